"""`save_weights(only=, skip=)`: what is in the file, who reads it, what it does not replace."""

from __future__ import annotations

import io
import json
import os
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers
from safetensors import safe_open

import hornbeam
from hornbeam import IncompleteLoadError, saving
from hornbeam.errors import InvalidError, UnsupportedError
from hornbeam.flows.requests import SaveRequest
from support.helpers import reported, tree
from support.zoo import TRAINABLE_BACKEND, floats

MARK = "hornbeam_partial"
#: What a save writes to, and its arguments; `None` is a file object.
WAYS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "h5": ("m.weights.h5", {}),
    "compressed": ("m.weights.h5", {"compression": 1}),
    "asynchronous": ("m.weights.h5", {"asynchronous": True}),
    "shards": ("m.weights.json", {"max_shard_size": 300 / 1024**3}),
    "safetensors": ("m.safetensors", {}),
    "safetensors shards": ("m.safetensors", {"max_shard_size": 150 / 1024**3}),
    "file object": (None, {}),
}


@pytest.fixture(autouse=True)
def _strict() -> Any:
    with hornbeam.options(fallback=False):
        yield


def build(rank: int = 0, *, trained: bool = False, around: bool = False) -> Any:
    """An encoder with names of its own, and a head; with `rank`, one layer has LoRA."""
    inputs = keras.Input((4,))
    first = layers.Dense(6, name="first")
    encoder = keras.Sequential([first, layers.BatchNormalization(name="norm")], name="encoder")
    x = inputs
    if around:
        x = layers.Dense(4, name="new")(layers.Dense(4, name="newer")(x))
    model = keras.Model(inputs, layers.Dense(2, name="head")(encoder(x)), name="model")
    if rank:
        first.enable_lora(rank)
    model.compile(keras.optimizers.Adam(name="adam"), "mse")
    if trained and TRAINABLE_BACKEND:
        model.fit(floats(8, 4), floats(8, 2), verbose=0)
    for i, variable in enumerate(variables(model)):
        if "float" in variable.dtype:
            variable.assign(floats(*variable.shape) + i + 3)
    return model


def variables(model: Any) -> list[Any]:
    return [*model.weights, *model.optimizer.variables]


def values(model: Any) -> dict[str, np.ndarray]:
    return {v.path: np.array(keras.ops.convert_to_numpy(v)) for v in variables(model)}


def zero(model: Any) -> Any:
    for variable in variables(model):
        variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
    return model


def got(model: Any, source: Any) -> dict[str, str]:
    """What is not zero any more, and whether it is what `source` has."""
    found, wanted = values(model), values(source)
    return {
        name: "same" if np.array_equal(value, wanted[name]) and value.dtype == wanted[name].dtype else "other"
        for name, value in found.items()
        if np.any(value)
    }


def save(model: Any, way: str, tmp_path: Path, **how: Any) -> tuple[Any, hornbeam.SaveReport]:
    """Saves; where to, and the report."""
    name, arguments = WAYS[way]
    place: Any = io.BytesIO() if name is None else tmp_path / name
    handle = saving.save_weights(model, place, **arguments, **how)
    if handle is not None:
        handle.result(timeout=60)
        return place, handle.report
    report = hornbeam.last_report("save")
    assert report is not None
    return place, report


def _index(place: Any) -> Any:
    """What is opened: the index, where the shards have another name."""
    index = f"{place}.index.json"
    return index if os.path.exists(index) else place


def content(place: Any) -> dict[str, bytes]:
    """Every file of a folder, or what is in memory."""
    if isinstance(place, io.BytesIO):
        return {"": place.getvalue()}
    return {path.name: path.read_bytes() for path in sorted(place.parent.iterdir())}


