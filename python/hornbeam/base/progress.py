"""Progress of long saves and loads: a bar on a terminal, or whatever the caller does with it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from hornbeam.base import counters, fork, settings

#: Seconds before a bar appears, and between two looks.
_PATIENCE, _INTERVAL = 2.0, 0.1


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a save or load is.

    Attributes:
        operation: `"save"` or `"load"`.
        path: The file, or `None` for a file object.
        done: Bytes of tensors written or read.
        total: Bytes of tensors there are.
        seconds: Since the beginning.
    """

    operation: str
    path: str | None
    done: int
    total: int
    seconds: float


@contextlib.contextmanager
def watch(operation: str, path: str | None, total: int | Callable[[], int], done: Callable[[], int]) -> Iterator[None]:
    """Shows or tells, while it lasts, what `done` says; does nothing where nobody looks.

    A load learns from the model how much there is to be read, so `total` may grow.

    A callable of the caller's is called in a thread of its own, some ten times a second and at the end; what it raises
    is logged, and it is not called again.
    """
    wanted = settings.current().progress
    if wanted is None:
        wanted = sys.stderr is not None and sys.stderr.isatty() and not fork.is_child()
    if wanted is False:
        yield
        return
    since = time.monotonic()
    stop = threading.Event()

    def now() -> Progress:
        known = total() if callable(total) else total
        return Progress(operation, path, min(done(), known), known, time.monotonic() - since)

    def work() -> None:
        try:
            if callable(wanted):
                _call_back(wanted, now, stop)
            else:
                _draw(now, stop)
        except Exception:
            counters.logger.exception("progress is not shown any more")

    thread = threading.Thread(target=work, name="hornbeam-progress", daemon=True)
    thread.works_for = threading.current_thread()  # type: ignore[attr-defined]  # which waits for it: `base/writer.py`
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _call_back(callback: Callable[[Progress], Any], now: Callable[[], Progress], stop: threading.Event) -> None:
    while not stop.wait(_INTERVAL):
        callback(now())
    callback(now())


def _draw(now: Callable[[], Progress], stop: threading.Event) -> None:
    if stop.wait(_PATIENCE):
        return
    from rich.console import Console  # Keras needs it anyway
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    state = now()
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{state.operation} {state.path or ''}", total=state.total)
        while not stop.wait(_INTERVAL):
            state = now()
            bar.update(task, completed=state.done, total=state.total)
