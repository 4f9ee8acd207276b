"""Memory that changes while it is saved, and how much of it a save and a load take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers

import hornbeam
from support.helpers import saved
from support.zoo import ZOO, chain

MB = 1 << 20
TENSORFLOW = keras.backend.backend() == "tensorflow"


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of an archive whose checksums are right."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        found: dict[str, np.ndarray] = {}
        with archive.open("model.weights.h5") as member, h5py.File(member, "r") as file:

            def visit(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset):
                    found[name] = item[()]

            file.visititems(visit)
        return found


class Busy(threading.Thread):
    """Changes a model again and again until it is told to stop."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change
        self.steps = 0
        self.error: BaseException | None = None
        self.running = threading.Event()
        self.stop = threading.Event()

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                self.change(self.steps)
                self.steps += 1
                self.running.set()
        except BaseException as error:
            self.error = error
            self.running.set()

    def __enter__(self) -> Busy:
        self.start()
        self.running.wait()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        self.join()
        assert self.error is None, self.error


def save(model: Any, path: Path) -> None:
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.save(path)


@pytest.mark.backend("tensorflow", reason="assigns TensorFlow variables")
@pytest.mark.parametrize("how", ["assign", "assign_add", "swap"])
def test_every_tensor_is_one_that_existed(how: str, tmp_path: Path) -> None:
    model = chain(layers.Dense(1500), layers.Dense(1000), layers.Dense(30), shape=(800,))
    variables = [v.value for v in model.weights]
    for variable in variables:
        variable.assign(np.zeros(variable.shape))

    def change(step: int) -> None:
        for variable in variables:
            if how == "assign":
                variable.assign(np.full(variable.shape, step + 1, "float32"))
            elif how == "assign_add":
                variable.assign_add(np.ones(variable.shape, "float32"))
            else:  # without a new memory, where TensorFlow sees that it may
                variable.assign_sub(np.full(variable.shape, -1, "float32"))

    seen = set()
    with Busy(change) as busy:
        for i in range(12):
            before = busy.steps
            save(model, tmp_path / "m.keras")
            after = busy.steps
            found = tensors(tmp_path / "m.keras")
            assert len(found) == 6
            for name, array in found.items():
                assert array.min() == array.max(), f"{name} is torn in save {i}"
                assert before <= array.flat[0] <= after + 1, name
            seen.add(float(found["layers/dense/vars/0"].flat[0]))
    assert len(seen) > 3  # it did change meanwhile


@pytest.mark.backend("tensorflow", reason="makes sparse updates of TensorFlow variables")
def test_sparse_updates_while_saving(tmp_path: Path) -> None:
    """Rows are updated in place, one after another: a tensor may be between two steps, but is never changed once it
    has passed the checksum, and holds no value that was not there."""
    import tensorflow as tf

    rows, width = 20_000, 64
    model = chain(layers.Embedding(rows, width), shape=(2,), dtype="int32")
    optimizer = keras.optimizers.SGD(1.0)
    embeddings = model.layers[1].embeddings
    optimizer.build([embeddings])
    embeddings.assign(np.zeros((rows, width), "float32"))
    gradient = tf.IndexedSlices(-tf.ones((rows, width)), tf.range(rows), (rows, width))

    with Busy(lambda _: optimizer.apply([gradient], [embeddings])) as busy:
        for _ in range(25):
            before = busy.steps
            save(model, tmp_path / "m.keras")
            after = busy.steps
            [array] = tensors(tmp_path / "m.keras").values()
            assert np.array_equal(array, np.round(array))
            assert before <= array.min() <= array.max() <= after + 1
    assert float(embeddings.value[0, 0]) == busy.steps  # no update was lost


@pytest.mark.trains
def test_saves_during_training_hold_whole_tensors(tmp_path: Path) -> None:
    model = chain(layers.Dense(300), layers.Dense(1), shape=(200,))
    model.compile("adam", "mse")
    x, y = np.ones((512, 200), "float32"), np.ones((512, 1), "float32")
    model.fit(x, y, verbose=0)

    class Saves(keras.callbacks.Callback):
        count = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            save(self.model, tmp_path / "m.keras")  # on JAX this brings the values back to the model
            assert all(np.isfinite(array).all() for array in tensors(tmp_path / "m.keras").values())
            Saves.count += 1

    model.fit(x, y, batch_size=128, verbose=0, callbacks=[Saves()])
    assert Saves.count == 4
    save(model, tmp_path / "m.keras")
    assert saved(keras.models.load_model(tmp_path / "m.keras")) == saved(model)