ENCODER = {f"encoder/{name}" for name in ("first/kernel", "first/bias", *(f"norm/{n}" for n in ("gamma", "beta")))}
ENCODER |= {"encoder/norm/moving_mean", "encoder/norm/moving_variance"}
HEAD = {"head/kernel", "head/bias"}
ADAPTER = {"encoder/first/lora_kernel_a", "encoder/first/lora_kernel_b"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("how", "there"),
    [
        ({"only": "encoder"}, ENCODER),
        ({"skip": "head"}, ENCODER),
        ({"only": ["*/kernel"]}, {"encoder/first/kernel", "head/kernel"}),
        (
            {"only": ("layers/sequential", "head/*", "enc*"), "skip": ["*bias", "encoder/norm/*"]},
            {"encoder/first/kernel", "head/kernel"},
        ),
        ({"only": "layers/dense"}, HEAD),
    ],
)
def test_exactly_what_is_named_is_saved(way: str, how: Any, there: set[str], tmp_path: Path) -> None:
    model, other = build(trained=True), zero(build())
    place, report = save(model, way, tmp_path, **how)
    assert report.tensors == len(there)
    assert sum("optimizer" in name for name in report.left_out) == len(model.optimizer.variables)
    assert len(report.left_out) == len(variables(model)) - len(there)
    loaded = saving.load_weights(other, place)
    assert got(other, model) == dict.fromkeys(there, "same")
    assert (loaded.partial, loaded.complete, loaded.unexpected, len(loaded.loaded)) == (True, False, [], len(there))
    assert "partial     the file holds a part of a model" in str(loaded)
    names = {v.path for v in variables(other)}
    assert set(loaded.missing) == names - there
    with hornbeam.open(_index(place)) as file:
        assert json.loads(file.attributes()[MARK]) == {
            "only": [how["only"]] if isinstance(how.get("only"), str) else list(how["only"]) if "only" in how else None,
            "skip": [how["skip"]] if isinstance(how.get("skip"), str) else list(how.get("skip", ())),
        }
    before = values(other)
    with pytest.raises(IncompleteLoadError, match=r"adam/iteration: not in the file") as raised:
        saving.load_weights(other, place, strict=True)
    assert raised.value.report.partial
    assert all(np.array_equal(value, before[name]) for name, value in values(other).items())


@pytest.mark.parametrize("way", WAYS)
def test_adapters_are_saved_as_they_are(way: str, tmp_path: Path) -> None:
    model, other = build(4, trained=True), zero(build(4))
    place, report = save(model, way, tmp_path, only="*lora*")
    assert report.tensors == 2
    loaded = saving.load_weights(other, place)
    assert got(other, model) == dict.fromkeys(ADAPTER, "same")
    assert len(loaded.loaded) == 2
    assert "encoder/first/kernel" in loaded.missing
    assert not [name for name in loaded.missing if name.startswith("layers/")]
    saving.load_weights(zero(other), place, only="*_a")
    assert got(other, model) == {"encoder/first/lora_kernel_a": "same"}


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_with_lora_is_whole_or_in_parts(way: str, tmp_path: Path) -> None:
    model, plain = build(2), zero(build())
    first = model.get_layer("encoder").layers[0]
    merged = keras.ops.convert_to_numpy(first.kernel)
    place, report = save(model, way, tmp_path, only="encoder")
    assert (report.tensors, [n for n in report.left_out if "lora" in n]) == (6, [])
    loaded = saving.load_weights(plain, place)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(plain.get_layer("encoder").layers[0].kernel), merged)
    assert len(loaded.loaded) == 6
    other = zero(build(2))
    saving.load_weights(other, place)
    found = values(other)
    np.testing.assert_array_equal(found["encoder/first/kernel"], merged)
    assert not any(np.any(found[name]) for name in ADAPTER)
    place, report = save(model, way, tmp_path, skip="*lora*")
    assert [name.rpartition("/")[2] for name in report.left_out if "lora" in name] == ["lora_kernel_a", "lora_kernel_b"]
    for target in (zero(build(2)), zero(build())):
        saving.load_weights(target, place)
        assert got(target, model) == dict.fromkeys(ENCODER | HEAD, "same")
    place, report = save(model, way, tmp_path, only=["*lora*", "encoder/first/bias"])
    saving.load_weights(zero(other), place)
    assert got(other, model) == dict.fromkeys({*ADAPTER, "encoder/first/bias"}, "same")


