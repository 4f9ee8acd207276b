"""Savers that are killed: a server forks one for each kill, which tells through a pipe when a save starts and ends.

For scripts with Keras' numpy backend, which has no threads, so that it may fork.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any


def kill(
    work: Callable[[Callable[[bytes], Any]], Any],
    rng: random.Random,
    once: float,
    *,
    starts: int,
    number: int = signal.SIGKILL,
) -> list[bytes]:
    """Forks a child that runs `work(tell)`, and kills it within a save.

    Args:
        work: Saves on and on, and calls `tell(b"start")` before each.
        rng: Chooses the moment.
        once: Seconds that a save takes.
        starts: The kill comes in one of the first so many saves.
        number: The signal; an interrupted `work` has to let the `KeyboardInterrupt` through.

    Returns:
        The words that it told.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(receive)
            work(lambda word: os.write(send, word + b"\n"))
        except KeyboardInterrupt:
            code = 42
        finally:
            os._exit(code)
    os.close(send)
    wanted, text = rng.randrange(1, starts + 1), b""
    while text.count(b"start\n") < wanted:
        byte = os.read(receive, 1)
        assert byte, "the child ended by itself"
        text += byte
    end = time.perf_counter() + rng.uniform(0, 1.2 * once)
    while time.perf_counter() < end:
        pass
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (42 if number == signal.SIGINT else -number), status
    while block := os.read(receive, 1000):
        text += block
    os.close(receive)
    return text.split()
