"""A lock that a process holds on a file, and that ends with the process however it ends."""

from __future__ import annotations

import errno
import os
import stat
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

from hornbeam.base.counters import logger

#: What a file system without locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
#: Links are not followed, and pipes not waited for.
_CAREFULLY = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))


class FileLock:
    """An exclusive lock on a file of its own. It belongs to this object: another one, in this process too, is refused.

    The file stays when the lock is released: removing it would let two hold "the" lock. A forked child does not hold
    it.
    """

    def __init__(self, path: Path) -> None:
        """Takes the lock.

        Raises:
            BlockingIOError: Somebody holds it.
            OSError: The file cannot be made, or something stands there that is no file: a link, a pipe.
        """
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _CAREFULLY, 0o666)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.release()
            raise OSError(errno.EINVAL, "a lock must be a file; remove what stands there", os.fspath(path))
        try:
            _lock(self._descriptor)
        except BlockingIOError:
            self.release()
            raise
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.release()
                raise
            logger.warning("the file system has no locks: nothing keeps a second writer from '%s'", path.parent)
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether this process holds it."""
        return self._descriptor >= 0

    def release(self, *, _close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when the process ends
        """Gives it back."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            _close(descriptor)

    def __del__(self) -> None:
        self.release()  # closing the descriptor, which nothing else would


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget() -> None:
    for lock in list(_held):  # closing a copy of the descriptor leaves the parent's lock
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from None

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