def test_factors_of_another_rank_do_not_fit(tmp_path: Path) -> None:
    model, other = build(2), build(3)
    saving.save_weights(model, tmp_path / "m.weights.h5", only=["*lora*", "head"])
    before = values(other)
    with pytest.raises(IncompleteLoadError, match="layers/sequential/layers/dense: "):
        saving.load_weights(other, tmp_path / "m.weights.h5")
    assert all(np.array_equal(value, before[name]) for name, value in values(other).items())
    with pytest.warns(UserWarning, match="could not be loaded"):
        report = saving.load_weights(zero(other), tmp_path / "m.weights.h5", skip_mismatch=True)
    assert got(other, model) == dict.fromkeys(HEAD, "same")
    assert [place for place, _ in report.mismatched] == ["layers/sequential/layers/dense"]


def test_the_names_and_bytes_are_those_of_the_whole_file(tmp_path: Path) -> None:
    model = build(trained=True)
    saving.save_weights(model, tmp_path / "whole.weights.h5")
    saving.save_weights(model, tmp_path / "part.weights.h5", only="encoder")
    whole, part = tree(tmp_path / "whole.weights.h5"), tree(tmp_path / "part.weights.h5")
    assert part.items() <= whole.items()
    assert {path for path in part if path.endswith("vars")} == {
        "vars",
        "layers/sequential/vars",
        "layers/sequential/layers/dense/vars",
        "layers/sequential/layers/batch_normalization/vars",
    }
    with h5py.File(tmp_path / "part.weights.h5") as file:
        assert dict(file.attrs) == {MARK: '{"only": ["encoder"], "skip": []}'}
    saving.save_weights(model, tmp_path / "part.safetensors", only="encoder")
    with safe_open(tmp_path / "part.safetensors", "np") as file:
        assert set(file.keys()) == ENCODER
        assert file.metadata()[MARK] == '{"only": ["encoder"], "skip": []}'
        for variable in model.get_layer("encoder").weights:
            assert np.array_equal(file.get_tensor(variable.path), keras.ops.convert_to_numpy(variable))
    with hornbeam.options(engine="libhdf5"):
        saving.save_weights(model, tmp_path / "other.weights.h5", only="encoder")
    with h5py.File(tmp_path / "other.weights.h5") as file:
        assert dict(file.attrs) == {MARK: '{"only": ["encoder"], "skip": []}'}


@pytest.mark.parametrize("name", ["m.weights.h5", "m.weights.json"])
def test_stock_keras_reads_what_is_there(name: str, tmp_path: Path) -> None:
    model, other = build(trained=True), zero(build())
    shards = {"max_shard_size": 300 / 1024**3} if name.endswith(".json") else {}
    saving.save_weights(model, tmp_path / name, only="encoder", **shards)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says what the file lacks
        keras.saving.load_weights(other, tmp_path / name, skip_mismatch=True)
    assert got(other, model) == dict.fromkeys(ENCODER, "same")
    with pytest.raises(ValueError, match="head"):
        keras.saving.load_weights(other, tmp_path / name)
    for how in ({"only": "*lora*"}, {"only": "encoder/first", "skip": "*lora*"}):
        saving.save_weights(zero(build(2)), tmp_path / name, **how, **shards)
        for target in (build(2), build()):  # a layer that is there in part is not touched
            before = values(target)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                keras.saving.load_weights(target, tmp_path / name, skip_mismatch=True)
            assert all(np.array_equal(value, before[path]) for path, value in values(target).items())
    part = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    with h5py.File(tmp_path / "marked.weights.h5", "w") as file, h5py.File(io.BytesIO(_whole(part)), "r") as whole:
        for key in whole:
            whole.copy(key, file)
        file.attrs[MARK] = "{}"
    wanted = [keras.ops.convert_to_numpy(v) for v in part.weights]
    for variable in part.weights:
        variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
    keras.saving.load_weights(part, tmp_path / "marked.weights.h5")
    assert all(np.array_equal(keras.ops.convert_to_numpy(v), w) for v, w in zip(part.weights, wanted, strict=True))


def _whole(model: Any) -> bytes:
    memory = io.BytesIO()
    saving.save_weights(model, memory)
    return memory.getvalue()


