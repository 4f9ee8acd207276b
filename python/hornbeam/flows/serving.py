"""`LoadStore` serves Keras' walk from images that the core reads.

Keras asks that a store be an instance of its own `H5IOStore`; nothing of that class is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras.src.saving import saving_lib

from hornbeam import _core
from hornbeam.base import dtypes
from hornbeam.base.deferred import Unread
from hornbeam.values import ownership


class LoadStore(saving_lib.H5IOStore):
    """Serves a load from one image or several shards, each read by a background thread of the core.

    Args:
        images: What is read.
        source: Path in the model → path in the file, where they differ or where not everything is loaded.
        own: Path in the model → its own value, of what is not loaded.

    Attributes:
        taken: Paths in the file that were handed over.
        fitting: What the objects planned so far have places for.
        passes: Whether nothing is loaded for the object that is being walked; Keras asks whether the store is true.
        by_keras: Whether Keras' own code loads that object. It neither keeps nor changes what it assigns.
    """

    def __init__(
        self, images: Iterable[Image], source: dict[str, str] | None = None, own: dict[str, Any] | None = None
    ) -> None:
        self.mode = "r"
        self.images = list(images)
        self.where: dict[str, tuple[Image, int]] = {}
        self.own = own or {}
        self.members: dict[str, list[str]] = {}  # group → names in it
        self.error: Exception | None = None
        self.taken: set[str] = set()
        self.passes = False
        self.by_keras = False
        self.fitting: dict[Image, set[int]] = {}
        self._prefix: str | None = None
        in_file: dict[str, tuple[Image, int]] = {}
        for image in self.images:
            for path in image.groups if source is None else ():
                self._list(path)
                self.members.setdefault(path, [])
            for i, (path, *_) in enumerate(image.datasets):
                if path in in_file:
                    raise ValueError(f"'{path}' is in two shards: {image.name} and another")
                in_file[path] = (image, i)
        self.where = in_file if source is None else {path: in_file[name] for path, name in source.items()}
        for path in (*self.where, *self.own):
            self._list(path)

    def _list(self, path: str) -> None:
        while path:
            parent, _, name = path.rpartition("/")
            known = parent in self.members
            names = self.members.setdefault(parent, [])
            if not names or names[-1] != name:
                names.append(name)
            if known:
                return
            path = parent

    def __bool__(self) -> bool:
        return not self.passes

    def close(self) -> None:
        """Stops the readers."""
        for image in self.images:
            image.close()

    def get(self, path: str) -> LoadStore:
        """Points the store at `<path>/vars`; a path that is not there gives an empty store."""
        self._prefix = None
        if not self._enter(path):
            self._enter(self.old_path(path))
        return self

    def old_path(self, path: str) -> str:
        """Where Keras 2.12 and 2.13 put it: they went through layers with weights twice, and counted them so."""
        if "_layer_checkpoint_dependencies" not in self.members:
            return path
        found: list[str] = []
        for name in path.split("/"):
            if found and found[-1] == "_layer_checkpoint_dependencies":
                base, _, number = name.rpartition("_")
                base, nth = (base, int(number)) if base and number.isdecimal() else (name, 0)
                counted = [n for n in self.members.get("/".join(found), ()) if n.rpartition("_")[0] == base]
                numbers = sorted(int(n) for n in {c.rpartition("_")[2] for c in counted} if n.isdecimal())
                found.append(name if nth == 0 or nth > len(numbers) else f"{base}_{numbers[nth - 1]}")
            else:
                found.append("_layer_checkpoint_dependencies" if name == "layers" else name)
        return "/".join(found)

    def plan(self, path: str, variables: Iterable[Any]) -> None:
        """Notes which datasets an object at `path` has a place for: those with the shapes of its variables.

        An object that loads its state in a way of its own may ask for others, which are then read at once.
        """
        try:
            names = self.get(path).keys()
        except ValueError:
            return  # raised again by the load itself
        shapes = [tuple(v.shape) for v in variables]
        if len(shapes) != len(names):
            return
        for place in (f"{self._prefix}/{name}" for name in names):
            if place in self.where:
                self._plan_entry(place, shapes)  # quantized layers have an order of their own

    def plan_entry(self, path: str, shape: tuple[int, ...]) -> None:
        """The same for one entry of the model."""
        self._plan_entry(path, [shape])

    def _plan_entry(self, path: str, shapes: Sequence[tuple[int, ...]]) -> None:
        image, i = self.where[path]
        if self.shape(path) in shapes:
            self.fitting.setdefault(image, set()).add(i)
            image.unfit.discard(i)
        elif i not in self.fitting.get(image, ()):
            image.unfit.add(i)

    def _enter(self, path: str) -> bool:
        group = f"{path}/vars" if path else "vars"
        for place in (path, group):
            if place in self.where:
                raise ValueError(f"Invalid H5 file, expected Group but found a dataset at '{place}'")
        if group in self.members:
            self._prefix = group
            return True
        return False

    def has_path(self, path: str) -> bool:
        """Whether there is a group or dataset at `path`."""
        return path in self.members or path in self.where or path in self.own

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape that the file has for `path`."""
        image, i = self.where[path]
        return tuple(image.datasets[i][2])

    def keys(self) -> list[str]:
        """Names in the current group, in the order HDF5 lists them."""
        return [] if self._prefix is None else sorted(set(self.members[self._prefix]), key=str.encode)

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return self._prefix is not None and self.has_path(f"{self._prefix}/{key}")

    def __getitem__(self, key: str) -> Any:
        path = f"{self._prefix}/{key}"
        if self._prefix is not None and path in self.own:
            value = self.own[path]
            return value if self.by_keras else np.array(keras.ops.convert_to_numpy(value))
        if self._prefix is None or path not in self.where:
            if self._prefix is not None and path in self.members:
                raise ValueError(f"Invalid H5 file, expected Dataset, received a group at '{path}'")
            raise KeyError(key)
        image, i = self.where[path]
        if self.by_keras and i in image.unfit:
            return Unread(self.shape(path), lambda: self._take(image, i))
        array = self._take(image, i)
        if self.by_keras:
            return ownership.give_away(array)
        return np.array(array)  # others may keep and change it

    def value(self, path: str) -> np.ndarray:
        """The value at a path in the model, of which something is loaded; its memory is the caller's."""
        return ownership.give_away(self._take(*self.where[path]))

    def _take(self, image: Image, i: int) -> np.ndarray:
        try:
            array = image.take(i)
        except Exception as error:
            # Keras collects errors of its layers; that of a broken file is kept, and raised by `complete`.
            self.error = self.error or error
            raise
        self.taken.add(image.datasets[i][0])
        return array

    def complete(self, *, drop_rest: bool) -> None:
        """Waits until every byte was read and checked.

        Raises:
            HornbeamError: When the file is broken, also if Keras has swallowed the error before.
        """
        if self.error is not None:
            raise self.error
        for image in self.images:
            image.complete(drop_rest=drop_rest)


