"""Saves and loads in a forked child of a process that has used TensorFlow.

TensorFlow's threads are not there, and what waits for them waits for ever. Each child has a time limit; a signal ends
what hangs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import keras
import pytest

import hornbeam
from support.helpers import script

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here"),
    pytest.mark.backend("tensorflow", reason="the parent uses it"),
]

#: When the child is forked.
MOMENTS = {
    "before TensorFlow is used": "import hornbeam, hornbeam.saving; ready = None",
    "after TensorFlow was used": "import hornbeam, hornbeam.saving; ready = small(); ready.predict(x, verbose=0)",
    "after stock Keras saved": "import hornbeam; ready = model(); ready.save(place / 'stock.keras')",
    "after a save of ours": "import hornbeam; ready = model(); hornbeam.saving.save_model(ready, place / 'ours.keras')",
    "after a load of ours": "import hornbeam; ready = hornbeam.saving.load_model(given / 'm.keras')",
    "inside installed()": "import hornbeam; hornbeam.install(); ready = model(); ready.save(place / 'ours.keras')",
    "before hornbeam is imported": "ready = model(); ready.save(place / 'stock.keras')",
}
#: What it does there: name → an expression that gives a model with the values of the given one.
OPERATIONS = {
    "load .keras": "hornbeam.saving.load_model(given / 'm.keras')",
    "load .h5": "hornbeam.saving.load_model(given / 'm.h5')",
    "load a directory": "hornbeam.saving.load_model(given / 'm')",
    "load weights .keras": "loaded('m.keras')",
    "load .weights.h5": "loaded('m.weights.h5')",
    "load legacy weights": "loaded('m.h5')",
    "load .safetensors": "loaded('m.safetensors')",
    "load shards": "loaded('m.weights.json')",
    "save .keras": "saved(hornbeam.saving.save_model, '.keras')",
    "save .h5": "saved(hornbeam.saving.save_model, '.h5')",
    "save .weights.h5": "saved(hornbeam.saving.save_weights, '.weights.h5')",
    "save .safetensors": "saved(hornbeam.saving.save_weights, '.safetensors')",
    "save shards": "saved(hornbeam.saving.save_weights, '.weights.json', max_shard_size=0.0005)",
    "save asynchronously": "saved(hornbeam.saving.save_model, '.keras', asynchronous=True)",
    "save with progress": "saved(hornbeam.saving.save_model, '.keras', progress=lambda now: None)",
    "stock Keras' names": "stock_names()",
    "pickle": "pickled()",
    "checkpoint": "checkpoint()",
}
#: What is enough where the moment differs in what was tried before the fork only.
FEW = ["load .keras", "load .h5", "load .safetensors", "save .keras", "save asynchronously"]
SCRIPT = """
import io, json, os, pickle, signal, sys
from pathlib import Path
os.environ["KERAS_BACKEND"] = "tensorflow"
import keras, numpy as np
given, place, moment, operations = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
x = np.zeros((1, 4), "float32")
small = lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])

def model():
    layers = [keras.Input((4,)), keras.layers.Dense(300), *(keras.layers.Dense(300 // (i + 2)) for i in range(40))]
    made = keras.Sequential(layers)
    made.compile("adam", "mse")
    made.optimizer.build(made.trainable_variables)
    return made

def blank():  # TensorFlow itself cannot fill a large tensor with random numbers in such a child
    return models.pop() if models else model()

def loaded(name):
    made = blank()
    hornbeam.saving.load_weights(made, given / name)
    return made

def saved(save, suffix, **how):
    path = place / f"child-{os.getpid()}{suffix}"
    save(loaded("m.weights.h5"), path, **how)
    hornbeam.wait()
    if save is hornbeam.saving.save_model:
        return hornbeam.saving.load_model(path)
    made = blank()
    hornbeam.saving.load_weights(made, path)
    return made

def stock_names():
    with hornbeam.installed():
        path = place / f"child-{os.getpid()}.keras"
        keras.models.load_model(given / "m.keras").save(path)
        return keras.models.load_model(path)

def pickled():
    with hornbeam.installed():
        return pickle.loads(pickle.dumps(loaded("m.weights.h5")))

def checkpoint():
    manager = hornbeam.CheckpointManager(place / f"checkpoints-{os.getpid()}")
    manager.save(1, loaded("m.weights.h5"))
    manager.save(2, loaded("m.safetensors"))
    made = blank()
    manager.restore(made)
    manager.close()
    return made

def weights(made):
    return [np.asarray(v).tobytes() for v in made.weights]

exec(moment)
models = [] if ready is None else [model() for _ in range(3)]
with np.load(given / "values.npz") as file:
    expected = [file[name].tobytes() for name in file.files]
found = {}
for name, operation in operations.items():
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            import hornbeam, hornbeam.saving
            same = weights(eval(operation)) == expected
            os._exit(0 if same else 2)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    found[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(found))
os._exit(0)
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every format, and its values."""
    import numpy as np

    place = tmp_path_factory.mktemp("given")
    layers = [keras.layers.Dense(300), *(keras.layers.Dense(300 // (i + 2)) for i in range(40))]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    hornbeam.saving.save_model(model, place / "m.keras")
    hornbeam.saving.save_model(model, place / "m.h5")
    hornbeam.saving.save_model(model, place / "m", zipped=False)
    hornbeam.saving.save_weights(model, place / "m.weights.h5")
    hornbeam.saving.save_weights(model, place / "m.safetensors")
    hornbeam.saving.save_weights(model, place / "m.weights.json", max_shard_size=0.0005)
    np.savez(place / "values.npz", *[np.asarray(v) for v in model.weights])
    return place


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_child_saves_and_loads(given: Path, tmp_path: Path, moment: str) -> None:
    """-14 is the alarm that ends a child which hangs."""
    names = OPERATIONS if moment == "after TensorFlow was used" else FEW
    operations = {name: OPERATIONS[name] for name in names}
    ran = script(SCRIPT, given, tmp_path, MOMENTS[moment], json.dumps(operations), timeout=900)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert found == dict.fromkeys(operations, 0), ran.stderr[-4000:]


@pytest.mark.parametrize(
    ("before", "forks", "tried"),
    [("", 0, True), ("", 1, False), ("", 2, False), ("asked()", 1, True)],
    ids=["no fork", "a child", "a child's child", "tried before the fork"],
)
def test_nothing_is_tried_in_a_child(before: str, forks: int, tried: bool) -> None:
    """Also no bar is drawn, which takes a thread; a callable of the caller's is called."""
    code = f"""
import os, sys, threading
import hornbeam
from hornbeam.base import progress
from hornbeam.base import trials

checked, told, inside = [], [], []
asked = trials.Tried("a shortcut", lambda: not checked.append(os.getpid()))
{before}
for _ in range({forks}):
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
sys.stderr.isatty = lambda: True
with progress.watch("load", "x", 1, lambda: 1):
    inside += [thread.name for thread in threading.enumerate()]
with hornbeam.options(progress=told.append), progress.watch("load", "x", 1, lambda: 1):
    pass
found = (asked(), len(checked), "hornbeam-progress" in inside, [p.done for p in told])
os._exit(0 if found == ({tried}, int({tried}), {forks == 0}, [1]) else 1)
"""
    ran = script(code, timeout=60)
    assert ran.returncode == 0, ran.stderr
