"""`hornbeam.open`: any model file as a lazy, read-only mapping of NumPy arrays. Imports neither Keras nor a backend."""

from __future__ import annotations

import builtins
import difflib
import functools
import heapq
import html
import io
import itertools
import math
import mmap as _mmap
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from hornbeam import _core
from hornbeam.base import contents, dtypes, file_objects, locations, settings, writer
from hornbeam.base.file_objects import Stream
from hornbeam.errors import (
    ConfigError,
    HornbeamError,
    StorageError,
    UnsafeFileError,
    UnsupportedError,
    WeightsFileError,
)

Format = Literal["keras", "h5", "shards", "directory", "safetensors"]

_WEIGHTS, _CONFIG, _METADATA, _NPZ = "model.weights.h5", "config.json", "metadata.json", "model.weights.npz"
#: Keras' thresholds for members of an archive; a test compares them.
_BOMB_FLOOR, _MAX_EXPANSION = 4 << 30, 100
#: More is neither read by people nor drawn by notebooks.
_HTML_ROWS = 1000
_PART = re.compile("[/._]")


def open(path: str | bytes | os.PathLike[str] | IO[bytes], *, mmap: bool = False) -> File:
    """Opens a model file for reading its tensors one by one; which kind of file it is, its content says.

    Args:
        path: A `.keras`, `.weights.h5`, `.h5` or `.safetensors` file, a `.weights.json` or `.safetensors.index.json`
            of sharded weights, or the directory of a save with `zipped=False`. Or a binary file object, read from its
            beginning, which must stay open; one that cannot go back is read into memory.
        mmap: Map the file into memory: tensors that lie in it as NumPy needs them become read-only views of it, not
            copies. Another process that truncates the file then ends this one with SIGBUS, so it is never the default.

    Returns:
        A mapping from names to arrays, to be closed, or used as a context manager.

    Raises:
        FileNotFoundError: There is no such file. `StorageError` for what else the operating system refuses.
        HornbeamError: The file is malformed (`ArchiveError`, `WeightsFileError`, `ConfigError`), asks for more than a
            limit allows (`LimitError`), points outside itself (`UnsafeFileError`) or is of no kind known here
            (`UnsupportedError`).
    """
    path = file_objects.path_to_str(path)
    writer.wait_for(path, loads=True)
    return File(path, mmap=mmap)


