"""Legacy HDF5: the files are Keras', attribute by attribute; what Keras cannot load of them, we can."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from keras.src.legacy.saving import legacy_h5_format

import hornbeam
from hornbeam import saving
from hornbeam.errors import LimitError, UnsafeFileError, UnsupportedError, WeightsFileError
from support.helpers import saved, values
from support.zoo import ZOO, chain, floats, train

#: Entries whose file Keras cannot write, or whose configuration says more than Keras' could: it does not load them.
BEYOND = {"attention", "subclassed", "optimizer_Adafactor"}


def tree(path: Path) -> dict[str, Any]:
    """Every object of a file with its attributes, and of each attribute type, padding, character set and shape."""

    def attributes(item: Any) -> dict[str, Any]:
        found = {}
        for name in item.attrs:
            attribute = h5py.h5a.open(item.id, name.encode())
            kind = attribute.get_type()
            how = [kind.get_class(), kind.get_size(), kind.encode()]
            found[name] = (*how, attribute.shape, np.asarray(item.attrs[name]).tolist())
        return found

    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        data = (item.dtype.str, item.id.get_type().encode(), item.shape, item[()].tobytes())
        found[name] = (attributes(item), data)

    with h5py.File(path) as file:
        found[""] = attributes(file)
        file.visititems(lambda n, i: visit(n, i) if isinstance(i, h5py.Dataset) else found.update({n: attributes(i)}))
    return found


def load(path: Path, **kwargs: Any) -> Any:
    with hornbeam.installed(), hornbeam.options(fallback=False):
        return keras.models.load_model(path, **kwargs)


def save(model: Any, path: Path, **kwargs: Any) -> None:
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.save(path, **kwargs)


def step(model: Any, like: Any, x: Any, y: Any) -> Any:
    """One more training step, from the random state that `like` has: files hold no seeds."""
    theirs, ours = seeds(like), seeds(model)
    assert len(theirs) == len(ours)
    keras.utils.set_random_seed(0)  # attention on torch draws from its one generator
    for variable, value in zip(ours, theirs, strict=True):
        variable.assign(np.asarray(value.value))
    model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
    return values(model)


def seeds(model: Any) -> list[Any]:
    return [v for layer in model._flatten_layers() for v in layer.variables if "seed_generator_state" in v.path]


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str, tmp_path: Path) -> None:
    model, x, y = ZOO[name]()
    before = saved(model)
    settings = dict(model._compile_config.config) if model.compiled else None
    ours, stock = tmp_path / "ours.h5", tmp_path / "stock.h5"
    save(model, ours)
    assert (hornbeam.stats().saves, hornbeam.stats().engines) == (1, {"direct": 1})
    assert saved(model) == before
    assert not model.compiled or model._compile_config.config == settings
    if name not in BEYOND:
        model.save(stock)
        if settings is not None:
            model._compile_config.config.update(settings)  # Keras has taken the optimizer out of it
        assert tree(ours) == tree(stock)

    loaded = load(ours)
    report = hornbeam.last_report("load")
    assert report is not None
    assert report.complete, report
    assert report.engine == "direct"
    assert sorted(saved(loaded)) == sorted(before)  # float8 layers list their variables in another order
    assert loaded.compiled == model.compiled
    if name not in BEYOND:
        assert sorted(saved(load(stock))) == sorted(before)
    if name == "preprocessing_with_assets":
        return  # what `adapt` learned of words is an asset, and the format has none
    for a, b in zip(*(keras.tree.flatten(m.predict(x, verbose=0)) for m in (model, loaded)), strict=True):
        np.testing.assert_array_equal(a, b)
    # What stock Keras loads of this model on torch trains in another way than the model did, too.
    if y is not None and (keras.backend.backend(), name) != ("torch", "attention"):
        twin = load(ours)
        expected = step(model, loaded, x, y)
        assert step(twin, loaded, x, y) == expected


@pytest.mark.parametrize("name", sorted({"not_compiled", "custom_assets", "int8"} & ZOO.keys()))
def test_stock_loads_what_it_can(name: str, tmp_path: Path) -> None:
    model, _, _ = ZOO[name]()
    save(model, tmp_path / "m.h5")
    assert saved(keras.models.load_model(tmp_path / "m.h5")) == saved(model)


def test_stock_loads_compiled_models(tmp_path: Path) -> None:
    loss, metric = keras.losses.MeanSquaredError(), keras.metrics.MeanAbsoluteError()
    model, _, _ = train(chain(layers.Dense(3)), floats(8, 6), floats(8, 3), loss=loss, metrics=[metric])
    save(model, tmp_path / "m.h5")
    stock, ours = keras.models.load_model(tmp_path / "m.h5"), load(tmp_path / "m.h5")
    assert saved(stock)[:2] == saved(ours)[:2] == saved(model)[:2]
    assert stock.loss.get_config() == ours.loss.get_config() == loss.get_config()
    assert stock.optimizer.get_config() == ours.optimizer.get_config()


def test_compile_settings_come_back(tmp_path: Path) -> None:
    model = chain(layers.Dense(3))
    model.compile(keras.optimizers.SGD(0.25), "huber", metrics=["mae", "accuracy"], loss_weights=2.0)
    save(model, tmp_path / "m.h5")
    loaded = load(tmp_path / "m.h5")
    ours, theirs = (dict(m._compile_config.config) for m in (loaded, model))
    assert (ours.pop("optimizer").get_config(), ours) == (theirs.pop("optimizer").get_config(), theirs)
    assert not load(tmp_path / "m.h5", compile=False).compiled
    report = hornbeam.last_report("load")
    assert report is not None
    assert all(name.startswith("optimizer_weights/") for name in report.skipped)


@pytest.mark.parametrize("name", ["model", "model.hdf5", "model.h5", "model.bin"])
def test_any_name_with_save_format_and_content_tells_on_loading(name: str, tmp_path: Path) -> None:
    model, _, _ = ZOO["sequential"]()
    save(model, tmp_path / name, save_format="h5")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert saved(load(tmp_path / name)) == saved(model)
    saving.save_model(model, tmp_path / name, save_format="h5", include_optimizer=False)
    with h5py.File(tmp_path / name) as file:
        assert set(file) == {"model_weights"}
        assert "training_config" not in file.attrs
    with pytest.raises(ValueError, match="save_format"):
        model.save(tmp_path / "model", save_format="h5")  # stock


def test_long_rows_of_names_are_split_as_keras_splits_them(tmp_path: Path) -> None:
    inputs = x = keras.Input((1,))
    for i in range(70):
        x = layers.Dense(1, name=f"layer_{i}_" + "n" * 1000)(x)
    model = keras.Model(inputs, x)
    model.save(tmp_path / "stock.h5")
    save(model, tmp_path / "ours.h5")
    found = tree(tmp_path / "ours.h5")
    assert found == tree(tmp_path / "stock.h5")
    assert {"layer_names0", "layer_names1"} <= set(found["model_weights"])
    assert saved(load(tmp_path / "ours.h5")) == saved(model)
    for engine in ("direct", "libhdf5"):
        with hornbeam.options(engine=engine):
            save(model, tmp_path / "e.h5")
            assert tree(tmp_path / "e.h5") == found
            assert saved(load(tmp_path / "e.h5")) == saved(model)


def test_dense_attributes_and_chunks(tmp_path: Path) -> None:
    model, _, _ = ZOO["functional"]()
    save(model, tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5") as old, h5py.File(tmp_path / "n.h5", "w", libver="latest") as new:
        for name, value in old.attrs.items():
            new.attrs[name] = value
        for name in old:
            old.copy(name, new)
        for i in range(20):
            new.attrs[f"more {i}"] = ["x" * 100] * 10
    assert saved(load(tmp_path / "n.h5")) == saved(model)
    report = hornbeam.last_report("load")
    assert report is not None
    assert report.engine == "libhdf5"
    saving.save_model(model, tmp_path / "c.h5", compression=9)
    assert saved(load(tmp_path / "c.h5")) == saved(model)


# --- Weights ---


def pair() -> tuple[Any, Any]:
    def make(seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        return chain(layers.Dense(4, name="a"), layers.BatchNormalization(name="b"), layers.Dense(3, name="c"))

    return make(1), make(2)


def keras1(model: Any, path: Path, *, root: str = "/") -> None:
    """As Keras 1 and 2 wrote weights: fixed-length strings, a colon in the names."""
    with h5py.File(path, "w") as file:
        group = file.require_group(root)
        group.attrs["layer_names"] = np.array([layer.name.encode() for layer in model.layers])
        group.attrs["backend"] = np.bytes_(b"tensorflow")
        group.attrs["keras_version"] = np.bytes_(b"2.1.6")
        for layer in model.layers:
            inner = group.create_group(layer.name)
            weights = legacy_h5_format._legacy_weights(layer)
            names = [f"{v.path}:0".encode() for v in weights]
            inner.attrs["weight_names"] = np.array(names) if names else []
            for name, v in zip(names, weights, strict=True):
                inner[name] = keras.ops.convert_to_numpy(v)


@pytest.mark.parametrize("root", ["/", "model_weights"])
@pytest.mark.parametrize("by_name", [None, True])
def test_weights_of_keras_1_and_2(root: str, by_name: bool | None, tmp_path: Path) -> None:
    model, other = pair()
    keras1(model, tmp_path / "w.h5", root=root)
    with hornbeam.installed(), hornbeam.options(fallback=False):
        other.load_weights(tmp_path / "w.h5", by_name=by_name)
    assert saved(other) == saved(model)
    report = hornbeam.last_report("load")
    assert report is not None
    assert (report.complete, len(report.loaded)) == (True, 8)
    _, third = pair()
    third.load_weights(tmp_path / "w.h5", by_name=by_name)
    assert saved(third) == saved(model)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[bool, Any], dict[bool, Path]]:
    """A model of `keras.applications`, with its top and without, and what Keras would download for both."""
    root = tmp_path_factory.mktemp("applications")
    models, paths = {}, {}
    for top, name in ((True, "mobilenet_2_5_32_tf.h5"), (False, "mobilenet_2_5_32_tf_no_top.h5")):
        models[top], paths[top] = mobilenet(top), root / name
        for i, variable in enumerate(models[top].weights):
            variable.assign(0.5 + floats(*variable.shape, seed=i))
        with h5py.File(paths[top], "w") as file:
            legacy_h5_format.save_weights_to_hdf5_group(file, models[top])
    return models, paths


def mobilenet(top: bool, weights: Any = None) -> Any:
    return keras.applications.MobileNet((32, 32, 3), alpha=0.25, include_top=top, weights=weights, classes=3)


@pytest.mark.parametrize("top", [True, False])
def test_weights_of_applications(top: bool, pretrained: tuple[dict[bool, Any], dict[bool, Path]]) -> None:
    models, paths = pretrained
    wanted = saved(models[top])
    with hornbeam.installed(), hornbeam.options(fallback=False):
        assert saved(mobilenet(top, weights=paths[top])) == wanted
        report = hornbeam.last_report("load")
        assert report is not None
        assert (report.complete, report.engine, len(report.loaded)) == (True, "direct", len(wanted))
        other = mobilenet(top)
        assert saved(other) != wanted
        other.load_weights(paths[top])
    assert saved(other) == wanted
    stock = mobilenet(top)
    stock.load_weights(paths[top])
    assert saved(stock) == wanted


def test_the_top_of_an_application_is_left_out_by_name(
    pretrained: tuple[dict[bool, Any], dict[bool, Path]],
) -> None:
    models, paths = pretrained
    other = mobilenet(False)
    before = saved(other)
    with hornbeam.installed(), hornbeam.options(fallback=False):
        with pytest.raises(ValueError, match="Layer count mismatch"):
            other.load_weights(paths[True])
        assert saved(other) == before
        other.load_weights(paths[True], by_name=True)
    whole = models[True]
    top = {id(v) for v in whole.get_layer("conv_preds").weights}
    assert saved(other) == [s for s, v in zip(saved(whole), whole.weights, strict=True) if id(v) not in top] != before
    report = hornbeam.last_report("load")
    assert report is not None
    assert sorted(report.skipped) == ["conv_preds/conv_preds/bias", "conv_preds/conv_preds/kernel"]


def outcome(call: Callable[[], Any]) -> tuple[str, list[str]]:
    """The exception of a call, if there is one, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
            raised = ""
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"
    return raised, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("skip_mismatch", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", ["shape", "count", "layers", "top", "kwargs", "skip"])
def test_what_does_not_fit_ends_as_in_keras(kind: str, by_name: bool, skip_mismatch: bool, tmp_path: Path) -> None:
    model, _ = pair()
    model.save(tmp_path / "w.h5")
    steps = {
        "shape": lambda: chain(
            layers.Dense(4, name="a"), layers.BatchNormalization(name="b"), layers.Dense(5, name="c")
        ),
        "count": lambda: chain(
            layers.Dense(4, name="a", use_bias=False), layers.BatchNormalization(name="b"), layers.Dense(3, name="c")
        ),
        "layers": lambda: chain(layers.Dense(4, name="a"), layers.Dense(3, name="d")),
    }
    with h5py.File(tmp_path / "w.h5", "a") as file:
        if kind == "top":
            top = file["model_weights/top_level_model_weights"]
            top.attrs["weight_names"] = [b"x"]
            top["x"] = np.zeros(3)
    extra = {"kwargs": {"wrong": 1}, "skip": {"objects_to_skip": []}}.get(kind, {})
    results, states = [], []
    for installed in (False, True):
        keras.utils.set_random_seed(5)
        other = steps.get(kind, lambda: pair()[1])()
        before = saved(other)
        kwargs = {"skip_mismatch": skip_mismatch, "by_name": by_name, **extra}
        with hornbeam.installed() if installed else contextlib.nullcontext():
            results.append(outcome(lambda: other.load_weights(tmp_path / "w.h5", **kwargs)))  # noqa: B023
        states.append(saved(other))
    if results[1][0]:
        assert states[1] == before
    assert results[0] == results[1]
    assert results[0] != ("", []) or (kind, by_name) == ("layers", True)
    if kind in ("shape", "count", "top") and not results[1][0]:  # what fits was loaded, by both
        assert states[0] == states[1] != before


def test_a_load_that_fails_late_changes_nothing(tmp_path: Path) -> None:
    model, other = pair()
    save(model, tmp_path / "w.h5")

    class Fails(keras.layers.Dense):
        def finalize_state(self) -> None:
            raise RuntimeError("no")

    other = chain(layers.Dense(4, name="a"), layers.BatchNormalization(name="b"), Fails(3, name="c"))
    before = saved(other)
    with hornbeam.installed(), pytest.raises(RuntimeError, match="no"):
        other.load_weights(tmp_path / "w.h5")
    assert saved(other) == before


def test_names_win_over_the_order_when_layers_were_frozen(tmp_path: Path) -> None:
    def make() -> Any:
        keras.utils.set_random_seed(4)
        inner = keras.Sequential(
            [keras.Input((4,)), layers.Dense(4, name="x"), layers.Dense(4, name="y")], name="inner"
        )
        return keras.Sequential([keras.Input((4,)), inner])

    model = make()
    model.layers[0].layers[0].trainable = False
    for variable in model.weights:
        variable.assign(floats(*variable.shape, seed=len(variable.path)))
    save(model, tmp_path / "w.h5")
    other = make()
    with hornbeam.installed():
        other.load_weights(tmp_path / "w.h5")
    assert saved(other) == saved(model)


def test_partial_and_renamed_loads(tmp_path: Path) -> None:
    model, other = pair()
    save(model, tmp_path / "w.h5")
    before = dict(zip([v.path for v in other.weights], saved(other), strict=True))
    theirs = dict(zip([v.path for v in model.weights], saved(model), strict=True))

    def now(m: Any) -> dict[str, Any]:
        return dict(zip([v.path for v in m.weights], saved(m), strict=True))

    report = saving.load_weights(other, tmp_path / "w.h5", only="a/*")
    assert report.complete
    assert now(other) == {**before, "a/kernel": theirs["a/kernel"], "a/bias": theirs["a/bias"]}
    _, other = pair()
    saving.load_weights(other, tmp_path / "w.h5", skip=["b", "c/c/bias"])
    kept = [path for path in before if path.startswith("b/") or path == "c/bias"]
    assert now(other) == {**theirs, **{path: before[path] for path in kept}}
    _, other = pair()
    names = {"a/a/kernel": "a/kernel", "a/a/bias": None}
    saving.load_weights(other, tmp_path / "w.h5", only="a/kernel", name_map=names)
    assert now(other) == {**before, "a/kernel": theirs["a/kernel"]}
    with pytest.raises(ValueError, match="not complete"):
        saving.load_weights(other, tmp_path / "w.h5", name_map=lambda name: "a/kernel" if "a/a/k" in name else None)
    with pytest.raises(ValueError, match="No variable of the model fits"):
        saving.load_weights(other, tmp_path / "w.h5", only="z")
    assert now(other) == {**before, "a/kernel": theirs["a/kernel"]}


# --- Bad files ---


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = chain(layers.Dense(4, name="a"))
    model.compile("adam", "mse")
    save(model, tmp_path / "m.h5")
    return tmp_path / "m.h5"


def test_truncated_and_changed_files_end_in_an_error_or_load(file: Path) -> None:
    data = file.read_bytes()
    for cut in range(0, len(data), 97):
        file.write_bytes(data[:cut])
        with pytest.raises((OSError, ValueError)):
            load(file)
    rng = np.random.default_rng(0)
    metadata = data.index(b"model_config")
    for at in rng.integers(0, metadata, 60):
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        with hornbeam.installed():
            raised, _ = outcome(lambda: keras.models.load_model(file))
        kinds = (WeightsFileError, UnsafeFileError, LimitError, ValueError, KeyError, TypeError, OSError)
        assert raised == "" or raised.split(":")[0] in {k.__name__ for k in kinds} | {"UnsupportedError", "ConfigError"}


@pytest.mark.parametrize("where", ["model_weights/x", "optimizer_weights/x", "x"])
@pytest.mark.parametrize("link", [h5py.SoftLink("/model_weights"), h5py.ExternalLink("other.h5", "/")])
def test_links_are_refused(where: str, link: Any, file: Path) -> None:
    with h5py.File(file, "a") as opened:
        opened[where] = link
    with pytest.raises(UnsafeFileError):
        load(file)


@pytest.mark.parametrize(
    ("path", "name", "value", "error"),
    [
        ("/", "model_config", None, "No model config found"),
        ("/", "model_config", b"{", "Expecting"),
        ("/", "model_config", b'{"a": 1, "a": 2}', "twice|duplicate"),
        ("/", "model_config", [b"{}"], "no string"),
        ("/", "model_config", b"[]", "not a list"),
        ("/", "training_config", b"{", "Expecting"),
        ("model_weights", "layer_names", b"a", "no row"),
        ("model_weights", "layer_names", [b"a", b"z"], "z"),
        ("model_weights", "layer_names", [b"a", b"../a"], "a"),
        ("model_weights/a", "weight_names", [b"a/kernel", b"/a/bias"], "bias"),
        ("model_weights/a", "weight_names", [b"a/kernel", b"a"], "Dataset"),
        ("model_weights/a", "weight_names", [b"\xff", b"a/bias"], "utf"),
    ],
)
def test_attributes_that_make_no_sense(path: str, name: str, value: Any, error: str, file: Path) -> None:
    with h5py.File(file, "a") as opened:
        del opened[path].attrs[name]
        if value is not None:
            opened[path].attrs[name] = value
    with pytest.raises((ValueError, KeyError, TypeError), match=error):
        load(file)


LAMBDA = "4wAAAAA="


def poison(file: Path, attribute: str, change: Callable[[Any], None]) -> None:
    with h5py.File(file, "a") as opened:
        config = json.loads(opened.attrs[attribute])
        change(config)
        opened.attrs[attribute] = json.dumps(config).encode()


def legacy_lambda() -> dict[str, Any]:
    function = [LAMBDA, None, None]
    return {"class_name": "Lambda", "config": {"name": "l", "function": function, "function_type": "lambda"}}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: inner,
        lambda inner: {"class_name": "TimeDistributed", "config": {"name": "t", "layer": inner}},
        lambda inner: {"class_name": "Sequential", "config": {"name": "s", "layers": [inner]}},
    ],
)
def test_lambdas_are_refused_in_model_configs(wrap: Callable[[Any], Any], file: Path) -> None:
    node = {**wrap(legacy_lambda()), "name": "l", "inbound_nodes": [[["input_layer", 0, 0, {}]]]}
    poison(file, "model_config", lambda config: config["config"]["layers"].append(node))
    for route in (load, keras.models.load_model):
        with pytest.raises((ValueError, TypeError), match=r"[Ll]ambda"):
            route(file)


