"""Smaller files: weights in half precision, saves without the optimizer, and what the report says of them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers

import hornbeam
from hornbeam import _core, saving
from hornbeam.errors import InvalidError, UnsupportedError
from support.helpers import reported, saved, state
from support.zoo import ZOO, chain, floats, train

DTYPES = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@pytest.fixture(autouse=True)
def _strict() -> Any:
    with hornbeam.options(fallback=False):
        yield


def arrays(variables: Any) -> dict[str, np.ndarray]:
    return {v.path: np.array(keras.ops.convert_to_numpy(v)) for v in variables}


def narrowed(array: np.ndarray, dtype: str) -> np.ndarray:
    """The value that a weight has when it was saved in `dtype` and loaded again."""
    if array.dtype.kind == "f" and array.dtype.itemsize > 2:
        return array.astype(DTYPES[dtype]).astype(array.dtype)
    return array


def blank(model: Any) -> Any:
    """A model of the same structure with other values."""
    clone = keras.models.clone_model(model)
    for variable in clone.weights:
        variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
    return clone


SAVES: dict[str, Any] = {
    "m.keras": saving.save_model,
    "m.h5": saving.save_model,
    "old": lambda model, path, **kw: saving.save_model(model, path, save_format="h5", **kw),
    "m.weights.h5": saving.save_weights,
    "m.safetensors": saving.save_weights,
    "m.weights.json": lambda model, path, **kw: saving.save_weights(model, path, max_shard_size=1.0, **kw),
    "directory": lambda model, path, **kw: saving.save_model(model, path, zipped=False, **kw),
}


@pytest.mark.trains
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SAVES)
def test_every_format_stores_and_every_reader_gets_the_cast_weights(name: str, dtype: str, tmp_path: Path) -> None:
    model, *_ = ZOO["convolutional"]()
    path = tmp_path / name
    legacy = name in ("m.h5", "old")
    if legacy and dtype == "bfloat16":  # which HDF5 does not know; the other formats say so beside the values
        with pytest.raises(UnsupportedError, match="no bfloat16"):
            SAVES[name](model, path, dtype=dtype)
        assert not path.exists()
        return
    before = arrays(model.weights)
    slots = arrays(model.optimizer.variables)
    report = reported(SAVES[name], model, path, dtype=dtype)
    assert arrays(model.weights).keys() == before.keys()
    assert all(np.array_equal(a, before[k]) for k, a in arrays(model.weights).items())
    assert report.dtype == dtype
    assert {c.name for c in report.cast} == set(before)
    wanted = [narrowed(a, dtype).tobytes() for a in before.values()]
    readers = [True] if name in ("m.safetensors", "old") else [True, False]
    for ours in readers:
        scope = hornbeam.installed() if ours else contextlib.nullcontext()
        with scope, warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            if name in ("m.keras", "directory") or legacy:
                loaded = keras.models.load_model(path, compile=ours or not legacy)
                assert (legacy and not ours) or [a.tobytes() for a in arrays(loaded.optimizer.variables).values()] == [
                    a.tobytes() for a in slots.values()
                ]
            else:
                loaded = blank(model)
                loaded.load_weights(path)
        assert [v.dtype for v in loaded.weights] == [v.dtype for v in model.weights]
        assert [a.tobytes() for a in arrays(loaded.weights).values()] == wanted
        if ours:
            cast = hornbeam.last_report("load").cast
            assert {tuple(c[1:]) for c in cast} == {(dtype, "float32")}
            assert len(cast) == len(before)


def test_the_file_is_half_as_large_and_marked_as_keras_marks_it(tmp_path: Path) -> None:
    model = chain(layers.Dense(256), shape=(256,))
    sizes = {}
    for dtype in (None, "float16", "bfloat16"):
        saving.save_weights(model, tmp_path / "m.weights.h5", dtype=dtype)
        sizes[dtype] = (tmp_path / "m.weights.h5").stat().st_size
        with h5py.File(tmp_path / "m.weights.h5") as file:
            kernel = file["layers/dense/vars/0"]
            assert (kernel.dtype, kernel.attrs.get("dtype")) == {
                None: (np.dtype("float32"), None),
                "float16": (np.dtype("float16"), None),
                "bfloat16": (np.dtype("V2"), "bfloat16"),
            }[dtype]
    assert sizes["float16"] < 0.53 * sizes[None]
    assert sizes["bfloat16"] < 0.53 * sizes[None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_report_says_what_the_cast_cost(dtype: str, tmp_path: Path) -> None:
    model = chain(layers.Dense(300, name="a"), layers.Dense(7, name="b"), shape=(700,))  # more than a block of the cast
    random = np.random.default_rng(5)
    for variable in model.weights:
        variable.assign(random.standard_normal(variable.shape) * 10.0 ** random.integers(-12, 4, variable.shape))
    before = arrays(model.weights)
    report = reported(saving.save_weights, model, tmp_path / "m.weights.h5", dtype=dtype)
    assert [c.name for c in report.cast] == list(before)
    for cast in report.cast:
        wide = before[cast.name].astype("float64")
        narrow = before[cast.name].astype(DTYPES[dtype]).astype("float64")
        error = np.abs(wide - narrow)
        relative = error[wide != 0] / np.abs(wide[wide != 0])
        assert cast.max_abs == pytest.approx(error.max(), rel=1e-6)
        assert cast.max_rel == pytest.approx(relative.max(initial=0), rel=1e-4)
        assert cast.zeros == np.count_nonzero((narrow == 0) & (wide != 0))
        assert (cast.dtype, cast.saved_as, cast.infinite) == ("float32", dtype, 0)
    assert report.max_abs == max(c.max_abs for c in report.cast) > 0
    assert report.max_rel == max(c.max_rel for c in report.cast) == (1.0 if dtype == "float16" else report.max_rel)
    assert (sum(c.zeros for c in report.cast) > 0) == (dtype == "float16")
    text = str(report)
    assert f"4 to {dtype}" in text
    assert "at most (a/kernel)" in text
    assert ("values became so" in text) == (dtype == "float16")
    assert json.loads(json.dumps(report.to_dict()))["cast"][0]["name"] == "a/kernel"
    assert report.bytes == (tmp_path / "m.weights.h5").stat().st_size
    assert report.path == str(tmp_path / "m.weights.h5")


def test_what_becomes_infinite_is_an_error_unless_it_was_asked_for(tmp_path: Path) -> None:
    model = chain(layers.Dense(2, name="a"), shape=(3,))
    kernel = model.layers[-1].kernel
    kernel.assign([[1e9, 1.0], [np.nan, np.inf], [-7e4, 65504.0]])
    path = tmp_path / "m.keras"
    path.write_bytes(b"old")
    with pytest.raises(InvalidError, match=r"'a/kernel' \('layers/dense/vars/0' in.*2 would become infinite"):
        saving.save_model(model, path, dtype="float16")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.keras"]
    report = reported(saving.save_model, model, path, dtype="float16", allow_overflow=True)
    loaded = saving.load_model(path)
    wanted = np.float32([[np.inf, 1.0], [np.nan, np.inf], [-np.inf, 65504.0]])
    assert np.array_equal(arrays(loaded.weights)["a/kernel"], wanted, equal_nan=True)
    cast = report.cast[0]
    assert (cast.infinite, cast.max_abs, cast.max_rel) == (2, 0.0, 0.0)
    assert "2 values became so: 2 of a/kernel" in str(report)
    saving.save_model(model, path, dtype="bfloat16")  # reaches as far
    assert np.isfinite(arrays(saving.load_model(path).weights)["a/kernel"][0, 0])


@keras.saving.register_keras_serializable("cast")
class Counter(keras.Model):
    """Has an optimizer of its own."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)
        self.other_optimizer = keras.optimizers.Adam(0.1)

    def build(self, shape: Any) -> None:
        self.dense.build(shape)
        self.other_optimizer.build(self.dense.trainable_variables)
        self.built = True

    def call(self, x: Any) -> Any:
        return self.dense(x)


