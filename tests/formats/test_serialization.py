"""Configs and JSON are what Keras makes, through the core; weights in memory, and parts of models."""

from __future__ import annotations

import copy
import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import hornbeam
from hornbeam import models, saving
from hornbeam.seam import shortcuts
from support.helpers import member, saved
from support.zoo import ZOO, chain, floats, train

#: Optimizers differ only in their own config, which one entry shows as well as all.
MODELS = [name for name in ZOO if not name.startswith("optimizer_") or name == "optimizer_Adafactor"]


@pytest.fixture(autouse=True)
def _all_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models would be without."""
    monkeypatch.setattr(shortcuts, "WORTH_TRYING", 0)


def arrays(variables: Any) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def equal(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_every_config_and_its_text_are_keras_own(name: str) -> None:
    model, *_ = ZOO[name]()
    stock = model.to_json()
    with hornbeam.installed():
        assert model.to_json() == stock
        assert model.to_json(indent=1) == json.dumps(json.loads(stock), indent=1)
    assert model.to_json() == stock
    assert saving.serialize_keras_object(model) == keras.saving.serialize_keras_object(model)
    ours, theirs = models.model_from_json(stock), keras.models.model_from_json(stock)
    with hornbeam.installed():
        installed = keras.models.model_from_json(stock)
    for other in (ours, theirs, installed):
        assert type(other) is type(model)
        assert json.loads(other.to_json()) == json.loads(theirs.to_json())
    again = saving.deserialize_keras_object(saving.serialize_keras_object(model))
    assert json.loads(again.to_json()) == json.loads(theirs.to_json())


@keras.saving.register_keras_serializable("serialization")
class Meddler(keras.Model):
    """Changes what Keras gives it, and has others look."""

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        dense = config["layers"][1]["config"]
        dense["units"] += 1
        dense["kernel_initializer"]["config"]["seed"] = 7
        config["layers"][1]["inbound_nodes"].clear()
        thread = threading.Thread(target=super().get_config)
        thread.start()
        thread.join()
        return config


def test_a_config_that_becomes_text_is_not_copied_and_nobody_can_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = keras.Input((3,))
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model = Meddler(inputs, inner(layers.Dense(4)(inputs)))
    stock = model.to_json()
    models.model_from_json(chain(layers.Dense(1)).to_json())
    saving.save_model(model, tmp_path / "m.keras")  # tries the shortcuts
    copied: list[Any] = []

    def deepcopy(value: Any, memo: Any = None) -> Any:
        copied.append((threading.current_thread() is threading.main_thread(), value))
        return copy.deepcopy(value, memo)

    monkeypatch.setattr(shortcuts, "copy", SimpleNamespace(deepcopy=deepcopy))
    with hornbeam.installed():
        for _ in range(2):
            assert model.to_json() == stock
    assert {main for main, _ in copied} == {False}  # the other thread's are copies as ever
    assert len(copied) == 4  # both models in it, twice
    with hornbeam.installed(), hornbeam.options(shortcuts=False):
        assert model.to_json() == stock
    assert len(copied) == 4  # nothing is patched
    saving.save_model(model, tmp_path / "m.keras")
    assert {main for main, _ in copied} == {False}
    assert len(copied) == 6
    keras.saving.save_model(model, tmp_path / "stock.keras")
    ours, theirs = (member(tmp_path / name, "config.json") for name in ("m.keras", "stock.keras"))
    assert ours == theirs
    assert model.layers[1].units == 4
    assert model.to_json() == stock


def test_install_routes_json_and_uninstall_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from hornbeam import _core

    model = chain(layers.Dense(2))
    before = keras.Model.to_json, keras.models.model_from_json
    calls: list[str] = []
    for name in ("encode_json", "decode_json"):
        real = getattr(_core, name)
        monkeypatch.setattr(_core, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
    with hornbeam.installed():
        keras.models.model_from_json(model.to_json())
    assert calls == ["encode_json", "decode_json"]
    assert (keras.Model.to_json, keras.models.model_from_json) == before
    keras.models.model_from_json(model.to_json())
    assert calls == ["encode_json", "decode_json"]
    models.model_from_json(model.to_json())
    assert calls[2:] == ["decode_json"]


@keras.saving.register_keras_serializable("serialization")
class Holder(layers.Layer):
    """Has anything in its config."""

    def __init__(self, held: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.held = held

    def call(self, x: Any) -> Any:
        return x

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "held": self.held}


def held(text: Any) -> Any:
    found = next(layer for layer in models.model_from_json(text).layers if isinstance(layer, Holder)).held
    stock = next(layer for layer in keras.models.model_from_json(text).layers if isinstance(layer, Holder)).held
    assert repr(found) == repr(stock)
    return found


def test_what_json_loads_takes() -> None:
    text = chain(Holder("MARK")).to_json()
    assert held(text.replace('"MARK"', '{"a": 1, "a": 2}')) == {"a": 2}
    assert math.isnan(held(text.replace('"MARK"', "NaN")))
    assert held(text.replace('"MARK"', "[Infinity, -Infinity]")) == [math.inf, -math.inf]
    assert held(text.replace("MARK", "\\ud800")) == "\ud800"
    assert held(text.replace('"MARK"', "123456789012345678901234567890")) == 123456789012345678901234567890
    assert held(text.replace("MARK", "größe")) == "größe"
    for data in (text.encode(), bytearray(text.encode()), text.encode("utf-16"), f" \n{text}\t"):
        assert held(data) == "MARK"
    for bad in ("", "{", text + "x", "\ufeff" + text):
        with pytest.raises(json.JSONDecodeError) as ours:
            models.model_from_json(bad)
        with pytest.raises(json.JSONDecodeError) as stock:
            keras.models.model_from_json(bad)
        assert str(ours.value) == str(stock.value)
    with pytest.raises(TypeError):
        models.model_from_json(None)  # type: ignore[arg-type]


VALUES: list[Any] = [
    None, True, 7, 2.5, "text", (1, (2, [3])), {"a": {"b": (None,)}}, b"bytes", slice(1, None, 2), ...,
    np.arange(6).reshape(2, 3), np.float32(1.5), np.array(3), keras.initializers.Constant(2.0), keras.ops.relu,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_values_of_every_kind(value: Any, tmp_path: Path) -> None:
    config = saving.serialize_keras_object(value)
    assert repr(config) == repr(keras.saving.serialize_keras_object(value))
    back = saving.deserialize_keras_object(config)
    assert repr(back) == repr(keras.saving.deserialize_keras_object(config)) or type(back) is type(value)
    if isinstance(value, np.ndarray) and value.ndim:
        assert np.array_equal(back, value)
    model = chain(Holder(value))
    with hornbeam.installed():
        assert model.to_json() == hornbeam_free(model)
    saving.save_model(model, tmp_path / "m.keras")
    assert saving.load_model(tmp_path / "m.keras").to_json() == keras.models.load_model(tmp_path / "m.keras").to_json()


ACTIVATIONS = st.sampled_from([None, "relu", "swish", "softmax", keras.ops.tanh, keras.activations.gelu])
INITIALIZERS = st.one_of(
    st.sampled_from(["zeros", "he_normal"]),
    st.builds(keras.initializers.RandomUniform, st.floats(-1, 0), st.floats(0, 1), st.integers(0, 1 << 40)),
    st.builds(keras.initializers.Constant, st.floats(width=32, allow_nan=False)),
)
REGULARIZERS = st.none() | st.builds(keras.regularizers.L1L2, st.floats(0, 1), st.floats(0, 1))
TEXTS = st.text(st.characters(blacklist_characters="/"), min_size=1, max_size=8)
HELD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
COMMON = {"name": TEXTS, "trainable": st.booleans(), "dtype": st.sampled_from(["float32", "bfloat16", "mixed_float16"])}
WEIGHTED = {
    "activation": ACTIVATIONS,
    "use_bias": st.booleans(),
    "kernel_initializer": INITIALIZERS,
    "bias_regularizer": REGULARIZERS,
    "kernel_constraint": st.none() | st.builds(keras.constraints.MaxNorm, st.floats(0, 9)),
}
LAYERS = st.one_of(
    st.builds(layers.Dense, st.integers(1, 1 << 40), **WEIGHTED, **COMMON),
    st.builds(layers.Conv1D, st.integers(1, 9), st.integers(1, 9), **WEIGHTED, **COMMON),
    st.builds(layers.LayerNormalization, epsilon=st.floats(1e-12, 1), scale=st.booleans(), **COMMON),
    st.builds(layers.BatchNormalization, momentum=st.floats(0, 1), center=st.booleans(), **COMMON),
    st.builds(layers.Dropout, st.floats(0, 0.99), seed=st.none() | st.integers(0, 1 << 30), **COMMON),
    st.builds(lambda size, **kw: layers.Bidirectional(layers.LSTM(size), **kw), st.integers(1, 9), name=TEXTS),
    st.builds(Holder, HELD, name=TEXTS),
)


@settings(max_examples=20, deadline=None)
@given(st.lists(LAYERS, min_size=1, max_size=4, unique_by=lambda layer: layer.name), TEXTS)
def test_configurations_at_random(stack: list[Any], name: str) -> None:
    """The text, to the byte, and what becomes of it, are those of stock Keras."""
    model = keras.Sequential(stack, name=name)
    stock = hornbeam_free(model)
    with hornbeam.installed():
        assert model.to_json() == stock
        assert saving.serialize_keras_object(model) == keras.saving.serialize_keras_object(model)
        again = keras.models.model_from_json(stock)
    assert json.loads(again.to_json()) == json.loads(keras.models.model_from_json(stock).to_json())


def hornbeam_free(model: Any) -> str:
    return json.dumps(keras.saving.serialize_keras_object(model))


@pytest.mark.parametrize("name", ["functional", "sequential", "nested", "shared_layers", "recurrent", "convolutional"])
def test_clones_and_configs(name: str) -> None:
    model, x, _ = ZOO[name]()
    clone = models.clone_model(model)
    assert json.loads(clone.to_json()) == json.loads(keras.models.clone_model(model).to_json())
    rebuilt = type(model).from_config(model.get_config())
    for other in (clone, rebuilt):
        other.set_weights(model.get_weights())
        assert equal(arrays(other.weights), arrays(model.weights))
        assert np.allclose(other.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)


# Weights in memory, as the guide has them


class Subclassed(keras.Model):
    """The guide's three layers, one without state between them."""

    def __init__(self, *, dropout: bool) -> None:
        super().__init__()
        self.first = layers.Dense(8, activation="relu")
        self.second = layers.Dense(8, activation="relu")
        self.between = layers.Dropout(0.5) if dropout else None
        self.last = layers.Dense(3)

    def call(self, x: Any) -> Any:
        x = self.second(self.first(x))
        return self.last(x if self.between is None else self.between(x))


