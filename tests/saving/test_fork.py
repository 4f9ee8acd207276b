"""Every object that has a thread or a lock, after a fork: dropped, used and closed, in the child and in the parent.

Each case runs in a process of its own, under a time limit, and forks 40 times (200 in `make soak-forks`) while the
object's threads work. A child that hangs, panics or dies is a failure; so is a parent whose object no longer does what
it is for.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.helpers import script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

FORKS = 200 if os.environ.get("HORNBEAM_SOAK") else 40

_START = r"""
import gc, os, signal, sys, time, traceback, warnings
import numpy as np
from hornbeam import _core
warnings.filterwarnings("ignore", message=".*fork.*")
root = sys.argv[1]
FORKS, LIMIT = int(os.environ["FORKS"]), 20

def forked(child, n):
    "Runs `child` in a fork, n steps of the loop after now; ends with its status."
    x = 0
    for i in range(997 * (n % 40)):  # so that the threads are elsewhere each time
        x += i
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT)
        try:
            child()
            gc.collect()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"child {n} ended with {status}"

def refused(use):
    "In the child, an error of ours that says so."
    from hornbeam.errors import HornbeamError
    try:
        use()
    except HornbeamError as error:
        assert "process" in str(error), error
    else:
        raise AssertionError("it works in the child")

def written(name, tensors, engine="direct", **how):
    rows = [(f"x{i:02}", "float32", list(t.shape), []) for i, t in enumerate(tensors)]
    save = _core.plan([], rows, engine=engine, **how).start(f"{root}/{name}", list(tensors), archive=False)
    return save

tensors = [np.full(1 << 18, i, "f4") for i in range(24)]
written("a.h5", tensors).finish([])
file = _core.open(f"{root}/a.h5", archive=False)
"""

_READING = r"""
weights = file.weights(engine="direct")
for n in range(FORKS):
    reading = weights.fetch(list(range(24)), verify=True, read_ahead=[1 << 40, 1 << 21][n % 2])
    first = reading.take(3)
    def child():
        global reading, first
        USE
        del reading, first
    forked(child, n)
    assert np.frombuffer(first, "f4")[7] == 3
    assert np.frombuffer(reading.take(20), "f4")[-1] == 20
    reading.complete(drop_rest=bool(n % 3))
    del reading, first
"""

CASES = {
    "a read is dropped": _READING.replace("USE", "pass"),
    "a read is used": _READING.replace(
        "USE",
        "assert reading.done == 0 and reading.nbytes == 24 << 20\n"
        "        refused(lambda: reading.take(5))\n"
        "        refused(reading.complete)\n"
        "        refused(lambda: reading.complete(drop_rest=True))",
    ),
    "what was taken stays": _READING.replace("USE", "assert (np.frombuffer(first, 'f4') == 3).all()"),
    "a file that was opened before is read anew": _READING.replace(
        "USE",
        "again = weights.fetch([1], verify=False, read_ahead=0)\n"
        "        assert np.frombuffer(again.take(1), 'f4')[0] == 1\n"
        "        assert np.frombuffer(weights.read(2, 0, 4), 'f4') == [2]",
    ),
    "a read is dropped in the parent first": r"""
weights = file.weights(engine="direct")
for n in range(FORKS):
    reading = weights.fetch(list(range(24)), verify=True, read_ahead=1 << 40)
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT)
        del reading
        gc.collect()
        os._exit(0)
    del reading
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
""",
    "a read of chunks": r"""
written("z.h5", tensors, engine="auto", compression=1, shuffle=False, chunk_bytes=1 << 16).finish([])
chunks = _core.open(f"{root}/z.h5", archive=False).weights(engine="auto")
for n in range(FORKS):
    reading = chunks.fetch([0, 1, 2], verify=False, read_ahead=0)
    if n % 2:
        reading.take(0)
    def child():
        global reading
        refused(lambda: reading.take(1))
        del reading
        if n % 4 == 0:
            again = chunks.fetch([2], verify=False, read_ahead=0)
            assert np.frombuffer(again.take(2), "f4")[9] == 2
            assert np.frombuffer(chunks.read(1, 8, 16), "f4").tolist() == [1, 1]
    forked(child, n)
    assert np.frombuffer(reading.take(2), "f4")[9] == 2
    del reading
