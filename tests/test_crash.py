"""Killed while saving: what is there is the old or the new file, whole, and the next save clears up.

A server with Keras' numpy backend (no threads, so it may fork) forks a saver for each kill. Saver and server share a
pipe: the saver says when a save starts and when it is done, the server kills it some microseconds after a start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hornbeam

SERVER = r"""
import json, os, random, signal, sys, time, zipfile
import keras, numpy as np
from keras import layers
import hornbeam

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
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            while True:
                step += 1
                fill(step)
                os.write(send, b"start\n")
                save()
                os.write(send, b"%d\n" % step)
        except KeyboardInterrupt:
            os._exit(42)
        finally:
            os._exit(1)
    os.close(send)
    wanted = rng.randrange(1, 4)
    text = b""
    while text.count(b"start\n") < wanted:
        text += os.read(receive, 1)
    end = time.perf_counter() + rng.uniform(0, 1.2 * once)
    while time.perf_counter() < end:
        pass
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    if number == signal.SIGKILL:
        assert os.WIFSIGNALED(status), status
    else:
        assert os.waitstatus_to_exitcode(status) == 42, status
    while block := os.read(receive, 1000):
        text += block
    os.close(receive)
    told = int([b"%d" % step, *(word for word in text.split() if word != b"start")][-1])
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


def serve(form: str, root: Path, kills: int, number: int) -> Any:
    source = Path(hornbeam.__file__).parent.parent
    environment = {**os.environ, "KERAS_BACKEND": "numpy", "PYTHONPATH": str(source), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", SERVER, form, str(root), str(kills), str(number)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("form", "kills"), [("archive", 30), ("weights", 15), ("directory", 15)])
def test_a_killed_save_leaves_the_old_or_the_new(form: str, kills: int, tmp_path: Path) -> None:
    root = tmp_path / "only"
    root.mkdir()
    found = serve(form, root, kills, 9)
    assert len(found["seen"]) >= kills
    assert found["left"] >= 3, found


def test_an_interrupted_save_leaves_nothing_at_all(tmp_path: Path) -> None:
    root = tmp_path / "only"
    root.mkdir()
    assert len(serve("archive", root, 10, 2)["seen"]) == 10