def functional(*, dropout: bool) -> Any:
    steps = [layers.Dense(8, activation="relu"), layers.Dense(8, activation="relu")]
    return chain(*steps, *([layers.Dropout(0.5)] if dropout else []), layers.Dense(3), shape=(6,))


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_weights_go_between_functional_and_subclassed_models(ours: bool, theirs: bool, tmp_path: Path) -> None:
    source, target = functional(dropout=ours), Subclassed(dropout=theirs)
    target(keras.ops.ones((1, 6)))
    target.set_weights(source.get_weights())
    assert equal(target.get_weights(), source.get_weights())
    x = floats(4, 6)
    assert np.allclose(source.predict(x, verbose=0), target.predict(x, verbose=0), atol=1e-6)
    # A loaded model is as good a source.
    saving.save_model(source, tmp_path / "m.keras")
    loaded = saving.load_model(tmp_path / "m.keras")
    other = Subclassed(dropout=theirs)
    other(keras.ops.ones((1, 6)))
    other.set_weights(loaded.get_weights())
    assert equal(other.get_weights(), source.get_weights())
    first, last = loaded.layers[1], target.first
    last.set_weights([2 * value for value in first.get_weights()])
    assert equal(last.get_weights(), [2 * value for value in source.layers[1].get_weights()])
    assert equal(first.get_weights(), source.layers[1].get_weights())


