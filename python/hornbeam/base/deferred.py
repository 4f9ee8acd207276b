"""Values that are fetched when they are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hornbeam.base.dtypes import extended_dtype


class Deferred:
    """A value whose host array is made when its turn comes; what it will look like is known now.

    Args:
        array: Makes it.
        dtype: Its dtype.
        shape: Its shape.
        into: Copies the value to memory that is there; without it, `array` makes the whole value first.
    """

    __slots__ = ("array", "dtype", "into", "shape")

    def __init__(
        self,
        array: Callable[[], np.ndarray],
        dtype: str,
        shape: Sequence[int],
        into: Callable[[np.ndarray], Any] | None = None,
    ) -> None:
        self.array = array
        self.dtype = extended_dtype(dtype)
        self.shape = tuple(shape)
        self.into = into

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.dtype.itemsize * math.prod(self.shape)

    def copy_to(self, memory: np.ndarray) -> np.ndarray:
        """The value as an array over `memory`, which has `nbytes` bytes."""
        taken = np.ndarray(self.shape, self.dtype, buffer=memory)
        if self.into is None:
            np.copyto(taken, self.array())
        elif self.nbytes:
            self.into(memory)
        return taken


def fetch_rows(take: Callable[[Any], Any], dtype: str, shape: Sequence[int], memory: np.ndarray) -> None:
    """Fills memory from a device, some rows at a time: of a large value the host holds little more than `memory`."""
    target = np.ndarray(tuple(shape), extended_dtype(dtype), buffer=memory)
    if target.nbytes <= _FETCHED:
        target[...] = take(...)
        return
    step = max(1, _FETCHED * target.shape[0] // target.nbytes)
    for start in range(0, target.shape[0], step):
        target[start : start + step] = take(slice(start, start + step))


#: Bytes that are fetched from a device at a time.
_FETCHED = 64 << 20


def copied(value: np.ndarray) -> np.ndarray:
    """A copy that no other thread changes half-way."""
    # `tobytes` keeps the interpreter, `copy` lets it go: another thread could write half of a tensor meanwhile.
    return np.ndarray(value.shape, value.dtype, buffer=value.tobytes())


class Unread:
    """A dataset that does not fit where it would go: not read unless somebody insists, by `np.asarray`, say.

    `KerasVariable.assign` compares shapes, which takes no values.
    """

    def __init__(self, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> None:
        self.shape, self.read = shape, read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.read(), name)