def test_optimizers_keep_their_precision(tmp_path: Path) -> None:
    model = Counter()
    model.build((None, 4))
    for variable in model.other_optimizer.variables:
        if "velocity" in variable.path:
            variable.assign(keras.ops.ones(variable.shape, variable.dtype) * 1e-12)
    path = tmp_path / "m.weights.h5"
    report = reported(saving.save_weights, model, path, dtype="float16")
    assert [c.name.rpartition("/")[2] for c in report.cast] == ["kernel", "bias"]
    other = Counter()
    other.build((None, 4))
    saving.load_weights(other, path)
    for a, b in zip(model.other_optimizer.variables, other.other_optimizer.variables, strict=True):
        assert np.array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b))
    report = reported(saving.save_weights, model, path, include_optimizer=False)
    assert report.left_out == [f"other_optimizer/vars/{i}" for i in range(6)]
    with h5py.File(path) as file:
        assert "dense" in file
        assert "other_optimizer" not in file


@pytest.mark.parametrize("name", sorted({"int8", "int4", "float8"} & ZOO.keys()))
def test_layers_with_quantised_weights_stay_what_they_are(name: str, tmp_path: Path) -> None:
    model, *_ = ZOO[name]()
    saving.save_model(model, tmp_path / "m.keras")
    report = reported(saving.save_model, model, tmp_path / "n.keras", dtype="float16")
    integers = {path.rpartition("/")[0] for path in quantised(tmp_path / "m.keras")}
    with hornbeam.open(tmp_path / "m.keras") as a, hornbeam.open(tmp_path / "n.keras") as b:
        assert list(a) == list(b)
        for path in a:
            kept = path.rpartition("/")[0] in integers
            assert (a[path].tobytes() == b[path].tobytes()) or not kept
            if kept:
                assert a[path].dtype == b[path].dtype
    assert bool(integers) == (name != "float8")
    assert saving.load_model(tmp_path / "n.keras").predict(floats(2, *model.input_shape[1:]), verbose=0) is not None
    assert all(c.dtype == "float32" for c in report.cast)


