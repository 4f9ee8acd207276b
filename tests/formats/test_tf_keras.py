"""`tf_keras` as it is installed beside Keras 3: each reads what the other wrote. Runs where it is.

It has a process of its own, in which there is neither Keras 3 nor hornbeam.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format

import hornbeam
from hornbeam.saving import load_model, load_weights, save_model
from support.helpers import script

FOUND = importlib.util.find_spec("tf_keras")  # not imported: this process is that of Keras 3
pytestmark = pytest.mark.skipif(FOUND is None, reason="tf_keras is not installed")


def build(package: Any) -> Any:
    """A model of either package."""
    layers = package.layers
    inputs = package.Input((6, 4), name="x")
    x = layers.Conv1D(3, 2, activation="relu", name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.LSTM(3, name="lstm")(x)
    head = [layers.Dense(4, activation="tanh", name="first"), layers.Dense(2, name="second")]
    model = package.Model(inputs, package.Sequential([package.Input((3,)), *head], name="head")(x), name="whole")
    model.compile(package.optimizers.Adam(0.05), "mse")
    return model


PEER = f"""
import sys
sys.modules["keras"] = sys.modules["hornbeam"] = None
from pathlib import Path
import numpy as np, tf_keras
from typing import Any

{inspect.getsource(build)}

def record(model, **more):
    found = {{f"w{{i:02}}": w for i, w in enumerate(model.get_weights())}}
    return {{**found, "y": model(x).numpy(), **more}}

root = Path(sys.argv[1])
x = np.load(root / "x.npy")
model = build(tf_keras)
model.fit(x, np.ones((len(x), 2)), batch_size=2, epochs=2, verbose=0)
slots = {{f"o{{i:02}}": v.numpy() for i, v in enumerate(model.optimizer.variables)}}
np.savez(root / "wrote.npz", **record(model, **slots))
for name in ("m.keras", "m.h5"):
    model.save(root / name)
for name in ("w.weights.h5", "w.h5"):
    model.save_weights(root / name)

for name in ("ours", "stock", "weights"):
    for by_name in (False, True):
        model = build(tf_keras)
        model.load_weights(root / f"{{name}}.h5", by_name=by_name)
        np.savez(root / f"read_{{name}}_{{by_name}}.npz", **record(model))
print(tf_keras.__version__)
"""


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Files of both, and the model that is in ours."""
    assert FOUND is not None
    assert FOUND.origin is not None
    root = tmp_path_factory.mktemp("tf_keras")
    rng = np.random.default_rng(3)
    np.save(root / "x.npy", rng.random((6, 6, 4), "float32"))
    model = build(keras)
    for variable in model.weights:
        variable.assign(rng.random(variable.shape, "float32"))
    save_model(model, root / "ours.h5")
    model.save(root / "stock.h5")
    with h5py.File(root / "weights.h5", "w") as file:  # of weights alone, as Keras 2 has them
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    done = script(PEER, root, PYTHONPATH=str(Path(FOUND.origin).parents[1]))
    assert done.returncode == 0, done.stderr
    return root, model


def recorded(path: Path, letter: str) -> list[np.ndarray]:
    with np.load(path) as file:
        return [file[name] for name in sorted(file) if name.startswith(letter)]


def bits(arrays: Any) -> list[tuple[tuple[int, ...], bytes]]:
    """Sorted: Keras 3 has weights, and slots, in an order of its own. Counts may be of another type."""
    found = [np.asarray(keras.ops.convert_to_numpy(a)) for a in arrays]
    return sorted((a.shape, a.tobytes()) for a in found if a.ndim)


def check(model: Any, wrote: Path, x: np.ndarray) -> None:
    assert bits(model.weights) == bits(recorded(wrote, "w"))
    answers = keras.ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(answers, *recorded(wrote, "y"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["m.keras", "m.h5"])
def test_models_of_tf_keras(name: str, peer: tuple[Path, Any]) -> None:
    root, _ = peer
    with hornbeam.options(fallback=False):
        model = load_model(root / name)
    check(model, root / "wrote.npz", np.load(root / "x.npy"))
    assert int(model.optimizer.iterations) == 6
    slots = bits(recorded(root / "wrote.npz", "o"))
    assert len(slots) == 2 * len(model.trainable_variables)
    assert bits(model.optimizer.variables) == slots
    assert any(np.any(keras.ops.convert_to_numpy(v)) for v in model.optimizer.variables[2:])


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")  # as stock Keras does
@pytest.mark.parametrize("name", ["w.weights.h5", "w.h5", "m.keras", "m.h5"])
def test_weights_of_tf_keras(name: str, peer: tuple[Path, Any]) -> None:
    root, _ = peer
    model = build(keras)
    with hornbeam.options(fallback=False):
        report = load_weights(model, root / name)
    assert (report.engine, report.mismatched) == ("direct", [])
    assert sorted(report.missing) in ([], [f"{model.optimizer.name}/{name}" for name in ("iteration", "learning_rate")])
    check(model, root / "wrote.npz", np.load(root / "x.npy"))


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("name", ["ours", "stock", "weights"])
def test_tf_keras_reads_weights(name: str, by_name: bool, peer: tuple[Path, Any]) -> None:
    """Our files as it reads stock Keras'."""
    root, model = peer
    check(model, root / f"read_{name}_{by_name}.npz", np.load(root / "x.npy"))
