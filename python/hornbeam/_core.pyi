"""The boundary to the Rust core. Nothing here knows Keras; `flows/` and `formats/` are its users.

Errors are classes of `hornbeam.errors`; a Python exception raised by a callback or file object passes through.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Protocol, final

import numpy as np

__all__ = [
    "Block",
    "Directory",
    "File",
    "FileLock",
    "Plan",
    "Reading",
    "Save",
    "Weights",
    "build_info",
    "check_expansion",
    "clear_leftovers",
    "commit_indexed",
    "decode_json",
    "encode_json",
    "keeps_inode",
    "make_directories",
    "open",
    "plan",
    "sync",
    "sync_name",
    "write_file",
]

_Path = str | PathLike[str]
_Buffer = np.ndarray[Any, Any] | memoryview | bytes | bytearray
#: `bytes` are variable-length strings said to be ASCII, like those of a list; a pair is a list of strings that all take
#: that many bytes. An empty list has no type of its own.
_Value = str | bytes | list[bytes] | tuple[int, list[bytes]]
_Attributes = Sequence[tuple[str, _Value]]
_Dataset = tuple[str, str, list[int], _Attributes]

class _Writable(Protocol):
    def write(self, data: bytes, /) -> int | None: ...

class _Seekable(Protocol):
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def read(self, size: int, /) -> bytes: ...

def build_info() -> dict[str, Any]:
    """`version`, and whether this is a `debug` build and has `libhdf5`."""

def encode_json(obj: Any) -> bytes:
    """`json.dumps(obj).encode()`, byte for byte.

    Raises:
        TypeError: For what JSON cannot hold.
        ValueError: For an object that contains itself.
        RecursionError: For one nested too deeply.
    """

def decode_json(data: str | bytes | bytearray, *, trusted: bool = True) -> Any:
    """`json.loads(data)`.

    Args:
        data: The text.
        trusted: With `False`, the limits of `limits.rs` hold and a key that comes twice is refused.

    Raises:
        json.JSONDecodeError: For malformed text.
        HornbeamError: When a limit is exceeded.
    """

def plan(
    groups: Sequence[tuple[str, _Attributes]],
    datasets: Sequence[tuple[str, str, Sequence[int], _Attributes]],
    *,
    engine: str = "auto",
    compression: int | None = None,
    shuffle: bool = True,
    chunk_bytes: int = ...,
    casts: Sequence[tuple[int, str, str, bool]] = ...,
) -> Plan:
    """Lays out a weights image: `(path, attributes)` of groups, `(path, dtype, shape, attributes)` of datasets.

    Args:
        groups: The groups that have attributes, or are empty; the root is `""`.
        datasets: The datasets, in the order they are written.
        engine: Who lays it out. `"safetensors"` takes names instead of paths, the NumPy name of what is opaque from an
            attribute `dtype`, and its metadata from the attributes of a group `__metadata__`.
        compression: Level of deflate, 0 to 9; then datasets of 16 KiB and more are written in chunks, by libhdf5.
        shuffle: Transpose the bytes of the elements first.
        chunk_bytes: Bytes of a chunk, at most, before compression.
        casts: `(position, dtype, name, whether values may become infinite)` of the datasets that are written in half
            precision, and whose memory has this wider dtype.

    Raises:
        HornbeamError: For paths and dtypes that a weights file cannot hold.
    """

@final
class Plan:
    """A weights image whose every byte has its place, and none was moved."""

    @property
    def engine(self) -> str:
        """The engine that laid it out."""
    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
    def weights_end(self, archive: bool) -> int | None:
        """Bytes up to the end of the weights, in a file of their own or at the start of an archive.

        `None` where they are known only when everything was compressed.
        """
    def start(
        self,
        target: _Path | _Writable | _Buffer,
        buffers: Sequence[_Buffer | None],
        *,
        archive: bool,
        base: int = 0,
        atomic: bool = True,
        durable: bool = False,
        hold: bool = False,
    ) -> Save:
        """Starts a thread that writes to a path, a file object or writable memory.

        Args:
            target: Where to.
            buffers: The memory of each dataset, which must not change; `None` is asked for by `Save.finish`.
            archive: A `.keras` archive, whose other members `Save.finish` brings, or a bare weights image.
            base: Offset in a file object or memory where the archive begins.
            atomic: Replace the file at a path when the new one is complete.
            durable: Wait for stable storage.
            hold: Open the path now, and start the thread when `Save.finish` is called. Other saves of this process
                may be writing to the same path then; otherwise they may not.
        """

@final
class Save:
    """A save in progress. Dropping it cancels it."""

    @property
    def written(self) -> int:
        """Bytes of the weights written so far."""
    def finish(
        self,
        members: Sequence[tuple[str, bytes | PathLike[str]]],
        pull: Callable[[int], _Buffer] | None = None,
        *,
        commit: bool = True,
    ) -> dict[str, Any]:
        """Hands over the other members and waits for the end.

        Args:
            members: `(name, content or path of the content)`, in order.
            pull: Gives the memory of a dataset whose buffer was `None`; it must not change until the next call.
            commit: Replace the old file now; `commit_indexed` does it otherwise.

        Returns:
            `bytes` of the file, `crc` (CRC-32 of the weights image), `in_place` (why it was written over instead of
            being replaced, or `None`), `lost` (which attribute of the old file could not be kept, or `None`), `casts`
            (position, largest absolute and relative error, values that became zero and infinite, of each cast), and
            `tail`: what followed the end of target memory.
        """
    def cancel(self) -> None:
        """Stops the writer and removes what it wrote."""

def commit_indexed(
    saves: Sequence[Save], index: _Path, content: bytes, *, atomic: bool = True, durable: bool = False
) -> list[tuple[str | None, str | None]]:
    """Replaces the old files of saves after `finish(commit=False)`, and then the index that names them.

    With `atomic` the old index goes first, so that what is interrupted is refused instead of mixing two saves.

    Returns:
        `in_place` and `lost` of each, as `Save.finish` has them, and then of the index.
    """

def write_file(
    path: _Path, data: bytes, *, atomic: bool = True, durable: bool = False
) -> tuple[str | None, str | None]:
    """Writes a small file, replacing the old one when it is complete; returns its `in_place` and `lost`."""

def keeps_inode(path: _Path) -> bool:
    """Whether a save writes over this file, so that what has it open sees the new content.

    That is so for an empty one, and, on Linux, for one that this process has open for writing.
    """

def clear_leftovers(path: _Path) -> None:
    """Removes what crashed saves of this path left beside it."""

def make_directories(path: _Path, *, durable: bool = False) -> None:
    """Makes a directory and those above it, where they are missing; `durable` waits until their names are stored."""

def sync(path: _Path) -> None:
    """Brings a file, or a directory with everything in it, to stable storage; not its name."""

def sync_name(path: _Path) -> None:
    """Brings the name of a file in its directory to stable storage."""

@final
class FileLock:
    """An exclusive lock on a file of its own. It belongs to this object: another one, in this process too, is refused.

    It ends with the process, however that ends. The file stays: removing it would let two hold "the" lock. A forked
    child does not hold it. Where the file system has no locks, a warning is logged.

    Raises:
        BlockingIOError: Somebody holds it.
        OSError: The file cannot be made, or something stands there that is no file: a link, a pipe.
    """

    def __new__(cls, path: _Path) -> FileLock: ...
    @property
    def held(self) -> bool:
        """Whether this process holds it."""
    def release(self) -> None:
        """Gives it back."""

@final
class Directory:
    """A directory that replaces another one when it is complete; a context manager.

    Args:
        target: The directory to replace. If it holds anything but `names`, it is written in place.
        names: What may be in it.
        atomic: `False` writes in place.
        durable: Wait for stable storage.
    """

    def __new__(
        cls, target: _Path, names: Sequence[str], *, atomic: bool = True, durable: bool = False
    ) -> Directory: ...
    @property
    def path(self) -> str:
        """Where to write."""
    def commit(self) -> str | None:
        """Puts it in the target's place; returns which attribute of the old one could not be kept, or `None`."""
    def __enter__(self) -> Directory: ...
    def __exit__(
        self,
        *_raised: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...

def open(target: _Path | _Buffer | _Seekable, *, archive: bool) -> File:
    """Opens an archive, or a bare weights image, at a path, in memory, or behind a file object."""

def check_expansion(images: Sequence[tuple[Weights, Sequence[int]]]) -> None:
    """Refuses datasets of several images, by their positions, that take far more memory than the files say, together.

    Raises:
        LimitError: When they do. `Weights.fetch` checks what is wanted of one image.
    """

@final
class File:
    """An open file."""

    def members(self) -> list[tuple[str, int, int]]:
        """`(name, bytes, bytes stored)` of every member of an archive."""
    def read(self, name: str) -> bytes:
        """A whole member, inflated, its CRC checked."""
    def check_expansion(self, name: str | None, floor: int, max_expansion: int) -> None:
        """Refuses a member that stands for more than `floor` bytes and `max_expansion` times what it stores.

        Without a name, all of them together.
        """
    def kind(self) -> Literal["keras", "h5", "safetensors", "shards"] | None:
        """What it is, by how it begins: an archive, HDF5, perhaps behind a user block, safetensors, a JSON object."""
    def weights(self, *, engine: str = "auto") -> Weights:
        """Indexes the weights. The engine `"safetensors"` reads that format, and no other does."""

@final
class Weights:
    """The index of a weights image."""

    @property
    def engine(self) -> str:
        """The engine that read it."""
    @property
    def has_crc(self) -> bool:
        """Whether the image has a checksum."""
    def groups(self) -> list[tuple[str, _Attributes]]:
        """`(path, attributes)` of every group but the root."""
    def datasets(self) -> list[_Dataset]:
        """`(path, dtype, shape, attributes)` of every dataset; the dtype `object` is for what cannot be read."""
    def decoded(self) -> list[int]:
        """The positions of those whose bytes are not in the file as they are: compressed, in chunks, never written."""
    @property
    def attributes(self) -> _Attributes:
        """Attributes of the root; the metadata of a safetensors file."""
    def names(self) -> list[str]:
        """The paths of `datasets()`."""
    def dataset(self, i: int) -> tuple[str, list[int], int, _Attributes, int | None]:
        """`(dtype, shape, bytes, attributes, offset)` of one dataset; no offset where it is no run of bytes."""
    def read(self, i: int, start: int, stop: int) -> Block:
        """Bytes `start` to `stop` of a dataset, without a thread and unchecked. Chunked ones are read whole."""
    def fetch(self, wanted: Sequence[int], *, verify: bool = True, read_ahead: int) -> Reading:
        """Starts a thread that reads datasets, by their positions in `datasets()`, in the order of the file.

        Args:
            wanted: Which.
            verify: Read every byte of the image and compare its CRC, if it has one.
            read_ahead: Bytes that may be read before they are taken.
        """

@final
class Reading:
    """A read in progress. Dropping it stops it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that it reads ahead."""
    @property
    def done(self) -> int:
        """Bytes of those that were read."""

    def take(self, i: int) -> Block | None:
        """Waits for a dataset; `None` if it was taken before."""
    def complete(self, *, drop_rest: bool = False) -> None:
        """Waits until every byte was read and checked; what was not taken is kept, or dropped."""

@final
class Block:
    """A tensor's bytes, at a multiple of 64, writable; supports the buffer protocol."""

    def __len__(self) -> int: ...