@pytest.mark.trains
def test_the_optimizers_state_is_there_if_it_is_named(tmp_path: Path) -> None:
    model = build(trained=True)
    slots = {v.path for v in model.optimizer.variables}
    for name in ("m.weights.h5", "m.safetensors"):
        for pattern in ("optimizer", "adam", "adam/*", "optimizer/vars/*"):
            saving.save_weights(model, tmp_path / name, only=["head", pattern])
            other = zero(build(trained=True))
            assert saving.load_weights(other, tmp_path / name, only=["head", "adam"], strict=True).complete
            assert set(got(other, model).values()) == {"same"}
            assert got(other, model).keys() == HEAD | {n for n in slots if np.any(values(model)[n])}
        for pattern in ("*momentum*", "*"):
            report = reported(saving.save_weights, model, tmp_path / name, only=["head", pattern])
            assert not [s for s in slots if s in hornbeam.open(tmp_path / name)]
            assert report.left_out.count("optimizer/vars/0") == 1
        with pytest.raises(InvalidError, match=r"Nothing is left to save.*'adam/\*'"):
            saving.save_weights(model, tmp_path / name, only="*momentum*")
        with pytest.raises(InvalidError, match="Nothing is left to save"):
            saving.save_weights(model, tmp_path / name, only="head", skip="head")
    some = "adam/head_kernel_*"
    with pytest.raises(UnsupportedError, match="cannot hold a part of the optimizer's state 'optimizer/vars'"):
        saving.save_weights(model, tmp_path / "m.weights.h5", only=some)
    saving.save_weights(model, tmp_path / "m.safetensors", only=some)
    other = zero(build(trained=True))
    assert len(saving.load_weights(other, tmp_path / "m.safetensors").loaded) == 2
    assert got(other, model) == dict.fromkeys(["adam/head_kernel_momentum", "adam/head_kernel_velocity"], "same")
    everything = [v.path for v in model.weights]
    saving.save_weights(model, tmp_path / "m.weights.h5", only=everything)
    with pytest.raises(IncompleteLoadError, match="adam/iteration: not in the file"):
        saving.load_weights(other, tmp_path / "m.weights.h5", strict=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"only": "encodr"}, r"No variable of the model fits 'encodr'; nearest: "),
        ({"skip": "haed/kernel"}, r"fits 'haed/kernel'; nearest: head/kernel"),
        ({"only": ["head", "xyz"]}, "No variable of the model fits 'xyz'"),
        ({"only": ()}, "Nothing is left to save"),
    ],
)
def test_a_pattern_that_fits_nothing_writes_nothing(way: str, how: Any, text: str, tmp_path: Path) -> None:
    model = build()
    place, _ = save(model, way, tmp_path, only="head")
    before = content(place)
    with pytest.raises(ValueError, match=text):
        save(model, way, tmp_path, **how)
    assert content(place) == before


@pytest.mark.parametrize("way", WAYS)
def test_a_complete_file_is_not_replaced_unless_asked_to(way: str, tmp_path: Path) -> None:
    model = build()
    name, arguments = WAYS[way]
    place: Any = io.BytesIO() if name is None else tmp_path / name
    saving.save_weights(model, place, **arguments)
    hornbeam.wait()
    before, wrong = content(place), str(_index(place))
    arguments = {**arguments, "only": "head"}

    def again(**more: Any) -> None:
        if name is None:
            place.seek(0)
        saving.save_weights(model, place, **arguments, **more)
        hornbeam.wait()

    with pytest.raises(InvalidError, match=r"holds complete weights.*`replace_complete=True`") as raised:
        again()
    assert (raised.value.path, raised.value.found) == (None if name is None else wrong, "complete weights")
    assert content(place) == before
    again(replace_complete=True)
    assert saving.load_weights(zero(model), place).partial
    again()  # a part may be replaced
    again(replace_complete=True)
    arguments.pop("only")
    again()  # and by the whole
    assert saving.load_weights(model, place, strict=True).partial is False


