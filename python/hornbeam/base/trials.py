"""Whether something private of Keras or a backend works as hornbeam expects: tried once in a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from hornbeam.base import fork
from hornbeam.base.counters import logger


class Tried:
    """A check that runs when its verdict is first asked for, by one thread at a time.

    It runs in a thread of its own: name scopes, name counters, graphs, devices and distribution strategies belong to
    threads, so that nothing around the first load has a say in what holds for the whole process, and nothing is left
    behind. In a forked child, where backends may wait for threads that are not there, nothing is tried: what was not
    tried before is not used.

    Args:
        what: Names it in the log.
        check: Returns whether it works; errors of missing or changed functions mean no.
    """

    def __init__(self, what: str, check: Callable[[], bool]) -> None:
        self._what = what
        self._check = check
        self._verdict: bool | None = None
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)  # the lock may have been held by a thread that is gone

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> bool:
        """Whether it works here; tried now, if that was not done yet."""
        if self._verdict is None and not fork.is_child():
            with self._lock:
                if self._verdict is None:
                    thread = threading.Thread(target=self._run, name="hornbeam-try")
                    try:
                        thread.start()
                    except RuntimeError:  # the interpreter is shutting down
                        return False
                    thread.join()
        return bool(self._verdict)

    def _run(self) -> None:
        try:
            self._verdict, why = self._check(), "the check failed"
        except Exception as error:
            self._verdict, why = False, repr(error)
        if not self._verdict:
            logger.warning(
                "%s does not work with this Keras and backend (%s): results are right, but take longer. "
                "A newer hornbeam may know this Keras.",
                self._what,
                why,
            )