def test_lambdas_are_refused_in_training_configs(file: Path) -> None:
    value = {"class_name": "__lambda__", "config": {"value": LAMBDA}}

    def change(config: Any) -> None:
        config["loss"] = {"class_name": "MeanSquaredError", "config": {"name": value, "reduction": "sum"}}
        config["optimizer_config"]["config"]["learning_rate"] = value

    poison(file, "training_config", change)
    with pytest.raises((ValueError, TypeError), match=r"lambda"):
        load(file)


@pytest.mark.parametrize("name", ["TFSMLayer", "get_file", "load_model"])
def test_training_configs_name_losses_only(name: str, file: Path) -> None:
    poison(file, "training_config", lambda config: config.update(loss=name))
    with pytest.raises(ValueError, match=name):
        load(file)


def test_nothing_reads_legacy_files_with_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = ZOO["functional"]()
    opened = h5py.File

    class Refuses(opened):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("h5py was asked")

    monkeypatch.setattr(h5py, "File", Refuses)
    save(model, tmp_path / "m.h5")
    assert saved(load(tmp_path / "m.h5")) == saved(model)
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.load_weights(tmp_path / "m.h5")
    assert hornbeam.stats().handovers == {}


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    class Unserialisable(keras.Model):
        def __init__(self, thing: Any) -> None:
            super().__init__()
            self.thing = thing

        def get_config(self) -> Any:
            raise NotImplementedError("no config")

    path = tmp_path / "m.h5"
    path.write_bytes(b"old")
    with pytest.raises(NotImplementedError, match="no config"):
        save(Unserialisable(object()), path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_an_open_file_is_keras_own(tmp_path: Path) -> None:
    model, _, _ = ZOO["not_compiled"]()
    with hornbeam.installed():
        with h5py.File(tmp_path / "m.h5", "w") as file:
            legacy_h5_format.save_model_to_hdf5(model, file)
        with h5py.File(tmp_path / "m.h5") as file:
            assert saved(legacy_h5_format.load_model_from_hdf5(file)) == saved(model)
    assert hornbeam.stats().handovers == {"an open HDF5 file": 2}
    with (
        hornbeam.installed(),
        hornbeam.options(fallback=False),
        h5py.File(tmp_path / "m.h5") as file,
        pytest.raises(UnsupportedError),
    ):
        legacy_h5_format.load_model_from_hdf5(file)


def test_a_text_is_no_function_of_keras_layers(tmp_path: Path) -> None:
    x = keras.Input((4, 3))
    model = keras.Model(x, layers.Attention(score_mode="dot")([x, layers.Dense(3)(x)]))
    saving.save_model(model, tmp_path / "m.h5")
    loaded = saving.load_model(tmp_path / "m.h5")
    assert loaded.get_config() == model.get_config()
    assert saved(loaded) == saved(model)
