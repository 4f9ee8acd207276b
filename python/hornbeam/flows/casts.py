"""Smaller files: what a save leaves out, and weights in half precision, cast one tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from hornbeam.base import deferred, dtypes
from hornbeam.base.reports import Cast, SaveReport
from hornbeam.errors import InvalidError, UnsupportedError
from hornbeam.flows.recording import Dataset, RecordStore

_local = threading.local()
_DTYPES = ("float16", "bfloat16")
#: Elements that are cast and compared while they are in cache.
_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Smaller:
    """How a save is smaller than Keras'.

    Attributes:
        include_optimizer: Save the optimizer's state.
        dtype: What weights in wider floating-point types are cast to.
        allow_overflow: Let values that the type cannot hold become infinite.
    """

    include_optimizer: bool = True
    dtype: str | None = None
    allow_overflow: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (None, *_DTYPES):
            raise ValueError(f"dtype must be 'float16' or 'bfloat16'. Received: dtype={self.dtype!r}")


@contextlib.contextmanager
def requested(smaller: Smaller) -> Iterator[None]:
    """How this thread's next save is smaller; saves inside of it are others."""
    before = getattr(_local, "smaller", None)
    _local.smaller = smaller
    try:
        yield
    finally:
        _local.smaller = before


def take_request() -> Smaller:
    """What this save is to be."""
    smaller = getattr(_local, "smaller", None)
    _local.smaller = None
    return smaller or Smaller()


def asked(kwargs: dict[str, Any], *keep: str) -> contextlib.AbstractContextManager[None]:
    """`requested` for what the keyword arguments of a save ask for; they are taken out, but for `keep`.

    Raises:
        ValueError: For an unknown dtype.
    """
    names = [field.name for field in dataclasses.fields(Smaller)]
    given: dict[str, Any] = {
        name: kwargs.get(name) if name in keep else kwargs.pop(name) for name in names if name in kwargs
    }
    return requested(Smaller(**given)) if given else contextlib.nullcontext()


def refuse(what: str) -> None:
    """Raises if the save is to be smaller, where it cannot be.

    Raises:
        UnsupportedError: As said.
    """
    if take_request() != Smaller():
        raise UnsupportedError(f"{what}, which neither casts weights nor leaves the optimizer's state out.")


def narrow(store: RecordStore, model: Any, smaller: Smaller) -> SaveReport:
    """Leaves out of a recorded save what it is not to hold, and has the rest cast when its turn to be written comes.

    Cast are the weights of the model (`model.weights`) in wider floating-point types. What belongs to metrics and
    optimizers stays: counts overflow, and second moments vanish, in half precision. So do the weights of a layer that
    holds quantised ones, whose scales would no longer fit them.

    Returns:
        The report, in which each cast appears when it is done.
    """
    report = SaveReport(dtype=smaller.dtype)
    if not smaller.include_optimizer:
        report.left_out = store.drop_optimizers()
    if smaller.dtype is None:
        return report
    dtype = dtypes.own_dtype(smaller.dtype, smaller.dtype)
    weights = {id(variable) for variable in getattr(model, "weights", ())}
    quantised = _quantised(store)
    for path, dataset in store.datasets.items():
        wider = dataset.name.startswith("float") and dataset.memory.dtype.itemsize > dtype.itemsize
        if not wider or id(dataset.variable) not in weights or path.rpartition("/")[0] in quantised:
            continue
        assert dataset.variable is not None
        store.datasets[path] = cast_dataset(dataset, dtype, path, smaller, report)
    return report


def _quantised(store: RecordStore) -> set[str]:
    """The groups with integers and their scales."""
    integers = {path.rpartition("/")[0] for path, d in store.datasets.items() if d.name in ("int8", "uint8")}
    scaled = {p.rpartition("/")[0] for p, d in store.datasets.items() if "scale" in getattr(d.variable, "name", "")}
    return integers & scaled


def cast_dataset(dataset: Dataset, dtype: np.dtype, path: str, smaller: Smaller, report: SaveReport) -> Dataset:
    """The same dataset in another type, cast when it is asked for."""
    name = dataset.variable.path if dataset.variable is not None else path

    def array() -> np.ndarray:
        narrow, lost = cast(dataset.array(), dtype, name)
        if lost.infinite and not smaller.allow_overflow:
            raise InvalidError(
                f"'{name}' ('{path}' in the file) holds values that {dtype.name} cannot: {lost.infinite} would become "
                "infinite. Save it as bfloat16, which reaches as far as float32, or with `allow_overflow=True`."
            )
        report.cast.append(lost)
        return narrow

    return Dataset(deferred.Deferred(array, dtype.name, dataset.shape), dataset.variable)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> tuple[np.ndarray, Cast]:
    """The array in a narrower type, and what that costs."""
    flat = np.ascontiguousarray(array).reshape(-1)
    narrow = np.empty(flat.size, dtype)
    lost = Cast(name, array.dtype.name, dtype.name)
    tiny = np.finfo(array.dtype).smallest_subnormal
    for start in range(0, flat.size, _BLOCK):
        wide = flat[start : start + _BLOCK]
        part = narrow[start : start + _BLOCK]
        with np.errstate(all="ignore"):
            part[:] = wide
            back = part.astype(wide.dtype)
            size = np.abs(wide)
            error = np.abs(wide - back)
            most = float(error.max())
            if not np.isfinite(most):  # something was not finite, or is not any more
                fine = np.isfinite(wide)
                lost.infinite += int(np.count_nonzero(fine & ~np.isfinite(back)))
                fine &= np.isfinite(back)
                error = np.where(fine, error, 0)
                most = float(error.max())
            lost.max_abs = max(lost.max_abs, most)
            lost.max_rel = max(lost.max_rel, float((error / np.maximum(size, tiny)).max()))
            if not back.all():
                lost.zeros += int(np.count_nonzero((back == 0) & (wide != 0)))
    return narrow.reshape(array.shape), lost
