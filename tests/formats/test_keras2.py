"""Files that Keras 2.12 to 2.15 and `tf_keras` wrote load, answer as recorded, and train on as they would have.

`golden/make_keras2.py` wrote them, in an environment of each version.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import saving_options, saving_utils
from keras.src.saving import serialization_lib

import hornbeam
from hornbeam import models
from hornbeam.errors import IncompleteLoadError
from hornbeam.formats import legacy_load
from hornbeam.seam import keras2
from support import helpers
from support.zoo import TRAINABLE_BACKEND

ARCHIVE = helpers.TESTS / "golden" / "keras2.tar.xz"
ERAS = ["keras-2.12.0", "keras-2.13.1", "keras-2.14.0", "keras-2.15.0", "tf_keras-2.15.1", "tf_keras-2.21.0"]
MODELS = ["sequential", "functional", "nested", "attention", "recurrent", "broad", "subclassed"]
OPTIMIZERS = ["schedule", "amsgrad", "adamw", "nadam", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "ftrl"]
OLD = ["old_adam", "old_nadam", "old_sgd", "old_rmsprop", "old_adagrad", "old_adadelta", "old_adamax", "old_ftrl"]


@keras.saving.register_keras_serializable("golden")
class Subclassed(helpers.Subclassed):
    """As in `make_keras2.py`."""


@keras.saving.register_keras_serializable("golden")
class Labelled(helpers.Labelled):
    """As there."""


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keras2")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    with hornbeam.installed(), hornbeam.options(fallback=False):
        yield


class Recorded:
    """What Keras 2 wrote down beside a model."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            found: dict[str, dict[str, np.ndarray]] = {}
            for key in file:
                part, _, name = key.partition("/")
                found.setdefault(part, {})[name] = file[key]
        self.x: Any = found["x"] if "0" not in found["x"] else list(found["x"].values())
        if len(self.x) == 1:
            (self.x,) = self.x
        self.answers, self.trained = list(found["y"].values()), list(found["z"].values())
        self.weights = list(found["w"].values())
        self.slots = list(found["o"].values())
        self.names = [name.decode() for name in found["names"]["0"]]


def answers(model: Any, x: Any) -> list[np.ndarray]:
    found = model(x)
    return [np.asarray(keras.ops.convert_to_numpy(y)) for y in (found if isinstance(found, list | tuple) else [found])]


def train(model: Any, x: Any, shapes: list[tuple[int, ...]]) -> None:
    y = [np.linspace(-1, 1, int(np.prod(shape)), dtype="float32").reshape(shape) for shape in shapes]
    model.run_eagerly = True
    model.train_on_batch(x, y if len(y) > 1 else y[0])


def bits(arrays: Any) -> list[bytes]:
    """Sorted: Keras 3 has its weights in an order of its own."""
    return sorted(np.asarray(keras.ops.convert_to_numpy(a)).tobytes() for a in arrays if np.ndim(a))


