"""What depends on the backend: whose memory is shared, whose is copied, and when."""

from __future__ import annotations

import operator
import types
from pathlib import Path

import keras
import numpy as np
import pytest

import hornbeam
from hornbeam.values import on_tensorflow, tensors
from support.helpers import saved
from support.zoo import ZOO, chain, floats

pytestmark = pytest.mark.keras_versions

BACKEND = keras.backend.backend()
SHARED = BACKEND in ("tensorflow", "jax")


def test_variables_are_shared_where_they_cannot_change() -> None:
    variable = keras.Variable(floats(300, 300))
    found = tensors.view(variable)
    assert isinstance(found, np.ndarray) == SHARED
    before = np.array(found if SHARED else found.array())
    if SHARED:
        again = tensors.view(variable)
        assert isinstance(again, np.ndarray)
        assert np.shares_memory(found, again)
        variable.assign_add(keras.ops.ones((300, 300)))
        np.testing.assert_array_equal(found, before)
    else:
        taken = found.array()
        variable.assign(variable + 1)
        np.testing.assert_array_equal(taken, before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int8", "uint8", "int32", "bool"])
def test_every_dtype_arrives(dtype: str, tmp_path: Path) -> None:
    layer = keras.layers.Layer(name="holder")
    layer.kept = layer.add_weight(shape=(3, 2), dtype=dtype, initializer="zeros", trainable=False)
    layer.built = True
    layer.kept.assign(np.array([[0, 1], [1, 0], [1, 1]]))
    holder = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    holder.extra = layer
    with hornbeam.installed(), hornbeam.options(fallback=False):
        holder.save_weights(tmp_path / "m.weights.h5")
        expected = saved(holder)
        layer.kept.assign(np.zeros((3, 2)))
        holder.load_weights(tmp_path / "m.weights.h5")
    assert saved(holder) == expected
    assert keras.backend.standardize_dtype(layer.kept.dtype) == dtype


@pytest.mark.parametrize("name", ["functional", "custom_state", "odd_variables", "many_layers"])
def test_files_cross_to_this_backend_and_back(name: str, tmp_path: Path) -> None:
    model, _, _ = ZOO[name]()
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.save(tmp_path / "m.keras")
        loaded = keras.models.load_model(tmp_path / "m.keras")
    assert saved(loaded) == saved(model)
    assert saved(keras.models.load_model(tmp_path / "m.keras")) == saved(model)


def test_a_variable_changed_by_others_code_after_it_was_stored_keeps_its_value(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("backends")
    class Restores(keras.layers.Layer):
        def build(self, shape: object) -> None:
            self.w = self.add_weight(shape=(3,), initializer="ones")

        def call(self, x: object) -> object:
            return x

        def save_own_variables(self, store: dict[str, object]) -> None:
            before = np.array(keras.ops.convert_to_numpy(self.w))
            self.w.assign(before * 5)
            store["0"] = self.w
            self.w.assign(before)

    model = chain(Restores(), shape=(3,))
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.save_weights(tmp_path / "m.weights.h5")
        model.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(model.layers[1].get_weights()[0], [5, 5, 5])


@keras.saving.register_keras_serializable("hornbeam_tests")
class Averaged(keras.layers.Dense):
    """Stores other values than it has, by lending them to `super()`."""

    def save_own_variables(self, store: object) -> None:
        held = [np.array(keras.ops.convert_to_numpy(v)) for v in self.variables]
        for variable in self.variables:
            variable.assign(np.full(variable.shape, 7.0))
        super().save_own_variables(store)
        for variable, value in zip(self.variables, held, strict=True):
            variable.assign(value)


def test_values_lent_to_super_are_what_is_saved(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), Averaged(2, kernel_initializer="ones")])
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    for variable in loaded.variables:
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), np.full(variable.shape, 7.0))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.variables[0]), np.ones((3, 2)))


@keras.saving.register_keras_serializable("hornbeam_tests")
class Doubles(keras.layers.Layer):
    """Changes the layer before it, which was stored already."""

    def call(self, x: object) -> object:
        return x

    def save_own_variables(self, store: object) -> None:
        if BACKEND == "numpy":
            self.before.w.value[...] *= 2  # in place, as torch assigns
        else:
            self.before.w.assign(self.before.w * 2)


def test_what_compiled_code_stores_is_taken_at_once(tmp_path: Path) -> None:
    """Code that has no frame in Python, as of Cython, is not Keras' own, either."""
    model = chain(keras.layers.Dense(2, kernel_initializer="ones", use_bias=False), Doubles(), shape=(3,))
    dense, doubles = model.layers[1:]
    dense.save_own_variables = operator.methodcaller("__setitem__", "0", dense.kernel)
    doubles.before = types.SimpleNamespace(w=dense.kernel)
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.save_weights(tmp_path / "m.weights.h5")
    with hornbeam.open(tmp_path / "m.weights.h5") as file:
        np.testing.assert_array_equal(file["layers/dense/vars/0"], np.ones((3, 2)))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(dense.kernel), np.full((3, 2), 2))


@pytest.mark.backend("tensorflow", reason="only TensorFlow has this mode")
@pytest.mark.parametrize("rows", [100, 5000])
def test_sparse_updates_do_not_make_saves_copy(rows: int) -> None:
    model = chain(keras.layers.Embedding(rows, 16), keras.layers.Flatten(), keras.layers.Dense(1), shape=(8,))
    model.compile("sgd", "mse")
    x, y = np.arange(512).reshape(64, 8) % 97, floats(64, 1)
    model.fit(x, y, verbose=0)
    embeddings = model.layers[1].embeddings
    first, second = tensors.view(embeddings), tensors.view(embeddings)
    assert np.shares_memory(first, second) == (first.nbytes > on_tensorflow._COPIED)  # a small one may be copied
    before = np.array(first)
    model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(first, before)
    assert not np.array_equal(tensors.view(embeddings), before)


@pytest.mark.backend("tensorflow", reason="only TensorFlow compiles slots into being")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slots_that_fit_made_are_shared_and_survive_further_training(dtype: str) -> None:
    model = chain(keras.layers.Dense(64, dtype=dtype), keras.layers.Dense(3))
    model.compile("adam", "mse", jit_compile=True)
    x, y = floats(16, 6), floats(16, 3)
    model.fit(x, y, verbose=0)
    variables = [*model.variables, *model.optimizer.variables]
    views = [(tensors.view(v), tensors.view(v)) for v in variables]
    assert all(np.shares_memory(a, b) or a.size == 0 for a, b in views)
    before = [a.tobytes() for a, _ in views]
    model.fit(x, y, verbose=0, epochs=3)
    assert [a.tobytes() for a, _ in views] == before
    assert [np.array(tensors.view(v)).tobytes() for v in variables] != before