def test_what_get_weights_gives_after_a_load_is_nobody_elses_memory(tmp_path: Path) -> None:
    model = functional(dropout=True)
    saving.save_model(model, tmp_path / "m.keras")
    loaded = saving.load_model(tmp_path / "m.keras")
    before = [value.copy() for value in loaded.get_weights()]
    taken = loaded.get_weights()
    loaded.set_weights([value + 1 for value in taken])
    assert equal(taken, before)
    assert equal(loaded.get_weights(), [value + 1 for value in before])


@pytest.mark.parametrize("form", ["m.keras", "m.weights.h5", "m.safetensors"])
def test_freezing_layers_changes_no_order_that_files_depend_on(form: str, tmp_path: Path) -> None:
    model = functional(dropout=True)
    path = tmp_path / form
    (saving.save_model if form == "m.keras" else saving.save_weights)(model, path)
    wanted = {v.path: a for v, a in zip(model.weights, arrays(model.weights), strict=True)}
    for frozen in ([1], [2], [1, 4]):
        other = functional(dropout=True)
        for i in frozen:
            other.layers[i].trainable = False
        order = [v.shape for v in other.weights]
        saving.load_weights(other, path)
        assert equal(arrays(other.weights), list(wanted.values()))
        assert [v.shape for v in other.weights] == order == [v.shape for v in model.weights]
        saving.save_model(other, tmp_path / "frozen.keras")
        loaded = saving.load_model(tmp_path / "frozen.keras", strict=True)
        assert [layer.trainable for layer in loaded.layers] == [layer.trainable for layer in other.layers]
        assert equal(arrays(loaded.weights), list(wanted.values()))


