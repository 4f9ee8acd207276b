"""Saves that have to wait: a writer that is kept busy, and a small model to save behind it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from keras import layers

import hornbeam
from hornbeam.base import writer
from support.zoo import chain


@contextlib.contextmanager
def held(values: Sequence[Any] = ()) -> Iterator[writer.Handle]:
    """Keeps the writer busy while the block lasts; gives the handle of the save it is busy with, which has `values`."""
    release = threading.Event()

    def write() -> hornbeam.SaveReport:
        assert release.wait(600)
        return hornbeam.SaveReport()

    with writer.Reservation() as request:
        request.stage(values)
        request.submit("held", write, lambda: None, hornbeam.base.settings.current())
    try:
        yield request.handle
    finally:
        release.set()


def small() -> Any:
    return chain(layers.Dense(4), layers.Dense(2))
