"""Knowing exactly what was loaded: reports, strict and partial loads, and models that a failed load leaves alone."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers

import hornbeam
from hornbeam import IncompleteLoadError, saving
from support.helpers import state
from support.zoo import ZOO, chain, floats, train


@pytest.fixture(autouse=True)
def _strict() -> Any:
    with hornbeam.options(fallback=False):
        yield


def disturb(model: Any) -> list[Any]:
    """Gives every floating variable another value."""
    for variable in model.variables:
        if "float" in variable.dtype:
            variable.assign(keras.ops.convert_to_numpy(variable) + 1)
    return state(model)


def datasets(path: Path) -> set[str]:
    found: set[str] = set()

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found.add(name)

    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as image, h5py.File(image, "r") as file:
            file.visititems(visit)
    else:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    return found


@pytest.mark.parametrize("name", ZOO)
def test_every_tensor_of_every_model_is_accounted_for(name: str, tmp_path: Path) -> None:
    model, *_ = ZOO[name]()
    saving.save_model(model, tmp_path / "m.keras")
    names = datasets(tmp_path / "m.keras")
    loaded = saving.load_model(tmp_path / "m.keras", strict=True)
    report = hornbeam.last_report("load")
    assert report is not None
    assert (set(report.loaded), report.missing, report.unexpected, report.mismatched) == (names, [], [], [])
    assert (report.initialised, report.crc, report.engine) == ([], "verified", "direct")
    narrow = name == "float64" and keras.backend.backend() in ("jax", "numpy")  # they compute, and save, float32
    assert bool(report.cast) == narrow
    assert report.path == str(tmp_path / "m.keras")
    again = saving.load_weights(loaded, tmp_path / "m.keras", strict=True)
    assert again is hornbeam.last_report("load")
    assert (set(again.loaded), again.complete, again.bytes) == (names, True, report.bytes)


@pytest.mark.parametrize(("name", "damage"), [(name, ("shape", "absent")[i % 2]) for i, name in enumerate(ZOO)])
def test_what_does_not_fit_leaves_every_model_as_it_was(name: str, damage: str, tmp_path: Path) -> None:
    model, *_ = ZOO[name]()
    path = tmp_path / "m.weights.h5"
    saving.save_weights(model, path)
    found = sorted(n for n in datasets(path) if not n.startswith("optimizer/"))
    if not found:
        return  # a model of preprocessing layers: nothing to damage
    with h5py.File(path, "a") as file:
        del file[found[-1]]
        if damage == "shape":
            file[found[-1]] = np.zeros((3, 1, 4, 1, 5))
    before = disturb(model)
    with pytest.raises(IncompleteLoadError, match=re.escape(str(path))) as raised:
        saving.load_weights(model, path, strict=True)
    assert state(model) == before
    assert not raised.value.report.complete


def two_towers(units: int = 3) -> Any:
    inputs = keras.Input((4,))
    left = keras.Sequential([layers.Dense(units, name="a"), layers.Dense(2, name="b")], name="encoder")(inputs)
    right = layers.Dense(2, name="head")(inputs)
    model = keras.Model(inputs, layers.Add()([left, right]))
    return model


def values(model: Any) -> dict[str, np.ndarray]:
    return {v.path: np.array(keras.ops.convert_to_numpy(v)) for v in model.weights}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> set[str]:
    return {name for name in a if np.array_equal(a[name], b[name])}


@pytest.fixture(params=["m.keras", "m.weights.h5", "m.weights.json"])
def saved(request: Any, tmp_path: Path) -> tuple[dict[str, np.ndarray], Path]:
    """The values of a model, and a file that holds them."""
    model, path = two_towers(), tmp_path / request.param
    disturb(model)
    if path.suffix == ".keras":
        saving.save_model(model, path)
    else:
        saving.save_weights(model, path, max_shard_size=1e-7 if path.suffix == ".json" else None)
    return values(model), path


def test_only_what_is_named_is_loaded(saved: Any) -> None:
    theirs, path = saved
    for only, expected in {
        "encoder/*": {n for n in theirs if n.startswith("encoder/")},
        "encoder": {n for n in theirs if n.startswith("encoder/")},
        "*/kernel": {n for n in theirs if n.endswith("/kernel")},
        "layers/dense/vars/1": {"head/bias"},
    }.items():
        model = two_towers()
        disturb(model)
        model.get_layer("head").bias.assign([5.0, 6.0])
        before = values(model)
        report = saving.load_weights(model, path, only=only)
        assert same(values(model), theirs) >= expected, only
        assert same(values(model), before) >= set(theirs) - expected, only
        assert len(report.loaded) == len(expected)
        assert report.missing == []
        assert not report.unexpected
        with hornbeam.open(path) as file:
            assert sorted(report.loaded + report.skipped) == sorted(file)
        assert report.crc == ("partial" if path.suffix == ".keras" else "none")
        assert report.bytes == sum(theirs[n].nbytes for n in expected)
    with hornbeam.options(verify=True):
        assert saving.load_weights(two_towers(), path, only="head").crc == report.crc.replace("partial", "verified")


def test_what_is_skipped_keeps_its_value(saved: Any) -> None:
    theirs, path = saved
    model = two_towers(units=7)  # does not fit in the encoder
    before = values(model)
    report = saving.load_weights(model, path, skip=["encoder/*"])
    after = values(model)
    assert same(after, theirs) >= {"head/kernel", "head/bias"}
    assert same(after, before) >= {n for n in theirs if n.startswith("encoder/")}
    assert len(report.loaded) == 2


def test_a_pattern_that_fits_nothing_is_an_error(saved: Any) -> None:
    _, path = saved
    model = two_towers()
    before = state(model)
    with pytest.raises(ValueError, match=r"No variable of the model fits 'encodr/\*'; nearest: encoder/"):
        saving.load_weights(model, path, only="encodr/*")
    assert state(model) == before


def test_names_are_mapped(saved: Any) -> None:
    theirs, path = saved
    tower = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="other")])
    to = {"layers/dense/vars/0": "other/kernel", "layers/dense/vars/1": "other/bias"}
    for name_map in (to, to.get):
        report = saving.load_weights(tower, path, name_map=name_map)
        assert sorted(report.loaded) == sorted(to)
        np.testing.assert_array_equal(tower.layers[0].kernel, theirs["head/kernel"])
        np.testing.assert_array_equal(tower.layers[0].bias, theirs["head/bias"])
    before = state(tower)
    with pytest.raises(IncompleteLoadError, match="other/bias: not in the file"):
        saving.load_weights(tower, path, name_map=lambda name: to.get(name) if name.endswith("0") else None)
    with pytest.raises(ValueError, match="Two tensors of the file go to"):
        saving.load_weights(tower, path, name_map=lambda name: "other/bias")
    assert state(tower) == before


def test_layers_are_matched_by_name(saved: Any) -> None:
    theirs, path = saved
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="new")(inputs)  # takes the place that `head` has in the file
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    before = values(model)
    report = saving.load_weights(model, path, by_name=True)
    after = values(model)
    for name in ("head/kernel", "head/bias"):
        np.testing.assert_array_equal(after[name], theirs[name])
    assert same(after, before) >= {"new/kernel", "new/bias"}
    assert len(report.loaded) == 2


def test_an_error_lists_every_difference_and_the_nearest_names(tmp_path: Path) -> None:
    model = chain(layers.Dense(3, name="a"), layers.Dense(2, name="b"), layers.Dense(2, name="c"))
    saving.save_weights(model, tmp_path / "m.weights.h5")
    other = chain(layers.Dense(4, name="a"), layers.Dense(2, name="b"), layers.EinsumDense("ab,bc->ac", 2))
    before = disturb(other)
    with pytest.raises(ValueError, match="A total of 3 objects could not be loaded") as raised:
        saving.load_weights(other, tmp_path / "m.weights.h5")
    text = str(raised.value)
    for line in (
        "layers/dense: The shape of the target variable and the shape of the target value",
        "layers/dense_1: The shape",
        "layers/einsum_dense: Layer",
        "Nearest in the file: ['layers/dense",
        "layers/dense_2/vars/0: in the file, but not in the model",
    ):
        assert line in text, line
    assert state(other) == before
    with pytest.warns(UserWarning, match="A total of 3 objects could not be loaded"):
        report = saving.load_weights(other, tmp_path / "m.weights.h5", skip_mismatch=True)
    assert [place for place, _ in report.mismatched] == ["layers/dense", "layers/dense_1", "layers/einsum_dense"]
    assert not report.complete


def test_state_outside_of_variables_is_restored(tmp_path: Path) -> None:
    class Remembers(layers.Layer):
        words = ("before",)

        def build(self, shape: Any) -> None:
            self.w = self.add_weight(shape=(2,), initializer="zeros")

        def load_own_variables(self, store: Any) -> None:
            self.words = ("after",)
            self.new = 1
            self.w.assign(store["0"])

        def call(self, x: Any) -> Any:
            return x

    normalization = layers.Normalization()
    normalization.adapt(floats(50, 6))
    model = chain(Remembers(), normalization, layers.Dense(2, name="last"))
    path = tmp_path / "m.weights.h5"
    saving.save_weights(model, path)
    with h5py.File(path, "a") as file:
        file["layers/normalization/vars/0"][...] += 5
        del file["layers/dense/vars/1"]
        file["layers/dense/vars/1"] = np.zeros(9)
    x = floats(3, 6)
    before, expected = disturb(model), model.predict(x, verbose=0)
    held = np.array(keras.ops.convert_to_numpy(normalization.mean))
    with pytest.raises(IncompleteLoadError):
        saving.load_weights(model, path)
    assert state(model) == before
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(normalization.mean), held)
    assert model.layers[1].words == ("before",)
    assert not hasattr(model.layers[1], "new")
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)


def test_code_that_fails_in_the_middle_leaves_the_model(tmp_path: Path) -> None:
    class Fails(layers.Layer):
        def load_own_variables(self, store: Any) -> None:
            raise KeyboardInterrupt

        def call(self, x: Any) -> Any:
            return x

    model = chain(layers.Dense(3), layers.Dense(3), Fails())
    saving.save_weights(model, tmp_path / "m.weights.h5")
    before = disturb(model)
    with pytest.raises(KeyboardInterrupt):
        saving.load_weights(model, tmp_path / "m.weights.h5")
    assert state(model) == before


def test_what_custom_code_changes_in_place_is_undone(tmp_path: Path) -> None:
    class Changes(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.seen = [1]
            self.names = {"a": {"b": 1}}
            self.kinds = {"a"}
            self.table = np.zeros(3)
            self.raw = None
            if keras.backend.backend() == "tensorflow":
                import tensorflow as tf

                self.raw = tf.Variable([1.0, 2.0], trainable=False)
            self.inner = layers.Dense(2)
            self.inner.times = 0

        def build(self, shape: Any) -> None:
            self.inner.build(shape)

        def load_own_variables(self, store: Any) -> None:
            self.seen.append(2)
            self.names["a"]["b"] = 2
            self.kinds.add("b")
            self.table += 1
            if self.raw is not None:
                self.raw.assign([3.0, 4.0])
                self.inner.kernel.value.assign(self.inner.kernel.value * 0 + 7)
            self.inner.bias.assign(self.inner.bias + 1)
            self.inner.times += 1
            self.inner.new = 1
            raise KeyboardInterrupt

        def call(self, x: Any) -> Any:
            return x

    layer = Changes()
    model = chain(layers.Dense(3), layer)
    saving.save_weights(model, tmp_path / "m.weights.h5")
    before = disturb(model)
    with pytest.raises(KeyboardInterrupt):
        saving.load_weights(model, tmp_path / "m.weights.h5")
    assert state(model) == before
    assert (list(layer.seen), dict(layer.names["a"]), set(layer.kinds)) == ([1], {"b": 1}, {"a"})
    assert layer.table.tolist() == [0, 0, 0]
    assert (layer.inner.times, hasattr(layer.inner, "new")) == (0, False)
    if layer.raw is not None:
        assert layer.raw.numpy().tolist() == [1, 2]


@pytest.mark.trains
def test_optimizer_state_is_part_of_a_complete_load(tmp_path: Path) -> None:
    model, *_ = train(chain(layers.Dense(2)), floats(16, 6), floats(16, 2))
    path = tmp_path / "m.keras"
    saving.save_model(model, path)
    fresh = chain(layers.Dense(2))
    fresh.compile("sgd", "mse")
    before = state(fresh)
    with pytest.raises(IncompleteLoadError) as raised, pytest.warns(UserWarning, match="Skipping variable loading"):
        saving.load_weights(fresh, path, strict=True)
    assert any(name.startswith("optimizer/") for name in raised.value.report.unexpected)
    assert raised.value.report.missing
    assert state(fresh) == before
    uncompiled = chain(layers.Dense(2))
    report = saving.load_weights(uncompiled, path, strict=True)
    assert report.complete
    assert [name.split("/")[0] for name in report.skipped] == ["optimizer"] * len(model.optimizer.variables)


def test_without_an_optimizer_its_bytes_are_not_read(tmp_path: Path) -> None:
    model = chain(layers.Dense(4), shape=(8,))
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    path = tmp_path / "m.keras"
    saving.save_model(model, path)
    hornbeam.stats(reset=True)
    loaded = saving.load_model(path, compile=False, strict=True)
    report = hornbeam.last_report("load")
    assert report is not None
    assert (report.crc, report.bytes) == ("partial", 8 * 4 * 4 + 4 * 4)
    assert (len(report.loaded), len(report.skipped)) == (2, len(model.optimizer.variables))
    assert values(loaded).keys() == values(model).keys()
    with hornbeam.options(verify=True):
        saving.load_model(path, compile=False)
    report = hornbeam.last_report("load")
    assert report is not None
    assert report.crc == "verified"


def test_what_the_file_lacks_is_reported_as_initialised(tmp_path: Path) -> None:
    class Odd(layers.Layer):
        def build(self, shape: Any) -> None:
            self.kept = self.add_weight(shape=(2,), initializer="ones", name="kept")
            self.lost = self.add_weight(shape=(2,), initializer="ones", name="lost")

        def save_own_variables(self, store: Any) -> None:
            store["0"] = self.kept

        def load_own_variables(self, store: Any) -> None:
            self.kept.assign(store["0"])

        def call(self, x: Any) -> Any:
            return x

    model = chain(Odd(name="odd"))
    saving.save_model(model, tmp_path / "m.keras")
    saving.load_model(tmp_path / "m.keras", custom_objects={"Odd": Odd})
    report = hornbeam.last_report("load")
    assert report is not None
    assert (report.initialised, report.missing) == (["odd/lost"], ["odd/lost"])
    with pytest.raises(IncompleteLoadError, match="odd/lost: not in the file"):
        saving.load_model(tmp_path / "m.keras", custom_objects={"Odd": Odd}, strict=True)


def test_casts_are_reported(tmp_path: Path) -> None:
    model = chain(layers.Dense(2, name="d"))
    saving.save_weights(model, tmp_path / "m.weights.h5")
    half = chain(layers.Dense(2, name="d", dtype="float16"))
    report = saving.load_weights(half, tmp_path / "m.weights.h5")
    assert report.cast == [("d/kernel", "float32", "float16"), ("d/bias", "float32", "float16")]
    stock = chain(layers.Dense(2, name="d", dtype="float16"))
    stock.load_weights(tmp_path / "m.weights.h5")
    assert [v[3] for v in state(half)] == [v[3] for v in state(stock)]


def test_reports_are_readable(tmp_path: Path) -> None:
    model = two_towers()
    saving.save_weights(model, tmp_path / "<m>.weights.h5")
    report = saving.load_weights(model, tmp_path / "<m>.weights.h5", only="head")
    lines = str(report).splitlines()
    assert lines[0] == f"complete load of {tmp_path / '<m>.weights.h5'}"
    assert lines[1].startswith("  loaded      2 tensors, 40 bytes, ")
    assert "skipped     4: layers/sequential/layers/dense/vars/0" in str(report).replace("encoder", "sequential")
    assert "&lt;m&gt;" in report._repr_html_()
    assert json.loads(json.dumps(report.to_dict()))["complete"] is True
    assert set(report.seconds) == {"open", "read", "assign"}


def test_layers_that_are_not_loaded_do_not_even_run(tmp_path: Path) -> None:
    model = two_towers()
    saving.save_weights(model, tmp_path / "m.weights.h5")
    other = two_towers()
    dense = other.get_layer("encoder").get_layer("a")
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(floats(2, 3))
    before = {v.path: np.array(keras.ops.convert_to_numpy(v)) for v in dense.variables}
    saving.load_weights(other, tmp_path / "m.weights.h5", only="head/bias", strict=True)
    for variable in dense.variables:  # a LoRA layer stores its kernels merged, and resets what it merged when it loads
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), before[variable.path])
    np.testing.assert_array_equal(other.get_layer("head").bias, model.get_layer("head").bias)
    with pytest.raises(ValueError, match="load all of it, or nothing"):
        saving.load_weights(other, tmp_path / "m.weights.h5", only="encoder/a/bias")


def heads() -> Any:
    inputs = keras.Input((3, 4))
    x = layers.MultiHeadAttention(2, 2, name="first")(inputs, inputs)
    x = layers.MultiHeadAttention(2, 2, name="second")(x, x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def test_names_that_repeat_inside_of_layers_are_told_apart(tmp_path: Path) -> None:
    model, other = heads(), heads()
    saving.save_weights(model, tmp_path / "m.weights.h5")
    report = saving.load_weights(other, tmp_path / "m.weights.h5", by_name=True, strict=True)
    assert len(report.loaded) == len(model.weights)
    assert [v[3] for v in state(other)][: len(model.weights)] == [v[3] for v in state(model)][: len(model.weights)]
    with h5py.File(tmp_path / "m.weights.h5", "a") as file:
        file.visititems(lambda _, item: item.attrs.pop("name", None) and None)
    with pytest.raises(ValueError, match="does not say what its layers are called"):
        saving.load_weights(other, tmp_path / "m.weights.h5", by_name=True)
    keras.Sequential([keras.Input((4,)), layers.Dense(2, name="twin")]).save_weights(tmp_path / "t.weights.h5")
    left = keras.Sequential([layers.Dense(2, name="twin")], name="part")
    inputs = keras.Input((4,))
    both = keras.Model(inputs, [left(inputs), layers.Dense(2, name="twin")(inputs)])
    assert len(saving.load_weights(both, tmp_path / "t.weights.h5", by_name=True).loaded) == 2


@pytest.mark.trains
def test_slots_of_other_variables_are_not_taken(tmp_path: Path) -> None:
    model, *_ = train(chain(layers.Dense(6, name="a"), layers.Dense(6, name="b")), floats(16, 6), floats(16, 6))
    saving.save_model(model, tmp_path / "m.keras")
    wide, x, y = train(
        chain(layers.Dense(6, name="a"), layers.EinsumDense("ab,bc->ac", 6, name="new"), layers.Dense(6, name="b")),
        floats(16, 6),
        floats(16, 6),
    )
    slots = [np.array(keras.ops.convert_to_numpy(v)) for v in wide.optimizer.variables]
    with pytest.warns(UserWarning, match="other variables"):
        report = saving.load_weights(wide, tmp_path / "m.keras", skip="new/*")
    assert not any(name.startswith("optimizer/") for name in report.loaded)
    for variable, slot in zip(wide.optimizer.variables, slots, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), slot)
    wide.fit(x, y, verbose=0)


def test_a_load_inside_of_a_load_is_undone_with_it(tmp_path: Path) -> None:
    part = chain(layers.Dense(6))
    saving.save_weights(part, tmp_path / "part.weights.h5")

    class Nests(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [lambda: part]  # no layer to Keras

        def load_own_variables(self, store: Any) -> None:
            saving.load_weights(self.hidden[0](), tmp_path / "part.weights.h5")

        def call(self, x: Any) -> Any:
            return x

    model = chain(Nests(), layers.Dense(3))
    saving.save_weights(model, tmp_path / "m.weights.h5")
    other = chain(Nests(), layers.Dense(4))
    before = disturb(part)
    with pytest.raises(IncompleteLoadError):
        saving.load_weights(other, tmp_path / "m.weights.h5")
    assert state(part) == before


def test_what_a_layer_does_not_assign_is_missing(tmp_path: Path) -> None:
    class Shrugs(layers.Dense):
        def load_own_variables(self, store: Any) -> None:
            with contextlib.suppress(ValueError):
                super().load_own_variables(store)

    saving.save_weights(chain(Shrugs(3, name="s")), tmp_path / "m.weights.h5")
    other = chain(Shrugs(4, name="s"))
    report = saving.load_weights(other, tmp_path / "m.weights.h5")
    assert report.missing == ["s/kernel", "s/bias"]
    with pytest.raises(IncompleteLoadError, match="s/kernel: not in the file"):
        saving.load_weights(other, tmp_path / "m.weights.h5", strict=True)


def test_objects_to_skip_are_reported_as_skipped(tmp_path: Path) -> None:
    model = two_towers()
    saving.save_weights(model, tmp_path / "m.weights.h5")
    report = saving.load_weights(
        model, tmp_path / "m.weights.h5", strict=True, objects_to_skip=[model.get_layer("head")]
    )
    assert report.skipped == ["layers/dense/vars/0", "layers/dense/vars/1"]


def test_an_exception_without_a_text(tmp_path: Path) -> None:
    class Fails(layers.Layer):
        def load_own_variables(self, store: Any) -> None:
            raise AssertionError

        def call(self, x: Any) -> Any:
            return x

    model = chain(Fails())
    saving.save_weights(model, tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match="layers/fails: AssertionError"):
        saving.load_weights(model, tmp_path / "m.weights.h5")
    with pytest.warns(UserWarning, match="1 objects could not be loaded"):
        report = saving.load_weights(model, tmp_path / "m.weights.h5", skip_mismatch=True)
    assert "AssertionError" in str(report)


def test_metrics_and_optimizers_are_pickled() -> None:
    metric = keras.metrics.MeanSquaredError()
    metric.update_state([1.0], [3.0])
    with hornbeam.installed():
        again = pickle.loads(pickle.dumps(metric))
        assert again.get_config() == metric.get_config()  # Keras does not store what a metric has seen
        assert pickle.loads(pickle.dumps(keras.optimizers.Adam(0.5))).get_config()["learning_rate"] == 0.5


# ---- what fits nothing ----

FILES = {
    "m.weights.h5": {},
    "m.keras": {},
    "m.h5": {},
    "m.safetensors": {},
    "m.weights.json": {"max_shard_size": 1e-7},
    "m.safetensors.index.json": {"max_shard_size": 1e-7},
}


def pair_of(start: str) -> Any:
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name=f"{start}a"), keras.layers.Dense(2, name=f"{start}b")], name="m"
    )


def write(name: str, folder: Path) -> Path:
    """A file with layers `xa` and `xb`."""
    save = saving.save_model if name in ("m.keras", "m.h5") else saving.save_weights
    save(pair_of("x"), folder / name, **FILES[name])
    return folder / name


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [{}, {"only": "ya/*"}, {"skip": "yb"}])
def test_names_that_fit_nothing_are_told(name: str, part: dict[str, Any], tmp_path: Path) -> None:
    path, model = write(name, tmp_path), pair_of("y")
    before = values(model)
    with pytest.warns(UserWarning, match=r"Nothing was loaded from .*the model has m/ya/kernel"):
        report = saving.load_weights(model, path, by_name=True, **part)
    assert same(values(model), before) == set(before)
    assert (report.complete, report.loaded) == (False, [])
    assert len(report.missing) == (2 if part else 4)
    with pytest.raises(IncompleteLoadError, match="not in the file"):
        saving.load_weights(model, path, by_name=True, strict=True, **part)


@pytest.mark.parametrize("name", FILES)
def test_some_names_that_fit_are_enough_for_no_warning(name: str, tmp_path: Path) -> None:
    path, model = write(name, tmp_path), pair_of("x")
    model = keras.Sequential([keras.Input((4,)), model.layers[0], keras.layers.Dense(5, name="new")], name="m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = saving.load_weights(model, path, by_name=True)
    assert len(report.loaded) == 2
    assert (report.complete, len(report.missing)) == (False, 2)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("pattern", ["only", "skip"])
def test_patterns_that_fit_nothing_are_refused(name: str, pattern: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No variable of the model fits 'nothing\*'"):
        saving.load_weights(pair_of("x"), write(name, tmp_path), **{pattern: "nothing*"})


@pytest.mark.parametrize("name", FILES)
def test_a_name_to_be_mapped_that_is_not_in_the_file_is_told(name: str, tmp_path: Path) -> None:
    path, model = write(name, tmp_path), pair_of("x")
    with pytest.warns(UserWarning, match=r"`name_map` has names that are not in .*: misspelt"):
        report = saving.load_weights(model, path, name_map={"misspelt": "xa/kernel"})
    assert (report.complete, report.unmatched, len(report.loaded)) == (False, ["misspelt"], 4)
    assert "unmatched" in str(report)
    assert report.to_dict()["unmatched"] == ["misspelt"]
    with pytest.raises(IncompleteLoadError, match="misspelt: in `name_map`, but not in the file"):
        saving.load_weights(model, path, name_map={"misspelt": "xa/kernel"}, strict=True)


@pytest.mark.parametrize("name", FILES)
def test_a_map_to_nowhere_is_an_error(name: str, tmp_path: Path) -> None:
    path, model = write(name, tmp_path), pair_of("x")
    for name_map in (lambda _: None, lambda name: f"nowhere/{name}"):
        with pytest.raises(IncompleteLoadError):
            saving.load_weights(model, path, name_map=name_map)