@pytest.mark.trains
def test_layers_of_a_loaded_model_are_the_start_of_another(tmp_path: Path) -> None:
    model = train(functional(dropout=True), floats(8, 6), floats(8, 3))[0]
    saving.save_model(model, tmp_path / "m.keras")
    loaded = saving.load_model(tmp_path / "m.keras")
    extractor = keras.Sequential(loaded.layers[:-1])
    extractor.trainable = False
    extended = keras.Sequential([extractor, layers.Dense(5)])
    extended.build((None, 6))
    by_name = keras.Model(loaded.inputs, loaded.get_layer(loaded.layers[2].name).output)
    x = floats(4, 6)
    assert equal(arrays(extractor.weights), arrays(model.weights)[:4])
    assert np.allclose(by_name.predict(x, verbose=0), extractor.predict(x, verbose=0), atol=1e-6)
    extended.compile("sgd", "mse")
    extended.fit(x, floats(4, 5), verbose=0)
    assert equal(arrays(extractor.weights), arrays(model.weights)[:4])  # frozen
    saving.save_model(extended, tmp_path / "n.keras")
    again = saving.load_model(tmp_path / "n.keras", strict=True)
    assert saved(again) == saved(extended)
    # Only the common part goes into a model with another head.
    other = chain(*(layers.Dense(8, activation="relu") for _ in range(2)), layers.Dropout(0.5), layers.Dense(9))
    names = [v.path for v in other.weights]
    saving.load_weights(other, tmp_path / "m.keras", skip=[names[-1], names[-2]])
    assert equal(arrays(other.weights)[:4], arrays(model.weights)[:4])
