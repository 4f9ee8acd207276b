"""Paths and file objects: what a load reads from and a save writes to, in whatever form it was given."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
from collections.abc import Iterator
from typing import Any

from hornbeam.errors import UnsupportedError


class Stream:
    """A file object where a path is usual. As text it is a name, which ends as its content does.

    Args:
        file: The file object.
        suffix: `".keras"`, `".h5"`, `".weights.h5"` or `".safetensors"`.
    """

    def __init__(self, file: Any, suffix: str) -> None:
        self.file = file
        self.suffix = suffix

    def __str__(self) -> str:
        return f"<{type(self.file).__name__}>{self.suffix}"

    __repr__ = __str__


def is_path(value: Any) -> bool:
    """Whether it is what Python's own functions take for a path."""
    return isinstance(value, str | bytes | os.PathLike)


def path_to_str(value: Any) -> Any:
    """A path as `str`; anything else as it is."""
    return os.fsdecode(value) if isinstance(value, bytes | os.PathLike) else value


def is_file_object(value: Any) -> bool:
    """Whether it can be read from or written to like a file."""
    return not is_path(value) and (callable(getattr(value, "read", None)) or callable(getattr(value, "write", None)))


def check(file: Any, operation: str) -> None:
    """Refuses a file object that cannot serve.

    Args:
        file: The file object.
        operation: `"read"` or `"write"`.

    Raises:
        ValueError: It is closed, gives text, or is open for something else.
    """
    if getattr(file, "closed", False) is True:
        raise ValueError(f"I/O operation on closed file: {file!r}")
    if isinstance(file, io.TextIOBase) or isinstance(getattr(file, "file", None), io.TextIOBase):
        wanted = "rb" if operation == "read" else "wb"
        raise UnsupportedError(f"Models are bytes, and this file object is open for text: open it with {wanted!r}.")
    mode = getattr(file, "mode", "")
    if operation == "write" and isinstance(mode, str) and "a" in mode:
        raise UnsupportedError(
            "A save goes back to complete what it wrote, and this file object only appends: open it with 'wb'."
        )
    able = getattr(file, "readable" if operation == "read" else "writable", None)
    if not callable(getattr(file, operation, None)) or (callable(able) and not able()):
        raise UnsupportedError(f"This file object is not open to {operation}: {file!r}")


def name(file: Any) -> str:
    """The name of a file object, if it has one; empty otherwise."""
    try:
        found = file.name
    except (AttributeError, ValueError):
        return ""
    return os.fsdecode(found) if isinstance(found, str | bytes | os.PathLike) else ""


def is_seekable(file: Any) -> bool:
    """Whether it can be read or written at any place."""
    able = getattr(file, "seekable", None)
    return bool(able()) if callable(able) else callable(getattr(file, "seek", None))


def source(file: Any) -> Any:
    """What the core reads from: a path, also where a file object stands for one, memory, or the object itself."""
    if isinstance(file, str):
        return file
    if isinstance(file, Stream):
        file = file.file
    if type(file) is io.BufferedReader:
        path = name(file)
        try:
            if path and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return path
        except (OSError, ValueError):
            pass
    if type(file) is io.BytesIO:
        return file.getvalue()  # no copy, and the object stays free to be written to
    if isinstance(file, mmap.mmap):
        return memoryview(file)
    if not is_seekable(file):
        return file.read()
    return file if isinstance(file, io.IOBase) else _Reader(file)


class _Reader:
    """A file object of somebody else's class; where theirs says nothing, `seek` says where it is."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.read = file.read

    def seek(self, offset: int, whence: int = 0) -> int:
        """As `io.IOBase.seek`."""
        self.file.seek(offset, whence)
        return int(self.file.tell())


def openable(place: Any) -> Any:
    """What the core opens for a path or a `Stream`."""
    return source(place) if isinstance(place, Stream) else str(place)


def path_of(place: Any) -> str | None:
    """What a report calls it; `None` for a file object."""
    return None if isinstance(place, Stream) else str(place)


@contextlib.contextmanager
def rewound(file: Any) -> Iterator[Any]:
    """The file object at its beginning, and back where it was afterwards; `None` for one that cannot go back."""
    if isinstance(file, Stream):
        file = file.file
    if not callable(getattr(file, "read", None)) or not is_seekable(file):
        yield None
        return
    before = file.tell()
    try:
        file.seek(0)
        yield file
    finally:
        file.seek(before)
