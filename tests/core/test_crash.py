"""Killed while saving: what is there is the old or the new file, whole, and the next save clears up.

A server forks a saver for each kill (`kills.py`), which comes some microseconds after the start of a save.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.helpers import script

SERVER = r"""
import json, os, random, signal, sys, time, zipfile
import keras, numpy as np
from keras import layers
import hornbeam
from support.kills import kill

form, root, kills, number = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
suffix = {"archive": "m.keras", "weights": "m.weights.h5", "directory": "m"}[form]
path = os.path.join(root, suffix)
hornbeam.install()
inputs = keras.Input((500,))
model = keras.Model(inputs, layers.Dense(300)(layers.Dense(2000)(layers.Dense(900)(inputs))))

def fill(step):
    for variable in model.variables:
        variable.assign(np.full(variable.shape, step, "float32"))

def save():
    if form == "weights":
        model.save_weights(path)
    else:
        model.save(path, zipped=form == "archive")

def step_of_file():
    # Whole by its own checksums, and every value of one and the same step.
    if form == "archive":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert sorted(archive.namelist()) == ["config.json", "metadata.json", "model.weights.h5"]
    if form == "directory":
        assert sorted(os.listdir(path)) == ["assets", "config.json", "metadata.json", "model.weights.h5"]
        json.load(open(os.path.join(path, "config.json")))
    if form == "weights":
        model.load_weights(path)
        loaded = model
    else:
        loaded = keras.models.load_model(path)
    found = {float(v) for variable in loaded.variables for v in np.unique(np.asarray(variable.value))}
    assert len(found) == 1, found
    return found.pop()

rng = random.Random(11)
step = 1
fill(step)
save()
started = time.perf_counter()
save()
once = time.perf_counter() - started
left, seen = 0, []
# On until some kills have hit between the making of a temporary file and its renaming.
while len(seen) < kills or (number == signal.SIGKILL and left < 3 and len(seen) < 20 * kills):
    def work(tell):
        global step
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        while True:
            step += 1
            fill(step)
            tell(b"start")
            save()
            tell(b"%d" % step)

    words = kill(work, rng, once, starts=3, number=number)
    told = int([b"%d" % step, *(word for word in words if word != b"start")][-1])
    step = int(step_of_file())
    assert step in (told, told + 1), (step, told)
    seen.append(step - told)
    names = sorted(os.listdir(root))
    assert suffix in names
    if number == signal.SIGINT:
        assert names == [suffix], names
    left += len(names) > 1
    step += 1
    fill(step)
    save()  # clears what the kill left, and is itself whole
    assert os.listdir(root) == [suffix], os.listdir(root)
    assert step_of_file() == step
print(json.dumps({"left": left, "seen": seen}))
"""


CALLBACK = r"""
import json, os, random, signal, sys, time
import keras, numpy as np
from keras import layers
import hornbeam
from hornbeam.callbacks import ModelCheckpoint, best_checkpoint, latest_checkpoint
from hornbeam.saving import load_model
from support.kills import kill

form, root, kills, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
retention = "retention" in form
pattern = os.path.join(root, "m-{epoch}.keras" if retention else "m.keras")
how = {"asynchronous": "async" in form, "durable": "durable" in form, "keep_last": 2}
if retention:
    how["keep_best"] = 1
inputs = keras.Input((500,))
model = keras.Model(inputs, layers.Dense(300)(layers.Dense(2000)(layers.Dense(900)(inputs))))

def score(step):
    return random.Random(step).random()

class Told(ModelCheckpoint):
    tell = staticmethod(lambda word: None)

    def _confirm(self, record, *rest):
        super()._confirm(record, *rest)
        self.tell(b"%d" % record["step"])

def save(callback, step):
    for variable in model.variables:
        variable.assign(np.full(variable.shape, step, "float32"))
    callback.on_epoch_begin(step - 1)
    callback.on_epoch_end(step - 1, {"val_loss": score(step)})

def begin():
    callback = Told(pattern, **how)
    callback.set_model(model)
    callback.on_train_begin()
    return callback

def step_of(path):
    found = {float(v) for w in load_model(path).get_weights() for v in np.unique(w)}
    assert len(found) == 1, found
    return int(found.pop())

def files():
    return sorted(n for n in os.listdir(root) if not n.endswith((".json", ".lock")))

rng = random.Random(seed)
known = {}  # step -> score of every one that was ever seen committed
callback = begin()
save(callback, 1)
started = time.perf_counter()
save(callback, 2)
callback.on_train_end()
once = time.perf_counter() - started
step, left, newer = 2, 0, 0
for _ in range(kills):
    def work(tell):
        global step
        callback = begin()
        callback.tell = tell
        while True:
            step += 1
            tell(b"start")
            save(callback, step)

    words = kill(work, rng, once, starts=4)
    told = max([step, *(int(word) for word in words if word != b"start")])
    last = step + words.count(b"start")  # the last that can have begun
    latest = latest_checkpoint(pattern)
    found = step_of(latest)
    assert told <= found <= last, (told, found, last)
    newer += found > told
    left += any(n.endswith("-tmp") for n in files())
    if retention:
        assert int(os.path.basename(latest)[2:-6]) == found
        best = best_checkpoint(pattern)
        name = int(os.path.basename(best)[2:-6])
        assert step_of(best) == name
        low = min(range(1, found + 1), key=score)  # of all that were ever committed
        assert name == low, (name, low, found)
    step = found + 1
    callback = begin()
    save(callback, step)  # clears what the kill left
    callback.on_train_end()
    latest = latest_checkpoint(pattern)
    assert step_of(latest) == step
    names = files()
    if retention:
        low = min(range(1, step + 1), key=score)
        assert {f"m-{step}.keras", f"m-{low}.keras"} <= set(names)
        for name in names:
            assert name.endswith("-tmp") or step_of(os.path.join(root, name)) == int(name[2:-6]), name
        assert len([n for n in names if not n.endswith("-tmp")]) <= 3, names
    else:
        assert names == ["m.keras"], names
print(json.dumps({"kills": kills, "left": left, "newer": newer, "step": step}))
"""


def run_server(code: str, *arguments: Any) -> Any:
    done = script(code, *arguments, timeout=3000 if SOAK else 240, KERAS_BACKEND="numpy")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


#: `make soak`: as many kills and failures as the campaigns are for; a short version with fixed seeds otherwise.
SOAK = bool(os.environ.get("HORNBEAM_SOAK"))


@pytest.mark.parametrize("form", ["sync", "async", "async retention", "durable async retention"])
def test_a_killed_callback_leaves_the_newest_committed(form: str, tmp_path: Path) -> None:
    """Also with saves pending, files being deleted and the account being written."""
    kills = 100 if SOAK else 8
    found = run_server(CALLBACK, form, tmp_path, kills, 7 if SOAK else 3)
    assert found["kills"] == kills
    if SOAK:
        assert found["left"] >= 3  # some hit while a file was written


@pytest.mark.parametrize(("form", "kills"), [("archive", 30), ("weights", 15), ("directory", 15)])
def test_a_killed_save_leaves_the_old_or_the_new(form: str, kills: int, tmp_path: Path) -> None:
    root = tmp_path / "only"
    root.mkdir()
    kills = 100 if SOAK else kills
    found = run_server(SERVER, form, root, kills, 9)
    assert len(found["seen"]) >= kills
    assert found["left"] >= 3, found


def test_an_interrupted_save_leaves_nothing_at_all(tmp_path: Path) -> None:
    root = tmp_path / "only"
    root.mkdir()
    assert len(run_server(SERVER, "archive", root, 10, 2)["seen"]) == 10
