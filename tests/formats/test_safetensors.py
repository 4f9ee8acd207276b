"""Weights as safetensors: what the package of that name and `hornbeam.open` see, and what models get back."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from safetensors import safe_open
from safetensors.numpy import save_file

import hornbeam
from hornbeam import IncompleteLoadError, saving
from hornbeam.errors import InvalidError, UnsupportedError, WeightsFileError
from support.helpers import reported, saved, state
from support.zoo import ZOO, chain, floats, train


@pytest.fixture(autouse=True)
def _strict() -> Any:
    with hornbeam.options(fallback=False):
        yield


def disturb(model: Any) -> list[Any]:
    """Gives every floating variable of the model and its optimizer another value."""
    optimizer = getattr(model, "optimizer", None)
    for variable in [*model.weights, *(optimizer.variables if optimizer is not None else [])]:
        if "float" in variable.dtype:
            variable.assign(keras.ops.convert_to_numpy(variable) * 0 + 2)
    return state(model)


def disturbed(model: Any) -> Any:
    disturb(model)
    return model


def peer(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor, as the reference implementation reads them."""
    from safetensors import deserialize

    return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in deserialize(path.read_bytes())}


def two_layers(**kwargs: Any) -> Any:
    return chain(layers.Dense(3, name="first"), layers.Dense(2, name="second"), shape=(4,), **kwargs)


NAMES = {"float32": "F32", "float16": "F16", "float64": "F64", "bfloat16": "BF16", "bool": "BOOL", "complex64": "C64"}


#: Optimizers with names of several kinds; the others name their slots as these do.
OPTIMIZERS = ("optimizer_Adafactor", "optimizer_Muon", "optimizer_SGD")


@pytest.mark.parametrize("name", [name for name in ZOO if not name.startswith("optimizer_") or name in OPTIMIZERS])
def test_every_model_round_trips_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, *_ = ZOO[name]()
    path = tmp_path / "w.safetensors"
    report = reported(saving.save_weights, model, path)
    before = saved(model)
    there = peer(path)
    assert report.tensors == len(there)
    assert (report.engine, report.bytes) == ("safetensors", path.stat().st_size)
    for variable in model.weights:
        if variable.path not in there:
            assert name == "lora"  # it stores the merged kernel
            continue
        dtype, shape, data = there[variable.path]
        value = keras.ops.convert_to_numpy(variable)
        letters = dtype.rstrip("0123456789")
        known = NAMES.get(value.dtype.name, {"U": "U", "I": "I"}.get(letters, "F") + dtype.lstrip("UIF"))
        assert (dtype, tuple(shape), data) == (known, value.shape, value.tobytes())
    disturb(model)
    loaded = saving.load_weights(model, path, strict=True)
    assert loaded.complete
    assert len(loaded.loaded) == len(there)
    if name != "lora":
        assert saved(model) == before


@pytest.mark.parametrize("name", ["functional", "subclassed", "mixed_precision", "unicode_and_long_names", *OPTIMIZERS])
def test_a_model_of_other_automatic_names_trains_on_the_same(name: str, tmp_path: Path) -> None:
    model, x, y = ZOO[name]()
    other, *_ = ZOO[name]()
    saving.save_weights(model, tmp_path / "w.safetensors")
    saving.load_weights(disturbed(other), tmp_path / "w.safetensors", strict=True)
    assert saved(other) == saved(model)
    for m in (model, other):
        for variable in m.variables:
            if "seed" in variable.path:
                variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
        m.fit(x, y, batch_size=8, epochs=1, verbose=0, shuffle=False)
    assert saved(other) == saved(model)


