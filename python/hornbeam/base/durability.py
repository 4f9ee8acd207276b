"""Stable storage for what stock Keras writes."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from hornbeam import _core
from hornbeam.base import counters, settings


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
            _core.sync_name(made)


def sync_handed_over(path: Any) -> None:
    """After stock Keras wrote to `path`, if stable storage was asked for: as if it had waited for it itself."""
    if not settings.current().durable or not isinstance(path, str | os.PathLike):
        return
    place = os.fsdecode(path)
    if os.path.isfile(place) or os.path.isdir(place):
        _core.sync(place)
        _core.sync_name(place)
    else:
        tell(place)


def tell(place: str) -> None:
    """Says once that stable storage cannot be waited for at a place."""
    if settings.current().durable:
        _tell(place.split("://")[0] if "://" in place else place)


@functools.cache
def _tell(place: str) -> None:
    counters.logger.warning("durable: nobody can wait for stable storage at '%s'", place)
