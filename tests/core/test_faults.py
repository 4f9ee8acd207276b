"""Failures of the operating system, injected below the Rust I/O by a small preloaded library (`faults.c`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.helpers import script

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


CHECKPOINTS = r"""
import errno, gc, itertools, json, logging, os, random, sys, threading
import keras, numpy as np
from keras import layers
import hornbeam
from hornbeam.callbacks import ModelCheckpoint, latest_checkpoint
from hornbeam.checkpoint import CheckpointManager
from hornbeam.saving import load_model

root, times = sys.argv[1], int(sys.argv[2])
fault = os.environ["HORNBEAM_FAULT"]
logging.getLogger("hornbeam").setLevel(logging.CRITICAL)
model = keras.Sequential([keras.Input((30,)), layers.Dense(100), layers.Dense(1)])

def fill(value):
    for variable in model.variables:
        variable.assign(np.full(variable.shape, value, "float32"))

def held(loaded):
    (value,) = {float(v) for w in loaded.get_weights() for v in np.unique(w)}
    return value

def arm(text):
    with open(fault + ".new", "w") as file:
        file.write(text)
    os.replace(fault + ".new", fault)

def threads():
    return len(os.listdir("/proc/self/task"))

def descriptors():
    return len(os.listdir("/proc/self/fd"))

class Callback:
    def __init__(self, name, asynchronous):
        self.pattern = os.path.join(root, name, "{epoch}.keras")
        self.made = ModelCheckpoint(self.pattern, "loss", asynchronous=asynchronous, keep_last=2)
        self.made.set_model(model)
        self.made.on_train_begin()

    def save(self, i):
        self.made.on_epoch_begin(i)
        self.made.on_epoch_end(i, {"loss": 1.0})
        hornbeam.wait()

    def newest(self):
        return held(load_model(latest_checkpoint(self.pattern)))

    def left(self):
        names = os.listdir(os.path.dirname(self.pattern))
        assert sorted(n for n in names if n[0] == ".") == [".{epoch}.keras.checkpoints.json", ".{epoch}.keras.lock"]
        return len(names) - 2

class Manager:
    def __init__(self, name, asynchronous):
        self.made = CheckpointManager(os.path.join(root, name), asynchronous=asynchronous, keep_last=2).__enter__()

    def save(self, i):
        self.made.save(i, model)
        self.made.wait()

    def newest(self):
        CheckpointManager(self.made.directory).restore(model)
        return held(model)

    def left(self):
        names = os.listdir(self.made.directory)
        assert sorted(n for n in names if not n.startswith("step-")) == [".lock", "checkpoints.json"]
        return len(names) - 2

kinds = {f"{c.__name__}-{a}": c(f"{c.__name__}-{a}", a) for c in (Callback, Manager) for a in (False, True)}
committed = {}
for name, kind in kinds.items():
    for i in (0, 1):
        fill(1)
        kind.save(i)
    committed[name] = 1.0
faults = [("write", n, e) for n in (0, 1, 2, 3) for e in (errno.ENOSPC, errno.EIO)]
faults += [("fsync", n, errno.EIO) for n in range(1, 9)] + [("open", n, errno.EMFILE) for n in range(3)]
faults += [("rename", n, errno.EIO) for n in range(3)]
combinations = list(itertools.product(faults, kinds))
random.Random(6).shuffle(combinations)
start, failed = None, 0
for i in range(2, times + 2):
    (function, n, number), name = combinations[i % len(combinations)]
    kind = kinds[name]
    if i == 60:
        gc.collect()
        start = threads(), descriptors()
    fill(i)
    arm(f"{function} {n} {number} {i}")
    try:
        kind.save(i)
    except OSError as error:
        assert error.errno == number, (function, n, error)
        failed += 1
        possible = {committed[name], float(i)}  # the old one, or the new one where that was in its place already
    else:
        possible = {float(i)}
    finally:
        arm("none 0 0")
    committed[name] = kind.newest()
    assert committed[name] in possible, (name, function, n, committed[name], possible)
    kind.left()  # old ones stay until a save succeeds