class Tensor:
    """A tensor in an open file. `tensor[...]` reads what the index needs, `tensor.read()` all of it.

    Attributes:
        name: Its name in the file.
        dtype: Of its values, as NumPy or `ml_dtypes` have it; `V1` for what HDF5 stores without a type, `object` for
            what is listed and cannot be read: strings, structures, no values at all.
        shape: Its dimensions; `()` for a scalar.
        nbytes: Bytes of its values.
        attributes: Its string attributes, by name.
    """

    __slots__ = ("_file", "_i", "_offset", "_part", "attributes", "dtype", "name", "nbytes", "shape")

    def __init__(self, file: File, name: str, part: int, i: int) -> None:
        self._file, self._part, self._i = file, part, i
        weights = file._opened()[part]
        dtype, shape, self.nbytes, attributes, self._offset = weights.dataset(i)
        self.name = name
        self.shape = tuple(shape)
        self.attributes = _texts(attributes)
        tag = self.attributes.get("dtype")
        if weights.engine == "safetensors":  # the format has such types, and no attributes
            self.attributes = {}
            self.dtype = dtypes.own_dtype(dtype, tag)
        else:
            self.dtype = dtypes.numpy_dtype(dtype, tag)

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    @property
    def mapped(self) -> bool:
        """Whether what is read is a view of the mapped file, and no copy."""
        offset = self._offset
        return offset is not None and self._file._maps[self._part] is not None and offset % self.dtype.alignment == 0

    def read(self) -> np.ndarray:
        """All values.

        Returns:
            A writable array of its shape in memory of its own at a multiple of 64; a read-only view where `mapped`.

        Raises:
            ValueError: The file was closed.
            UnsupportedError: It holds no numbers.
            HornbeamError: The file is damaged, or shorter than it was.
        """
        if self.mapped:
            return self._view()
        return self._read(0, self.nbytes).reshape(self.shape)

    def __getitem__(self, index: Any) -> Any:
        """What `tensor.read()[index]` gives, from as few bytes as one run of the leading dimensions takes.

        Raises:
            IndexError: As NumPy.
        """
        if self.mapped:
            return self._view()[index]
        rest = list(index) if isinstance(index, tuple) else [index]
        if any(isinstance(i, list | np.ndarray) for i in rest[1:]):
            return self.read()[index]  # NumPy puts the axes of several such indices elsewhere
        first = axis = 0
        while rest and axis < self.ndim and isinstance(rest[0], int | np.integer) and not isinstance(rest[0], bool):
            size, i = self.shape[axis], int(rest.pop(0))
            if not -size <= i < size:
                raise IndexError(f"index {i} is out of bounds for axis {axis} with size {size}")
            first, axis = first * size + i % size, axis + 1
        shape = self.shape[axis:]
        run = _run(rest[0], shape[0]) if rest and shape else None
        if run is not None:
            low, high, rest[0] = run
            first = first * shape[0] + low
            shape = (high - low, *shape[1:])
            stride = math.prod(shape[1:])
            count = shape[0] * stride
        else:
            stride = count = math.prod(shape)
        start = first * stride * self.dtype.itemsize
        values = self._read(start, start + count * self.dtype.itemsize).reshape(shape)
        picked = values[tuple(rest)]
        # A small part of what was read must not keep all of it.
        return picked.copy() if isinstance(picked, np.ndarray) and 2 * picked.nbytes <= values.nbytes else picked

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False and not self.mapped:
            raise ValueError("a tensor that is not mapped cannot be read without a copy")
        array = self.read()
        if dtype is not None:
            array = array.astype(dtype, copy=False)
        return array.copy() if copy and self.mapped else array

    def __reduce__(self) -> tuple[Any, ...]:
        return _tensor, (self._file, self.name)

    def __repr__(self) -> str:
        return f"<hornbeam.Tensor {self.name!r}: {self.dtype}{list(self.shape)}, {_size(self.nbytes)}>"

    def _read(self, start: int, stop: int) -> np.ndarray:
        weights = self._file._opened()[self._part]
        if start == stop and not self.dtype.hasobject:  # there the core says why it cannot be read
            return np.empty(0, self.dtype)
        block: Any = weights.read(self._i, start, stop)
        return np.frombuffer(block, np.uint8).view(self.dtype)

    def _view(self) -> np.ndarray:
        self._file._opened()
        memory: Any = self._file._maps[self._part]
        return np.ndarray(self.shape, self.dtype, memory, self._offset or 0)


