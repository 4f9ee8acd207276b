"""What the guide's text promises, block by block: each function gets the names that the block left behind."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import hornbeam
from hornbeam.saving import load_model, load_weights, save_model, save_weights
from support.helpers import saved, without_ids


def check(block: str, names: dict[str, Any]) -> None:
    """Checks a block that just ran."""
    globals()[f"_{block}"](Names(names))


class Names:
    """Names of a namespace as attributes."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.__dict__ = names


@contextlib.contextmanager
def unregistered() -> Iterator[None]:
    """Nothing is registered meanwhile."""
    registry = keras.saving.get_custom_objects()
    known = dict(registry)
    registry.clear()
    try:
        yield
    finally:
        registry.clear()
        registry.update(known)


def same_answers(a: Any, b: Any, x: Any) -> None:
    np.testing.assert_array_equal(a.predict(x, verbose=0), b.predict(x, verbose=0))


def plain(config: Any) -> Any:
    """A config as a file holds it."""
    return without_ids(json.loads(json.dumps(config)))


def trains_on_alike(a: Any, b: Any, x: Any, y: Any) -> None:
    assert saved(a) == saved(b)
    assert a.optimizer.get_config() == b.optimizer.get_config()
    a.fit(x, y, shuffle=False, verbose=0)
    b.fit(x, y, shuffle=False, verbose=0)
    assert saved(a) == saved(b)


def endpoints(path: str) -> set[str]:
    return set(tf.saved_model.load(path).signatures)


def _setup(n: Any) -> None:
    assert n.keras is keras


def _save(n: Any) -> None:
    with zipfile.ZipFile("path/to/location.keras") as archive:
        assert {"config.json", "metadata.json", "model.weights.h5"} == set(archive.namelist())
        assert json.loads(archive.read("metadata.json"))["keras_version"] == keras.__version__
        assert json.loads(archive.read("config.json"))["class_name"] == "Sequential"


def _load(n: Any) -> None:
    assert type(n.model) is keras.Sequential
    same_answers(n.model, load_model("path/to/location.keras"), np.ones((3, 2)))


def _whole_model(n: Any) -> None:
    with zipfile.ZipFile("my_model.keras") as archive:
        config = json.loads(archive.read("config.json"))
        assert config["compile_config"]["loss"] == "mean_squared_error"
        with h5py.File(archive.open("model.weights.h5")) as weights:
            assert {"layers", "optimizer"} <= set(weights)  # directory keys for layers and their weights
            kernel = weights["layers/dense/vars/0"][()]
    np.testing.assert_array_equal(kernel, n.model.layers[1].kernel)
    assert plain(n.reconstructed_model.get_config()) == plain(n.model.get_config())
    assert n.reconstructed_model.loss == "mean_squared_error"
    assert int(n.reconstructed_model.optimizer.iterations) == 4
    same_answers(n.model, n.reconstructed_model, n.test_input)
    trains_on_alike(n.model, n.reconstructed_model, n.test_input, n.test_target)


def _config_methods(n: Any) -> None:
    model = keras.Sequential([keras.Input((2,)), n.CustomLayer(keras.layers.Dense(3))])
    save_model(model, "sublayer.keras")
    loaded = load_model("sublayer.keras", custom_objects={"CustomLayer": n.CustomLayer})
    assert type(loaded.layers[0]) is n.CustomLayer
    assert type(loaded.layers[0].sublayer) is keras.layers.Dense
    same_answers(model, loaded, np.ones((1, 2)))
    with pytest.raises((TypeError, ValueError), match="CustomLayer"):
        load_model("sublayer.keras")


def _is_custom(n: Any, model: Any) -> None:
    assert type(model.layers[1]) is n.CustomLayer
    assert model.layers[1].factor == 0.5
    assert model.layers[2].activation is n.custom_fn
    same_answers(n.model, model, n.test_input)
    assert saved(model) == saved(n.model)


def _registration(n: Any) -> None:
    _is_custom(n, n.reconstructed_model)
    for module in (keras.saving, hornbeam.saving):  # one registry, whichever it is asked through
        assert module.get_registered_name(n.CustomLayer) == "MyLayers>CustomLayer"
        assert module.get_registered_object("my_package>custom_fn") is n.custom_fn
        assert set(module.get_custom_objects()) == {"MyLayers>CustomLayer", "my_package>custom_fn"}
    default = keras.saving.register_keras_serializable()(type("Plain", (), {"get_config": lambda self: {}}))
    assert keras.saving.get_registered_name(default) == "Custom>Plain"
    trains_on_alike(n.model, n.reconstructed_model, n.test_input, n.test_target)
    with zipfile.ZipFile("custom_model.keras") as archive:
        assert b"def call" not in archive.read("config.json")  # no code
    with unregistered(), pytest.raises((TypeError, ValueError), match="CustomLayer"):
        load_model("custom_model.keras")


