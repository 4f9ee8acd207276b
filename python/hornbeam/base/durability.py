"""Stable storage for what the core does not write itself: new directories, copied assets, files of stock Keras'."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from hornbeam.base import counters, settings


def sync(path: str | os.PathLike[str]) -> None:
    """Brings a file, or a directory with everything in it, to stable storage; not its name.

    Raises:
        OSError: Where that fails.
    """
    if os.path.isfile(path):  # nobody waits for a pipe
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    for top, _, names in os.walk(path):
        for name in names:
            sync(os.path.join(top, name))
        _sync_directory(top)


def sync_name(path: str | os.PathLike[str]) -> None:
    """Brings the entry of a file in its directory to stable storage."""
    _sync_directory(os.path.dirname(os.path.realpath(path)))


@contextlib.contextmanager
def directories(path: Any, *, durable: bool) -> Iterator[None]:
    """Directories on the way to `path` that are made inside have their names on stable storage afterwards."""
    missing: list[str] = []
    if durable and isinstance(path, str | os.PathLike):
        place = os.path.dirname(os.path.realpath(os.fsdecode(path)))
        while not os.path.isdir(place) and os.path.dirname(place) != place:
            missing.append(place)
            place = os.path.dirname(place)
    yield
    for made in reversed(missing):
        if os.path.isdir(made):  # the outermost first
            sync_name(made)


def sync_handed_over(path: Any) -> None:
    """After stock Keras wrote to `path`, if stable storage was asked for: as if it had waited for it itself."""
    if not settings.current().durable or not isinstance(path, str | os.PathLike):
        return
    place = os.fsdecode(path)
    if os.path.isfile(place) or os.path.isdir(place):
        sync(place)
        sync_name(place)
    else:
        tell(place)


def tell(place: str) -> None:
    """Says once that stable storage cannot be waited for at a place."""
    if settings.current().durable:
        _tell(place.split("://")[0] if "://" in place else place)


@functools.cache
def _tell(place: str) -> None:
    counters.logger.warning("durable: nobody can wait for stable storage at '%s'", place)


def _sync_directory(path: str) -> None:
    if os.name != "posix":
        return  # elsewhere directories cannot be opened
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
