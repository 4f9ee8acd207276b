"""Exceptions: each is a `HornbeamError` and what Keras or Python raises in the same place."""

from __future__ import annotations

import builtins
import os
import zipfile
from concurrent import futures
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hornbeam.base.reports import LoadReport


class HornbeamError(Exception):
    """Base of every error of hornbeam's own; says where it happened.

    Attributes:
        path: The file, or `None`.
        member: The archive member, or `None`.
        entry: The path inside the weights image, or `None`.
        expected: What was expected, as text, or `None`.
        found: What was found, as text, or `None`.
    """

    path: str | None = None
    member: str | None = None
    entry: str | None = None
    expected: str | None = None
    found: str | None = None


class ArchiveError(HornbeamError, zipfile.BadZipFile):
    """The zip container is malformed."""


class ChecksumError(ArchiveError):
    """Bytes of a member do not match their CRC-32."""


class WeightsFileError(HornbeamError, OSError):
    """The HDF5 or safetensors image is malformed."""


class ConfigError(HornbeamError, ValueError):
    """A JSON member is malformed."""


class LimitError(HornbeamError, ValueError):
    """A file asks for more than a limit allows: decompression bombs, nesting, counts."""


class UnsafeFileError(HornbeamError, ValueError):
    """A file points to data outside itself: links, external or virtual datasets."""


class UnsupportedError(HornbeamError, ValueError):
    """Hornbeam does not handle this; under `options(fallback=False)` it is not handed to Keras either."""


class InvalidError(HornbeamError, ValueError):
    """Something that cannot be written was to be saved."""


class CheckpointError(HornbeamError, RuntimeError):
    """A directory of checkpoints is in use, incomplete, or of another training."""


class CancelledError(HornbeamError, futures.CancelledError, RuntimeError):
    """An asynchronous save that was not made: the user kept the old file, or it belongs to another process."""


class OutOfMemoryError(HornbeamError, MemoryError):
    """There is no memory for what a file or a model asks for."""


class IncompleteLoadError(HornbeamError, ValueError):
    """A load that had to fit, or to be complete, did not.

    Attributes:
        report: What would have been loaded, and what not.
    """

    report: LoadReport


class VerificationError(HornbeamError, ValueError):
    """An exported artifact does not answer as the model does."""


class UnknownKerasWarning(UserWarning):
    """This Keras is not one that hornbeam knows: stock Keras does an operation. Said once for each."""


class StorageError(HornbeamError, OSError):
    """The operating system refused an operation. Raised as a subclass that also is, say, `FileNotFoundError`."""


_KINDS: dict[str, type[HornbeamError]] = {
    "archive": ArchiveError,
    "crc": ChecksumError,
    "image": WeightsFileError,
    "json": ConfigError,
    "limit": LimitError,
    "unsafe": UnsafeFileError,
    "unsupported": UnsupportedError,
    "invalid": InvalidError,
    "cancelled": CancelledError,
    "memory": OutOfMemoryError,
}
_storage_errors: dict[type[OSError], type[StorageError]] = {OSError: StorageError}


def _storage_error(number: int | None) -> type[StorageError]:
    """`StorageError`, also deriving from the subclass of `OSError` that Python uses for this `errno`."""
    return _storage_class(type(OSError(number, "")) if number is not None else OSError)


def _storage_class(builtin: type[OSError]) -> type[StorageError]:
    if builtin not in _storage_errors:
        name = f"Storage{builtin.__name__}"
        _storage_errors[builtin] = type(name, (StorageError, builtin), {"__module__": __name__})
    return _storage_errors[builtin]


def __getattr__(name: str) -> Any:
    """Finds those classes by their names, as pickles of errors have to."""
    builtin = getattr(builtins, name.removeprefix("Storage"), None)
    if name.startswith("Storage") and isinstance(builtin, type) and issubclass(builtin, OSError):
        return _storage_class(builtin)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _from_core(kind: str, message: str, *, errno: int | None = None, **place: Any) -> HornbeamError:
    """The exception for an error of the Rust core; called by `py/errors.rs`."""
    error: HornbeamError
    if kind == "io":
        cls = _storage_error(errno)
        error = cls(message) if errno is None else cls(errno, message)
        if errno is not None and place.get("path"):
            error.filename = os.fspath(place["path"])
    else:
        error = _KINDS[kind](message)
    for name, value in place.items():
        setattr(error, name, value)
    return error
