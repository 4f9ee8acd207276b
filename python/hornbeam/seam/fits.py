"""How a `fit` ends; Keras has no callback for an exception."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any

from hornbeam.seam import displaced
from hornbeam.seam.operation import changed, running

_lock = threading.RLock()


class FitWatcher:
    """Who wants to know how a `fit` ends, and has called `fit_watchers().append(self)` inside it."""

    def fit_failed(self, error: BaseException) -> None:
        """An exception is about to leave `fit`."""

    def fit_ended(self) -> None:
        """Called last, whatever happened."""


def fit_watchers() -> list[FitWatcher] | None:
    """Those of the calling thread's innermost `fit`; `None` outside of Keras' own."""
    return running().fits[-1] if running().fits else None


def watch_fit() -> None:
    """Has `fit` tell its watchers how it ends. Keras has no callback for an exception."""
    import keras

    with _lock:
        owner = next(cls for cls in keras.Model.__mro__ if "fit" in vars(cls))
        original = vars(owner)["fit"]
        if hasattr(original, "__hornbeam__"):
            return

        @functools.wraps(original)
        def fit(self: Any, *args: Any, **kwargs: Any) -> Any:
            watchers: list[FitWatcher] = []
            try:
                with changed(fits=(*running().fits, watchers)):
                    return original(self, *args, **kwargs)
            except BaseException as error:
                for watcher in watchers:
                    watcher.fit_failed(error)
                raise
            finally:
                with contextlib.ExitStack() as stack:  # in reverse order, and all of them even if one raises
                    for watcher in watchers:
                        stack.callback(watcher.fit_ended)

        fit.__hornbeam__ = True  # type: ignore[attr-defined]
        owner.fit = fit
        displaced.displace(original, "original")
