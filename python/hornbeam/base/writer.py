"""Saves that go on while training does: the snapshot is taken at the call, one thread at a time writes.

One save is written, one more may wait; a third blocks. The writing itself is
done by a thread of the core's without the interpreter lock; the thread here only waits for it. It is no daemon and ends
with the last save, so that the interpreter waits for it at exit and none is there when nothing is saved.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from hornbeam.base import counters, locations, settings
from hornbeam.base.reports import SaveReport
from hornbeam.errors import CancelledError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

    from hornbeam.base.deferred import Deferred


class Handle(Future[str]):
    """An asynchronous save; `save_model(…, asynchronous=True)` makes them.

    A `concurrent.futures.Future` whose result is the path of the file: `as_completed`, `asyncio.wrap_future` and done
    callbacks work. A callback is called in the writer's thread, or at once if the save has ended; what it raises is
    logged. There it cannot wait for the saves behind it, which would wait for it: that is an `UnsupportedError`. A save
    cannot be cancelled.

    Attributes:
        path: The file, from the root: the process may change its directory before it is written.
        bytes: Its size, once it is written.
        stall_seconds: How long the call took.
        write_seconds: From the first byte until the file was in its place, once it is.
        report: What was saved, once it is.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = locations.absolute(path)
        self._real = os.path.realpath(self.path)  # now: links may change, too
        self.bytes: int | None = None
        self.stall_seconds = 0.0
        self.write_seconds: float | None = None
        self.report: SaveReport | None = None
        self.error: BaseException | None = None  # to look at, without having it reported
        self._reported = False  # whether somebody was given the error
        self.set_running_or_notify_cancel()

    def __reduce__(self) -> Any:
        raise TypeError(
            f"An asynchronous save can be neither copied nor pickled: it belongs to this process. Pass its path on, "
            f"after `result()`. Received: {self!r}"
        )

    def __repr__(self) -> str:
        state = "pending" if not self.done() else "failed" if self.error is not None else "done"
        return f"<hornbeam save of '{self.path}': {state}>"

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits for the end.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            What went wrong, or `None`. Whoever asks is the one who is told: the next save does not raise it again.

        Raises:
            TimeoutError: When it has not ended by then.
            UnsupportedError: In a callback of a save, which this one waits for.
        """
        if (timeout is None or timeout > 0) and not self.done():
            _queue.refuse_endless_wait()
        try:
            error = super().exception(timeout)
        except TimeoutError:
            raise TimeoutError(f"The save of '{self.path}' has not ended after {timeout} seconds.") from None
        self._reported = True
        return error

    def result(self, timeout: float | None = None) -> str:
        """Waits for the end.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            The path of the file.

        Raises:
            TimeoutError: When it has not ended by then.
            UnsupportedError: In a callback of a save, which this one waits for.
            CancelledError: Where the user kept the old file, and in a forked child.
            OSError: When the file could not be written; and whatever else a save raises.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self.path

    def new_error(self) -> BaseException | None:
        """As `exception` without a timeout, but for what somebody was given already."""
        seen, error = self._reported, self.exception()
        return None if seen else error

    def add_done_callback(self, fn: Callable[[Handle], Any]) -> None:
        """Has `fn(handle)` called when the save has ended, or now if it has."""

        def call(handle: Any) -> None:
            try:
                fn(handle)
            except BaseException:  # the writer goes on, also after a `sys.exit()`
                counters.logger.exception("a callback of the save of '%s' failed", self.path)

        super().add_done_callback(call)

    def end(self, error: BaseException | None) -> None:
        """Notes how it ended, and calls back."""
        self.error = error
        if error is None:
            self.set_result(self.path)
        else:
            self.set_exception(error)

    def start_anew(self) -> None:
        """In a forked child, where it belongs to the parent, and so do its callbacks and its error."""
        self._condition = threading.Condition()
        self._reported = True
        vars(self).update(_done_callbacks=[], _waiters=[])
        if not self.done():
            self.end(CancelledError(f"The save of '{self.path}' belongs to the parent process."))


