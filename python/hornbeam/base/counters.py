"""What hornbeam did in this process: counters, and the log."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from hornbeam.base.settings import current
from hornbeam.errors import UnsupportedError

logger = logging.getLogger("hornbeam")
T = TypeVar("T")


@dataclasses.dataclass
class Stats:
    """What hornbeam did in this process.

    Attributes:
        saves: Files, directories and file objects written.
        loads: Files, directories and file objects read.
        bytes_written: Bytes of those written.
        bytes_read: Bytes of the tensors handed over.
        tensors_written: Tensors written.
        tensors_read: Tensors handed over.
        engines: How often each engine laid out or indexed an image.
        handovers: How often stock Keras did the work instead, by reason.
    """

    saves: int = 0
    loads: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    tensors_written: int = 0
    tensors_read: int = 0
    engines: dict[str, int] = dataclasses.field(default_factory=dict)
    handovers: dict[str, int] = dataclasses.field(default_factory=dict)


_stats = Stats()
_lock = threading.Lock()


def stats(*, reset: bool = False) -> Stats:
    """A copy of the counters; with `reset`, they start again from zero."""
    global _stats
    with _lock:
        copy = dataclasses.replace(_stats, engines=dict(_stats.engines), handovers=dict(_stats.handovers))
        if reset:
            _stats = Stats()
    return copy


def renew_lock() -> None:
    """In a forked child, where another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.Lock()


def count(*, engine: str | None = None, **amounts: int) -> None:
    """Adds to the counters."""
    with _lock:
        for name, amount in amounts.items():
            setattr(_stats, name, getattr(_stats, name) + amount)
        if engine is not None:
            _stats.engines[engine] = _stats.engines.get(engine, 0) + 1


def hand_over(reason: str, stock: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Lets stock Keras do it: counted, logged, refused with `options(fallback=False)`."""
    if not current().fallback:
        raise UnsupportedError(f"hornbeam does not handle this: {reason}. Stock Keras would, with `fallback=True`.")
    with _lock:
        _stats.handovers[reason] = _stats.handovers.get(reason, 0) + 1
    logger.info("handed over to Keras: %s", reason)
    return stock(*args, **kwargs)