""",
    "a save is dropped": r"""
for n in range(FORKS):
    save = written("b.h5", tensors)
    def child():
        global save
        del save
    forked(child, n)
    save.finish([])
assert open(f"{root}/b.h5", "rb").read() == open(f"{root}/a.h5", "rb").read()
""",
    "a save is cancelled": r"""
for n in range(FORKS):
    save = written("b.h5", tensors)
    def child():
        refused(lambda: save.finish([]))
        save.cancel()
    forked(child, n)
    save.finish([])
assert open(f"{root}/b.h5", "rb").read() == open(f"{root}/a.h5", "rb").read()
""",
    "a compressed save is dropped, and another made": r"""
how = {"engine": "auto", "compression": 1, "shuffle": False, "chunk_bytes": 1 << 16}
few = tensors[:3]
for n in range(FORKS):
    save = written("b.h5", few, **how)
    def child():
        global save
        save.cancel()
        del save
        if n % 4 == 0:
            written("c.h5", few, **how).finish([])
            made = _core.open(f"{root}/c.h5", archive=False).weights(engine="auto")
            assert np.frombuffer(made.read(2, 0, 4), "f4") == [2]
    forked(child, n)
    save.finish([])
made = _core.open(f"{root}/b.h5", archive=False).weights(engine="auto")
assert np.frombuffer(made.read(2, 0, 1 << 20), "f4").tolist() == [2] * (1 << 18)
""",
    "a directory is dropped": r"""
for n in range(FORKS):
    directory = _core.Directory(f"{root}/d{n}", ["a"])
    open(os.path.join(directory.path, "a"), "w").close()
    def child():
        global directory
        directory.__exit__() if n % 2 else None
        del directory
    forked(child, n)
    directory.commit()
    assert os.listdir(f"{root}/d{n}") == ["a"]
""",
    "an opened file": r"""
import hornbeam
opened = hornbeam.open(f"{root}/a.h5")
for n in range(FORKS):
    def child():
        if n % 2:
            assert opened["x05"][3] == 5
        opened.close()
    forked(child, n)
    assert opened["x07"][3] == 7
opened.close()
""",
    "a save in the background, and its handle": r"""
import keras, hornbeam
model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(4000)])
for n in range(FORKS):
    handle = hornbeam.saving.save_model(model, f"{root}/m.keras", asynchronous=True)
    def child():
        assert handle.done()
        error = handle.exception()  # none, if it was done before the fork
        assert error is None or "parent process" in str(error), error
        hornbeam.wait()
    forked(child, n)
    handle.result()
model = hornbeam.saving.load_model(f"{root}/m.keras")
""",
    "a checkpoint manager": r"""
import keras
from hornbeam.checkpoint import CheckpointManager
model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(4000)])
with CheckpointManager(f"{root}/ckpt", asynchronous=True) as manager:
    for n in range(FORKS):
        manager.save(n, model)
        forked(manager.close if n % 2 else lambda: None, n)
    manager.wait()
    assert manager.latest().step == FORKS - 1
""",
    "whole loads": r"""
import keras, hornbeam
model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(400)])
hornbeam.saving.save_model(model, f"{root}/m.keras")
model.save_weights(f"{root}/m.weights.h5")
for n in range(FORKS // 10):  # a child that builds models takes a second
    weights = file.weights(engine="direct")
    reading = weights.fetch(list(range(24)), verify=True, read_ahead=1 << 40)
    def child():
        loaded = hornbeam.saving.load_model(f"{root}/m.keras")
        assert (np.asarray(loaded.weights[0]) == np.asarray(model.weights[0])).all()
        hornbeam.saving.load_weights(model, f"{root}/m.weights.h5")
    forked(child, n)
    del reading
""",
}


@pytest.mark.parametrize("case", CASES)
def test_forks(tmp_path: Path, case: str) -> None:
    code = _START + CASES[case] + "\nprint('all is well')"
    done = script(code, tmp_path, timeout=6 * FORKS, KERAS_BACKEND="numpy", FORKS=str(FORKS))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all is well"
    for word in ("panicked", "terminate unexpectedly"):
        assert word not in done.stderr
