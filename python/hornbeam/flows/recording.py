"""`RecordStore` notes what Keras' walk stores.

Keras asks that a store be an instance of its own `H5IOStore`; nothing of that class is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.src.saving import saving_lib

from hornbeam.base import deferred, dtypes
from hornbeam.base.reports import Cast, SaveReport
from hornbeam.errors import UnsupportedError
from hornbeam.values import tensors

Attributes = list[tuple[str, str]]


class Dataset:
    """A recorded value: what is known of it now, and its memory or how to get it.

    Attributes:
        cast: Where the core casts the memory while it writes: the type that it has, what errors call it, and whether
            its values may become infinite.
    """

    __slots__ = ("cast", "dtype", "memory", "name", "nbytes", "shape", "tag", "variable")

    def __init__(self, memory: np.ndarray | deferred.Deferred, variable: keras.Variable | None = None) -> None:
        self.memory = memory
        self.variable = variable
        self.shape = memory.shape
        self.cast: tuple[str, str, bool] | None = None
        self._store_as(memory.dtype)

    def narrow(self, dtype: np.dtype, path: str, *, allow_overflow: bool) -> None:
        """Has the core cast the value to a narrower type while it writes it."""
        self.cast = (self.name, path if self.variable is None else self.variable.path, allow_overflow)
        self._store_as(dtype)

    def _store_as(self, dtype: np.dtype) -> None:
        self.name = tensors.keras_dtype(dtype)
        self.dtype = dtypes.dtype_name(dtype)
        self.tag = [("dtype", "bfloat16")] if self.name == "bfloat16" else []
        self.nbytes = math.prod(self.shape) * dtype.itemsize  # in the file

    def array(self) -> np.ndarray:
        """The value, fetched now where it was deferred."""
        return self.memory.array() if isinstance(self.memory, deferred.Deferred) else self.memory


class RecordStore(saving_lib.H5IOStore):
    """Notes what a save stores, in order; holds shared views and copies, never the bytes of a deferred value.

    Attributes:
        by_keras: Whether Keras' own code stores the object that is being walked.
    """

    def __init__(self) -> None:
        self.mode = "w"
        self.groups: dict[str, Attributes] = {}
        self.datasets: dict[str, Dataset] = {}
        self.order: list[tuple[str, str]] = []  # ("group" or "dataset", path)
        self.optimizers: set[str] = set()  # groups
        self.report = SaveReport()
        self.by_keras = False
        self._prefix = "vars"

    def __bool__(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing to close."""

    def make(self, path: str, metadata: dict[str, Any] | None = None) -> RecordStore:
        """Points the store at `<path>/vars`; with metadata, the group exists even if it stays empty."""
        if not isinstance(metadata, dict | None):
            raise ValueError(f"`metadata` should be a dict or `None`. Received: {metadata}")
        self._prefix = f"{path}/vars" if path else "vars"
        if metadata:
            if self._prefix in self.groups:
                raise ValueError(f"Unable to create group (name already exists): {self._prefix}")
            self.groups[self._prefix] = [(name, str(value)) for name, value in metadata.items()]
            self.order.append(("group", self._prefix))
        return self

    def casts(self) -> list[tuple[int, str, str, bool]]:
        """What the core casts, by its position."""
        return [(i, *d.cast) for i, d in enumerate(self.datasets.values()) if d.cast is not None]

    def note_casts(self, losses: list[tuple[int, float, float, int, int]]) -> None:
        """Puts into the report what the casts of a save cost."""
        datasets = list(self.datasets.values())
        for i, max_abs, max_rel, zeros, infinite in sorted(losses):
            wide, name, _ = datasets[i].cast or ("", "", False)
            self.report.cast.append(Cast(name, wide, datasets[i].name, max_abs, max_rel, zeros, infinite))

    def mark_optimizer(self) -> None:
        """Notes that the current group is an optimizer's."""
        self.optimizers.add(self._prefix)

    def is_optimizer(self, path: str) -> bool:
        """Whether a group, or what is in one, is an optimizer's state."""
        return path.startswith("optimizer/") or path in self.optimizers or path.rpartition("/")[0] in self.optimizers

    def drop_optimizers(self) -> list[str]:
        """Forgets the state of all optimizers; returns what that was."""
        return self.drop(self.is_optimizer)

    def drop(self, gone: Callable[[str], bool]) -> list[str]:
        """Forgets the groups and values whose paths `gone` tells; returns which values these were."""
        dropped = [path for path in self.datasets if gone(path)]
        for known in (self.datasets, self.groups):
            for path in [path for path in known if gone(path)]:
                del known[path]
        self.order = [(kind, path) for kind, path in self.order if not gone(path)]
        return dropped

    def _path(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def __setitem__(self, key: str, value: Any) -> None:
        path = self._path(key)
        if path in self.datasets:
            raise ValueError(f"Unable to create dataset (name already exists): {path}")
        found = self.put(path, value)
        # Keras' own layers do not change a variable after they stored it; anybody else may, also around a super() call.
        if isinstance(found.memory, deferred.Deferred) and not self.by_keras:
            found.memory = found.array()

    def put(self, path: str, value: Any) -> Dataset:
        """Notes a variable, tensor or array at a path of its own."""
        if not tensors.is_addressable(value):
            raise UnsupportedError(
                f"'{path}' is spread over several processes, of which this one can read only its part. Gather it, or "
                "replicate it, before the model is saved."
            )
        found = Dataset(tensors.view(value), value if isinstance(value, keras.Variable) else None)
        self.note(path, found)
        return found

    def note(self, path: str, dataset: Dataset) -> None:
        """Notes a value at a path of its own."""
        self.datasets[path] = dataset
        self.order.append(("dataset", path))

    def __getitem__(self, key: str) -> np.ndarray:
        try:
            return np.array(self.datasets[self._path(key)].array())
        except KeyError:
            raise KeyError(key) from None

    def __delitem__(self, key: str) -> None:
        try:
            del self.datasets[self._path(key)]
        except KeyError:
            raise KeyError(key) from None

    def __contains__(self, key: object) -> bool:
        return self._path(str(key)) in self.datasets

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> list[str]:
        """Names in the current group, in the order HDF5 lists them."""
        start = len(self._prefix) + 1
        inside = (p[start:].split("/")[0] for p in self.datasets if p.startswith(f"{self._prefix}/"))
        return sorted(set(inside), key=str.encode)
