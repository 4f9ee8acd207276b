"""What is changed for the whole process for as long as somebody needs it: attributes of Keras', the collector's rest.

Who needs something is noted by a token, inside the `try` that takes it back: an exception at any moment (Ctrl-C, say)
leaves nobody noted twice, or for ever. In a forked child, what other threads needed is taken back.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

_lock = threading.RLock()
_patches: list[Patch] = []


class Users:
    """Who needs something that is there for all threads."""

    def __init__(self) -> None:
        self._threads: dict[object, int] = {}

    def __bool__(self) -> bool:
        return bool(self._threads)

    def add(self, token: object) -> None:
        """Notes one, of the calling thread."""
        self._threads[token] = threading.get_ident()

    def discard(self, token: object) -> None:
        """Forgets one, if it was noted."""
        self._threads.pop(token, None)

    def keep_own(self) -> None:
        """Forgets those of other threads."""
        self._threads = {token: thread for token, thread in self._threads.items() if thread == threading.get_ident()}


def reaches(function: Any, ours: Any) -> bool:
    """Whether a function is ours, or one that somebody put around it by `functools.wraps`."""
    while function is not None and function is not ours:
        function = getattr(function, "__wrapped__", None)
    return function is ours


class _Place(NamedTuple):
    owner: Any
    name: str
    original: Any
    replacement: Any


class Patch:
    """An attribute replaced while somebody needs it, in any thread; the replacement decides per thread.

    What others put around the replacement meanwhile stays, and then comes before the next one. That cannot go in
    circles: each replacement is made for what it found, and calls that and nothing else.

    Args:
        make: Makes what stands in the place of what is given to it.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make
        self._users = Users()
        self._place: _Place | None = None
        #: What was made → what it was made for: somebody may put it back when it is over.
        self._made: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        _patches.append(self)

    @contextlib.contextmanager
    def __call__(self, owner: Any, name: str) -> Iterator[None]:
        """Replaces `owner.name` while the context lasts."""
        token = object()
        try:
            with _lock:
                if not self._users:
                    self._put(owner, name)
                self._users.add(token)
            yield
        finally:
            with _lock:
                self._users.discard(token)
                self._take_back()

    def _put(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)
        if self._place is not None and reaches(original, self._place.replacement):
            return
        while (below := self._made.get(original)) is not None:
            original = below
        made = self._make(original)
        if isinstance(made, FunctionType):
            functools.update_wrapper(made, original)
        self._made[made] = original
        self._place = _Place(owner, name, original, made)
        setattr(owner, name, made)

    def _take_back(self) -> None:
        place = self._place
        if place is not None and not self._users and getattr(place.owner, place.name) is place.replacement:
            setattr(place.owner, place.name, place.original)
            self._place = None

    def start_anew(self) -> None:
        """In a forked child."""
        self._users.keep_own()
        self._take_back()


_collector_lock = threading.Lock()
_resting = Users()
_threshold: tuple[int, int, int] | None = None  # what it was before the first of them


@contextlib.contextmanager
def collector_rests() -> Iterator[None]:
    """The cyclic garbage collector does not run meanwhile, in any thread; whether it is enabled stays the caller's."""
    global _threshold
    token = object()
    try:
        with _collector_lock:
            if not _resting:
                _threshold = gc.get_threshold()
                gc.set_threshold(0, *_threshold[1:])
            _resting.add(token)
        yield
    finally:
        with _collector_lock:
            _resting.discard(token)
            _wake_collector()


def _wake_collector() -> None:
    global _threshold
    before = _threshold
    if _resting or before is None:
        return
    if gc.isenabled() and gc.get_freeze_count() == 0:  # otherwise a user has disabled or frozen it
        gc.freeze()  # makes all objects old, so that the next collection does not go through them
        gc.unfreeze()
    if gc.get_threshold() == (0, *before[1:]):  # nobody has set another one meanwhile
        gc.set_threshold(*before)
    _threshold = None


def _start_anew() -> None:
    """In a forked child: other threads are not there, and neither are their locks and what they needed."""
    global _lock, _collector_lock
    _lock, _collector_lock = threading.RLock(), threading.Lock()
    for patch in _patches:
        patch.start_anew()
    _resting.keep_own()
    _wake_collector()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