def _run(index: Any, size: int) -> tuple[int, int, Any] | None:
    """The rows from the first to behind the last that `index` picks, and what picks the same from them."""
    if isinstance(index, slice):
        rows = range(size)[index]
        if not rows:
            return 0, 0, slice(None)
        return min(rows[0], rows[-1]), max(rows[0], rows[-1]) + 1, slice(None, None, rows.step)
    if isinstance(index, list | np.ndarray):
        picked = np.asarray(index)
        if picked.dtype.kind in "iu" and picked.size and -size <= picked.min() and picked.max() < size:
            picked = picked.astype(np.intp)
            picked = np.where(picked < 0, picked + size, picked)
            low = int(picked.min())
            return low, int(picked.max()) + 1, picked - low
    return None


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a file, unread."""

    def __init__(self, file: File) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        return self._file._tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def __repr__(self) -> str:
        return f"<the tensors of {self._file!r}>"


class File(Mapping[str, np.ndarray]):
    """An open model file: a read-only mapping from names to arrays, each read when it is asked for.

    `file[name]` is a new, writable array at a multiple of 64 bytes, or a read-only view where `mmap=True` allows one.
    It is read without a checksum; `verify()` checks the whole. Names are paths of datasets: `layers/dense/vars/0`.
    Threads may read at the same time. A pickled file is its path, opened again.

    Attributes:
        path: Its absolute path; `None` for a file object that stands for none.
        format: `"keras"`, `"h5"`, `"shards"`, `"directory"` or `"safetensors"`.
    """

    __hash__ = object.__hash__

    def __init__(self, path: str | bytes | os.PathLike[str] | IO[bytes], *, mmap: bool = False) -> None:
        self.path: str | None = None
        self._place = _placed(path)
        if isinstance(self._place, str):
            self.path = self._place
        elif mmap:
            raise UnsupportedError(f"Only files are mapped into memory, not what a file object gives: {path!r}")
        self._mmap = mmap
        self._archive: _core.File | None = None
        self._texts: dict[str, bytes] = {}  # JSON files of a directory
        self._index: dict[str, Any] = {}  # of shards
        self._parts: list[_core.Weights] | None = []
        self._maps: list[_mmap.mmap | None] = []
        with contents.explained(self._place, "keras", "h5", "safetensors", "shards", "directory"):
            self.format: Format = self._open()
        names = [weights.names() for weights in self._parts]
        self._starts = list(itertools.accumulate(map(len, names), initial=0))
        self._where: dict[str, int] = dict(zip(itertools.chain(*names), itertools.count(), strict=False))
        if len(self._where) != self._starts[-1]:
            twice = Counter(itertools.chain(*names)).most_common(1)[0][0]
            raise WeightsFileError(f"'{twice}' is in two shards of '{self._place}'")
        if self.engine == "safetensors":
            _check_index(str(self._place), self._index, self._where)

    def _open(self) -> Format:
        if self.path is not None and os.path.isdir(self.path):
            root = Path(self.path)
            if not (root / _WEIGHTS).exists() and (root / _NPZ).exists():
                raise UnsupportedError(f"npz weights are not read: '{root / _NPZ}'")
            weights = str(root / _WEIGHTS)
            with contents.explained(weights, "h5"):
                self._add(weights, "h5")
            self._texts = {name: (root / name).read_bytes() for name in (_CONFIG, _METADATA) if (root / name).exists()}
            return "directory"
        kind = _kind(self._place)
        if kind == "shards":
            if self.path is None:
                raise UnsupportedError("An index of shards names other files: pass its path instead of a file object.")
            index = Path(self.path)
            self._index, names = read_index(index)
            for name in names:
                shard = str(index.with_name(name))
                with contents.explained(shard, "h5", "safetensors"):
                    self._add(shard, _kind(shard))
        else:
            self._add(self._place, kind)
        return kind

    def _add(self, path: str | Stream, kind: Format) -> None:
        """Indexes one file of weights, and maps it if it is to be."""
        before = _identity(os.stat(path)) if self._mmap and isinstance(path, str) else None
        file = _core.open(file_objects.openable(path), archive=kind == "keras")
        engine = settings.current().engine
        if kind == "keras":
            sizes = {name: size for name, size, _ in file.members()}
            if _WEIGHTS not in sizes and _NPZ in sizes:
                raise UnsupportedError(f"npz weights are not read: member '{_NPZ}' of '{path}'")
            if _WEIGHTS in sizes:
                file.check_expansion(_WEIGHTS, _BOMB_FLOOR, _MAX_EXPANSION)
            self._archive = file
        elif kind == "safetensors":
            engine = kind
        elif kind != "h5":
            raise UnsupportedError(f"'{path}' is an index, where weights were expected")
        weights = file.weights(engine=engine)
        self._opened().append(weights)
        mapped = None
        if before is not None and isinstance(path, str):
            with builtins.open(path, "rb") as f:
                if _identity(os.fstat(f.fileno())) != before:
                    raise StorageError(f"'{path}' was replaced or changed while it was opened; open it again")
                mapped = _mmap.mmap(f.fileno(), 0, access=_mmap.ACCESS_READ)
        self._maps.append(mapped)

    def _opened(self) -> list[_core.Weights]:
        if self._parts is None:
            raise ValueError("I/O operation on closed file")
        return self._parts

    def _tensor(self, name: str) -> Tensor:
        self._opened()
        try:
            i = self._where[name]
        except KeyError:
            raise self._missing("tensor", name) from None
        part = bisect_right(self._starts, i) - 1
        return Tensor(self, name, part, i - self._starts[part])

    def _missing(self, what: str, name: object) -> KeyError:
        wanted = str(name).strip("/")
        near = list(itertools.islice((n for n in self._where if n.startswith(f"{wanted}/")), 3))
        near = near or difflib.get_close_matches(wanted, _similar(wanted, self._where), 3, 0.5)
        hint = f"; the nearest names are {', '.join(map(repr, near))}" if near else ""
        return KeyError(f"there is no {what} {name!r} in '{self._place}'{hint}")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensor(name).read()

    def get(self, name: str, default: Any = None) -> Any:
        """The array called `name`, or `default`."""
        return self._tensor(name).read() if name in self else default

    def __contains__(self, name: object) -> bool:
        self._opened()
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        self._opened()
        return iter(self._where)

    def __len__(self) -> int:
        self._opened()
        return len(self._where)

    def __eq__(self, other: object) -> bool:
        return self is other  # arrays do not compare to one answer

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """A mapping from names to unread `Tensor` objects: shape, dtype, attributes, slices."""
        return _Tensors(self)  # not kept: a cycle would keep the file open until the garbage collector runs

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def engine(self) -> str:
        """What read the index: `"direct"`, `"libhdf5"` or `"safetensors"`; several, with commas, for mixed shards."""
        return ", ".join(sorted({weights.engine for weights in self._opened()}))

    @property
    def groups(self) -> tuple[str, ...]:
        """The paths of all HDF5 groups but the root."""
        return tuple(self._groups)

    def attributes(self, path: str = "") -> dict[str, str]:
        """The string attributes of a group or tensor; of the root, and a safetensors file's metadata, by default.

        Raises:
            KeyError: There is nothing at `path`.
        """
        parts = self._opened()
        if not path:
            return {name: value for weights in parts for name, value in _texts(weights.attributes).items()}
        if path in self._where:
            return self._tensor(path).attributes
        try:
            return dict(self._groups[path])
        except KeyError:
            raise self._missing("group or tensor", path) from None

    @functools.cached_property
    def _groups(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for weights in self._opened():
            for path, attributes in weights.groups():
                found.setdefault(path, {}).update(_texts(attributes))
        return found

    @functools.cached_property
    def config(self) -> Any:
        """The model's configuration, decoded: `config.json`, or a legacy file's `model_config`. `None` without one.

        Raises:
            ConfigError: It is malformed.
        """
        text: str | bytes | None = self._text(_CONFIG)
        if self.format == "h5":
            text = self.attributes().get("model_config")
        return None if text is None else _decode(text, f"{_CONFIG} of {self._place}")

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """`metadata.json`, the metadata of an index or a safetensors file, or the root's attributes in HDF5.

        Raises:
            ConfigError: It is malformed.
        """
        if self.format in ("h5", "safetensors"):
            return dict(self.attributes())
        text = self._text(_METADATA)
        found = self._index.get("metadata") if text is None else _decode(text, f"{_METADATA} of {self._place}")
        return found if isinstance(found, dict) else {}

    def _text(self, name: str) -> bytes | None:
        self._opened()
        if self._archive is None:
            return self._texts.get(name)
        if all(name != member for member, *_ in self._archive.members()):
            return None
        self._archive.check_expansion(name, _BOMB_FLOOR, _MAX_EXPANSION)
        return self._archive.read(name)

    def verify(self) -> Literal["verified", "none"]:
        """Reads all of the file that has a checksum and compares it.

        Returns:
            `"verified"`, or `"none"` for formats without one: only `.keras` archives have it.

        Raises:
            ChecksumError: The bytes changed after they were written.
            ValueError: The file was closed.
        """
        for weights in self._opened():
            if weights.has_crc:
                weights.fetch([], verify=True, read_ahead=0).complete(drop_rest=True)
        return "verified" if self.format == "keras" else "none"  # a compressed member was checked when it was opened

    def close(self) -> None:
        """Closes the file. Arrays stay; views of a mapped file keep the mapping."""
        self._parts = self._archive = None
        self._maps = [None] * len(self._maps)

    def __enter__(self) -> File:
        self._opened()
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        self._opened()
        if self.path is None:
            raise UnsupportedError("What is read from a file object cannot be pickled, as a path can.")
        return _reopen, (self.path, self._mmap)

    def __repr__(self) -> str:
        if self._parts is None:
            return f"<closed hornbeam.File '{self._place}'>"
        return f"<hornbeam.File '{self._place}': {self.format}, {len(self)} tensors, {_size(self.nbytes)}>"

    def _repr_html_(self) -> str:
        if self._parts is None:
            return f"<p>{html.escape(repr(self))}</p>"
        row = "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>"
        rows = [
            row.format(html.escape(t.name), t.dtype, " &times; ".join(map(str, t.shape)), _size(t.nbytes))
            for t in itertools.islice(self.tensors.values(), _HTML_ROWS)
        ]
        if len(self) > _HTML_ROWS:
            rows.append(row.format(f"… and {len(self) - _HTML_ROWS} more", "", "", ""))
        head = "<tr><th>name</th><th>dtype</th><th>shape</th><th>size</th></tr>"
        return f"<p>{html.escape(repr(self))}</p><table>{head}{''.join(rows)}</table>"


def _placed(path: Any) -> str | Stream:
    """The absolute path, or the file object where there is none."""
    if not file_objects.is_file_object(path):
        return locations.absolute(path)
    file_objects.check(path, "read")
    found = file_objects.source(path)
    if isinstance(found, str):
        return locations.absolute(found)
    return Stream(io.BytesIO(found) if isinstance(found, bytes) else path, "")


def _reopen(path: str, mmap: bool) -> File:
    return File(path, mmap=mmap)


def _tensor(file: File, name: str) -> Tensor:
    return file.tensors[name]


def _decode(text: str | bytes, where: str) -> Any:
    """Decodes JSON from a file; its errors say which."""
    try:
        return _core.decode_json(text, trusted=False)
    except HornbeamError as e:
        raise type(e)(f"'{where}': {e}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"'{where}': it is no JSON, for it is no text: {e}") from e


def _similar(wanted: str, names: Iterable[str]) -> list[str]:
    """The names that share most of their parts: comparing 10,000 letter by letter would take half a second."""
    parts = set(_PART.split(wanted))
    return heapq.nlargest(300, names, key=lambda name: len(parts.intersection(_PART.split(name))))


def _texts(attributes: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Those that are one string."""
    texts = ((name, v.decode("utf-8", "replace") if isinstance(v, bytes) else v) for name, v in attributes)
    return {name: text for name, text in texts if isinstance(text, str)}


