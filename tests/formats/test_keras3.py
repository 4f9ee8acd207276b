"""A file that Keras 3 wrote is never taken for one of Keras 2, whatever its layers and arguments are called."""

from __future__ import annotations

import tempfile
from typing import Any

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hornbeam
from hornbeam import models, saving
from hornbeam.seam import keras2
from support.zoo import TRAINABLE_BACKEND

#: What only Keras 2 wrote where it wrote it; in a file of Keras 3, a word like any other.
WORDS = [*keras2._MODULES, *keras2._OLD_ARGUMENTS, "tf_keras_backbone", "keras.src.engine.functional", "Custom>Adam"]


@keras.saving.register_keras_serializable("hornbeam_tests")
class Worded(keras.layers.Layer):
    """Takes arguments by names that Keras 2 has, of any value."""

    def __init__(self, words: Any = None, time_major: Any = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.words, self.time_major = words, time_major

    def call(self, x: Any) -> Any:
        return x

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "words": self.words, "time_major": self.time_major}


words = st.recursive(
    st.sampled_from(WORDS) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)


def build(given_words: Any, name: str) -> Any:
    """Two outputs and a list of metrics for each: what the migration of a file of Keras 2 would change."""
    inputs = keras.Input((2,))
    worded = Worded(given_words, time_major=True, name=name)(inputs)
    model = keras.Model(inputs, [keras.layers.Dense(1, name="a")(worded), keras.layers.Dense(1, name="b")(worded)])
    model.compile("sgd", "mse", metrics=["mae", "mse"])
    return model


@pytest.mark.parametrize("kind", [".keras", ".h5", "json"])
@hypothesis.settings(max_examples=10, deadline=None)
@given(given_words=words, name=st.sampled_from(WORDS))
def test_it_loads_as_stock_keras_loads_it(kind: str, given_words: Any, name: str) -> None:
    """Stock Keras wrote it; hornbeam is not installed, so `keras.models` is stock Keras here."""
    assert not hornbeam.seam.hook.is_installed()
    name = name.replace(".", "_").replace(">", "_")
    model = build(given_words, name)
    with tempfile.TemporaryDirectory() as directory, hornbeam.options(fallback=False):
        if kind == "json":
            text = model.to_json()
            stock, loaded = keras.models.model_from_json(text), models.model_from_json(text)
        else:
            path = f"{directory}/m{kind}"
            model.save(path)
            # Of a metric's name in `.h5`, stock Keras says that it cannot be deserialised.
            stock, loaded = keras.models.load_model(path, compile=kind == ".keras"), saving.load_model(path)
    assert loaded.get_config() == stock.get_config()
    assert loaded.get_layer(name).words == stock.get_layer(name).words
    if kind != "json":
        if kind == ".keras":
            assert loaded.get_compile_config() == stock.get_compile_config()
        for ours, theirs in zip(loaded.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        if TRAINABLE_BACKEND:
            x, y = np.ones((2, 2), "float32"), [np.zeros((2, 1), "float32"), np.ones((2, 1), "float32")]
            assert loaded.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)
