"""Stores between Keras' walk and the Rust core: `RecordStore` notes a save, `LoadStore` serves a load.

Keras asks that a store be an instance of its own `H5IOStore`; nothing of that class is used.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import keras
import numpy as np
from keras.src.saving import saving_lib

from hornbeam import _core, _tensors
from hornbeam._report import SaveReport
from hornbeam.errors import UnsupportedError

Attributes = list[tuple[str, str]]


class Dataset:
    """A recorded value: what is known of it now, and its memory or how to get it."""

    __slots__ = ("dtype", "memory", "name", "shape", "tag", "variable")

    def __init__(self, memory: np.ndarray | _tensors.Deferred, variable: keras.Variable | None = None) -> None:
        self.memory = memory
        self.variable = variable
        self.name = _tensors.keras_dtype(memory.dtype)
        self.dtype = _tensors.dtype_name(memory.dtype)
        self.tag = [("dtype", "bfloat16")] if self.name == "bfloat16" else []
        self.shape = memory.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.memory.dtype.itemsize

    def array(self) -> np.ndarray:
        return self.memory.array() if isinstance(self.memory, _tensors.Deferred) else self.memory


class RecordStore(saving_lib.H5IOStore):
    """Notes what a save stores, in order; holds shared views and copies, never the bytes of a deferred value."""

    def __init__(self) -> None:
        self.mode = "w"
        self.groups: dict[str, Attributes] = {}
        self.datasets: dict[str, Dataset] = {}
        self.order: list[tuple[str, str]] = []  # ("group" or "dataset", path)
        self.optimizers: set[str] = set()  # groups
        self.report = SaveReport()
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

    def mark_optimizer(self) -> None:
        """Notes that the current group is an optimizer's."""
        self.optimizers.add(self._prefix)

    def is_optimizer(self, path: str) -> bool:
        """Whether a group, or what is in one, is an optimizer's state."""
        return path.startswith("optimizer/") or path in self.optimizers or path.rpartition("/")[0] in self.optimizers

    def drop_optimizers(self) -> list[str]:
        """Forgets the state of all optimizers; returns what that was."""
        dropped = [path for path in self.datasets if self.is_optimizer(path)]
        for known in (self.datasets, self.groups):
            for path in [path for path in known if self.is_optimizer(path)]:
                del known[path]
        self.order = [(kind, path) for kind, path in self.order if not self.is_optimizer(path)]
        return dropped

    def _path(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def __setitem__(self, key: str, value: Any) -> None:
        path = self._path(key)
        if path in self.datasets:
            raise ValueError(f"Unable to create dataset (name already exists): {path}")
        if not _tensors.is_addressable(value):
            raise UnsupportedError(
                f"'{path}' is spread over several processes, of which this one can read only its part. Gather it, or "
                "replicate it, before the model is saved."
            )
        found = _tensors.view(value)
        # Keras' own layers do not change a variable after they stored it; anybody else may, also around a super() call.
        if isinstance(found, _tensors.Deferred) and not _stored_by_keras(sys._getframe(1)):
            found = found.array()
        self._note(path, Dataset(found, value if isinstance(value, keras.Variable) else None))

    def _note(self, path: str, dataset: Dataset) -> None:
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


def _stored_by_keras(frame: FrameType | None) -> bool:
    """Whether nothing but Keras' own code stands between a layer's `save_own_variables` and the walk over the model."""
    while frame is not None and _tensors.is_keras_code(frame):
        if frame.f_code.co_name == "_save_state":
            return True
        frame = frame.f_back
    return False


class LoadStore(saving_lib.H5IOStore):
    """Serves a load from one image or several shards, each read by a background thread of the core.

    Args:
        images: What is read.
        source: Path in the model → path in the file, where they differ or where not everything is loaded.
        own: Path in the model → its own value, of what is not loaded.

    Attributes:
        taken: Paths in the file that were handed over.
        fitting: What the objects planned so far have places for.
        passes: Whether nothing of the object whose turn it is is loaded; Keras asks whether the store is true.
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
            return  # is raised when it loads
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
        by_keras = _tensors.is_keras_code(sys._getframe(1))
        if self._prefix is not None and path in self.own:
            value = self.own[path]
            return value if by_keras else np.array(keras.ops.convert_to_numpy(value))
        if self._prefix is None or path not in self.where:
            if self._prefix is not None and path in self.members:
                raise ValueError(f"Invalid H5 file, expected Dataset, received a group at '{path}'")
            raise KeyError(key)
        image, i = self.where[path]
        if by_keras and i in image.unfit:
            return Unread(self.shape(path), lambda: self._take(image, i))
        array = self._take(image, i)
        if by_keras:
            return _tensors.give_away(array)
        return np.array(array)  # others may keep and change it

    def _take(self, image: Image, i: int) -> np.ndarray:
        try:
            array = image.take(i)
        except Exception as error:
            # Keras collects what its layers raise while loading; a broken file must not become one of those.
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
        self._numpy_dtype = _tensors.own_dtype if weights.engine == "safetensors" else _tensors.numpy_dtype
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
        for reading in self._readings or ():
            reading.complete(drop_rest=drop_rest)

    def close(self) -> None:
        self._readings = None
        self._by = {}


class AssetStore(saving_lib.DiskIOStore):
    """Keras' asset store, whose temporary directory is made when the first asset asks for it."""

    def __init__(self, mode: str, extract: Callable[[str], None] | None = None) -> None:
        self.mode = mode
        self.archive = None
        self.tmp_dir: str | None = None
        self.root_path = saving_lib._ASSETS_DIRNAME
        self._extract = extract
        self._working_dir: str | None = None
        self.old_path: Callable[[str], str] | None = None

    def get(self, path: str) -> Any:
        """The directory of `path`, or of what an old file calls so, or `None`."""
        return super().get(path) or (self.old_path and super().get(self.old_path(path)))

    @property
    def working_dir(self) -> str:
        if self._working_dir is None:
            self.tmp_dir = saving_lib.get_temp_dir()
            self._working_dir = str(Path(self.tmp_dir) / self.root_path)
            Path(self._working_dir).mkdir()
            if self._extract is not None:
                self._extract(self._working_dir)
        return self._working_dir

    def extract(self) -> None:
        """Does now what the first asset would ask for."""
        assert self.working_dir

    def files(self) -> list[tuple[str, str]]:
        """`(member name, path)` of every asset, in the order stock Keras archives them."""
        if self._working_dir is None:
            return []
        root = Path(self._working_dir)
        # Links are followed, as Keras follows them.
        found = sorted(Path(top, name) for top, _, names in os.walk(root, followlinks=True) for name in names)
        return [(f"{self.root_path}/{p.relative_to(root).as_posix()}", str(p)) for p in found]

    def move(self) -> AssetStore:
        """Another store with the same files, which this one no longer removes."""
        moved = AssetStore(self.mode)
        moved.tmp_dir, moved._working_dir = self.tmp_dir, self._working_dir
        self.tmp_dir = self._working_dir = None
        return moved

    def close(self) -> None:
        """Removes the temporary directory."""
        if self.tmp_dir is not None:
            saving_lib.file_utils.rmtree(self.tmp_dir)
            self.tmp_dir = self._working_dir = None