@pytest.mark.parametrize(("name", "shards"), [("m.weights.json", 300), ("m.safetensors", 150)])
def test_no_shard_of_a_complete_save_is_replaced(name: str, shards: int, tmp_path: Path) -> None:
    model, size = build(), shards / 1024**3
    saving.save_weights(model, tmp_path / name, max_shard_size=size)
    index = tmp_path / (name if name.endswith(".json") else f"{name}.index.json")
    index.unlink()  # somebody has only the shards
    before = content(index)
    with pytest.raises(InvalidError, match="holds complete weights"):
        saving.save_weights(model, tmp_path / name, max_shard_size=size, skip="head/bias")
    assert content(index) == before


def test_what_is_no_weights_file_is_not_replaced_either(tmp_path: Path) -> None:
    model, path = build(), tmp_path / "m.weights.h5"
    path.write_bytes(b"notes")
    with pytest.raises(InvalidError, match="holds something else than weights"):
        saving.save_weights(model, path, only="head")
    assert path.read_bytes() == b"notes"
    path.write_bytes(b"")  # as `mkstemp` leaves it
    saving.save_weights(model, path, only="head")
    with open(path, "r+b") as file:
        saving.save_weights(model, file, only="encoder")
    with open(tmp_path / "new.weights.h5", "wb") as file:
        saving.save_weights(model, file, only="encoder")
    assert (tmp_path / "new.weights.h5").read_bytes() == path.read_bytes()
    saving.save_weights(model, path)
    with open(path, "r+b") as file, pytest.raises(InvalidError, match="holds complete weights"):
        saving.save_weights(model, file, only="encoder")
    assert saving.load_weights(model, path, strict=True).complete


def test_what_is_refused(tmp_path: Path) -> None:
    model = build()
    for how in ({"only": "head"}, {"skip": "head"}, {"replace_complete": True}):
        for name in ("m.keras", "m.h5", "m"):
            with pytest.raises(UnsupportedError, match=r"saved whole.*save_weights"):
                saving.save_model(model, tmp_path / name, **how)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`replace_complete` is for saves of a part"):
        saving.save_weights(model, tmp_path / "m.weights.h5", replace_complete=True)
    with hornbeam.options(fallback=True), pytest.raises(UnsupportedError, match="does not save in part"):
        saving.save_weights(model, "gs://bucket/m.weights.h5", only="head")
    for name in ("m.h5", "m.keras", "m.weights"):
        with pytest.raises(ValueError, match="must end in"):
            saving.save_weights(model, tmp_path / name, only="head")
    with pytest.raises(ValueError, match="not yet been built"):
        saving.save_weights(keras.Sequential([layers.Dense(2)]), tmp_path / "m.weights.h5", skip="dense")
    assert "does not save in part" in SaveRequest(model, "m.weights.h5", skip=("head",)).beyond()
    assert SaveRequest(model, "m.weights.h5").beyond() == []
    assert os.listdir(tmp_path) == []


def test_other_models_take_a_part(tmp_path: Path) -> None:
    model, other = build(), zero(build(around=True))
    saving.save_weights(model, tmp_path / "m.weights.h5", only="encoder")
    loaded = saving.load_weights(other, tmp_path / "m.weights.h5", by_name=True)
    assert (len(loaded.loaded), loaded.unexpected) == (6, [])
    assert {name for name, value in values(other).items() if np.any(value)} == ENCODER
    np.testing.assert_array_equal(values(other)["encoder/first/kernel"], values(model)["encoder/first/kernel"])
    saving.save_weights(model, tmp_path / "m.safetensors", only="encoder")
    assert saving.load_weights(zero(other), tmp_path / "m.safetensors").unexpected == []
    assert {name for name, value in values(other).items() if np.any(value)} == ENCODER
    head = keras.Sequential([keras.Input((6,)), layers.Dense(2, name="mine")])
    saving.save_weights(model, tmp_path / "head.safetensors", only="head")
    saving.load_weights(head, tmp_path / "head.safetensors", name_map=lambda name: name.replace("head", "mine"))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(head.weights[0]), values(model)["head/kernel"])
    with pytest.warns(UserWarning, match="Nothing was loaded"):
        saving.load_weights(keras.Sequential([keras.Input((6,)), layers.Dense(2, name="a")]), tmp_path / "m.weights.h5")