def _by_registered_name(n: Any) -> dict[str, Any]:
    """What was registered when it was saved is looked up by that name."""
    return {"MyLayers>CustomLayer": n.CustomLayer, "my_package>custom_fn": n.custom_fn}


def _passing(n: Any) -> None:
    _is_custom(n, n.reconstructed_model)
    with unregistered():
        _is_custom(n, load_model("custom_model.keras", custom_objects=_by_registered_name(n)))


def _scope(n: Any) -> None:
    _is_custom(n, n.reconstructed_model)
    with unregistered():
        with keras.saving.custom_object_scope(_by_registered_name(n)):
            _is_custom(n, load_model("custom_model.keras"))
        with pytest.raises((TypeError, ValueError), match="CustomLayer"):
            load_model("custom_model.keras")


def _clone(n: Any) -> None:
    assert n.new_model is not n.model
    assert [type(layer) for layer in n.new_model.layers] == [type(layer) for layer in n.model.layers]
    assert n.new_model.layers[1].factor == 0.5
    assert plain(n.new_model.layers[2].get_config()) == plain(n.model.layers[2].get_config())
    assert not np.array_equal(n.new_model.get_weights()[0], n.model.get_weights()[0])  # initialised anew
    # Keras 3 compiles the clone as well, which the guide denies: with an optimizer of its own that did nothing yet.
    assert n.new_model.optimizer is not n.model.optimizer
    assert int(n.new_model.optimizer.iterations) == 0


def _layer_config(n: Any) -> None:
    assert (n.layer_config["units"], n.layer_config["activation"]) == (3, "relu")
    json.dumps(n.layer_config)


def _layer_from_config(n: Any) -> None:
    assert type(n.new_layer) is keras.layers.Dense
    assert n.new_layer.get_config() == n.layer_config
    assert n.new_layer.weights == []  # no weights


def _sequential_config(n: Any) -> None:
    _same_but_fresh(n, keras.Sequential)
    assert plain(n.new_model.get_config()) == plain(n.config)


def _functional_config(n: Any) -> None:
    _same_but_fresh(n, type(n.model))


def _json(n: Any) -> None:
    _same_but_fresh(n, keras.Sequential)
    assert json.loads(n.json_config)["class_name"] == "Sequential"
    assert n.new_model.to_json() == n.json_config


def _same_but_fresh(n: Any, cls: type) -> None:
    assert type(n.new_model) is cls
    assert plain(n.new_model.get_config()) == plain(n.model.get_config())
    assert [w.shape for w in n.new_model.get_weights()] == [w.shape for w in n.model.get_weights()]
    assert not np.array_equal(n.new_model.get_weights()[0], n.model.get_weights()[0])
    assert not n.new_model.compiled


def _serialize(n: Any) -> None:
    assert set(n.config) == {"module", "class_name", "config", "registered_name"}
    assert (n.config["module"], n.config["class_name"], n.config["registered_name"]) == (
        *("keras.regularizers", "L1", None),
    )
    assert n.config["config"]["l1"] == pytest.approx(0.005)


def _deserialize(n: Any) -> None:
    assert type(n.new_reg) is keras.regularizers.L1
    assert n.new_reg.l1 == n.my_reg.l1


def _layer_weights(n: Any) -> None:
    _same_weights(n.layer_1, n.layer_2)
    assert n.layer_1.kernel is not n.layer_2.kernel


