"""The SavedModel format: what is written, what stands without Keras, what loads back, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import hornbeam
import hornbeam.models
from hornbeam.errors import InvalidError, StorageError, UnsupportedError
from hornbeam.saving import load_model, save_model
from support.helpers import member, saved, state

tf = pytest.importorskip("tensorflow", reason="SavedModels are written by TensorFlow")

PACKAGE = str(Path(hornbeam.__file__).parent.parent)
#: Prints what an artifact answers, in a process that has no Keras.
SERVE = """
import sys
for name in ("keras", "tf_keras", "jax", "hornbeam"):
    sys.modules[name] = None  # TensorFlow imports the first and the third by itself, where they are
import numpy as np, tensorflow as tf
x = np.load(sys.argv[2])
artifact = tf.saved_model.load(sys.argv[1])
answers = artifact.signatures["serving_default"](tf.constant(x))
np.savez(sys.argv[3], direct=artifact.serve(x), signature=next(iter(answers.values())), n=len(artifact.variables))
assert not {n for n, module in sys.modules.items() if module and n.partition(".")[0] in ("keras", "tf_keras", "jax")}
"""


def served(path: Path, x: np.ndarray, tmp_path: Path) -> Any:
    """What `serve` and `serving_default` answer in a process without Keras."""
    np.save(tmp_path / "x.npy", x)
    env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    command = [sys.executable, "-c", SERVE, str(path), str(tmp_path / "x.npy"), str(tmp_path / "answers.npz")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return np.load(tmp_path / "answers.npz")


def trained(seed: int = 0) -> tuple[Any, np.ndarray, np.ndarray]:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,))
    x = keras.layers.Dense(8, activation="relu")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.5, seed=3)(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    model.compile("adam", "mse", metrics=["mae"])
    x, y = np.random.rand(32, 4).astype("float32"), np.random.rand(32, 2).astype("float32")
    model.fit(x, y, epochs=2, verbose=0)
    return model, x, y


def ask(path: Path, x: Any) -> Any:
    artifact = tf.saved_model.load(str(path))  # its functions work as long as it is there
    return artifact.serve(x)


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_standard_savedmodel_and_the_whole_model_beside_it(tmp_path: Path) -> None:
    model, x, y = trained()
    save_model(model, tmp_path / "m")
    assert {p.name for p in tmp_path.iterdir()} == {"m"}
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        *("saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra")
    }
    assert tf.saved_model.contains_saved_model(str(tmp_path / "m"))
    answers = served(tmp_path / "m", x, tmp_path)
    expected = np.asarray(model(x))
    np.testing.assert_allclose(answers["direct"], expected, atol=1e-6)
    np.testing.assert_array_equal(answers["signature"], answers["direct"])
    assert answers["n"] == len(model.variables)

    loaded = load_model(tmp_path / "m", strict=True)
    report = hornbeam.last_report("load")
    assert report.complete
    assert report.crc == "verified"
    assert report.path == str(tmp_path / "m" / "assets.extra" / "model.keras")
    assert saved(loaded) == saved(model)
    assert type(loaded.optimizer) is type(model.optimizer)
    for m in (loaded, model):  # the same seed state, and one more step
        m.layers[3].seed_generator.state.assign([1, 2])
        m.train_on_batch(x, y)
    assert saved(loaded) == saved(model)


def test_the_archive_inside_is_what_a_keras_save_writes(tmp_path: Path) -> None:
    model, *_ = trained()
    save_model(model, tmp_path / "m")
    model.save(tmp_path / "stock.keras")
    inside = tmp_path / "m" / "assets.extra" / "model.keras"
    with zipfile.ZipFile(inside) as ours, zipfile.ZipFile(tmp_path / "stock.keras") as stock:
        assert sorted(ours.namelist()) == sorted(stock.namelist())
    assert member(inside, "config.json") == member(tmp_path / "stock.keras", "config.json")
    assert saved(keras.models.load_model(inside)) == saved(model)  # stock Keras


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("m", {}), ("m", {"save_format": "tf"}), ("m.tf", {"save_format": "tf"}), ("v1.2", {"save_format": "tensorflow"})],
)
def test_the_ways_to_ask_for_it(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    model, *_ = trained()
    with hornbeam.installed():
        model.save(tmp_path / name, **arguments)
        assert saved(keras.models.load_model(str(tmp_path / name))) == saved(model)
        keras.saving.save_model(model, str(tmp_path / f"again-{name}"), **arguments)
    hornbeam.models.save_model(model, f"{tmp_path / 'third'}-{name}", **arguments)
    for path in tmp_path.iterdir():
        assert tf.saved_model.contains_saved_model(str(path))
        assert saved(hornbeam.models.load_model(path)) == saved(model)


def test_what_keras_refuses_is_refused_and_what_it_takes_is_taken(tmp_path: Path) -> None:
    model, *_ = trained()
    with hornbeam.installed():
        for name, arguments, text in [
            ("m.foo", {}, "Invalid filepath extension"),
            ("m", {"save_format": "keras"}, "`save_format` argument is deprecated"),
            ("m", {"zipped": True}, "Invalid filepath extension"),
            ("m", {"nonsense": 1}, "not supported"),
            ("m", {"save_format": "tf", "signatures": None}, "not supported"),
        ]:
            with pytest.raises(ValueError, match=text):
                model.save(tmp_path / name, **arguments)
        assert list(tmp_path.iterdir()) == []
        model.save(tmp_path / "m.keras", save_format="tf")  # the name decides there, with Keras' warning
        model.save(tmp_path / "directory", zipped=False)
        assert zipfile.is_zipfile(tmp_path / "m.keras")
        assert (tmp_path / "directory" / "config.json").exists()
        assert saved(keras.models.load_model(tmp_path / "directory")) == saved(model)
    with pytest.raises(ValueError, match="Invalid filepath extension"):
        model.save(tmp_path / "m")  # not installed


def test_an_old_one_stays_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = trained()
    save_model(model, tmp_path / "m")
    before, weights = files(tmp_path / "m"), saved(model)
    other, *_ = trained(seed=1)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(tf.saved_model, "save", fails)
        with pytest.raises(RuntimeError, match="no space"):
            save_model(other, tmp_path / "m")
    assert files(tmp_path / "m") == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    with pytest.raises(ValueError, match="not supported"):
        save_model(other, tmp_path / "m", nonsense=1)
    assert files(tmp_path / "m") == before
    warm = tmp_path / "m" / "assets.extra" / "tf_serving_warmup_requests"
    warm.write_text("mine")
    with hornbeam.options(durable=True):
        save_model(other, tmp_path / "m")
    assert warm.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert saved(load_model(tmp_path / "m")) == saved(other) != weights
    np.testing.assert_allclose(ask(tmp_path / "m", x), np.asarray(other(x)), atol=1e-6)
    with hornbeam.options(atomic=False):
        save_model(model, tmp_path / "m")
    assert saved(load_model(tmp_path / "m")) == weights


def test_what_else_stands_there_is_left_alone(tmp_path: Path) -> None:
    model, *_ = trained()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text.txt").write_text("mine")
    with pytest.raises(InvalidError, match=r"holds what is no part of a SavedModel \('text.txt'\)"):
        save_model(model, tmp_path / "notes")
    model.save(tmp_path / "keras", zipped=False)
    with pytest.raises(InvalidError, match=r"config\.json"):
        save_model(model, tmp_path / "keras")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="A SavedModel is a directory, and a file stands there"):
        save_model(model, tmp_path / "file")
    (tmp_path / "d.keras").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        save_model(model, tmp_path / "d.keras")
    assert isinstance(raised.value, StorageError)
    assert (tmp_path / "notes" / "text.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"notes", "keras", "file", "d.keras"}


def test_overwriting_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, *_ = trained()
    save_model(model, tmp_path / "m", overwrite=False)
    before = files(tmp_path / "m")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    save_model(model, tmp_path / "m", overwrite=False)
    assert files(tmp_path / "m") == before
    assert "already exists - overwrite? [y/n]" in asked[0]
    monkeypatch.setattr("builtins.input", lambda _: "y")
    save_model(model, tmp_path / "m", overwrite=False)
    assert files(tmp_path / "m") != before


def test_arguments_of_other_saves(tmp_path: Path) -> None:
    model, *_ = trained()
    assert save_model(model, tmp_path / "m", include_optimizer=False) is None
    loaded = load_model(tmp_path / "m")
    assert [w.tobytes() for w in loaded.get_weights()] == [w.tobytes() for w in model.get_weights()]
    assert int(loaded.optimizer.iterations) == 0 != int(model.optimizer.iterations)
    before = files(tmp_path / "m")
    for arguments in ({"dtype": "float16"}, {"asynchronous": True}):
        with pytest.raises(UnsupportedError, match="SavedModel"):
            save_model(model, tmp_path / "m", **arguments)
    assert files(tmp_path / "m") == before


def test_models_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbuilt = keras.Sequential([keras.layers.Dense(2, name="first")], name="chain")
    with pytest.raises(ValueError, match=r"not yet been built.*(?s:.)*'chain' \(Sequential\).*'first' \(Dense\)"):
        save_model(unbuilt, tmp_path / "m")
    model, *_ = trained()
    with monkeypatch.context() as patch:
        patch.setattr("keras.backend.backend", lambda: "torch")
        with pytest.raises(UnsupportedError, match="from the TensorFlow and JAX backends, not from torch"):
            save_model(model, tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr("hornbeam.formats.savedmodel.tf", type("Missing", (), {"available": False}))
        with pytest.raises(ImportError, match="pip install tensorflow"):
            save_model(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


class Factor(keras.layers.Layer):
    def __init__(self, factor: Any) -> None:
        super().__init__(name="scaling")
        self.factor = factor

    def call(self, x: Any) -> Any:
        return x * 2.0

    def get_config(self) -> dict[str, Any]:
        return {"factor": self.factor}


def test_what_cannot_be_serialised_is_named_with_its_place(tmp_path: Path) -> None:
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), Factor(object())], name="encoder")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inner(inputs)), name="whole")
    for name in ("m", "m.keras"):
        with pytest.raises(TypeError) as raised:
            save_model(model, tmp_path / name)
        text = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
        assert "'encoder/scaling' (Factor) in the model 'whole'" in text
    fine = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="fine")
    fine.compile("sgd", loss=Loss())
    with pytest.raises(TypeError) as raised:
        save_model(fine, tmp_path / "m")
    text = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert "What `compile()` got is in the way" in text
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_cannot_tell_its_place_does_not_hide_the_error(tmp_path: Path) -> None:
    class Shy(Factor):
        @property
        def path(self) -> str:
            raise ZeroDivisionError

        @path.setter
        def path(self, value: Any) -> None:
            pass

    model = keras.Sequential([keras.Input((4,)), Shy(object())])
    with pytest.raises(TypeError):
        save_model(model, tmp_path / "m.keras")


class Loss(keras.losses.Loss):
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean(y_true - y_pred)

    def get_config(self) -> dict[str, Any]:
        return {"thing": object()}


def test_a_savedmodel_of_somebody_else_needs_trust(tmp_path: Path) -> None:
    model, x, _ = trained()
    model.export(tmp_path / "plain", verbose=False)
    with pytest.raises(ValueError, match=r"(?s)without a Keras model in it.*safe_mode=False"):
        load_model(tmp_path / "plain")
    loaded = load_model(tmp_path / "plain", safe_mode=False)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    assert getattr(loaded, "optimizer", None) is None
    assert loaded.trainable_variables == []
    assert isinstance(loaded.layers[-1], keras.layers.TFSMLayer)
    with hornbeam.installed(), pytest.raises(ValueError, match="safe_mode=False"):
        keras.models.load_model(tmp_path / "plain")
    with pytest.raises(ValueError, match="File format not supported"):
        keras.models.load_model(tmp_path / "plain")  # stock

    class Two(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 2), name="a"), tf.TensorSpec((None, 2), name="b")])
        def __call__(self, a: Any, b: Any) -> Any:
            return {"sum": a + b, "difference": a - b}

    module = Two()
    tf.saved_model.save(module, str(tmp_path / "two"), signatures={"answers": module.__call__})
    two = load_model(tmp_path / "two", safe_mode=False)
    a, b = np.ones((3, 2), "float32"), np.full((3, 2), 2, "float32")
    answers = two.predict({"a": a, "b": b}, verbose=0)
    np.testing.assert_array_equal(answers["sum"], a + b)
    np.testing.assert_array_equal(answers["difference"], a - b)

    from google.protobuf import text_format
    from tensorflow.core.protobuf import saved_model_pb2

    binary = tmp_path / "two" / "saved_model.pb"  # the same graph as text is a SavedModel, too
    graph = saved_model_pb2.SavedModel.FromString(binary.read_bytes())
    binary.with_suffix(".pbtxt").write_text(text_format.MessageToString(graph))
    binary.unlink()
    text = load_model(tmp_path / "two", safe_mode=False)
    np.testing.assert_array_equal(text.predict({"a": a, "b": b}, verbose=0)["sum"], a + b)

    tf.saved_model.save(tf.Module(), str(tmp_path / "none"))
    with pytest.raises(UnsupportedError, match="has no signature"):
        load_model(tmp_path / "none", safe_mode=False)


def test_safe_mode_holds_for_the_model_inside(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x * 2)])
    save_model(model, tmp_path / "m")
    with pytest.raises(ValueError, match="Lambda"):
        load_model(tmp_path / "m")
    x = np.ones((1, 2), "float32")
    np.testing.assert_array_equal(load_model(tmp_path / "m", safe_mode=False).predict(x, verbose=0), 2 * x)


def test_one_that_was_written_over_is_no_longer_the_model(tmp_path: Path) -> None:
    model, x, _ = trained()
    save_model(model, tmp_path / "m")
    other, *_ = trained(seed=1)
    other.export(tmp_path / "m", verbose=False)  # stock Keras leaves what it does not know
    with pytest.raises(InvalidError, match="written over since"):
        load_model(tmp_path / "m")
    assert saved(load_model(tmp_path / "m" / "assets.extra" / "model.keras")) == saved(model)
    with hornbeam.installed():
        other.export(tmp_path / "m", verbose=False)
    assert not list((tmp_path / "m").glob("assets.extra/*"))
    np.testing.assert_allclose(ask(tmp_path / "m", x), np.asarray(other(x)), atol=1e-6)


def test_custom_objects_subclassed_models_and_structures(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("savedmodel")
    class Sub(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="sub")
            self.dense = keras.layers.Dense(3)

        def call(self, inputs: Any) -> Any:
            return {"out": self.dense(inputs["a"]) + inputs["b"][0], "b": inputs["b"][0]}

        def get_config(self) -> dict[str, Any]:
            return {}

    model = Sub()
    given = {"a": np.ones((2, 4), "float32"), "b": [np.ones((2, 3), "float32")]}
    expected = model(given)
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert type(loaded) is Sub
    assert state(loaded)[0][1:] == state(model)[0][1:]
    np.testing.assert_array_equal(loaded(given)["out"], expected["out"])
    answer = ask(tmp_path / "m", given)
    np.testing.assert_allclose(answer["out"], expected["out"], atol=1e-6)


JAX = """
import sys
from pathlib import Path
import keras, numpy as np
import hornbeam
from hornbeam.saving import load_model, save_model
assert keras.backend.backend() == "jax"
root = Path(sys.argv[1])
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.BatchNormalization(),
                          keras.layers.Dropout(0.5), keras.layers.Dense(2)])