class Image:
    """One weights image, of which what is asked for is read.

    Args:
        weights: Its index.
        name: What errors call it.

    Attributes:
        decoded: Datasets that may take far more memory than they take in the file.
        unfit: Datasets that have another shape than what is at their place in the model.
    """

    def __init__(self, weights: _core.Weights, name: str) -> None:
        self.name = name
        self.weights = weights
        self.groups = dict(weights.groups())
        self.datasets = weights.datasets()
        self.decoded = set(weights.decoded())
        self.unfit: set[int] = set()
        self._numpy_dtype = dtypes.own_dtype if weights.engine == "safetensors" else dtypes.numpy_dtype
        self._readings: list[_core.Reading] | None = []
        self._by: dict[int, _core.Reading] = {}
        self._checked = False
        self.bytes = 0
        self.tensors = 0

    def read(self, wanted: Iterable[int] | None, *, check: bool, read_ahead: int) -> None:
        """Starts to read datasets, which are not being read yet.

        Args:
            wanted: Which, by their positions; `None` for all.
            check: Every byte of the image is read and passes the checksum, if there is one.
            read_ahead: Bytes that may be read before they are taken.
        """
        if self._readings is None:
            raise ValueError("I/O operation on a closed store.")
        positions = sorted(range(len(self.datasets)) if wanted is None else wanted)
        if positions or check:
            reading = self.weights.fetch(positions, verify=check, read_ahead=read_ahead)
            self._readings.append(reading)
            self._by.update(dict.fromkeys(positions, reading))
            self._checked |= check

    @property
    def nbytes(self) -> int:
        """Bytes that are read ahead."""
        return sum(reading.nbytes for reading in self._readings or ())

    @property
    def done(self) -> int:
        """Bytes that were."""
        return sum(reading.done for reading in self._readings or ())

    @property
    def crc(self) -> str:
        """What `complete` has shown."""
        if not self.weights.has_crc:
            return "none"
        return "verified" if self._checked else "partial"

    def take(self, i: int) -> np.ndarray:
        """The value of dataset `i`, in memory of its own."""
        _, name, shape, attributes = self.datasets[i]
        dtype = self._numpy_dtype(name, dict(attributes).get("dtype"))
        if self._readings is None:
            raise ValueError("I/O operation on a closed store.")
        reading = self._by.get(i)
        block: Any = None if reading is None else reading.take(i)
        if block is None:  # taken before, or not read ahead
            block = self.weights.read(i, 0, dtype.itemsize * math.prod(shape))
        self.tensors += 1
        if len(block) == 0:
            return np.empty(shape, dtype)
        self.bytes += len(block)
        return np.frombuffer(block, np.uint8).view(dtype).reshape(shape)

    def complete(self, *, drop_rest: bool) -> None:
        """Waits until what is being read was read and checked; what nobody took is let go with `drop_rest`."""
        for reading in self._readings or ():
            reading.complete(drop_rest=drop_rest)

    def close(self) -> None:
        """Stops what is being read."""
        self._readings = None
        self._by = {}