def test_the_file_is_what_the_format_says(tmp_path: Path) -> None:
    model = two_layers()
    path = tmp_path / "w.safetensors"
    saving.save_weights(model, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert (8 + size) % 64 == 0
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "keras"
    assert json.loads(metadata["keras_paths"])["layers/dense/vars/0"] == "first/kernel"
    assert set(header) == {"first/kernel", "first/bias", "second/kernel", "second/bias"}
    ends = sorted(tuple(t["data_offsets"]) for t in header.values())
    assert ends[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
    assert 8 + size + ends[-1][1] == len(data)
    with safe_open(path, "np") as file:
        assert file.metadata()["keras_version"] == keras.__version__
        for variable in model.weights:
            assert np.array_equal(file.get_tensor(variable.path), keras.ops.convert_to_numpy(variable))
    with hornbeam.open(path) as file:
        assert file.format == "safetensors"
        assert file["first/kernel"].tobytes() == keras.ops.convert_to_numpy(model.layers[1].kernel).tobytes()


def zeros(shape: Any, dtype: str) -> Any:
    """TensorFlow makes a float8 of a float only."""
    return keras.ops.cast(keras.ops.zeros(shape, "float32"), dtype)


class Holder(layers.Layer):
    """One variable of every dtype."""

    def build(self, shape: Any) -> None:
        for dtype in DTYPES:
            self.add_weight(name=dtype, shape=(3, 5), dtype=dtype, initializer=zeros, trainable=False)

    def call(self, x: Any) -> Any:
        return x


BACKEND = keras.backend.backend()
DTYPES = ["float16", "float32", "float64", "bfloat16", "bool"]
DTYPES += ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"]
WRITTEN = {"BF16", "BOOL", "I8"}
if BACKEND != "torch":  # there Keras has no such numbers, or cannot make NumPy's of them
    DTYPES += ["float8_e4m3fn", "float8_e5m2", "uint64"]
    WRITTEN |= {"F8_E4M3", "F8_E5M2", "U32" if BACKEND == "jax" else "U64"}  # JAX computes 32 bits instead


def test_every_dtype(tmp_path: Path) -> None:
    model = chain(Holder(name="h"))
    random = np.random.default_rng(3)
    wanted = {}
    for variable in model.weights:
        bits = random.integers(0, 2 if variable.dtype == "bool" else 256, (3, 5), np.uint8)
        numbers = bits.astype("float32") / 64 if "float" in variable.dtype else bits
        variable.assign(keras.ops.cast(numbers, variable.dtype))
        wanted[variable.path] = keras.ops.convert_to_numpy(variable).tobytes()
    path = tmp_path / "w.safetensors"
    saving.save_weights(model, path)
    assert {name: t[2] for name, t in peer(path).items()} == wanted
    assert {t[0] for t in peer(path).values()} >= WRITTEN
    for variable in model.weights:
        variable.assign(zeros((3, 5), variable.dtype))
    saving.load_weights(model, path, strict=True)
    assert {v.path: keras.ops.convert_to_numpy(v).tobytes() for v in model.weights} == wanted


def test_what_the_format_cannot_hold_is_named(tmp_path: Path) -> None:
    class Complex(layers.Dense):
        def save_own_variables(self, store: Any) -> None:
            store["z"] = np.ones(2, "complex128")

    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(InvalidError, match=r"complex128.*layers/complex/vars/z|layers/complex/vars/z.*complex128"):
        saving.save_weights(chain(Complex(2)), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_two_variables_of_one_name_are_both_named(tmp_path: Path) -> None:
    def part(name: str) -> Any:
        return chain(layers.Dense(4, name="first"), shape=(4,), name=name)

    inputs = keras.Input((4,))
    model = keras.Model(inputs, part("b")(part("a")(inputs)))
    assert [v.path for v in model.weights] == ["first/kernel", "first/bias"] * 2
    wanted = r"'first/kernel'.*'layers/functional/layers/dense/vars/0' and 'layers/functional_1/layers/dense/vars/0'"
    with pytest.raises(InvalidError, match=wanted):
        saving.save_weights(model, tmp_path / "w.safetensors")
    assert not os.listdir(tmp_path)


def test_one_variable_in_two_places_is_saved_once_and_loaded_into_both(tmp_path: Path) -> None:
    model, *_ = ZOO["wrappers"]()
    path = tmp_path / "w.safetensors"
    saving.save_weights(model, path)
    places = json.loads(safe_open(path, "np").metadata()["keras_paths"])
    assert len(places) > len(set(places.values())) == len(peer(path))


def test_installed_keras_saves_and_loads_them(tmp_path: Path) -> None:
    model, *_ = ZOO["functional"]()
    path = tmp_path / "w.safetensors"
    with hornbeam.installed():
        model.save_weights(path)
        before = saved(model)
        disturb(model)
        model.load_weights(str(path))
    assert saved(model) == before
    with pytest.raises(ValueError, match="File format not supported"):
        model.load_weights(path)
    with pytest.raises(ValueError, match=r"must end in `\.weights\.h5`"):
        model.save_weights(path)


def test_without_the_optimizer(tmp_path: Path) -> None:
    model, *_ = ZOO["functional"]()
    path = tmp_path / "w.safetensors"
    report = reported(saving.save_weights, model, path, include_optimizer=False)
    assert set(peer(path)) == {v.path for v in model.weights}
    assert report.left_out == [f"optimizer/vars/{i}" for i in range(len(model.optimizer.variables))]
    before = saved(model)
    with hornbeam.options(fallback=True):
        loaded = saving.load_weights(model, path)
    assert loaded.missing == [v.path for v in model.optimizer.variables]
    assert not loaded.complete
    with pytest.raises(IncompleteLoadError):
        saving.load_weights(model, path, strict=True)
    assert saved(model) == before


def test_the_state_of_an_optimizer_of_another_name_is_found(tmp_path: Path) -> None:
    model = train(two_layers(), floats(8, 4), floats(8, 2))[0]
    other = train(two_layers(), floats(8, 4), floats(8, 2))[0]
    assert {v.path for v in model.optimizer.variables}.isdisjoint(v.path for v in other.optimizer.variables)
    saving.save_weights(model, tmp_path / "w.safetensors")
    saving.load_weights(other, tmp_path / "w.safetensors", strict=True)
    assert saved(other) == saved(model)


def test_automatic_names_that_stand_for_other_places_are_warned_of(tmp_path: Path) -> None:
    def build(*names: str) -> Any:
        return chain(*(layers.Dense(4, name=name) for name in names), shape=(4,))

    model = build("dense_1", "dense_2", "head")
    saving.save_weights(model, tmp_path / "w.safetensors")
    other = build("dense_2", "dense_1", "head")
    with pytest.warns(UserWarning, match=r"saved as 'dense_1/kernel' is 'dense_2/kernel'.*loaded by name"):
        saving.load_weights(other, tmp_path / "w.safetensors")
    assert state(other) != state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saving.load_weights(build("dense_1", "dense_2", "head"), tmp_path / "w.safetensors")


def test_an_optimizer_is_loaded_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    model = train(two_layers(), floats(8, 4), floats(8, 2))[0]
    saving.save_weights(model, tmp_path / "w.safetensors")
    other = two_layers()
    other.compile("adam", "mse")  # its slots are made by the first step
    with pytest.warns(UserWarning, match="other variables for it"), hornbeam.options(fallback=True):
        report = saving.load_weights(other, tmp_path / "w.safetensors")
    assert int(other.optimizer.iterations) == 0
    assert saved(other)[:4] == saved(model)[:4]
    assert not report.complete
    with pytest.raises(IncompleteLoadError), pytest.warns(UserWarning, match="other variables for it"):
        saving.load_weights(other, tmp_path / "w.safetensors", strict=True)


def test_a_model_without_an_optimizer_skips_its_state(tmp_path: Path) -> None:
    model = train(two_layers(), floats(8, 4), floats(8, 2))[0]
    saving.save_weights(model, tmp_path / "w.safetensors")
    other = two_layers()
    report = saving.load_weights(other, tmp_path / "w.safetensors", strict=True)
    assert sorted(report.skipped) == sorted(v.path for v in model.optimizer.variables)
    assert not report.unexpected
    assert saved(other) == saved(model)[:4]


# Shards


def test_shards_as_hugging_face_lays_them_out(tmp_path: Path) -> None:
    model = two_layers()
    big = chain(*(layers.Dense(64, name=f"d{i}") for i in range(6)), shape=(64,))
    size = 3 * 64 * 65 * 4 / 1024**3
    saving.save_weights(big, tmp_path / "m.safetensors", max_shard_size=size)
    files = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
    assert sorted(os.listdir(tmp_path)) == [*files, "m.safetensors.index.json"]
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 6 * 64 * 65 * 4}
    assert index["weight_map"] == {name: file for file in files for name in peer(tmp_path / file)}
    assert set(index["weight_map"]) == {v.path for v in big.weights}
    before = saved(big)
    for name in ("m.safetensors.index.json", "m.safetensors"):
        disturb(big)
        saving.load_weights(big, tmp_path / name, strict=True)
        assert saved(big) == before
    with hornbeam.open(tmp_path / "m.safetensors.index.json") as file:
        assert file["d5/bias"].tobytes() == keras.ops.convert_to_numpy(big.layers[-1].bias).tobytes()
    # What fits into one is one file; at the path of an index there is an index.
    saving.save_weights(model, tmp_path / "s.safetensors", max_shard_size=1)
    saving.save_weights(model, tmp_path / "i.safetensors.index.json", max_shard_size=1)
    assert {f for f in os.listdir(tmp_path) if f[0] in "si"} == {
        "s.safetensors",
        "i.safetensors.index.json",
        "i-00001-of-00001.safetensors",
    }


def test_new_shards_leave_nothing_of_the_old(tmp_path: Path) -> None:
    big = chain(*(layers.Dense(64, name=f"d{i}") for i in range(6)), shape=(64,))
    layer = 64 * 65 * 4 / 1024**3
    saving.save_weights(big, tmp_path / "m.safetensors")
    (tmp_path / "m-notes.safetensors").write_bytes(b"mine")
    for n in (1, 2, 3):
        saving.save_weights(big, tmp_path / "m.safetensors", max_shard_size=n * layer)
        shards = {f"m-{i:05}-of-{6 // n:05}.safetensors" for i in range(1, 6 // n + 1)}
        assert set(os.listdir(tmp_path)) == {*shards, "m.safetensors.index.json", "m-notes.safetensors"}


def test_shards_replace_nothing_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("keras.src.utils.io_utils.ask_to_proceed_with_overwrite", lambda path: asked.append(path))
    big = chain(layers.Dense(64), layers.Dense(64), shape=(64,))
    size = 64 * 65 * 4 / 1024**3
    single, index = tmp_path / "v.safetensors", tmp_path / "v.safetensors.index.json"
    single.write_bytes(b"mine")
    with pytest.warns(UserWarning, match="is left as it is"):
        saving.save_weights(big, index, max_shard_size=size, overwrite=False)
    assert single.read_bytes() == b"mine"
    assert not asked
    single.unlink()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 3
    disturb(big)
    saving.save_weights(big, single, max_shard_size=size, overwrite=False)  # the answer is no
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(asked) == 1
    assert all(str(path) in asked[0] for path in before)
    index.unlink()
    saving.save_weights(big, index, max_shard_size=size, overwrite=False)  # its shards are there
    assert not index.exists()
    assert len(asked) == 2
    saving.save_weights(big, single, max_shard_size=size)
    assert before.keys() == set(tmp_path.iterdir())
    assert all(path.read_bytes() != before[path] for path in before if path != index)


def test_an_interrupted_replacement_leaves_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hornbeam import _core

    big = chain(*(layers.Dense(64, name=f"d{i}") for i in range(6)), shape=(64,))
    path = tmp_path / "m.safetensors"
    saving.save_weights(big, path, max_shard_size=64 * 65 * 4 / 1024**3)

    shards = sorted(tmp_path.glob("*.safetensors"))
    before = [shard.read_bytes() for shard in shards]
    disturb(big)
    commit = _core.commit_indexed

    def fails(*args: Any, **how: Any) -> Any:
        """The third shard cannot take its place."""
        shards[2].unlink()
        shards[2].mkdir()
        return commit(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(_core, "commit_indexed", fails)
        with pytest.raises(IsADirectoryError):
            saving.save_weights(big, path, max_shard_size=64 * 65 * 4 / 1024**3)
    shards[2].rmdir()
    untouched = [s.exists() and s.read_bytes() == old for s, old in zip(shards, before, strict=True)]
    assert untouched == [False] * 3 + [True] * (len(shards) - 3)
    assert sorted(tmp_path.iterdir()) == [shard for shard in shards if shard != shards[2]]
    assert not (tmp_path / "m.safetensors.index.json").exists()
    with pytest.raises(FileNotFoundError):
        saving.load_weights(big, path)


def test_a_tensor_larger_than_a_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"first/kernel is 48\.0\d?B? which exceeds|first/kernel.*exceeds the maximum"):
        saving.save_weights(two_layers(), tmp_path / "m.safetensors", max_shard_size=1e-9)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "elsewhere", "wrong", "twice"])
def test_broken_shards_change_nothing(damage: str, tmp_path: Path) -> None:
    big = chain(*(layers.Dense(64, name=f"d{i}") for i in range(6)), shape=(64,))
    saving.save_weights(big, tmp_path / "m.safetensors", max_shard_size=3 * 64 * 65 * 4 / 1024**3)
    path = tmp_path / "m.safetensors.index.json"
    index = json.loads(path.read_text())
    second = "m-00002-of-00002.safetensors"
    error: Any = FileNotFoundError
    if damage == "missing":
        (tmp_path / second).unlink()
    elif damage == "elsewhere":
        index["weight_map"]["d0/kernel"] = "../x.safetensors"
        error = ValueError
    elif damage == "wrong":
        index["weight_map"]["d9/kernel"] = second
        error = WeightsFileError
    else:
        saving.save_weights(big, tmp_path / "m-00001-of-00002.safetensors")
        error = ValueError
    path.write_text(json.dumps(index))
    before = disturb(big)
    with pytest.raises(error):
        saving.load_weights(big, tmp_path / "m.safetensors")
    assert state(big) == before


# Partial, renamed and foreign


def test_weights_of_another_tool_through_a_map_and_a_function(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    values = {f"net.{i}.{k}": floats(*s, seed=i) for i, k, s in [(0, "w", (4, 3)), (0, "b", (3,)), (1, "w", (3, 2))]}
    values["net.1.b"] = floats(2, seed=7)
    save_file({**values, "net.pos": floats(5)}, path)
    names = {"net.0.w": "first/kernel", "net.0.b": "first/bias", "net.1.w": "second/kernel", "net.1.b": "second/bias"}
    for name_map in (names, lambda name: names.get(name)):
        model = two_layers()
        with hornbeam.options(fallback=True):
            report = saving.load_weights(model, path, name_map=name_map)
        assert sorted(report.loaded) == sorted(values)
        assert report.skipped == ["net.pos"]
        for source, target in names.items():
            variable = next(v for v in model.weights if v.path == target)
            assert np.array_equal(keras.ops.convert_to_numpy(variable), values[source])


def test_a_transposed_tensor_says_so_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(
        {
            "first/kernel": floats(3, 4),
            "first/bias": floats(3),
            "second/kernel": floats(3, 2),
            "second/bias": floats(2),
        },
        path,
    )
    model = two_layers()
    before = state(model)
    with pytest.raises(IncompleteLoadError, match=r"first/kernel: \(3, 4\) in the file is the transpose of \(4, 3\)"):
        saving.load_weights(model, path)
    assert state(model) == before
    with pytest.warns(UserWarning, match="could not be loaded"):
        report = saving.load_weights(model, path, skip_mismatch=True)
    assert "first/kernel" in report.refused
    assert np.array_equal(keras.ops.convert_to_numpy(model.layers[2].kernel), floats(3, 2))


def test_what_is_missing_is_named_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"first/kernel": floats(4, 3), "first/bias": floats(3), "second/kernal": floats(3, 2)}, path)
    model = two_layers()
    before = state(model)
    with pytest.raises(IncompleteLoadError, match="second/kernel: not in the file") as caught:
        saving.load_weights(model, path)
    assert caught.value.report.missing == ["second/kernel", "second/bias"]
    assert caught.value.report.unexpected == ["second/kernal"]
    assert state(model) == before
    report = saving.load_weights(model, path, by_name=True, skip_mismatch=True)
    assert report.missing == ["second/kernel", "second/bias"]
    assert np.array_equal(keras.ops.convert_to_numpy(model.layers[1].kernel), floats(4, 3))


def test_only_and_skip(tmp_path: Path) -> None:
    model = two_layers()
    path = tmp_path / "w.safetensors"
    saving.save_weights(model, path)
    before = saved(model)
    after = disturb(model)
    report = saving.load_weights(model, path, only="first/*")
    assert sorted(report.loaded) == ["first/bias", "first/kernel"]
    assert sorted(report.skipped) == ["second/bias", "second/kernel"]
    assert saved(model)[:2] == before[:2]
    assert state(model)[2:] == after[2:]
    disturb(model)
    saving.load_weights(model, path, skip="second/bias")
    assert saved(model)[:3] == before[:3]
    with pytest.raises(ValueError, match=r"No variable of the model fits 'third'"):
        saving.load_weights(model, path, only="third")


def test_casts_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    model = two_layers()
    save_file({v.path: keras.ops.convert_to_numpy(v).astype("float16") for v in model.weights}, path)
    report = saving.load_weights(model, path, strict=True)
    assert ("first/kernel", "float16", "float32") in report.cast
    assert {v.dtype for v in model.weights} == {"float32"}


def test_names_in_other_layers_order_go_by_name(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    saving.save_weights(chain(layers.Dense(4, name="a"), layers.Dense(4, name="b"), shape=(4,)), path)
    file = {n: np.frombuffer(d, "float32").reshape(s) for n, (_, s, d) in peer(path).items()}
    other = chain(layers.Dense(4, name="b"), layers.Dense(4, name="a"), shape=(4,))
    saving.load_weights(other, path, strict=True)
    for variable in other.weights:
        assert np.array_equal(keras.ops.convert_to_numpy(variable), file[variable.path])


# What cannot be


@pytest.mark.parametrize("damage", ["short", "long", "header", "metadata"])
def test_a_damaged_file_changes_nothing(damage: str, tmp_path: Path) -> None:
    model = two_layers()
    path = tmp_path / "w.safetensors"
    saving.save_weights(model, path)
    data = path.read_bytes()
    if damage == "metadata":
        save_file({v.path: keras.ops.convert_to_numpy(v) for v in model.weights}, path, {"keras_paths": "[1]"})
    else:
        path.write_bytes({"short": data[:-1], "long": data + b"\0", "header": b"\xff" * 8 + data[8:]}[damage])
    before = disturb(model)
    with pytest.raises((WeightsFileError, ValueError)):
        saving.load_weights(model, path)
    assert state(model) == before


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    unbuilt = keras.Sequential([layers.Dense(2)])
    with pytest.raises(ValueError, match="not yet been built"):
        saving.save_weights(unbuilt, path)
    with pytest.raises(ValueError, match="not yet been built"):
        saving.load_weights(unbuilt, path)
    with pytest.raises(UnsupportedError, match="not compressed"):
        saving.save_weights(two_layers(), path, compression="gzip")
    with pytest.raises(UnsupportedError, match="local paths"):
        saving.save_weights(two_layers(), "gs://bucket/w.safetensors")
    with pytest.raises(ValueError, match="max_shard_size"):
        saving.save_weights(two_layers(), tmp_path / "w.safetensors.index.json")
    with pytest.raises(FileNotFoundError):
        saving.load_weights(two_layers(), path)
    assert not os.listdir(tmp_path)
    path.write_bytes(b"old")
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    saving.save_weights(two_layers(), path, overwrite=False)
    assert path.read_bytes() == b"old"


def test_a_process_without_keras_reads_it(tmp_path: Path) -> None:
    model = two_layers()
    path = tmp_path / "w.safetensors"
    saving.save_weights(model, path)
    code = (
        "import sys, hornbeam\n"
        f"with hornbeam.open({str(path)!r}) as f: print(f['first/kernel'].tobytes().hex())\n"
        "assert 'keras' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == keras.ops.convert_to_numpy(model.layers[1].kernel).tobytes().hex()
