"""Options of saves and loads: scoped, for the calling thread or task."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """What `hornbeam.options` can set.

    Attributes:
        fallback: Hand over to stock Keras what hornbeam does not handle; otherwise `UnsupportedError` is raised.
        engine: `"auto"` (our own; libhdf5 for reading what it does not), `"direct"` or `"libhdf5"`.
        atomic: Write beside the target and rename. `False` writes over the old file, as Keras does.
        durable: A save returns only when data and directory are on stable storage.
        verify: Read all of a file to check its CRC, also where only a part of it is loaded.
        shortcuts: Loads and saves take ways around slow parts of Keras (`seam/shortcuts.py`).
        compression: Level of deflate that saves use, 0 to 9, or `None`.
        shuffle: Whether the bytes of the elements are transposed before they are compressed.
        chunk_bytes: Most bytes of a chunk, before compression.
        progress: `None` (a bar on a terminal, after two seconds), `True`, `False`, or called with a `Progress`.
    """

    fallback: bool = True
    engine: str = "auto"
    atomic: bool = True
    durable: bool = False
    verify: bool = False
    shortcuts: bool = True
    progress: Callable[[Any], Any] | bool | None = None
    compression: int | None = None
    shuffle: bool = True
    chunk_bytes: int = 1 << 20


_options: ContextVar[Options] = ContextVar("hornbeam_options", default=Options())  # noqa: B039 - frozen


def current() -> Options:
    """The options in force in this thread or task."""
    return _options.get()


@contextlib.contextmanager
def options(
    *,
    fallback: bool | None = None,
    engine: str | None = None,
    atomic: bool | None = None,
    durable: bool | None = None,
    verify: bool | None = None,
    shortcuts: bool | None = None,
    progress: Callable[[Any], Any] | bool | None = None,
    compression: str | int | None = None,
    shuffle: bool | None = None,
    chunk_bytes: int | None = None,
) -> Iterator[Options]:
    """Sets options for the calling thread or task while the context lasts; `None` leaves one as it is.

    Args:
        fallback: `False` raises `UnsupportedError` where hornbeam would hand over to stock Keras.
        engine: `"auto"`, `"direct"` or `"libhdf5"`.
        atomic: Replace files by renaming (the default) or write over them.
        durable: Wait for stable storage.
        verify: Check the CRC also where only a part of a file is loaded.
        compression: Saves compress tensors of 16 KiB and more with deflate: a level from 0 to 9, or `"gzip"` for 4, as
            h5py has it; `"none"` for not.
        shuffle: Transpose the bytes of the elements first, which makes numbers compress better. Otherwise they are.
        chunk_bytes: Bytes of a chunk, at most, before compression; 1 MiB otherwise.
        progress: `True` shows a bar after two seconds, `False` shows nothing, and a callable gets a
            `hornbeam.Progress` some ten times a second, in a thread of its own. Otherwise there is a bar on a terminal.
        shortcuts: `False` has slow parts of Keras and TensorFlow do their work while a model is built or described,
            instead of ways around them that are tried first (`docs/performance.md`).

    Yields:
        The options in force inside.

    Raises:
        ValueError: For what is none of these.
    """
    given: dict[str, Any] = {
        "fallback": fallback,
        "engine": engine,
        "atomic": atomic,
        "durable": durable,
        "verify": verify,
        "progress": progress,
        "shortcuts": shortcuts,
        "shuffle": shuffle,
        "chunk_bytes": chunk_bytes,
    }
    if chunk_bytes is not None and not 1 << 10 <= chunk_bytes <= 1 << 30:
        raise ValueError(f"chunk_bytes must be between 1 KiB and 1 GiB. Received: {chunk_bytes}")
    if engine not in (None, "auto", "direct", "libhdf5"):
        raise ValueError(f"engine must be 'auto', 'direct' or 'libhdf5'. Received: engine={engine!r}")
    if shortcuts not in (None, True, False):
        raise ValueError(f"shortcuts must be True or False. Received: shortcuts={shortcuts!r}")
    before = _options.get()
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if compression is not None:
        changes["compression"] = _level(compression)
    _options.set(dataclasses.replace(before, **changes))
    try:
        yield _options.get()
    finally:
        _options.set(before)  # no `reset`: the block may be left in another context


@contextlib.contextmanager
def using(options: Options) -> Iterator[None]:
    """Has the options of another thread in force."""
    before = _options.get()
    _options.set(options)
    try:
        yield
    finally:
        _options.set(before)


def _level(compression: str | int) -> int | None:
    levels: dict[str | int, int | None] = {"none": None, "gzip": 4, **{level: level for level in range(10)}}
    if isinstance(compression, bool) or compression not in levels:
        raise ValueError(f"compression must be 'gzip', 'none' or a level from 0 to 9. Received: {compression!r}")
    return levels[compression]