for name, kind in kinds.items():  # and all go on
    fill(0)
    kind.save(times + 2)
    assert kind.newest() == 0.0
    assert kind.left() == 2
gc.collect()
deadline = 600
while threads() > start[0] and deadline:  # a thread that was joined is gone a little later
    deadline -= 1
    os.sched_yield()
end = threads(), descriptors()
assert end[0] <= start[0] and end[1] <= start[1], (start, end)
assert failed > times // 2, failed
print(json.dumps({"tried": times, "failed": failed}))
"""


SYNCED = r"""
import logging, os, signal, sys
import keras
from keras import layers
from keras.src.saving import saving_lib
import hornbeam
from hornbeam.callbacks import ModelCheckpoint
from hornbeam.checkpoint import CheckpointManager
from hornbeam.saving import save_model, save_weights

os.chdir(sys.argv[1])

class Asset(layers.Layer):
    def call(self, x):
        return x

    def save_assets(self, directory):
        os.makedirs(os.path.join(directory, "inner"))
        for name in ("a", "inner/b"):
            with open(os.path.join(directory, name), "w") as file:
                file.write(name)

inputs = keras.Input((3,))
model = keras.Model(inputs, layers.Dense(1)(Asset()(inputs)))

def callback(path, **how):
    made = ModelCheckpoint(path, monitor="loss", **how)
    made.set_model(model)
    made.on_train_begin()
    made.on_epoch_begin(0)
    made.on_epoch_end(0, {"loss": 1.0})
    return made

def replaced(path, **how):
    class Store(saving_lib.H5IOStore):
        pass

    original, saving_lib.H5IOStore = saving_lib.H5IOStore, Store
    try:
        save_model(model, path, **how)
    finally:
        saving_lib.H5IOStore = original

def manage(path, **how):
    with CheckpointManager(path, **how) as manager:
        manager.save(1, model)

def legacy(path):
    simple = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    save_model(simple, path)

os.makedirs("there/d")
for name in ("m.keras", "m.weights.h5"):  # the first is replaced, the second written over
    with open("there/" + name, "w") as file:
        file.write("old" if name == "m.keras" else "")
ways = [
    lambda: save_model(model, "there/m.keras"),
    lambda: save_weights(model, "there/m.weights.h5"),
    lambda: save_weights(model, "there/m.safetensors"),
    lambda: save_model(model, "new/on/the/way", zipped=False),
    lambda: save_model(model, "there/d", zipped=False),
    lambda: legacy("far/away/m.h5"),
    lambda: callback("stock/callback/{epoch}.keras"),
    lambda: callback("our/callback/{epoch}.keras", keep_last=1),
    lambda: callback("our/async/{epoch}.keras", asynchronous=True).on_train_end(),
    lambda: callback("rescue/d/m.keras", save_on_exception=True)._rescue(0, 0, None, "exception"),
    lambda: manage("a/manager/of"),
    lambda: manage("an/async/manager", asynchronous=True, save_weights_only=False),
    lambda: replaced("there/handed.keras"),
    lambda: replaced("there/handed", zipped=False),
]

def there():
    found = [os.path.join(top, name) for top, inner, names in os.walk(".") for name in [*inner, *names]]
    return {(os.stat(path).st_ino, os.path.isfile(path) and os.path.getsize(path)): path for path in found}

for i, way in enumerate(ways):
    before = there()
    with open(os.environ["HORNBEAM_SYNCED"], "w"), hornbeam.options(durable=True):
        way()
    with open(os.environ["HORNBEAM_SYNCED"]) as file:
        synced = {int(line) for line in file}
    new = {key[0]: path for key, path in there().items() if key not in before}
    for inode, path in new.items():
        if not path.endswith(".lock"):  # nothing is in it
            assert inode in synced, (i, path)
            assert os.stat(os.path.dirname(path)).st_ino in synced, (i, path)
    assert new, i
assert hornbeam.stats().handovers
print("all of it")
"""


REPLACING = r"""
import errno, hashlib, logging, os, sys
import keras, numpy as np
from keras import layers
import hornbeam
from hornbeam.saving import load_model, save_model