@dataclasses.dataclass
class _Job:
    """A save whose values were taken: what is left to do, and to give back."""

    handle: Handle
    write: Callable[[], SaveReport]
    drop: Callable[[], None]
    options: settings.Options
    stages: bool  # its values are in the staging memory

    def run(self) -> BaseException | None:
        """Writes the file; logs what went wrong."""
        handle = self.handle
        since = time.perf_counter()
        error: BaseException | None = None
        try:
            with settings.using(dataclasses.replace(self.options, progress=self.options.progress or False)):
                handle.report = self.write()
                handle.bytes = handle.report.bytes
        except BaseException as e:
            error = e
            counters.logger.error("the asynchronous save of '%s' failed: %s", handle.path, e, exc_info=e)
            error.__traceback__ = None  # its frames hold the values
        handle.write_seconds = time.perf_counter() - since
        return error


class _Queue:
    """What is written, and what waits for it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.writing: _Job | None = None
        self.waiting: _Job | None = None
        self.reserved = 0  # callers that have a place, and take their snapshot now
        self.thread: threading.Thread | None = None
        self.failed: list[Handle] = []
        self.staging = _Staging()
        self.staged = False  # somebody's values are in it

    def places(self) -> int:
        return 2 - (self.writing is not None) - (self.waiting is not None) - self.reserved

    def submit(self, job: _Job, *, reserved: bool) -> None:
        with self.changed:
            self.reserved -= reserved
            # Never for who has reserved a place; and those who have may be waiting for this one's memory.
            while self.places() + (self.reserved if job.stages else 0) < 1:
                self.wait()
            # Once the interpreter ends, nobody waits for a new thread: the caller writes.
            ending = not threading.main_thread().is_alive()
            if not ending and self.writing is not None:
                self.waiting = job
            elif not ending:
                self.writing = job
                self.thread = threading.Thread(target=self._work, name="hornbeam-writer", daemon=False)
                try:
                    self.thread.start()
                except RuntimeError:  # no more threads
                    ending, self.writing, self.thread = True, None, None
        if ending:
            self._end(job, job.run())
            if job.handle.error is not None:
                _fail_exit()  # which may have looked already

    def _work(self) -> None:
        while True:
            with self.changed:
                job = self.writing
            if job is None:
                return
            self._end(job, job.run())
            with self.changed:
                job = self.writing = self.waiting
                self.waiting = None
                if job is None:
                    self.thread = None
                self.changed.notify_all()

    def _end(self, job: _Job, error: BaseException | None) -> None:
        """Gives back what the save held, and ends its handle."""
        try:
            job.drop()
        except BaseException as e:
            counters.logger.exception("cleaning up after the save of '%s' failed", job.handle.path)
            error = error or e
        with self.changed:
            if job.stages:
                self.staged = False
            job.handle.error = error  # before anybody hears of it
            if error is not None:
                self.failed.append(job.handle)
            self.changed.notify_all()
        job.handle.end(error)

    def is_writer(self) -> bool:
        """Whether this is the writer's thread, in a callback, or one that it waits for."""
        here = threading.current_thread()
        return self.thread is not None and self.thread is getattr(here, "works_for", here)

    def wait(self) -> None:
        """Waits for a change of the queue; the caller holds the lock."""
        self.refuse_endless_wait()
        self.changed.wait()

    def refuse_endless_wait(self) -> None:
        """Raises where what somebody is about to wait for is done by this thread, later.

        Raises:
            UnsupportedError: In the writer's thread.
        """
        if self.is_writer():
            raise UnsupportedError(
                "A callback of an asynchronous save cannot wait for a save that is not done: the thread that it runs "
                "in writes that one afterwards. Have another thread wait, or ask `done()`."
            )

    def raise_failed(self, path: str | None = None) -> None:
        """Raises what was not reported yet: of any save, or of those to one path."""
        with self.changed:
            unreported = [h for h in self.failed if not h._reported]
            chosen = [h for h in unreported if path is None or h._real == path]
            self.failed = [h for h in unreported if h not in chosen]
        if not chosen:
            return
        for handle in chosen:
            handle._reported = True
        error = chosen[0].error
        assert error is not None
        error.add_note(f"This happened while '{chosen[0].path}' was saved asynchronously.")
        for handle in chosen[1:]:
            error.add_note(f"The asynchronous save of '{handle.path}' failed as well: {handle.error}")
        raise error


