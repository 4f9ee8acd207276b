"""Absurd arguments to the core: an exception that Python code may expect, never a panic, a wrap or a hang."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hornbeam import _core
from support.helpers import script

posix = pytest.mark.skipif(os.name != "posix", reason="no pipes in directories")

NUMBERS = [0, 1, 2, 5, 63, 64, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**59, 2**60, 2**60 + 1, 2**63 - 1, 2**63]
NUMBERS += [2**64 - 1, 2**64, 2**70, -1, -(2**63), -(2**70)]
#: What bad arguments raise. A `PanicException` is no `Exception`.
EXPECTED = (ValueError, TypeError, OverflowError, IndexError, KeyError, MemoryError, OSError, RuntimeError)


def call(function: Callable[[], Any]) -> Any:
    error: Exception | None = None
    try:
        return function()
    except EXPECTED as raised:
        error = raised
    assert "panicked" not in str(error), error
    return None


class Generous(io.BytesIO):
    """Returns more than was asked for."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(-1 if size is None or size < 0 else size + 8)


def written(path: Path) -> bytes:
    plan = _core.plan([], [("a", "float32", [2], []), ("b", "float32", [0], [])], engine="direct")
    save = plan.start(str(path), [np.ones(2, "float32").view("uint8"), np.zeros(0, "uint8")], archive=True)
    save.finish([])
    return path.read_bytes()


def test_numbers_of_every_size(tmp_path: Path) -> None:
    choose = random.Random(15).choice
    content = written(tmp_path / "m.keras")
    for _ in range(2000):
        shape = [choose(NUMBERS) for _ in range(choose([0, 1, 2, 3, 33]))]
        datasets = [
            (f"{i}", choose(["float32", "uint8", "bool", "complex128"]), shape, []) for i in range(choose([1, 40]))
        ]
        compression = choose([None, None, *NUMBERS])
        engine = "auto" if compression is not None else choose(["direct", "safetensors"])
        plan: Any = call(
            lambda d=datasets, e=engine, c=compression: _core.plan(
                [], d, engine=e, compression=c, chunk_bytes=choose(NUMBERS)
            )
        )
        if plan is None:
            continue
        call(lambda p=plan: (p.nbytes, p.weights_end(True), p.weights_end(False)))
        if plan.nbytes <= 1 << 16:
            buffers = [np.zeros(plan.nbytes // len(datasets), "uint8")] * len(datasets)
            target = choose([io.BytesIO(), bytearray(choose([0, 1, 4096]))])
            save = call(
                lambda p=plan, b=buffers, t=target: p.start(t, b, archive=choose([True, False]), base=choose(NUMBERS))
            )
            call(lambda s=save: s is None or s.finish([]))
    for number in NUMBERS:
        file = _core.open(content, archive=True)
        call(lambda f=file, n=number: f.check_expansion(None, n, n))
        call(lambda n=number: _core.encode_json({"n": n, str(n): [n, float(n)]}))
        call(lambda n=number: _core.plan([("g", [("a", (n, [b"x"] * 3))])], []))


def test_a_file_object_that_returns_more_than_asked(tmp_path: Path) -> None:
    content = written(tmp_path / "m.keras")
    with pytest.raises(OSError, match="more bytes than were asked for"):
        _core.open(Generous(content), archive=True)


@posix
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """In a process of its own: it would hang."""
    done = script(
        """
import os, signal, sys
import keras, pytest
from keras import layers
import hornbeam
from hornbeam import _core
from hornbeam.saving import load_model, load_weights, save_model, save_weights

root = sys.argv[1]
model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])

class Interrupted(Exception):
    pass

def interrupt(*_):
    raise Interrupted

signal.signal(signal.SIGALRM, interrupt)  # Python waits for a pipe in stock Keras' code, until a signal comes
refused = pytest.raises((OSError, ValueError, Interrupted))
for suffix in (".keras", ".weights.h5", ".safetensors", ".h5"):
    path = os.path.join(root, "pipe" + suffix)
    os.mkfifo(path)
    for use in (load_model, lambda path: load_weights(model, path)):
        signal.setitimer(signal.ITIMER_REAL, 1, 1)
        with refused:
            use(path)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if suffix in (".weights.h5", ".safetensors"):
        with pytest.raises(OSError):
            save_weights(model, path)
os.symlink("elsewhere", os.path.join(root, "link"))
os.mkfifo(os.path.join(root, "pipe"))
for name in ("link", "pipe"):
    with pytest.raises(OSError):
        _core.FileLock(os.path.join(root, name))
assert not os.path.exists(os.path.join(root, "elsewhere"))
# A leftover's name in the directory of a save.
for number in range(3):
    os.mkfifo(os.path.join(root, f".m.keras.{number:016x}.hornbeam-tmp"))
save_model(model, os.path.join(root, "m.keras"))
print("all of it")
""",
        tmp_path,
        timeout=120,
    )
    assert "all of it" in done.stdout, done.stderr[-3000:]


@posix
def test_a_forked_child_holds_no_lock_of_its_parent(tmp_path: Path) -> None:
    done = script(
        """
import os, sys
from hornbeam import _core

lock = _core.FileLock(sys.argv[1] + "/lock")
told, answer = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    ok = not lock.held
    os.write(answer[1], b"?")
    os.read(told[0], 1)  # while this process lives, the parent gives the lock back, and takes it again
    del lock
    try:
        _core.FileLock(sys.argv[1] + "/lock")
        ok = False
    except BlockingIOError:
        pass
    os._exit(0 if ok else 1)
os.read(answer[0], 1)
assert lock.held
lock.release()
again = _core.FileLock(sys.argv[1] + "/lock")
os.write(told[1], b"!")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert again.held and not lock.held
print("all of it")
""",
        tmp_path,
        timeout=60,
    )
    assert "all of it" in done.stdout, done.stderr[-3000:]