model.compile("adam", "mse")
x = np.random.rand(16, 4).astype("float32")
model.fit(x, np.ones((16, 2)), verbose=0)
save_model(model, root / "m")
loaded = load_model(root / "m", strict=True)
for a, b in zip(loaded.weights + loaded.optimizer.variables, model.weights + model.optimizer.variables, strict=True):
    np.testing.assert_array_equal(a, b)
np.savez(root / "jax.npz", x=x, y=model.predict(x, verbose=0))
report = hornbeam.export.export(model, root / "e", verbose=False, verify=True)
assert 0 <= report.largest < 1e-5, report
with hornbeam.installed():
    layer = keras.layers.MultiHeadAttention(2, 2)
    layer.build((None, 3, 5), (None, 3, 5))
    archive = keras.export.ExportArchive()
    archive.track(layer)
    spec = keras.InputSpec(shape=(None, 3, 5), dtype="float32")
    archive.add_endpoint("attend", layer.call, [spec, spec], verify=True)
    archive.add_variable_collection("mine", layer.weights)
    assert len(archive.mine) == 8
    archive.write_out(root / "layer", verbose=False)
assert list(hornbeam.last_report("export").differences) == ["attend"]
try:
    load_model(root / "e", safe_mode=False)
except ValueError as error:
    assert "The backend is jax" in str(error)
else:
    raise AssertionError("loaded")
print(hornbeam.stats().handovers)
"""


def test_from_jax(tmp_path: Path) -> None:
    pytest.importorskip("jax", reason="no JAX here")
    env = {**os.environ, "PYTHONPATH": PACKAGE, "KERAS_BACKEND": "jax"}
    command = [sys.executable, "-c", JAX, str(tmp_path)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "{}"
    known = np.load(tmp_path / "jax.npz")
    for name in ("m", "e"):
        answers = served(tmp_path / name, known["x"], tmp_path)
        np.testing.assert_allclose(answers["direct"], known["y"], atol=1e-5)
    mine = tf.saved_model.load(str(tmp_path / "layer")).mine
    assert len(mine) == 8
