"""What hornbeam leaves to stock Keras, and the one request that passes through other people's code.

That request is the asynchronous save of a model by its own `save`.
"""

from __future__ import annotations

import contextlib
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

    def __init__(self, model: Any, path: str, request: writer.Request) -> None:
        self.model = model
        self.path = os.path.abspath(path)
        self.request: writer.Request | None = request


_offer: ContextVar[_Offer | None] = ContextVar("hornbeam_offer", default=None)


@contextlib.contextmanager
def offered(model: Any, path: str, request: writer.Request | None) -> Iterator[None]:
    """Makes the save of `model` to `path` that happens inside asynchronous; others, of its encoder say, are not."""
    if request is None:
        yield
        return
    before, offer = _offer.get(), _Offer(model, path, request)
    _offer.set(offer)
    try:
        yield
    finally:
        _offer.set(before)
    if offer.request is not None:
        counters.logger.warning("`asynchronous=True` did nothing: '%s' was not saved by hornbeam", path)


def claim(model: Any, path: Any) -> writer.Request | None:
    """The offer for this save, once."""
    offer = _offer.get()
    if offer is None or offer.model is not model or not isinstance(path, str | os.PathLike):
        return None
    if os.path.abspath(os.fsdecode(path)) != offer.path:
        return None
    request, offer.request = offer.request, None
    return request