def quantised(path: Path) -> list[str]:
    with hornbeam.open(path) as file:
        return [name for name, tensor in file.tensors.items() if tensor.dtype.name in ("int8", "uint8")]


def hard_values(dtype: np.dtype) -> np.ndarray:
    """Every value that half precision has, what lies half-way between two, their neighbours, and random bits."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        every = np.concatenate([bits.view(half).astype(dtype) for half in DTYPES.values()])
        middle = (every[:-1] + every[1:]) / dtype.type(2)
        known = np.concatenate([every, middle])
        up, down = (np.nextafter(known, dtype.type(to)) for to in (np.inf, -np.inf))
    random = np.random.default_rng(7).integers(0, 256, (1 << 20) + 12345 * dtype.itemsize, np.uint8).view(dtype)
    return np.concatenate([known, up, down, random])


def cast_by_core(values: np.ndarray, dtype: str) -> tuple[np.ndarray, tuple[Any, ...]]:
    stored = "V2" if dtype == "bfloat16" else dtype
    plan = _core.plan([], [("x", stored, values.shape, [])], casts=[(0, values.dtype.name, "x", True)])
    file = io.BytesIO()
    (loss,) = plan.start(file, [values], archive=False).finish([])["casts"]
    weights = _core.open(file.getvalue(), archive=False).weights()
    return np.frombuffer(weights.read(0, 0, 2 * values.size), DTYPES[dtype]), loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_casts_round_as_numpy_and_ml_dtypes_do(wide: str, dtype: str) -> None:
    values = hard_values(np.dtype(wide))
    found, (i, max_abs, max_rel, zeros, infinite) = cast_by_core(values, dtype)
    with np.errstate(all="ignore"):
        wanted = values.astype(DTYPES[dtype])
        back = wanted.astype(wide)
        fine = np.isfinite(values) & np.isfinite(back)
        error = np.abs(values[fine] - back[fine])
        relative = error[values[fine] != 0] / np.abs(values[fine][values[fine] != 0])
    nan = np.isnan(values)  # which bits a NaN keeps depends on the processor
    assert found[~nan].tobytes() == wanted[~nan].tobytes()
    assert np.isnan(found[nan].astype("float32")).all()
    assert np.array_equal(np.signbit(found[nan]), np.signbit(values[nan]))
    assert (i, max_abs, max_rel) == (0, error.max(), relative.max())
    assert zeros == np.count_nonzero((back == 0) & (values != 0)) > 0
    assert infinite == np.count_nonzero(np.isfinite(values) & np.isinf(back)) > 0


@pytest.mark.parametrize("size", [1, 15, 16, 17, 4095, 4096, 4097, 3 * 4096 + 5])
def test_casts_of_every_length(size: int) -> None:
    values = np.linspace(-3, 3, size + 1, dtype="float32")[1:]
    wanted = values.astype("float16")
    found, (_, max_abs, _, zeros, infinite) = cast_by_core(values, "float16")
    assert found.tobytes() == wanted.tobytes()
    assert (max_abs, zeros, infinite) == (np.abs(values - wanted.astype("float32")).max(), 0, 0)


@pytest.mark.parametrize("how", ["compressed", "asynchronous"])
def test_other_ways_to_write_cast_alike(how: str, tmp_path: Path) -> None:
    def save(path: Path) -> Any:
        if how == "compressed":
            return reported(saving.save_weights, model, path, dtype="float16", compression=1)
        handle = saving.save_weights(model, path, dtype="float16", asynchronous=True)
        handle.result()
        return handle.report

    model = chain(layers.Dense(300, name="a"), shape=(700,))
    plain = reported(saving.save_weights, model, tmp_path / "m.weights.h5", dtype="float16")
    path = tmp_path / "other.weights.h5"
    assert save(path).cast == plain.cast
    with hornbeam.open(path) as found, hornbeam.open(tmp_path / "m.weights.h5") as wanted:
        assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in wanted.items()}
    model.layers[-1].kernel.assign(keras.ops.ones((700, 300)) * 1e9)
    before = path.read_bytes()
    with pytest.raises(InvalidError, match=r"'a/kernel'.*210000 would become infinite"):
        save(path)
    assert path.read_bytes() == before


def test_only_wider_floats_are_cast(tmp_path: Path) -> None:
    model, *_ = ZOO["odd_variables"]()
    before = arrays(model.weights)
    report = reported(saving.save_weights, model, tmp_path / "m.safetensors", dtype="float16")
    wide = {k for k, a in before.items() if a.dtype.name in ("float32", "float64")}
    assert {c.name for c in report.cast} == {k for k in wide if before[k].size}
    assert wide < set(before)
    with hornbeam.open(tmp_path / "m.safetensors") as file:
        for path, array in before.items():
            assert file[path].dtype == ("float16" if path in wide else array.dtype)
            if path not in wide:
                assert file[path].tobytes() == array.tobytes()


# Without the optimizer


@pytest.mark.trains
@pytest.mark.parametrize("ours", [True, False])
def test_a_model_without_its_optimizers_state_loads_compiled_with_a_fresh_one(ours: bool, tmp_path: Path) -> None:
    model, x, y = ZOO["functional"]()
    path = tmp_path / "m.keras"
    saving.save_model(model, path)
    whole = path.stat().st_size
    report = reported(saving.save_model, model, path, include_optimizer=False)
    assert len(report.left_out) == len(model.optimizer.variables)
    assert "left out" in str(report)
    assert path.stat().st_size < whole
    with zipfile.ZipFile(path) as archive, h5py.File(archive.open("model.weights.h5")) as file:
        assert set(file) == {"layers", "vars"} | ({"_layer"} & set(file))
    scope = hornbeam.installed() if ours else contextlib.nullcontext()
    with scope, hornbeam.options(fallback=True), pytest.warns(UserWarning, match="Skipping variable") as caught:
        loaded = keras.models.load_model(path)
    # Keras' own words, from either.
    assert [str(w.message) for w in caught if w.category is UserWarning] == [
        f"Skipping variable loading for optimizer '{loaded.optimizer.name}', because it has 10 variables whereas the "
        "saved optimizer has 0 variables. "
    ]
    assert int(loaded.optimizer.iterations) == 0
    assert loaded.compiled
    assert [v[2] for v in saved(loaded)[:4]] == [v[2] for v in saved(model)[:4]]
    loaded.fit(x, y, verbose=0)
    assert int(loaded.optimizer.iterations) > 0


LEAVING_OUT = {**SAVES, "savedmodel": saving.save_model}


@pytest.mark.backend("tensorflow", "jax", reason="SavedModels need TensorFlow or JAX")
@pytest.mark.parametrize("name", LEAVING_OUT)
def test_every_format_leaves_the_optimizers_state_out(name: str, tmp_path: Path) -> None:
    model, *_ = ZOO["functional"]()
    path = tmp_path / name
    report = reported(LEAVING_OUT[name], model, path, include_optimizer=False)
    assert len(report.left_out) == len(model.optimizer.variables) == 10
    readers = [True] if name in ("m.safetensors", "old", "savedmodel") else [True, False]
    for ours in readers:
        scope = hornbeam.installed() if ours else contextlib.nullcontext()
        with scope, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if name.endswith((".safetensors", ".weights.h5", ".json")):
                loaded = blank(model)
                loaded.compile("adam", "mse")
                loaded.load_weights(path)
            else:
                loaded = keras.models.load_model(path)
        assert [a.tobytes() for a in arrays(loaded.weights).values()] == [
            a.tobytes() for a in arrays(model.weights).values()
        ]
        if name in ("m.h5", "old"):  # as in Keras: no training configuration either
            assert not loaded.compiled
            continue
        assert int(loaded.optimizer.iterations) == 0
        if name in ("m.keras", "directory", "savedmodel"):
            assert loaded.compiled
    if name in ("m.h5", "old"):
        with h5py.File(path) as file:
            assert "optimizer_weights" not in file


@pytest.mark.trains
def test_installed_keras_takes_the_arguments(tmp_path: Path) -> None:
    model, *_ = ZOO["functional"]()
    with hornbeam.installed():
        model.save(tmp_path / "m.keras", include_optimizer=False, dtype="bfloat16")
        report = hornbeam.last_report("save")
        assert len(report.cast) == 4
        assert len(report.left_out) == 10
        keras.saving.save_weights(model, tmp_path / "m.weights.h5", include_optimizer=False)
        with h5py.File(tmp_path / "m.weights.h5") as file:
            assert "optimizer" not in file
        with pytest.raises(ValueError, match=r"not supported: \['dtipe'\]"):
            model.save(tmp_path / "m.keras", dtipe="float16")
    with pytest.raises(ValueError, match=r"not supported: \['dtype'\]"):
        model.save(tmp_path / "m.keras", dtype="float16")


def test_the_next_save_is_whole_again(tmp_path: Path) -> None:
    model, *_ = ZOO["functional"]()
    before = state(model)

    copies: list[Any] = []

    class Nested(layers.Layer):
        def call(self, x: Any) -> Any:
            return x

        def save_own_variables(self, store: Any) -> None:
            copies.append(copy.deepcopy(model))

    outer = chain(Nested(), layers.Dense(2))
    with hornbeam.installed():
        outer.save(tmp_path / "m.keras", include_optimizer=False, dtype="float16")
        assert saved(copies[0]) == saved(model)
        copied = copy.deepcopy(model)
    assert saved(copied) == saved(model)
    assert state(model) == before
    saving.save_model(model, tmp_path / "m.keras")
    assert saved(saving.load_model(tmp_path / "m.keras", strict=True)) == saved(model)


def test_file_objects_too() -> None:
    model, *_ = ZOO["functional"]()
    file = io.BytesIO()
    saving.save_model(model, file, dtype="float16", include_optimizer=False)
    assert len(hornbeam.last_report("save").cast) == 4
    with zipfile.ZipFile(file) as archive, h5py.File(archive.open("model.weights.h5")) as weights:
        assert weights["layers/dense/vars/0"].dtype == "float16"
        assert "optimizer" not in weights


def test_what_is_refused(tmp_path: Path) -> None:
    model = train(chain(layers.Dense(2)), floats(8, 6), floats(8, 2))[0]
    with pytest.raises(ValueError, match="dtype must be 'float16' or 'bfloat16'"):
        saving.save_model(model, tmp_path / "m.keras", dtype="int8")
    with pytest.raises(ValueError, match="allow_overflow"):
        saving.save_model(model, tmp_path / "m.keras", allow_overflow=True)
    with pytest.raises(UnsupportedError, match="neither casts"), hornbeam.options(fallback=True):
        saving.save_weights(model, "memory://m.weights.h5", dtype="float16")
    assert not os.listdir(tmp_path)


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    size = 1 << 20
    model = chain(*(layers.Dense(1024, use_bias=False) for _ in range(12)), shape=(1024,))
    tracemalloc.start()
    saving.save_weights(model, tmp_path / "m.weights.h5", dtype="bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * 2 * size + (4 << 20)  # of 24 MiB