root = sys.argv[1]
fault = os.environ["HORNBEAM_FAULT"]
logger, records = logging.getLogger("hornbeam"), []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logger.addHandler(Keep())
model = keras.Sequential([keras.Input((300,)), layers.Dense(1000)])
path = os.path.join(root, "m.keras")

def fill(value):
    for variable in model.variables:
        variable.assign(np.full(variable.shape, value, "float32"))

def held(path):
    (value,) = {float(v) for w in load_model(path).get_weights() for v in np.unique(w)}
    return value

def arm(text):
    with open(fault + ".new", "w") as file:
        file.write(text)
    os.replace(fault + ".new", fault)

def save(value, *faults, asynchronous=False):
    fill(value)
    records.clear()
    arm(" ".join(map(str, [*faults, value])) if faults else "none 0 0")
    try:
        handle = save_model(model, path, asynchronous=asynchronous)
        if asynchronous:
            handle.result()
    finally:
        arm("none 0 0")

def refused(number, value, *faults):
    before, names = open(path, "rb").read(), sorted(os.listdir(root))
    try:
        save(value, *faults)
    except OSError as error:
        assert error.errno == number and path in str(error), error
    else:
        raise AssertionError(faults)
    return before, names

value = 1
save(value)
# A refusal of the replacement: over the old file, with a warning, whatever the number of the call.
for number in (errno.EPERM, errno.EACCES, errno.EXDEV, errno.EBUSY, errno.ENOTSUP, errno.EOPNOTSUPP):
    for calls, asynchronous in ((1, False), (0, False), (0, True)):
        value += 1
        inode = os.stat(path).st_ino
        save(value, "rename", calls, number, asynchronous=asynchronous)
        assert os.stat(path).st_ino == inode and held(path) == value
        assert any("wrote over" in r and path in r for r in records), records
        assert os.listdir(root) == ["m.keras"], os.listdir(root)
# A full or failing disk, or one that is read-only by now: an error, and the old file.
for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM):
    before, names = refused(number, -1, "rename", 0, number)
    assert open(path, "rb").read() == before and sorted(os.listdir(root)) == names
# The copy fails half way: the complete new file stays, and the error names it.
with open(path, "rb+") as file:
    for number in (errno.ENOSPC, errno.EIO):
        value += 1
        try:
            save(value, "copy", 0, number)
        except OSError as error:
            (kept,) = [n for n in os.listdir(root) if n != "m.keras"]
            kept = os.path.join(root, kept)
            assert error.errno == number and kept in str(error) and path in str(error), error
        else:
            raise AssertionError("copied")
        os.link(kept, os.path.join(root, "whole.keras"))
        assert held(os.path.join(root, "whole.keras")) == value
        os.remove(os.path.join(root, "whole.keras"))
        # A save that fails leaves it there, one that is complete does not.
        refused(errno.EIO, -1, "write", 0, errno.EIO)
        assert os.path.exists(kept)
        value += 1
        save(value)
        assert held(path) == value and os.listdir(root) == ["m.keras"]
# An empty one is empty again.
with open(path, "wb") as file:
    refused(errno.ENOSPC, -1, "copy", 0, errno.ENOSPC)
    assert os.path.getsize(path) == 0 and os.listdir(root) == ["m.keras"], os.listdir(root)
    save(5)
    assert held(path) == 5
# Mode and owner are told when they are lost, and no more.
os.chmod(path, 0o606)
for function, what, expected in (("fchmod", "its mode", 0o644), ("none", None, 0o644)):
    save(6, function, 0, errno.EPERM)
    assert held(path) == 6
    assert [r for r in records if "could not be kept" in r] == ([r for r in records if what in r] if what else [])
    assert bool(records) == bool(what), records
if os.geteuid() == 0:
    os.chown(path, 12345, 12345)
    save(7, "fchown", 0, errno.EPERM)
    assert held(path) == 7 and any("its owner or group" in r for r in records), records
assert os.listdir(root) == ["m.keras"]
print("all of it")
"""


KILLED = r"""
import errno, itertools, os, re, signal, sys
import keras, numpy as np
from keras import layers
import hornbeam
from hornbeam.saving import load_model, load_weights, save_model, save_weights

