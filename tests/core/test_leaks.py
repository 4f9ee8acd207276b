"""Loads and saves by the hundred grow nothing: memory, descriptors, threads, temporary files.

Each kind runs in a process of its own. The second half of the rounds is compared with the first, so that caches and
what is imported at the first use do not count.
"""

from __future__ import annotations

import os
import sys

import pytest

from support.helpers import script

ROUNDS = 50
#: The long campaign has so many times the rounds.
LONGER = 40 if os.environ.get("HORNBEAM_SOAK") else 1
#: Bytes that a round may grow by. A tensor of a round has 360 KB: one of them kept every third time shows.
SLACK = 100 << 10

KINDS = {
    "keras": "save_model(model, root + '/m.keras'); load_model(root + '/m.keras')",
    "keras into memory": "f = io.BytesIO(); saving_lib.save_model(model, f); f.seek(0); saving_lib.load_model(f)",
    "compressed": "save_model(model, root + '/m.keras', compression=1); load_model(root + '/m.keras')",
    "weights": "save_weights(model, root + '/m.weights.h5'); load_weights(model, root + '/m.weights.h5')",
    "part": "save_weights(model, root + '/m.weights.h5'); load_weights(model, root + '/m.weights.h5', only='*kernel')",
    "h5": "save_model(model, root + '/m.h5'); load_model(root + '/m.h5')",
    "safetensors": "save_weights(model, root + '/m.safetensors'); load_weights(model, root + '/m.safetensors')",
    "shards": "p = root + '/m.weights.json'; save_weights(model, p, max_shard_size=5e-4); load_weights(model, p)",
    "directory": "save_model(model, root + '/m', zipped=False); load_model(root + '/m')",
    "open": """
p = root + '/m.keras'
os.path.exists(p) or save_model(model, p)
for mmap in (False, True):
    with hornbeam.open(p, mmap=mmap) as f:
        f.verify(), f.config, [f[n].sum() for n in f], copy.deepcopy(f)
""",
    "asynchronous": """
h = save_model(model, root + '/m.keras', asynchronous=True)
save_weights(model, root + '/m.weights.h5', asynchronous=True)
h.add_done_callback(lambda _: None), h.result(), hornbeam.wait()
""",
    "deepcopy": "copy.deepcopy(model)",
    "pickle": "pickle.loads(pickle.dumps(model))",
    "manager": """
for asynchronous in (False, True):
    with CheckpointManager(root + '/c', keep_last=2, asynchronous=asynchronous, durable=False) as m:
        m.save(i, model, extra={'a': np.ones(1000)}), m.restore(model)
""",
    "failed loads": """
p = root + '/m.weights.h5'
os.path.exists(p) or save_weights(model, p)
for what in (lambda: load_weights(other, p), lambda: load_model(p[:-3]), lambda: hornbeam.open(root)):
    try:
        what()
    except Exception:
        pass
    else:
        raise AssertionError
""",
    "failed saves": """
bad = keras.Sequential([keras.Input((4,)), keras.layers.Dense(300)])
bad.layers[0].get_config = lambda: {'name': object()}
for what in (
    lambda: save_model(bad, root + '/m.keras'),
    lambda: save_model(bad, root + '/m.keras', asynchronous=True),
    lambda: save_model(model, root + '/none/m.keras'),
):
    try:
        what()
    except Exception:
        pass
    else:
        raise AssertionError
""",
    "callbacks": """
c = ModelCheckpoint(root + '/m.weights.h5', 'loss', save_weights_only=True, asynchronous=True, keep_last=1,
                    durable=False, save_on_exception=True)
trained.fit(x, y, verbose=0, callbacks=[copy.deepcopy(c), BackupAndRestore(root + '/b', durable=False)])
""",
    "savedmodel": "save_model(model, root + '/saved'); load_model(root + '/saved')",
}
#: Rounds of what takes long, and what of memory is not ours: TensorFlow keeps the functions that it traces.
SLOW = {"savedmodel": (6, 8 << 20), "callbacks": (20, 1 << 20)}
#: Kinds that some backends do not have.
MARKS = {"callbacks": pytest.mark.trains, "savedmodel": pytest.mark.backend("tensorflow")}

CODE = """
import copy, ctypes, gc, io, os, pickle, sys, tempfile, threading, warnings
import numpy as np, keras, hornbeam
from keras.src.saving import saving_lib
from hornbeam.callbacks import BackupAndRestore, ModelCheckpoint
from hornbeam.checkpoint import CheckpointManager
from hornbeam.saving import load_model, load_weights, save_model, save_weights

warnings.simplefilter("ignore")
root, rounds, body = sys.argv[1], int(sys.argv[2]), compile(sys.argv[3], "round", "exec")
os.mkdir(root + "/tmp")
tempfile.tempdir = root + "/tmp"
hornbeam.install()
inputs = keras.Input((300,))
model = keras.Model(inputs, keras.layers.Dense(300)(keras.layers.Dense(300)(inputs)))
other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
trained = keras.Sequential([keras.Input((4,)), keras.layers.Dense(300), keras.layers.Dense(1)])
trained.compile("adam", "mse")
x, y = np.ones((32, 4)), np.ones((32, 1))
try:
    trim = ctypes.CDLL(None).malloc_trim
except AttributeError:
    trim = None


def state():
    for _ in range(3):
        gc.collect()
    if trim:
        trim(0)
    for thread in threading.enumerate():
        if thread.name.startswith("hornbeam"):
            thread.join(60)
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    left = [n for n in os.listdir(root) if "hornbeam-" in n]
    left += [n for n in os.listdir(root + "/tmp") if not n.startswith("__autograph")]  # TensorFlow's, till the end
    descriptors, tasks = (len(os.listdir("/proc/self/" + name)) for name in ("fd", "task"))
    return resident, descriptors, tasks, threading.active_count(), left


names, found = dict(globals()), []
for i in range(rounds):
    exec(body, {**names, "i": i})
    keras.utils.clear_session() if i % 10 == 9 else None
    if i + 1 in (rounds // 2, rounds):
        found.append(state())
print("found", found)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=MARKS.get(kind, ())) for kind in KINDS])
def test_nothing_grows(kind: str, tmp_path: object) -> None:
    rounds, slack = SLOW.get(kind, (ROUNDS, SLACK))
    rounds *= LONGER
    done = script(CODE, tmp_path, rounds, KINDS[kind], timeout=240 * LONGER)
    assert done.returncode == 0, done.stderr
    first, last = eval(done.stdout.partition("found ")[2])
    half = rounds - rounds // 2
    print(f"{kind}: {(last[0] - first[0]) / half:.0f} bytes a round, of {first[0] / 1e6:.0f} MB")
    assert last[0] - first[0] <= slack * half, f"{(last[0] - first[0]) / half:.0f} bytes a round"
    assert last[1] <= first[1], "descriptors"
    assert last[2] <= first[2] + 2, "threads of the system"  # the backend's pools may still grow
    assert last[3] <= first[3], "threads"
    assert last[4] == [], "temporary files"
