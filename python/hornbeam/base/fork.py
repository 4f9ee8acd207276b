"""Whether this process is a forked child.

A backend's threads are not there, but their queues are: what waits for them waits for ever, so nothing is started in a
child that its caller has not asked for.
"""

from __future__ import annotations

import os
import sys

#: `PF_FORKNOEXEC` of Linux' `sched.h`, in the ninth field of `/proc/self/stat`.
_FORKED_WITHOUT_EXEC = 0x40
_BACKENDS = ("tensorflow", "jax", "torch")
_child = False


def _mark() -> None:
    global _child
    _child = True


def _was_forked() -> bool:
    """Whether this process was forked before hornbeam was imported, and may have a backend of its parent's."""
    if not any(name in sys.modules for name in _BACKENDS):
        return False
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return bool(int(fields[6]) & _FORKED_WITHOUT_EXEC)
    except (OSError, ValueError, IndexError):  # another system
        return False


def is_child() -> bool:
    """Whether this process is a forked child, or a child of one."""
    return _child


_child = _was_forked()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark)