def _same_weights(a: Any, b: Any) -> None:
    assert len(a.get_weights()) == len(b.get_weights()) > 0
    for left, right in zip(a.get_weights(), b.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


def _model_weights(n: Any) -> None:
    _same_weights(n.functional_model, n.subclassed_model)
    assert len(n.functional_model.weights) == 6
    same_answers(n.functional_model, n.subclassed_model, np.random.random((2, 784)))
    n.functional_model.set_weights([w + 1 for w in n.subclassed_model.get_weights()])  # and back
    n.subclassed_model.set_weights(n.functional_model.get_weights())
    _same_weights(n.functional_model, n.subclassed_model)


def _stateless_layers(n: Any) -> None:
    _same_weights(n.functional_model, n.functional_model_with_dropout)
    same_answers(n.functional_model, n.functional_model_with_dropout, np.random.random((2, 784)))
    save_weights(n.functional_model, "stateless.weights.h5")  # and on disk: layers without weights do not count
    n.functional_model_with_dropout.set_weights([w * 0 for w in n.functional_model.get_weights()])
    load_weights(n.functional_model_with_dropout, "stateless.weights.h5")
    _same_weights(n.functional_model, n.functional_model_with_dropout)


def _weights_on_disk(n: Any) -> None:
    with h5py.File("my_model.weights.h5") as file:
        assert {f"layers/{name}/vars/{i}" for name in ("dense", "dense_1", "dense_2") for i in (0, 1)} == {
            path for path, item in _items(file) if isinstance(item, h5py.Dataset)
        }
    other = keras.models.clone_model(n.sequential_model)
    report = load_weights(other, "my_model.weights.h5")
    assert report.complete
    _same_weights(other, n.sequential_model)
    with pytest.raises(ValueError, match=r"must end in `\.weights\.h5`"):
        save_weights(n.sequential_model, "my_model.weights")


def _items(file: Any) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    file.visititems(lambda name, item: found.append((name, item)))
    return found


def _trainable_order(n: Any) -> None:
    """The order may change, says the guide; Keras 3 keeps it. What is saved goes back where it came from either way."""
    assert sorted(n.variable_names) == sorted(n.variable_names_2)
    assert len(n.nested_model.trainable_weights) == len(n.nested_model.non_trainable_weights) == 2
    save_weights(n.nested_model, "nested.weights.h5")
    other = keras.Sequential([keras.Input((784,)), n.NestedDenseLayer(10, "nested")])
    load_weights(other, "nested.weights.h5")
    for name in ("dense_1", "dense_2"):
        _same_weights(getattr(other.layers[0], name), getattr(n.nested_model.layers[0], name))


def _transfer(n: Any) -> None:
    assert [layer.name for layer in n.model.layers] == ["dense_1", "dense_2", "dense_3"]
    for i, name in enumerate(["dense_1", "dense_2"]):
        assert n.model.layers[i] is n.pretrained_model.get_layer(name)
        _same_weights(n.model.layers[i], n.functional_model.get_layer(name))
    assert n.model.output_shape == (None, 5)
    assert n.model.count_params() == 54725
    save_model(n.model, "transferred.keras")
    same_answers(n.model, load_model("transferred.keras"), np.random.random((2, 784)))


def _export(n: Any) -> None:
    assert {"saved_model.pb", "variables", "fingerprint.pb"} <= {p.name for p in Path("exported_model").iterdir()}
    np.testing.assert_allclose(n.new_output_data, n.output_data, atol=1e-6)
    assert endpoints("exported_model") == {"serve", "serving_default"}
    # The forward pass only: batch normalisation does not learn, and any batch is fine.
    one = n.reloaded_artifact.serve(n.input_data[:1])
    np.testing.assert_allclose(one, n.output_data[:1], atol=1e-6)
    assert len(n.reloaded_artifact.variables) == len(n.model.variables) == 8


def _export_by_hand(n: Any) -> None:
    assert endpoints("path/to/location") == {"serve", "serving_default"}
    artifact = tf.saved_model.load("path/to/location")
    np.testing.assert_allclose(artifact.serve(n.input_data.astype("float32")), n.output_data, atol=1e-6)


def _export_archive(n: Any) -> None:
    assert endpoints("exported_mha_layer") == {"call", "serving_default"}
    for given in (n.export_archive.my_vars, n.revived_layer.my_vars):
        for ours, weight in zip(given, n.layer.weights, strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(weight))
    x = tf.random.normal((5, 2, 2))  # another batch
    np.testing.assert_allclose(n.revived_layer.call(query=x, value=x), n.layer(x, x), atol=1e-6)


def _config_by_hand(n: Any) -> None:
    assert (n.config["module"], n.config["class_name"]) == (None, "MyDense")
    assert n.config["registered_name"] == "MyLayers>KernelMult"
    assert n.config["config"]["nested_model"]["registered_name"] == "MyLayers>KernelMult"
    assert type(n.new_layer) is n.MyDense
    assert n.new_layer.hidden_units == 64
    json.dumps(n.config)


def _from_config_by_hand(n: Any) -> None:
    for model in (n.model, n.new_model):
        assert type(model.layers[1]) is n.CustomModel
        assert type(model.layers[1].first_layer) is n.MyDense
        assert type(model.layers[1].second_layer) is keras.layers.Dense
    assert plain(n.new_model.get_config()) == plain(n.model.get_config())
    save_model(n.model, "complex.keras")
    loaded = load_model("complex.keras")
    assert type(loaded.layers[1].first_layer) is n.MyDense
    same_answers(n.model, loaded, np.random.random((2, 32)))


def _registered_name(n: Any) -> None:
    assert n.config["registered_name"] == "MyLayers>KernelMult"
    assert (n.config["class_name"], n.config["module"]) == ("MyDense", None)
    assert n.config["config"]["kernel_regularizer"]["class_name"] == "L1L2"
    assert keras.saving.get_registered_object("MyLayers>KernelMult") is n.MyDense
    assert keras.saving.get_registered_name(n.MyDense) == "MyLayers>KernelMult"