class _Staging:
    """Memory that values are copied to where they cannot be shared.

    It is kept for the next save: fresh pages cost more than the copy.
    """

    def __init__(self) -> None:
        self.memory: mmap.mmap | None = None

    def take(self, size: int) -> np.ndarray:
        """`size` bytes."""
        import numpy as np

        if self.memory is None or len(self.memory) < size:
            self.memory = None
            size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
            if hasattr(mmap, "MAP_PRIVATE"):
                self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                self.memory = mmap.mmap(-1, size)
            # A forked child never looks at it, and shall not make the parent copy it.
            for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
                if hasattr(mmap, advice):
                    with contextlib.suppress(OSError):  # only advice
                        self.memory.madvise(getattr(mmap, advice))
        return np.frombuffer(self.memory, np.uint8)


_HUGE_PAGE = 2 << 20
_queue = _Queue()
_inherited: list[_Queue] = []


def _start_anew() -> None:
    """In a forked child: what was pending stays the parent's."""
    global _queue
    _inherited.append(_queue)  # never collected
    jobs = [job.handle for job in (_queue.writing, _queue.waiting) if job is not None]
    for handle in [*_queue.failed, *jobs]:
        handle.start_anew()
    _queue = _Queue()
    counters.renew_lock()  # the writer may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


class _FailedStream:
    """Stands for `sys.stderr` at the end of a program that lost a save: Python cannot flush it, and exits with 120.

    That is Python's status for "an error in the cleanup". Exiting at once would skip everybody else's cleanup. Only the
    interpreter's own last flush fails, which no Python code calls, and only if nobody was told in the meantime.
    """

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()
        if sys._getframe().f_back is None and _lost():
            raise OSError("an asynchronous save failed")

    def write(self, text: str) -> int:
        return len(text) if self._stream is None else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _lost() -> list[Handle]:
    """The failed saves that were not reported."""
    return [handle for handle in _queue.failed if not handle._reported]


def _fail_exit() -> None:
    """At the end of the program, a failed save that nobody was told of makes it a failed program."""
    lost = _lost()
    if not lost or isinstance(sys.stderr, _FailedStream):
        return
    for handle in lost:
        told = f"hornbeam: nothing asked how the asynchronous save of '{handle.path}' went; it failed: "
        print(f"{told}{type(handle.error).__name__}: {handle.error}", file=sys.stderr)
    if not hasattr(sys, "last_type"):  # else it ends with 1 anyway
        print("hornbeam: the program ends with status 120 for that.", file=sys.stderr)
        sys.stderr = _FailedStream(sys.stderr)


atexit.register(_fail_exit)


#: Called in the writer's thread with a save and what writes its file: calls that, and does what belongs to the save
#: before and after it. What it raises is the save's error.
Around = Callable[[Handle, Callable[[], SaveReport]], SaveReport]