def test_arrays_that_are_refilled_after_they_were_stored(tmp_path: Path) -> None:
    model, _, _ = ZOO["custom_state"]()
    save(model, tmp_path / "m.keras")
    found = tensors(tmp_path / "m.keras")
    [table] = [array for name, array in found.items() if name.endswith("/table")]
    [other] = [array for name, array in found.items() if name.endswith("/other")]
    np.testing.assert_array_equal(table, model.layers[1].tables[0])
    assert other.min() == other.max() == -1


def run(code: str, *arguments: str, backend: str) -> Any:
    """Runs `code` in a process of its own; gives what it printed last, which is JSON."""
    source = Path(hornbeam.__file__).parent.parent
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(source), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


IN_PLACE = r"""
import io, json, sys, threading, zipfile
import h5py, keras, numpy as np
from keras import layers
import hornbeam
from hornbeam.values import on_tensorflow
from hornbeam.values import tensors

path = sys.argv[1]
inputs = keras.Input((4_000_000,))
model = keras.Model(inputs, layers.Dense(1, use_bias=False)(inputs))
[array] = [v.value for v in model.weights]
assert type(array) is np.ndarray
fills = [np.full(array.shape, i, "float32").tobytes() for i in range(10)]
stop, running = threading.Event(), threading.Event()

def change():
    # One call in C that does not let go of the interpreter, over the memory that the model goes on using.
    step = 0
    while not stop.is_set():
        memoryview(array).cast("B")[:] = fills[step % 10]
        step += 1
        running.set()

thread = threading.Thread(target=change)
thread.start()
running.wait()
torn, values = 0, set()
for _ in range(100):  # what a save takes of a variable: many times, for a copy that lets go is torn once in ten
    copy = tensors.view(model.weights[0]).array()
    torn += copy.min() != copy.max()
hornbeam.install()
for _ in range(5):
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        image = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(image, "r") as file:
        found = file["layers/dense/vars/0"][()]
    low, high = float(found.min()), float(found.max())
    torn += low != high
    values.add(low)
torn = int(torn)
stop.set()
thread.join()
print(json.dumps({"torn": torn, "values": len(values), "handovers": dict(hornbeam.stats().handovers)}))
"""


def test_memory_that_is_changed_in_place(tmp_path: Path) -> None:
    """The numpy backend updates the arrays themselves, as torch does: they are copied, each in one go."""
    found = run(IN_PLACE, str(tmp_path / "m.keras"), backend="numpy")
    assert found["handovers"] == {}
    assert found["values"] > 1
    assert found["torn"] == 0


MEASURE = r"""
import gc, json, os, sys
import keras, numpy as np
from keras import layers
import hornbeam

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) << 10

def peak(action):
    "Bytes above those before, at the highest point of `action`; and those above them afterwards; and its result."
    gc.collect()
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    result = action()
    highest = status("VmHWM")
    return highest - before, status("VmRSS") - before, result

hornbeam.install()
root = sys.argv[1]
"""

PEAK = f"""{MEASURE}
small = keras.Sequential([keras.Input((4,)), layers.Dense(3)])  # everything that is imported on the way
small.save(os.path.join(root, "s.keras")); keras.models.load_model(os.path.join(root, "s.keras"))
small.load_weights(os.path.join(root, "s.keras"))
found = {{}}
path = os.path.join(root, "m.keras")
inputs = keras.Input((2500,))
x = inputs
for _ in range(12):
    x = layers.Dense(2500)(x)  # 25 MB each, 300 MB in all
model = keras.Model(inputs, x)
found["model"] = sum(v.value.numpy().nbytes for v in model.weights)
found["save"], *_ = peak(lambda: model.save(path))
weights = os.path.join(root, "m.weights.h5")
found["save_weights"], *_ = peak(lambda: model.save_weights(weights))
found["load_weights"], *_ = peak(lambda: model.load_weights(path))
found["load_weights_file"], *_ = peak(lambda: model.load_weights(weights))
del model, x, inputs
keras.backend.clear_session()
highest, finished, loaded = peak(lambda: keras.models.load_model(path))
found["load"], found["loaded"] = highest - finished, finished
del loaded
keras.backend.clear_session()
gc.collect()

tokens = keras.Input((2,), dtype="int32")
model = keras.Model(tokens, layers.Embedding(600_000, 128)(tokens))  # 300 MB in one tensor
model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
model.fit(np.zeros((4, 2), "int32"), np.zeros((4, 2, 128), "float32"), verbose=0)
found["embedding"], *_ = peak(lambda: model.save(path))
found["embedding again"], *_ = peak(lambda: model.save(path))
print(json.dumps(found))
"""