def _size(nbytes: int) -> str:
    """Bytes, for people."""
    if nbytes < 1000:
        return f"{nbytes} B"
    power = min((len(str(nbytes)) - 1) // 3, 4)
    return f"{nbytes / 1000**power:.1f} {'kMGT'[power - 1]}B"


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _kind(path: str | Stream) -> Format:
    """What a file is: by its first bytes; where those say nothing, its name decides whose error is raised."""
    known = _core.open(file_objects.openable(path), archive=False).kind()
    if known is not None:
        return known
    suffixes: dict[str, Format] = {
        ".keras": "keras",
        ".h5": "h5",
        ".hdf5": "h5",
        ".json": "shards",
        ".safetensors": "safetensors",
    }
    found = suffixes.get(os.path.splitext(str(path))[1].lower())
    if found is None:
        raise UnsupportedError(
            f"'{path}' is no model file: expected an archive, HDF5, safetensors or an index of shards"
        )
    return found


def read_index(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads an index of sharded weights, of Keras or of safetensors.

    Returns:
        Its content, and the names of its shards, in order.

    Raises:
        ValueError: When it is malformed or names a file elsewhere.
    """
    try:
        index = _decode(path.read_bytes(), str(path))
        values = list(index["weight_map"].values())
        names = [n for value in values for n in (value if isinstance(value, list) else [value])]
    except (KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"'{path}' is not an index of sharded weights: it has no weight_map") from e
    base = path.stem.replace(".weights", "")
    first = f"{base}_00000.weights.h5"  # holds the groups without values
    if path.with_name(first).exists():
        names.insert(0, first)
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", "..") or "\\" in name:
            raise UnsafeFileError(f"'{path}' names a shard outside its directory: {name!r}")
    return index, list(dict.fromkeys(names))


def open_shards(index: Path, kind: Literal["h5", "safetensors"]) -> list[tuple[str, _core.Weights]]:
    """Opens every shard that an index names.

    Raises:
        ValueError: When the index is malformed or names a file elsewhere.
        FileNotFoundError: When a shard is missing.
        WeightsFileError: When a tensor that a safetensors index names is not there.
    """
    content, names = read_index(index)
    opened = [(name, contents.open_weights(str(index.with_name(name)), kind)) for name in names]
    if kind == "safetensors":
        _check_index(str(index), content, {name for _, weights in opened for name in weights.names()})
    return opened


def _check_index(place: str, index: dict[str, Any], there: Container[str]) -> None:
    missing = next((name for name in index.get("weight_map", ()) if name not in there), None)
    if missing is not None:
        raise WeightsFileError(f"'{place}' names '{missing}', which is in none of its shards")
