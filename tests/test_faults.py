"""Failures of the operating system, injected below the Rust I/O by a small preloaded library (`faults.c`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hornbeam

SOAK = bool(os.environ.get("HORNBEAM_SOAK"))
COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or COMPILER is None, reason="the library is for Linux, and C"
)

SCRIPT = r"""
import errno, gc, hashlib, itertools, json, logging, os, random, sys, threading
import keras, numpy as np
from keras import layers
import hornbeam
from hornbeam.saving import load_model, save_model, save_weights

root, times = sys.argv[1], int(sys.argv[2])
fault = os.environ["HORNBEAM_FAULT"]
logging.getLogger("hornbeam").setLevel(logging.CRITICAL)
inputs = keras.Input((300,))
model = keras.Model(inputs, layers.Dense(1)(layers.Dense(1000)(inputs)))

def fill(value):
    for variable in model.variables:
        variable.assign(np.full(variable.shape, value, "float32"))

def arm(text):
    with open(fault + ".new", "w") as file:
        file.write(text)
    os.replace(fault + ".new", fault)

def content(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).digest()

def values(path):
    if path.endswith(".keras"):
        loaded = load_model(path)
    else:
        model.load_weights(path)
        loaded = model
    return {float(v) for w in loaded.get_weights() for v in np.unique(w)}

def threads():
    return len(os.listdir("/proc/self/task"))

def descriptors():
    return len(os.listdir("/proc/self/fd"))

paths = [os.path.join(root, "m.keras"), os.path.join(root, "m.weights.h5")]
saves = {paths[0]: save_model, paths[1]: save_weights}
fill(1)
for path in paths:
    saves[path](model, path)
    saves[path](model, path, asynchronous=True).result()
hornbeam.wait()
before = {path: content(path) for path in paths}
held = {path: 1.0 for path in paths}
names = sorted(os.listdir(root))
faults = [("write", n, e) for n in (0, 1, 3) for e in (errno.ENOSPC, errno.EIO)]
faults += [("fsync", 1, errno.EIO), ("fsync", 1, errno.ENOSPC), ("fsync", 2, errno.EIO)]
faults += [("rename", 0, errno.EIO), ("rename", 1, errno.ENOSPC), ("truncate", 1, errno.EIO)]
faults += [("open", 0, errno.EMFILE), ("open", 0, errno.ENOSPC)]
combinations = list(itertools.product(faults, paths, (False, True)))
random.Random(5).shuffle(combinations)
start = None
failed = 0
for i in range(times):
    (function, n, number), path, asynchronous = combinations[i % len(combinations)]
    if i == 40:
        gc.collect()
        start = threads(), descriptors()
    fill(2 + i)
    arm(f"{function} {n} {number} {i}")
    try:
        with hornbeam.options(durable=True):
            handle = saves[path](model, path, asynchronous=asynchronous)
        if asynchronous:
            handle.result()
    except OSError as error:
        assert error.errno == number, (function, n, error)
        assert path in str(error), error
        failed += 1
        failure = (function, n)
    else:
        raise AssertionError(f"{function} {n} {number} failed nothing")
    finally:
        arm("none 0 0")
    if asynchronous:
        hornbeam.wait()  # everything was told
    assert sorted(os.listdir(root)) == names, os.listdir(root)
    if failure == ("fsync", 2):  # of the directory: the new file has taken its place, and is whole
        assert values(path) == {float(2 + i)}
        before[path], held[path] = content(path), float(2 + i)
    assert content(path) == before[path], (function, n)
    # The other path is as it was, and this one saves again.
    if i % 50 == 49:
        for path in paths:
            assert values(path) == {held[path]}
            fill(2 + i)
            saves[path](model, path)
            before[path], held[path] = content(path), float(2 + i)
gc.collect()
deadline = 600
while threads() > start[0] and deadline:  # a thread that was joined is gone a little later
    deadline -= 1
    os.sched_yield()
end = threads(), descriptors()
assert end[0] <= start[0] and end[1] <= start[1], (start, end)
assert not [t for t in threading.enumerate() if "hornbeam" in t.name]
print(json.dumps({"failed": failed}))
"""


def test_failing_saves_tell_and_leave_everything_as_it_was(tmp_path: Path) -> None:
    library, root = tmp_path / "faults.so", tmp_path / "root"
    source = Path(__file__).with_name("faults.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-lpthread"], check=True)
    root.mkdir()
    times = 1000 if SOAK else 112
    environment = {
        **os.environ,
        "KERAS_BACKEND": "numpy",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(Path(hornbeam.__file__).parent.parent),
        "LD_PRELOAD": str(library),
        "HORNBEAM_FAULT": str(tmp_path / "fault"),
    }
    command = [sys.executable, "-c", SCRIPT, str(root), str(times)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'"failed": {times}' in done.stdout