class Reservation:
    """One asynchronous save that is being asked for.

    Attributes:
        handle: The save, once it was handed to the writer.
    """

    def __init__(self, around: Around | None = None) -> None:
        self.handle: Handle | None = None
        self._around, self._since = around, time.perf_counter()
        self._queue = _queue
        self._reserved = False
        self._stages = False

    def stage(self, values: Sequence[np.ndarray | Deferred]) -> list[np.ndarray]:
        """The values as they are now: those that can change, or are on a device, are copied.

        There is room for one save's copies. Another one's must be written first.
        """
        import numpy as np

        size = sum(_aligned(v.nbytes) for v in values if not isinstance(v, np.ndarray))
        memory = np.empty(0, np.uint8)
        if size:
            queue = self._queue
            with queue.changed:
                while queue.staged:
                    queue.wait()
                queue.staged = self._stages = True
            memory = queue.staging.take(size)
        at, taken = 0, []
        for value in values:
            if isinstance(value, np.ndarray):
                taken.append(value)
            else:
                taken.append(value.copy_to(memory[at : at + value.nbytes]))
                at += _aligned(value.nbytes)
        return taken

    def submit(
        self, path: str, write: Callable[[], SaveReport], drop: Callable[[], None], options: settings.Options
    ) -> Handle:
        """Hands the save to the writer."""
        handle = Handle(path)
        handle.stall_seconds = time.perf_counter() - self._since
        work = write if self._around is None else functools.partial(self._around, handle, write)
        job = _Job(handle, work, drop, options, self._stages)
        reserved, self._reserved, self._stages = self._reserved, False, False
        self._queue.submit(job, reserved=reserved)
        self.handle = handle
        return handle

    def __enter__(self) -> Reservation:
        queue = self._queue
        queue.raise_failed()
        with queue.changed:
            while queue.places() < 1:
                queue.wait()
            queue.reserved += 1
            self._reserved = True
        try:
            queue.raise_failed()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_raised: Any) -> None:
        with self._queue.changed:
            self._queue.reserved -= self._reserved
            self._queue.staged = self._queue.staged and not self._stages
            self._reserved = self._stages = False
            self._queue.changed.notify_all()


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


@contextlib.contextmanager
def reserve(asynchronous: bool, around: Around | None = None) -> Iterator[Reservation | None]:
    """A place in the queue for the save inside, if it is to be asynchronous."""
    if not asynchronous:
        yield None
        return
    with Reservation(around) as request:
        yield request


def cancelled(path: str) -> Handle:
    """What there is of a save for which the user did not want to lose the old file."""
    handle = Handle(path)
    handle.end(CancelledError(f"'{path}' was not saved: the old file was to be kept."))
    return handle


def wait_for(path: Any, *, loads: bool = False) -> None:
    """Waits for asynchronous saves of `path`, so that what follows comes after them.

    Args:
        path: A path, or anything else, which is nobody's target.
        loads: The file is to be read: what went wrong with it is raised.

    Raises:
        UnsupportedError: In a callback of a save, where one of `path` waits for it.
        Exception: What went wrong, if nobody was told.
    """
    queue = _queue
    if not isinstance(path, str | os.PathLike) or (queue.writing is None and not queue.failed):
        return
    real = os.path.realpath(os.fsdecode(path))
    with queue.changed:
        handles = [job.handle for job in (queue.writing, queue.waiting) if job is not None and job.handle._real == real]
    pending = [handle for handle in handles if not handle.done()]
    if loads and queue.is_writer() and pending != handles:
        return  # in a callback of the save that wrote what is there
    for handle in pending:
        if not handle.done():
            queue.refuse_endless_wait()
        futures.wait([handle])
    if loads:
        queue.raise_failed(real)


def wait(timeout: float | None = None) -> None:
    """Waits until every asynchronous save is done, and gives back the memory that was kept for them.

    Args:
        timeout: Seconds to wait at most.

    Raises:
        TimeoutError: When they are not done by then.
        UnsupportedError: In a callback of a save, while another waits for it.
        Exception: What went wrong with one of them, if neither its handle nor a later save has told.
    """
    finish(timeout, keep=False)


def finish(timeout: float | None = None, *, keep: bool = True) -> None:
    """As `wait`; with `keep` the memory stays for the next save."""
    queue = _queue
    with queue.changed:
        if queue.is_writer():  # in a callback of a save, which is done
            if queue.waiting is not None or queue.reserved or not (queue.writing and queue.writing.handle.done()):
                queue.refuse_endless_wait()
        else:
            idle = queue.changed.wait_for(lambda: queue.writing is None and not queue.reserved, timeout)
            if not idle:
                raise TimeoutError(f"Asynchronous saves are not done after {timeout} seconds.")
            if not queue.staged and not keep:
                queue.staging.memory = None
    queue.raise_failed()