def _automatic() -> Any:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(3), layers.Dense(2)])
    model.layers[1].enable_lora(2)
    for i, variable in enumerate(model.weights):
        variable.assign(floats(*variable.shape) + i + 3)
    return model


def test_automatic_names_that_count_on_fit_by_place(tmp_path: Path) -> None:
    model, other = _automatic(), _automatic()
    before = [keras.ops.convert_to_numpy(v) for v in other.weights]
    saving.save_weights(model, tmp_path / "m.safetensors", only=["*lora*", f"{model.layers[2].name}/*"])
    report = saving.load_weights(other, tmp_path / "m.safetensors")
    assert (len(report.loaded), report.unexpected) == (4, [])
    taken = {"lora_kernel_a", "lora_kernel_b"}
    for v, w, old in zip(model.weights, other.weights, before, strict=True):
        wanted = v if v.name in taken or v.path.startswith(f"{model.layers[2].name}/") else old
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(w), keras.ops.convert_to_numpy(wanted))


@keras.saving.register_keras_serializable("partial")
class Stateful(layers.Layer):
    """Stores something that is no variable, and has a variable that it does not store."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        self.count = self.add_weight(shape=(), initializer="ones", name="count", trainable=False)
        self.note = np.zeros(3)

    def call(self, x: Any) -> Any:
        return x * self.scale

    def save_own_variables(self, store: Any) -> None:
        store["scale"], store["note"] = self.scale, self.note

    def load_own_variables(self, store: Any) -> None:
        self.scale.assign(store["scale"])
        self.note = np.array(store["note"])


def _stateful() -> Any:
    model = keras.Sequential([keras.Input((2,)), Stateful(name="own"), layers.Dense(1, name="head")])
    own = model.layers[0]
    own.scale.assign([2.0, 3.0])
    own.count.assign(4.0)
    own.note = np.arange(3.0)
    return model


@pytest.mark.parametrize("name", ["m.weights.h5", "m.safetensors"])
def test_values_that_are_no_variables(name: str, tmp_path: Path) -> None:
    model, path = _stateful(), tmp_path / name
    whole: list[dict[str, Any]] = [{"only": "own"}, {"skip": "head"}, {"only": "*", "skip": "head"}]
    cases = [
        *((how, (2, 0, 1)) for how in whole),
        ({"only": "own/scale"}, (2, 0, 0)),
        ({"only": "own/count"}, (0, 4, 0)),
        ({"only": "*", "skip": ["head", "own/count"]}, (2, 0, 0)),
        ({"only": ["own", "head/bias"], "skip": "*/note"}, (2, 0, 0)),
    ]
    for how, wanted in cases:
        saving.save_weights(model, path, **how)
        other = _stateful()
        own = other.layers[0]
        own.scale.assign([0.0, 0.0])
        own.count.assign(0.0)
        own.note = np.zeros(3)
        saving.load_weights(other, path)
        found = float(own.scale[0]), float(keras.ops.convert_to_numpy(own.count)), float(own.note[1])
        assert found == wanted, how


@keras.saving.register_keras_serializable("partial")
class Noted(Stateful):
    """Stores all its variables, and something that is none."""

    def build(self, shape: Any) -> None:
        super().build(shape)
        self.count.trainable = True

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        store["count"] = self.count


@pytest.mark.parametrize("name", ["m.weights.h5", "m.safetensors"])
def test_a_value_that_stands_for_no_variable_is_not_saved_alone(name: str, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), Noted(name="own"), layers.Dense(1, name="head")])
    for how in ({"only": "*/note"}, {"only": "*", "skip": "own/scale"}):
        with pytest.raises(UnsupportedError, match=r"layers/noted/vars/note' is the value of no variable"):
            saving.save_weights(model, tmp_path / name, **how)
    assert os.listdir(tmp_path) == []
    saving.save_weights(model, tmp_path / name, skip="own/scale")
    with hornbeam.open(tmp_path / name) as file:
        assert sorted(n.rpartition("/")[2] for n in file) in (["0", "1", "count"], ["bias", "count", "kernel"])


def test_the_merged_kernel_goes_by_its_place_too(tmp_path: Path) -> None:
    model, other = build(2), zero(build(2))
    kernel = "layers/sequential/layers/dense/vars/0"
    wanted = {"encoder/first/kernel", *ADAPTER}
    for how in ({"only": kernel}, {"only": ["*"], "skip": ["encoder/first/bias", "head", "encoder/norm"]}):
        saving.save_weights(model, tmp_path / "m.safetensors", **how)
        saving.load_weights(zero(other), tmp_path / "m.safetensors")
        assert got(other, model) == dict.fromkeys(wanted, "same")
    saving.save_weights(model, tmp_path / "m.safetensors", skip=[kernel, "head"])
    saving.load_weights(zero(other), tmp_path / "m.safetensors")
    assert got(other, model) == dict.fromkeys(ENCODER - {"encoder/first/kernel"}, "same")


def test_casts_know_the_whole_layer(tmp_path: Path) -> None:
    model = build()
    report = reported(saving.save_weights, model, tmp_path / "m.weights.h5", only="head", dtype="float16")
    assert [c.name for c in report.cast] == ["head/kernel", "head/bias"]
    other = zero(build())
    saving.load_weights(other, tmp_path / "m.weights.h5")
    wanted = values(model)["head/kernel"].astype("float16").astype("float32")
    np.testing.assert_array_equal(values(other)["head/kernel"], wanted)
    model.get_layer("head").quantize("int8")
    report = reported(saving.save_weights, model, tmp_path / "m.weights.h5", only="head/bias", dtype="float16")
    assert (report.tensors, report.cast) == (1, [])  # its scale is not in the file, but the layer has one


NAMES = sorted(ENCODER | HEAD | ADAPTER)
_part = st.sampled_from(sorted({part for name in NAMES for part in (name, *name.split("/"))}))
PATTERNS = st.one_of(
    st.sampled_from(NAMES),
    st.builds("/".join, st.sampled_from([name.split("/")[:n] for name in NAMES for n in (1, 2)])),
    st.builds("*{}*".format, _part),
    st.builds(lambda part, n: f"*{part[n:]}", _part, st.integers(0, 8)),
    st.builds(lambda name, n: f"{name[: n + 1]}*", st.sampled_from(NAMES), st.integers(0, 20)),
    st.builds(lambda name, n: f"{name[:n]}?{name[n + 1 :]}", st.sampled_from(NAMES), st.integers(0, 10)),
)


def _named(patterns: list[str]) -> set[str]:
    return {name for name in NAMES for p in patterns if fnmatchcase(name, p) or name.startswith(f"{p}/")}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return build(2), build(2)


@given(
    only=st.none() | st.lists(PATTERNS, min_size=1, max_size=3), skip=st.lists(PATTERNS, max_size=2), h5=st.booleans()
)
def test_random_patterns_give_back_exactly_what_they_name(
    pair: tuple[Any, Any], only: list[str] | None, skip: list[str], h5: bool
) -> None:
    model, other = pair
    if only is None and not skip:
        return
    memory: Any = io.BytesIO()
    memory.name = "m.weights.h5" if h5 else "m.safetensors"
    wanted = (set(NAMES) if only is None else _named(only)) - _named(skip)
    if not wanted or not all(_named([pattern]) for pattern in (*(only or ()), *skip)):
        with pytest.raises(ValueError, match=r"fits|Nothing is left"):
            saving.save_weights(model, memory, only=only, skip=skip)
        assert memory.getvalue() == b""
        return
    saving.save_weights(model, memory, only=only, skip=skip)
    saving.load_weights(zero(other), memory)
    whole = wanted >= {"encoder/first/kernel", "encoder/first/bias", *ADAPTER}  # then it is stored as Keras stores it
    merged = keras.ops.convert_to_numpy(model.get_layer("encoder").layers[0].kernel)
    expected = values(model)
    if whole:
        expected["encoder/first/kernel"] = np.array(merged)
        wanted -= ADAPTER
    found = values(other)
    assert {name for name, value in found.items() if np.any(value)} == wanted
    assert all(np.array_equal(found[name], expected[name]) for name in wanted)