root = sys.argv[1]
fault = os.environ["HORNBEAM_FAULT"]
model = keras.Sequential([keras.Input((300,)), layers.Dense(1000)])

def fill(value):
    for variable in model.variables:
        variable.assign(np.full(variable.shape, value, "float32"))

def held(path):
    if path.endswith(".keras"):
        loaded = load_model(path)
    else:
        fill(-1)
        load_weights(model, path)
        loaded = model
    (value,) = {float(v) for w in loaded.get_weights() for v in np.unique(w)}
    return value

def arm(text):
    with open(fault + ".new", "w") as file:
        file.write(text)
    os.replace(fault + ".new", fault)

def read(path):
    with open(path, "rb") as file:
        return file.read()

def killed(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

saves = {"m.keras": save_model, "m.weights.h5": save_weights}
value = 0
for (name, save), empty, asynchronous, durable in itertools.product(saves.items(), *[(False, True)] * 3):
    path = os.path.join(root, name)
    value += 1
    fill(value)
    save(model, path)
    value += 1
    fill(value)
    with open(path, "wb" if empty else "rb+") as file:
        old, inode = read(path), os.fstat(file.fileno()).st_ino
        arm(f"copy 1 {-signal.SIGKILL} {value}")

        def work():
            with hornbeam.options(durable=durable):
                handle = save(model, path, asynchronous=asynchronous)
                if asynchronous:
                    handle.result()

        killed(work)
        arm("none 0 0")
        # Inside the copy: the target is half the one and half the other.
        (kept,) = [n for n in os.listdir(root) if n != name]
        assert re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{24}}\.complete\.hornbeam-tmp", kept), kept
        kept = os.path.join(root, kept)
        new, half = read(kept), os.path.getsize(kept) // 2
        assert read(path) == new[:half] + old[half:] and os.stat(path).st_ino == inode
        # Nothing is lost: the complete file is what was saved, and no save that fails takes it.
        whole = os.path.join(root, f"whole-{name}")
        os.link(kept, whole)
        assert held(whole) == value
        os.remove(whole)
        arm(f"write 0 {errno.EIO}")
        try:
            save(model, path)
        except OSError as error:
            assert error.errno == errno.EIO, error
        else:
            raise AssertionError("written")
        arm("none 0 0")
        assert read(kept) == new
        # The next that is complete does.
        value += 1
        fill(value)
        save(model, path)
        assert held(path) == value and os.listdir(root) == [name] and os.stat(path).st_ino == inode
    os.remove(path)
print("all of it")
"""


def run(code: str, root: Path, *arguments: str) -> str:
    """Runs a script above the library; gives what it prints."""
    library, inside = root / "faults.so", root / "root"
    source = Path(__file__).with_name("faults.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-lpthread"], check=True)
    inside.mkdir()
    files = {"HORNBEAM_FAULT": str(root / "fault"), "HORNBEAM_SYNCED": str(root / "synced")}
    preload = {"LD_PRELOAD": str(library), "KERAS_BACKEND": "numpy"}
    done = script(code, inside, *arguments, timeout=1500, **files, **preload)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_failing_saves_tell_and_leave_everything_as_it_was(tmp_path: Path) -> None:
    times = 1000 if SOAK else 112
    assert f'"failed": {times}' in run(SCRIPT, tmp_path, str(times))


def test_failing_checkpoints_leave_the_newest(tmp_path: Path) -> None:
    times = 1000 if SOAK else 112
    assert f'"tried": {times}' in run(CHECKPOINTS, tmp_path, str(times))


def test_everything_that_is_new_reaches_stable_storage(tmp_path: Path) -> None:
    assert "all of it" in run(SYNCED, tmp_path)


def test_what_cannot_be_replaced_is_written_over_and_never_lost(tmp_path: Path) -> None:
    assert "all of it" in run(REPLACING, tmp_path)


def test_a_kill_inside_the_copy_over_a_target_leaves_the_complete_file(tmp_path: Path) -> None:
    assert "all of it" in run(KILLED, tmp_path)