@pytest.mark.backend("tensorflow", reason="measures TensorFlow models")
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells the highest point")
def test_peak_memory(tmp_path: Path) -> None:
    found = {name: nbytes / MB for name, nbytes in run(PEAK, str(tmp_path), backend="tensorflow").items()}
    largest, model = 2500 * 2500 * 4 / MB, found["model"]
    assert model > 280
    # TensorFlow lends its memory, so nothing has to be copied.
    for name in ("save", "save_weights", "embedding", "embedding again"):
        assert found[name] <= 32, found
    assert found["load"] <= largest + 64, found
    assert found["loaded"] <= model + 64, found  # the finished model holds its tensors once
    for name in ("load_weights", "load_weights_file"):
        assert found[name] <= model + 64, found


LARGE = f"""{MEASURE}
import mmap
from hornbeam.values import on_tensorflow
from hornbeam.values import tensors

COUNT, SIZE = 12, (1 << 27) + 1  # of float32: half a gigabyte and a little each

def pages(shape, dtype):
    "Zeros that take no memory until they are changed; TensorFlow shares them."
    memory = np.frombuffer(mmap.mmap(-1, shape[0] * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), "float32")
    memory[-1] = next(numbers)
    return on_tensorflow.share(memory)

@keras.saving.register_keras_serializable("test_memory")
class Large(layers.Layer):
    def build(self, shape):
        for i in range(COUNT):
            self.add_weight(shape=(SIZE,), initializer=pages if numbers else "zeros", name=str(i))

    def call(self, x):
        return x

path = os.path.join(root, "large.keras")
found = {{}}
if sys.argv[2] == "save":
    numbers = iter(range(1, COUNT + 1))
    model = keras.Sequential([keras.Input((4,)), Large(), layers.Dense(2)])
    before = status("VmRSS")
    found["model"] = before
    found["extra"], *_ = peak(lambda: model.save(path))
else:
    numbers = None
    highest, finished, model = peak(lambda: keras.models.load_model(path))
    found["model"], found["extra"] = finished, highest - finished
    found["last"] = [float(v.value[-1]) for v in model.layers[0].weights]
    found["zero"] = [bool(np.all(v.value.numpy()[:-1] == 0)) for v in model.layers[0].weights[:: COUNT - 1]]
found["handovers"] = dict(hornbeam.stats().handovers)
print(json.dumps(found))
"""


@pytest.mark.backend("tensorflow", reason="measures TensorFlow models")
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells the highest point")
def test_six_gigabytes(tmp_path: Path) -> None:
    """More than 32 bits count, in both directions, in little memory; and other tools find their way."""
    path = tmp_path / "large.keras"
    if shutil.disk_usage(tmp_path).free < 8 << 30:
        pytest.skip("there are not 8 GB of disk for this file")
    found = run(LARGE, str(tmp_path), "save", backend="tensorflow")
    assert found["handovers"] == {}
    assert found["extra"] <= 32 * MB, found
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("model.weights.h5")
        assert info.file_size == info.compress_size > 6 << 30
        assert archive.getinfo("config.json").header_offset > 6 << 30
        assert archive.read("config.json")  # whose CRC is compared; that of the rest, when it is loaded
    tool = shutil.which("unzip")
    if tool is not None:
        listed = subprocess.run([tool, "-l", path], capture_output=True, text=True, check=True)
        assert str(info.file_size) in listed.stdout
    found = run(LARGE, str(tmp_path), "load", backend="tensorflow")
    path.unlink()
    assert found["handovers"] == {}
    assert found["last"] == list(range(1, 13))
    assert all(found["zero"])
    assert found["model"] <= (6 << 30) + 200 * MB, found
    assert found["extra"] <= 513 * MB + 64 * MB, found
