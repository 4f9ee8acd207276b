"""The running operation: what the functions that Keras calls back have to know, for this thread or task only.

Beside it, what hornbeam leaves to stock Keras, and the one request that passes through other people's code: the
asynchronous save of a model by its own `save`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from hornbeam.base import counters, writer


class NotOurs(Exception):
    """Stock Keras has to do this. It is raised before anything was touched, and no user sees it.

    Args:
        reason: Why; `None` where stock Keras refuses it, in words of its own.
        beyond: What was asked for that stock Keras does not do: then it is refused.
        path: Where it goes to, or comes from.
        saves: Whether it is a save.
    """

    def __init__(
        self, reason: str | None, beyond: Sequence[str] = (), path: str | None = None, *, saves: bool = True
    ) -> None:
        super().__init__(reason)
        self.reason, self.beyond, self.path, self.saves = reason, beyond, path, saves


class _Offer:
    """An asynchronous save that waits to be claimed by the save of just this model to just this path."""

    def __init__(self, model: Any, path: str, request: writer.Reservation) -> None:
        self.model = model
        self.path = os.path.abspath(path)
        self.request: writer.Reservation | None = request


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """What is going on in a thread or task; a nested operation has one of its own.

    Attributes:
        routed: Keras' functions come to hornbeam, whether or not it is installed.
        stock: Stock Keras does all of it: nothing that it calls comes back.
        journal: What the load assigns.
        pending: Variables that wait for their first value.
        walk: How Keras' walk over the model takes less time.
        shortcuts: Those that are taken while a model is built or described.
        describes: The legacy serialiser describes what the format's names do not lead to.
        seed: What an order of `tf.data` is drawn from.
        fits: The watchers of each running `fit`, the innermost last.
        offer: An asynchronous save, for who saves just this model.
    """

    routed: bool = False
    stock: bool = False
    journal: Any = None
    pending: list[Any] | None = None
    walk: Any = None
    shortcuts: Any = None
    describes: bool = False
    seed: Any = None
    fits: tuple[list[Any], ...] = ()
    offer: _Offer | None = None


_running: ContextVar[Operation] = ContextVar("hornbeam_operation", default=Operation())  # noqa: B039 - frozen


def running() -> Operation:
    """The operation that this thread or task is in."""
    return _running.get()


@contextlib.contextmanager
def changed(**changes: Any) -> Iterator[None]:
    """Has fields of the running operation changed inside."""
    before = _running.get()
    _running.set(dataclasses.replace(before, **changes))
    try:
        yield
    finally:
        _running.set(before)


@contextlib.contextmanager
def offered(model: Any, path: str, request: writer.Reservation | None) -> Iterator[None]:
    """Makes the save of `model` to `path` that happens inside asynchronous; others, of its encoder say, are not."""
    if request is None:
        yield
        return
    offer = _Offer(model, path, request)
    with changed(offer=offer):
        yield
    if offer.request is not None:
        counters.logger.warning("`asynchronous=True` did nothing: '%s' was not saved by hornbeam", path)


def claim(model: Any, path: Any) -> writer.Reservation | None:
    """The offer for this save, once."""
    offer = running().offer
    if offer is None or offer.model is not model or not isinstance(path, str | os.PathLike):
        return None
    if os.path.abspath(os.fsdecode(path)) != offer.path:
        return None
    request, offer.request = offer.request, None
    return request