def check(model: Any, recorded: Recorded, *, state: bool = True, trained: float = 1e-4) -> None:
    """Weights and optimizer state are those of the file, bit for bit; outputs, also after one more step, are close."""
    assert bits(model.weights) == bits(recorded.weights)
    for found, wanted in zip(answers(model, recorded.x), recorded.answers, strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    if state:
        assert int(model.optimizer.iterations) == 4
        kept = model.optimizer.variables
        assert bits(kept) == bits(recorded.slots if bits(kept) else [])  # SGD without momentum has none in Keras 3
    if trained and TRAINABLE_BACKEND:
        train(model, recorded.x, [y.shape for y in recorded.answers])
        for found, wanted in zip(answers(model, recorded.x), recorded.trained, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=trained, atol=trained)


@pytest.mark.parametrize("form", ["keras", "h5"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("era", ERAS)
def test_models(era: str, name: str, form: str, golden: Path, caplog: pytest.LogCaptureFixture) -> None:
    if (name, form) == ("subclassed", "h5"):
        assert not (golden / era / "subclassed.h5").exists()  # Keras 2 cannot
        return
    if (era, name) == ("keras-2.14.0", "subclassed"):  # it counted only the layers that were no attributes before
        with pytest.raises(IncompleteLoadError, match="Nearest in the file"):
            keras.models.load_model(golden / era / f"{name}.{form}")
        return
    with caplog.at_level(logging.INFO, logger="hornbeam"):
        model = keras.models.load_model(golden / era / f"{name}.{form}")
    report = hornbeam.last_report("load")
    assert report is not None
    assert (report.engine, report.mismatched) == ("direct", [])
    assert [path for path in report.unexpected if not path.startswith("metrics/")] == []  # Keras 3 starts those anew
    assert [path for path in report.missing if "learning_rate" not in path] == []  # that is in the configuration
    said = [r.message for r in caplog.records if "of Keras 2" in r.message]
    assert (len(said) > 0) == (name != "subclassed" or form == "keras")
    # Where a gradient is nothing but rounding, Adam makes steps of it.
    check(model, Recorded(golden / era / f"{name}.npz"), trained=2e-3 if name in ("attention", "broad") else 1e-4)


@pytest.mark.parametrize("era", ERAS)
def test_assets(era: str, golden: Path) -> None:
    """Of a layer of Keras' own, of somebody's, and of one in a model in the model."""
    tf = pytest.importorskip("tensorflow", reason="texts are TensorFlow's")
    model = keras.models.load_model(golden / era / "assets.keras")
    written = era.replace("-", " ")
    assert model.get_layer("label").text == f"of {written}"
    assert model.get_layer("inner").layers[-1].text == f"deep, of {written}"
    assert model.get_layer("lookup").get_vocabulary() == ["[UNK]", "b", "a"]
    recorded = Recorded(golden / era / "assets.npz")
    numbers, words = recorded.x
    recorded.x = [tf.constant(numbers), tf.constant(words)]  # Keras 3 takes no arrays of texts
    check(model, recorded)


@pytest.mark.parametrize("form", ["keras", "h5"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("era", ["keras-2.12.0", "keras-2.15.0"])
def test_optimizers(era: str, name: str, form: str, golden: Path) -> None:
    model = keras.models.load_model(golden / era / f"{name}.{form}")
    # Keras 2 did not save the product of momentums that Nadam goes on with.
    check(model, Recorded(golden / era / f"{name}.npz"), trained=0 if name == "nadam" else 1e-5)


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("era", ["keras-2.12.0", "keras-2.15.0"])
def test_optimizers_that_were_old_then(era: str, name: str, golden: Path) -> None:
    recorded = Recorded(golden / era / f"{name}.npz")
    whole = name != "old_nadam"  # whose momentum follows another schedule
    check(keras.models.load_model(golden / era / f"{name}.h5"), recorded, state=whole, trained=1e-5 * whole)
    with h5py.File(zipfile.ZipFile(golden / era / f"{name}.keras").open("model.weights.h5")) as file:
        assert not file.get("optimizer/vars")  # Keras 2 left it out
    with pytest.warns(UserWarning, match="saved optimizer has 0 variables"):
        model = keras.models.load_model(golden / era / f"{name}.keras")
    check(model, recorded, state=False, trained=0)
    assert type(model.optimizer).__name__.lower() == name.removeprefix("old_")


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(("name", "by_name"), [("functional", None), ("functional", True), ("nested", None)])
def test_weights_in_h5(era: str, name: str, by_name: bool | None, golden: Path) -> None:
    model = keras.models.load_model(golden / era / f"{name}.h5", compile=False)
    for variable in model.weights:
        variable.assign(np.zeros(variable.shape))
    model.load_weights(golden / era / f"{name}_weights.h5", by_name=by_name)
    check(model, Recorded(golden / era / f"{name}.npz"), state=False, trained=0)


@pytest.mark.parametrize("era", ERAS)
def test_weights_of_a_subclassed_model_in_h5(era: str, golden: Path) -> None:
    model = Subclassed()
    recorded = Recorded(golden / era / "subclassed.npz")
    model(recorded.x)
    model.load_weights(golden / era / "subclassed_weights.h5")
    check(model, recorded, state=False, trained=0)


def test_what_2_12_called_keras_and_was_hdf5(golden: Path) -> None:
    path = golden / "keras-2.12.0" / "functional_hdf5.keras"
    assert path.read_bytes().startswith(b"\x89HDF")
    check(keras.models.load_model(path), Recorded(golden / "keras-2.12.0" / "functional.npz"))


@pytest.mark.parametrize("name", ["functional", "nested"])
@pytest.mark.parametrize("era", ERAS)
def test_architectures_in_json(era: str, name: str, golden: Path) -> None:
    text = (golden / era / f"{name}.json").read_text()
    recorded = Recorded(golden / era / f"{name}.npz")
    for model in (models.model_from_json(text), keras.models.model_from_json(text)):
        model.load_weights(golden / era / f"{name}_weights.h5")
        check(model, recorded, state=False, trained=0)


#: What is nothing by itself; an `InputLayer` has no shape here.
BASES = ("Constraint", "Initializer", "InputLayer", "InputSpec", "Layer", "Loss")
#: What Keras 3 has under another name, or computes.
RENAMED = {"alpha", "negative_slope", "axis", "ragged", "fn", "reduction", "dtype", "factor"}


def kept(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The arguments that both have, and that are not the same."""
    plain = {k: v for k, v in wanted.items() if isinstance(v, int | float | str) and k not in RENAMED}
    return {k: (found[k], v) for k, v in plain.items() if k in found and found[k] != v}


@pytest.mark.parametrize("era", ERAS)
def test_every_class_that_keras_3_has_takes_its_configuration(era: str, golden: Path) -> None:
    absent, count = set(), 0
    for key, (new, old) in json.loads((golden / era / "objects.json").read_text()).items():
        kind, _, name = key.partition("/")
        cls = getattr(getattr(keras, kind), name, None)
        if cls is None or name in BASES:
            absent.add(name)
            continue
        if "module" in new:  # 2.12 has that form only inside of `.keras` files
            made = serialization_lib.deserialize_keras_object(keras2._migrated(new, {}, frozenset()))
            assert type(made) is cls, key
            assert kept(made.get_config(), new["config"]) == {}, key
        if kind == "layers":
            with saving_options.keras_option_scope(use_legacy_config=True), legacy_load._classes_only():
                made = saving_utils.model_from_config(keras2._migrated(old, {}, frozenset()))
        elif kind in ("losses", "metrics"):
            made = legacy_load._deserialize_one(getattr(keras, kind), old)
        else:
            made = getattr(keras, kind).deserialize(old)
        assert type(made) is cls, key
        assert kind == "losses" or kept(made.get_config(), old["config"]) == {}, key
        count += 1
    assert count > 140
    assert {n for n in absent if "Random" not in n} - set(BASES) <= {
        "AbstractRNNCell", "MeanTensor", "RadialConstraint", "ThresholdedReLU",
    }  # fmt: skip


def configurations(golden: Path) -> Iterator[str]:
    for path in golden.glob("*/*.keras"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield archive.read("config.json").decode()
    for path in golden.glob("*/*.h5"):
        with h5py.File(path) as file:
            yield from (str(value) for value in file.attrs.values())


def test_every_entry_of_the_tables_is_in_a_file(golden: Path) -> None:
    texts = list(configurations(golden))
    everything = "\n".join(texts)
    for module in (*keras2._MODULES, *keras2._OPTIMIZERS):
        assert f'"module": "{module}' in everything, module
    for argument in keras2._OLD_ARGUMENTS:
        assert f'"{argument}": ' in everything, argument
    for module, name in keras2._CLASSES:
        for root in keras2._ROOTS:
            assert f'"module": "{root}{module}", "class_name": "{name}"' in everything, root
    written: dict[str, set[str]] = {}
    for path in golden.glob("*/objects.json"):
        for key, (new, _) in json.loads(path.read_text()).items():
            written.setdefault(key, set()).update(new["config"])
    for name, arguments in keras2._ARGUMENTS.items():
        assert set(arguments) <= written[f"layers/{name}"], name
        assert not set(arguments) & set(_accepted(getattr(keras.layers, name))), name
    slots: dict[str, set[str]] = {}
    for path in golden.glob("*/*.npz"):
        for name in Recorded(path).names:
            slots.setdefault(name.split("/")[0], set()).update(name.removesuffix(":0").split("/"))
    for name, table in keras2._SLOTS.items():
        assert set(table) <= slots["Adam" if table is keras2._ADAM else name], name
    whole = {name.removeprefix("old_").replace("amsgrad", "adam") for name in OPTIMIZERS}
    assert {name.lower() for name in keras2._ORDER} <= whole


def _accepted(cls: type) -> set[str]:
    """What a layer of Keras 3 says of itself; `trainable` may be among what it does not take."""
    import inspect

    return set(inspect.signature(cls.__init__).parameters)


@pytest.mark.parametrize(
    "module", ["os", "keras.src.engine.training", "tf_keras.src.engine.functional.x", "subprocess"]
)
def test_nothing_else_is_imported(module: str, golden: Path, tmp_path: Path) -> None:
    """A class that is in no table is for Keras to refuse, whatever module it claims to be from."""
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(golden / "keras-2.15.0" / "functional.keras") as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename == "config.json":
                config = json.loads(content)
                config["module"], config["class_name"], config["registered_name"] = module, "system", None
                content = json.dumps(config).encode()
            new.writestr(item.filename, content)
    with pytest.raises((TypeError, ValueError)):
        keras.models.load_model(path)


def test_the_version_says_who_wrote_a_file() -> None:
    old = {"module": "keras.src.engine.functional", "class_name": "Functional", "config": {}}
    assert keras2.is_keras2({"class_name": "Mine", "config": {}}, "2.15.0")
    assert keras2.is_keras2({}, b"1.2.2")
    assert not keras2.is_keras2(old, "3.0.5")
    assert keras2.is_keras2({**old, "keras_version": "2.12.0"})
    for unknown in (None, "", "unknown"):
        assert keras2.is_keras2({"a": [old]}, unknown)
        assert not keras2.is_keras2({"class_name": "tf_keras", "module": "tf_keras_backbone", "config": {}}, unknown)
        assert not keras2.is_keras2({"words": ["keras.src.engine.", {"time_major": False}]}, unknown)


def test_what_somebody_elses_layer_is_given_is_left_alone() -> None:
    """A layer of that name in `custom_objects`, or registered, has arguments of its own."""
    own = {"class_name": "LSTM", "config": {"time_major": False}}
    assert keras2.keras_config(own, {"LSTM"}) == own
    registered = {"module": None, "class_name": "LSTM", "config": {"time_major": False}, "registered_name": "me>LSTM"}
    assert keras2.keras_config(registered) == registered
    asked = {"module": "keras.layers", "class_name": "LSTM", "config": {"time_major": True}}
    assert keras2.keras_config(asked) == asked  # Keras says that it cannot


def test_layers_need_no_shape_beside_an_input_layer() -> None:
    """`StringLookup` of Keras 3 does not take one; in older files it is all there is, and others have their own."""

    def described(name: str) -> dict[str, Any]:
        return {"class_name": name, "config": {"batch_input_shape": [None, 2]}}

    def kept(*names: str) -> list[str]:
        model = {"class_name": "Sequential", "config": {"layers": [described(name) for name in names]}}
        layers = keras2.keras_config(model, {"Dense"})["config"]["layers"]
        return [layer["class_name"] for layer in layers if layer["config"]]

    assert kept("InputLayer", "StringLookup", "Dense", "me>Dense") == ["InputLayer", "Dense", "me>Dense"]
    assert kept("StringLookup") == ["StringLookup"]


def test_safe_mode_holds_for_keras_2_files(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    shutil.copy(golden / "keras-2.15.0" / "sequential.h5", path)
    with h5py.File(path, "a") as file:
        config = json.loads(file.attrs["model_config"])
        node = {"class_name": "Lambda", "config": {"name": "l", "function": ["4wAAAAA=", None, None]}}
        config["config"]["layers"].append(node)
        file.attrs["model_config"] = json.dumps(config)
    with pytest.raises(ValueError, match=r"[Ll]ambda"):
        keras.models.load_model(path)


def test_the_files_are_small() -> None:
    assert os.stat(ARCHIVE).st_size < 150_000
