"""Building without initialising: nothing tells the model from one that stock Keras loaded."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import keras
import numpy as np
import pytest
from keras.src.random.seed_generator import global_seed_generator

import hornbeam
from hornbeam.base import trials
from hornbeam.formats import legacy_save
from hornbeam.seam import assignments, building, patches, walking
from hornbeam.seam import shortcuts as shortcuts_
from support.helpers import saved, state, value, values
from support.zoo import AWKWARD, ZOO, chain, floats

pytestmark = pytest.mark.keras_versions

BACKEND = keras.backend.backend()
PATHS = {"PYTHONPATH": str(Path(hornbeam.__file__).parent.parent)}


@pytest.fixture(autouse=True)
def _all_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models stand for large ones here."""
    monkeypatch.setattr(shortcuts_, "WORTH_TRYING", 0)


lazy = pytest.mark.backend("tensorflow", "jax", reason="other backends build the stock way")


def both(path: Path) -> tuple[Any, Any]:
    """The model as stock Keras loads it, and as we do, from the same random state, and to the same."""
    _seed()
    stock = keras.models.load_model(path)
    after_stock = _drawn()
    _seed()
    with hornbeam.installed(), hornbeam.options(fallback=False):
        ours = keras.models.load_model(path)
    assert _drawn() == after_stock
    return stock, ours


def _seed() -> None:
    """Sets every random state of the process."""
    for _ in range(2):  # Keras 3.12 keeps its own generator; later ones make another, and draw its seed
        keras.utils.set_random_seed(1)
        global_seed_generator().state.assign([1, 0])
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.random.set_global_generator(tf.random.Generator.from_seed(1))


def _drawn() -> list[Any]:
    """Every random state of the process. TensorFlow's own shows in what it gives next."""
    state: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]
    found = [random.getstate(), str(state), state["state"]["key"].tobytes(), value(global_seed_generator().state)[1:]]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        found += [tf.random.get_global_generator().state.numpy().tobytes(), tf.random.uniform((4,)).numpy().tobytes()]
    return found


@lazy
@pytest.mark.parametrize(
    "name", ["functional", "nested", "recurrent", "attention", "subclassed", "mixed_precision", "frozen_parts"]
)
def test_variables_are_the_same_things(name: str, tmp_path: Path) -> None:
    model, _, _ = ZOO[name]()
    model.save(tmp_path / "m.keras")
    stock, ours = both(tmp_path / "m.keras")
    for a, b in zip(_all(stock), _all(ours), strict=True):
        assert type(b) is type(a)
        assert set(vars(b)) == set(vars(a))
        assert _counted_off(b.name) == _counted_off(a.name)
        assert (b.dtype, b.trainable, b._initializer) == (a.dtype, a.trainable, a._initializer)
        if BACKEND == "tensorflow":
            assert type(b.value) is type(a.value)
            assert b.value.trainable == a.value.trainable
            assert b.value.device == a.value.device
            assert _counted_off(b.value.name) == _counted_off(a.value.name)
    assert values(ours) == values(stock)


@lazy
@pytest.mark.parametrize("shortcuts", [False, True])
def test_what_was_frozen_can_train_again(shortcuts: bool, tmp_path: Path) -> None:
    inputs = keras.Input((3,))
    frozen = keras.layers.Dense(4, name="frozen")
    frozen.trainable = False
    model = keras.Model(inputs, keras.layers.Dense(1)(frozen(inputs)))
    model.save(tmp_path / "m.keras")
    with hornbeam.options(shortcuts=shortcuts):
        stock, ours = both(tmp_path / "m.keras")
    x, y = np.random.default_rng(0).normal(size=(8, 3)).astype("float32"), np.ones((8, 1), "float32")
    for loaded in (stock, ours):
        loaded.get_layer("frozen").trainable = True
        loaded.compile("sgd", "mse")
        loaded.train_on_batch(x, y)
    assert values(ours) == values(stock)
    changed = keras.ops.convert_to_numpy(ours.get_layer("frozen").kernel)
    assert not np.array_equal(changed, keras.ops.convert_to_numpy(frozen.kernel))


MODELS = ZOO | AWKWARD
FEW = ("functional", "nested", "recurrent", "mixed_precision", "lora", "optimizer_Adam")


@pytest.mark.parametrize(
    ("name", "shortcuts"),
    [*((n, True) for n in MODELS), *((n, False) for n in (*FEW, *AWKWARD) if n in MODELS)],
)
def test_everything_about_a_model_is_the_same(name: str, shortcuts: bool, tmp_path: Path) -> None:
    model, x, y = MODELS[name]()
    model.save(tmp_path / "m.keras")
    with hornbeam.options(shortcuts=shortcuts):
        stock, ours = both(tmp_path / "m.keras")
    for a, b in zip(_objects(stock), _objects(ours), strict=True):
        assert type(b) is type(a)
        assert {k: type(v) for k, v in vars(b).items()} == {k: type(v) for k, v in vars(a).items()}, a
        plain = [k for k, v in vars(a).items() if isinstance(v, int | float | str | bool | None | tuple)]
        for key in plain:
            assert _comparable(vars(b)[key]) == _comparable(vars(a)[key]), (a, key)
    assert _counted_off(str(_dependencies(ours))) == _counted_off(str(_dependencies(stock)))
    assert values(ours) == values(stock)
    if y is not None and stock.optimizer is not None:
        for each in (stock, ours):
            keras.utils.set_random_seed(3)
            for _ in range(2):
                each.train_on_batch(x, y)
    assert values(ours) == values(stock)


def _objects(model: Any) -> list[Any]:
    found = [*model._flatten_layers(), *_all(model)] if hasattr(model, "_flatten_layers") else [model]
    return [*found, *([model.optimizer] if getattr(model, "optimizer", None) is not None else [])]


def _comparable(value: Any) -> str:
    return re.sub(r"0x[0-9a-f]+", "", _counted_off(str(value)))


def _dependencies(model: Any) -> list[str]:
    """The graph that `tf.train.Checkpoint` would save."""
    if BACKEND != "tensorflow":
        return []
    from tensorflow.python.checkpoint.graph_view import ObjectGraphView

    paths = ObjectGraphView(model).breadth_first_traversal()[1]
    return [f"{type(item).__name__}: {'/'.join(p.name for p in path)}" for item, path in paths.items()]


def _names() -> dict[str, int]:
    from keras.src.backend.common import global_state

    return dict(global_state.get_global_attribute("object_name_uids", {}))


@pytest.mark.parametrize(
    "name", sorted({"functional", "recurrent", "attention", "subclassed", "preprocessing_with_assets"} & ZOO.keys())
)
def test_automatic_names_count_on_alike(name: str, tmp_path: Path) -> None:
    model, _, _ = ZOO[name]()
    model.save(tmp_path / "m.keras")
    counted = []
    for installed in (False, True):
        before = _names()
        with hornbeam.installed() if installed else contextlib.nullcontext():
            keras.models.load_model(tmp_path / "m.keras")
        after = _names()
        counted.append({key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)})
    assert counted[0] == counted[1]


def _patch_points() -> list[tuple[Any, str, Any, str]]:
    """Everything of Keras that is replaced while a model or its weights are loaded, and by what."""
    from keras.src.backend.common.variables import Variable
    from keras.src.layers import layer
    from keras.src.ops import operation
    from keras.src.saving import saving_lib

    points: list[tuple[Any, str, Any, str]] = [
        (keras.layers.Layer, "__setattr__", shortcuts_._attribute_patch, "_make"),
        (layer, "inspect", shortcuts_._Inspect, "signature"),
        (operation, "inspect", shortcuts_._Inspect, "getfullargspec"),
        (Variable, "assign", assignments._assign_patch, "_make"),
        (saving_lib, "_load_state", assignments._load_patch, "_make"),
        (saving_lib, "_walk_saveable", walking._walk_patch, "_make"),
        (saving_lib, "naming", walking._Naming, "to_snake_case"),
        (keras.Variable, "_initialize_with_initializer", building._variable_patch, "_make"),
    ]
    if BACKEND == "tensorflow":
        import tensorflow as tf
        from keras.src.backend.tensorflow.optimizer import TFOptimizer

        points += [
            (tf, "is_tensor", shortcuts_._tensor_patch, "_make"),
            (TFOptimizer, "add_variable_from_reference", building._slot_patch, "_make"),
            (TFOptimizer, "_var_key", building._key_patch, "_make"),
        ]
    return points


def _saving_points() -> list[tuple[Any, str, Any, str, tuple[str, ...]]]:
    """Everything of Keras that is replaced while something is saved, by what, and the files that need it."""
    from keras.src.legacy.saving import serialization
    from keras.src.models import functional, sequential
    from keras.src.optimizers.base_optimizer import BaseOptimizer
    from keras.src.saving import saving_lib

    walked = ("m.keras", "m.weights.h5")
    points: list[tuple[Any, str, Any, str, tuple[str, ...]]] = [
        (saving_lib, "_walk_saveable", walking._walk_patch, "_make", walked),
        (saving_lib, "_save_state", walking._save_patch, "_make", walked),
        (saving_lib, "naming", walking._Naming, "to_snake_case", walked),
        (BaseOptimizer, "save_own_variables", walking._optimizer_patch, "_make", walked),
        (serialization, "serialize_keras_object", legacy_save._serialize_patch, "_make", ("m.h5",)),
        (functional, "copy", shortcuts_._Copy, "deepcopy", ("m.keras",)),
        (sequential, "copy", shortcuts_._Copy, "deepcopy", ()),  # the same
    ]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        points.append((tf, "is_tensor", shortcuts_._tensor_patch, "_make", ("m.keras",)))
    return points


def _save(model: Any, path: Path) -> None:
    (model.save_weights if path.name.endswith(".weights.h5") else model.save)(path)


@lazy
def test_the_patch_points_are_all_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = ZOO["functional"]()
    model.save(tmp_path / "m.keras")
    hornbeam.saving.load_model(tmp_path / "m.keras")  # tries the shortcuts
    patched: set[tuple[Any, str]] = set()
    original = patches.Patch.__call__

    def noted(self: Any, owner: Any, name: str) -> Any:
        patched.add((owner, name))
        return original(self, owner, name)

    monkeypatch.setattr(patches.Patch, "__call__", noted)
    with hornbeam.installed(), hornbeam.options(fallback=False):
        for name in ("m.keras", "m.weights.h5", "m.h5"):
            _save(model, tmp_path / name)
        assert patched == {(owner, name) for owner, name, *_ in _saving_points()}
        keras.models.load_model(tmp_path / "m.keras")
        model.load_weights(tmp_path / "m.weights.h5")
    assert patched == {(owner, name) for owner, name, *_ in (*_patch_points(), *_saving_points())}


class Injected(BaseException):
    """Passes what catches errors."""


def _before_each_call(ours: Any, name: str, check: Callable[[], None]) -> Callable[..., Any]:
    """What is there, with a check before each call; of a patch, before each call of what it makes."""
    original = getattr(ours, name)

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            check()
            return function(*args, **kwargs)

        return call

    return (lambda found: checked(original(found))) if name == "_make" else checked(original)


@lazy
@pytest.mark.parametrize("point", range(len(_patch_points())), ids=lambda i: _patch_points()[i][1])
@pytest.mark.parametrize("after", [0, 1])
def test_an_error_at_any_patch_point_leaves_nothing_patched(
    point: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = ZOO["functional"]()
    model.save(tmp_path / "m.keras")
    hornbeam.saving.load_model(tmp_path / "m.keras")  # tries the shortcuts
    _, _, ours, name = _patch_points()[point]
    calls = 0

    def may_fail() -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Injected

    before = [getattr(owner, n) for owner, n, *_ in _patch_points()]
    values_before = values(model)

    def load_both() -> None:
        keras.models.load_model(tmp_path / "m.keras")
        model.load_weights(tmp_path / "m.keras")

    with monkeypatch.context() as patch, hornbeam.installed():
        patch.setattr(ours, name, _before_each_call(ours, name, may_fail))
        with pytest.raises(Injected):
            load_both()
    assert [getattr(owner, n) for owner, n, *_ in _patch_points()] == before
    assert values(model) == values_before
    assert gc.isenabled()
    assert gc.get_threshold()[0] > 0
    with hornbeam.installed(), hornbeam.options(fallback=False):
        again = keras.models.load_model(tmp_path / "m.keras")
    assert saved(again) == saved(model)


@lazy
@pytest.mark.parametrize("point", range(len(_saving_points())), ids=lambda i: _saving_points()[i][1])
def test_an_error_at_any_patch_point_of_a_save_leaves_the_old_file(
    point: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = ZOO["functional"]()
    hornbeam.saving.save_model(model, tmp_path / "m.keras")  # tries the shortcuts
    (tmp_path / "m.keras").unlink()
    _, _, ours, name, files = _saving_points()[point]
    calls = wanted = 0
    error: type[BaseException] = Injected

    def may_fail() -> None:
        nonlocal calls
        calls += 1
        if calls > wanted:
            raise error("injected")

    before = [getattr(owner, n) for owner, n, *_ in _saving_points()]
    for file in files:
        path = tmp_path / file
        _save(model, path)
        old, expected = path.read_bytes(), state(model)
        for error in (Injected, RuntimeError):
            for wanted in (0, 1) if ours is not walking._optimizer_patch and name != "deepcopy" else (0,):
                calls = 0
                with monkeypatch.context() as patch, hornbeam.installed():
                    patch.setattr(ours, name, _before_each_call(ours, name, may_fail))
                    with pytest.raises(error, match="injected"):
                        _save(model, path)
                assert calls > wanted
                assert [getattr(owner, n) for owner, n, *_ in _saving_points()] == before
                assert path.read_bytes() == old
                assert [p.name for p in tmp_path.iterdir()] == [file]
                assert state(model) == expected
        assert not hornbeam.stats().handovers
        assert gc.isenabled()
        assert gc.get_threshold()[0] > 0
        kernel = model.layers[1].kernel
        kernel.assign(kernel + 1)
        expected = state(model)
        with hornbeam.installed(), hornbeam.options(fallback=False):
            _save(model, path)
        kernel.assign(kernel * 0)
        model.load_weights(path)
        assert state(model) == expected
        path.unlink()


AROUND = """
import sys, contextlib, logging
import keras
from keras.src.backend.common import global_state
import hornbeam
from hornbeam.seam import shortcuts

logging.basicConfig(level="WARNING", format="%(name)s")
shortcuts.WORTH_TRYING = 0
around = contextlib.nullcontext()
if sys.argv[2] == "name_scope":
    around = keras.name_scope("outer")
elif sys.argv[2] == "strategy":
    import tensorflow as tf

    around = tf.distribute.MirroredStrategy(["CPU:0"]).scope()
keras.Variable(1.0)
keras.random.SeedGenerator(1)
before = dict(global_state.get_global_attribute("object_name_uids"))
load = {"stock": keras.saving.load_model, "hornbeam": hornbeam.saving.load_model}[sys.argv[3]]
with around:
    load(sys.argv[1])
after = dict(global_state.get_global_attribute("object_name_uids"))
print({name: after[name] - before.get(name, 0) for name in sorted(after)})
print(*[name for name, works in shortcuts._works.items() if works._verdict])
"""


@lazy
@pytest.mark.parametrize("around", ["nothing", "name_scope", *(["strategy"] if BACKEND == "tensorflow" else [])])
def test_the_first_load_of_a_process_leaves_no_trace_and_finds_the_shortcuts(around: str, tmp_path: Path) -> None:
    model, _, _ = ZOO["functional"]()
    model.save(tmp_path / "m.keras")
    found = []
    for side in ("stock", "hornbeam"):
        command = [sys.executable, "-c", AROUND, str(tmp_path / "m.keras"), around, side]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **PATHS})
        assert "\nhornbeam" not in f"\n{done.stderr}"
        found.append(done.stdout.splitlines())
    assert found[0][0] == found[1][0]
    every = ["attributes", "signatures", "tensors", "variables"]
    assert found[1][1].split() == (every if BACKEND == "tensorflow" else every[:2])


@lazy
def test_a_shortcut_that_does_not_work_is_told_and_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, _, _ = ZOO["functional"]()
    model.save(tmp_path / "m.keras")
    verdicts = {"attributes": lambda: False, "signatures": lambda: {}["missing"]}
    for name, check in verdicts.items():
        monkeypatch.setitem(shortcuts_._works, name, trials.Tried(name, check))
    monkeypatch.setattr(shortcuts_, "_set_attribute", None)  # calling it would be an error
    assert saved(hornbeam.saving.load_model(tmp_path / "m.keras", strict=True)) == saved(model)
    hornbeam.saving.load_model(tmp_path / "m.keras")
    told = [record.message for record in caplog.records if "does not work" in record.message]
    assert sorted(message.split()[0] for message in told) == sorted(verdicts)


@lazy
def test_the_first_loads_of_a_few_variables_try_no_shortcuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = ZOO["functional"]()
    model.save(tmp_path / "m.keras")
    count = len(model.variables) + len(model.optimizer.variables)  # more than the file has
    tried: list[str] = []
    monkeypatch.setattr(shortcuts_, "WORTH_TRYING", 3 * count)
    monkeypatch.setattr(shortcuts_, "_built", 0)
    for name in ("attributes", "variables"):
        monkeypatch.setitem(shortcuts_._works, name, lambda name=name: bool(tried.append(name)))
    for _ in range(2):
        assert saved(hornbeam.saving.load_model(tmp_path / "m.keras")) == saved(model)
    assert not tried
    hornbeam.saving.save_model(model, tmp_path / "again.keras")
    for _ in range(9):
        hornbeam.saving.load_model(tmp_path / "m.keras")
    assert set(tried) == ({"attributes", "variables"} if BACKEND == "tensorflow" else {"attributes"})


@keras.saving.register_keras_serializable("build")
class Computed(keras.layers.Layer):
    """Has attributes that are in no dictionary."""

    asked: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        type(self).asked.append(name)
        if name == "computed":
            return 3
        raise AttributeError(name)

    def call(self, x: Any) -> Any:
        return x


def test_a_class_that_computes_attributes_goes_the_stock_way(tmp_path: Path) -> None:
    inputs = keras.Input((2,))
    keras.Model(inputs, Computed(name="computed")(inputs)).save(tmp_path / "m.keras")
    asked = []
    for loaded_by in (keras.models.load_model, hornbeam.saving.load_model):
        Computed.asked.clear()
        model = loaded_by(tmp_path / "m.keras")
        assert model.get_layer("computed").computed == 3
        asked.append(list(Computed.asked))
    assert asked[0] == asked[1]


@pytest.mark.parametrize("enabled", [True, False])
def test_what_is_done_to_the_collector_during_a_load_stays(enabled: bool, tmp_path: Path) -> None:
    before = gc.get_threshold()
    try:
        with patches.collector_rests():
            assert gc.get_threshold()[0] == 0
            with patches.collector_rests():
                (gc.enable if enabled else gc.disable)()
            assert gc.get_threshold()[0] == 0
        assert gc.isenabled() is enabled
        assert gc.get_threshold() == before
        with patches.collector_rests():
            gc.set_threshold(123, 4, 5)
        assert gc.get_threshold() == (123, 4, 5)
    finally:
        gc.enable()
        gc.set_threshold(*before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_collects_what_other_threads_of_its_parent_had_resting() -> None:
    """Also one that was forked while the lock was held."""
    before, inside, done = gc.get_threshold(), threading.Event(), threading.Event()

    def rests() -> None:
        with patches.collector_rests(), patches._collector_lock:
            inside.set()
            done.wait()

    thread = threading.Thread(target=rests)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        found = gc.get_threshold()
        with patches.collector_rests():
            resting = gc.get_threshold()[0] == 0
        os._exit(0 if resting and found == gc.get_threshold() == before else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.get_threshold() == before


def _all(model: Any) -> list[Any]:
    optimizer = getattr(model, "optimizer", None)
    return [*model.variables, *(optimizer.variables if optimizer is not None else ())]


def _counted_off(name: str) -> str:
    return re.sub(r"_\d+", "", name)


@keras.saving.register_keras_serializable("build")
class ReadsInBuild(keras.layers.Layer):
    """Reads a weight while it is built, derives others from it, and lets a graph capture it."""

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(shape=(shape[-1], 4), initializer=keras.initializers.GlorotUniform(seed=9), name="w")
        self.norm = float(keras.ops.convert_to_numpy(keras.ops.sum(self.w)))
        self.alias = self.w.value
        self.doubled = self.add_weight(shape=(4,), initializer=lambda s, dtype=None: keras.ops.ones(s, dtype) * 2)
        self.w.assign(self.w * 2)
        self.captured = self._capture() if BACKEND == "tensorflow" else ()

    def _capture(self) -> tuple[Any, ...]:
        """A graph, a dataset and a checkpoint that hold the variable while it has no value of the file yet."""
        import tensorflow as tf

        graph = tf.function(lambda: tf.reduce_sum(self.w)).get_concrete_function()
        data = tf.data.Dataset.range(2).map(lambda i: tf.reduce_sum(self.w) + tf.cast(i, "float32"))
        return graph, data, tf.train.Checkpoint(w=self.w.value)

    def call(self, x: Any) -> Any:
        return keras.ops.matmul(x, self.w) + self.doubled


@lazy
def test_a_value_read_in_build_is_the_initial_one(tmp_path: Path) -> None:
    model = chain(ReadsInBuild())
    model.layers[1].w.assign(floats(6, 4))
    model.save(tmp_path / "m.keras")
    model.compile("adam", "mse")
    model.save(tmp_path / "m.keras")
    stock, ours = both(tmp_path / "m.keras")
    a, b = stock.layers[1], ours.layers[1]
    assert b.norm == a.norm != 0.0
    assert (b.alias is b.w.value) == (a.alias is a.w.value)
    assert values(ours) == values(stock)
    if b.captured:
        import tensorflow as tf

        kernel, found = model.layers[1].w.numpy(), []
        for layer in (a, b):
            graph, data, checkpoint = layer.captured
            read = tf.train.load_checkpoint(checkpoint.save(tmp_path / "c"))
            np.testing.assert_array_equal(read.get_tensor("w/.ATTRIBUTES/VARIABLE_VALUE"), kernel)
            found.append([graph().numpy(), *(value.numpy() for value in data)])
        assert found[0] == found[1]


@lazy
def test_what_the_file_lacks_is_initialised_as_stock_keras_would(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("build")
    class KeepsNothing(keras.layers.Dense):
        def save_own_variables(self, store: Any) -> None:
            pass

        def load_own_variables(self, store: Any) -> None:
            pass

    model = chain(KeepsNothing(4, kernel_initializer="he_normal"), keras.layers.Dense(2))
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "m.keras")
    stock, ours = both(tmp_path / "m.keras")
    assert values(ours) == values(stock)
    assert np.any(np.asarray(ours.layers[1].kernel))


@lazy
def test_initialisers_with_state_are_called_as_ever(tmp_path: Path) -> None:
    model, _, _ = AWKWARD["initialisers_with_state"]()
    model.save(tmp_path / "m.keras")
    found = []
    for loaded in both(tmp_path / "m.keras"):
        first, *dense = loaded.layers[1:]
        counting, drawing = first.initializers
        seeds = [value(g.state)[3] for g in (first.generator, *(d.kernel_initializer.seed for d in dense))]
        next_ones = [keras.ops.convert_to_numpy(i((3,))).tolist() for i in (counting, drawing)]
        kept = [value(weight)[3] for weight in first.added]
        assert kept[1] == np.full(6, 2, "float32").tobytes()  # of no file: what the second call gave
        found.append([next_ones, seeds, kept])
    assert found[0] == found[1]
    assert found[0][0][0] == [3.0] * 3
    assert len(set(found[0][1])) == 2  # two draws, and one each


@lazy
def test_tied_weights_are_one_variable(tmp_path: Path) -> None:
    model, _, _ = AWKWARD["tied_weights"]()
    model.save(tmp_path / "m.keras")
    for loaded in both(tmp_path / "m.keras"):
        embedding, _, head = loaded.layers[1:]
        assert head.embedding is embedding
        assert head.kernel is embedding.embeddings
        assert saved(loaded) == saved(model)


@lazy
def test_training_never_writes_the_memory_that_was_read(tmp_path: Path) -> None:
    from hornbeam.flows import serving

    model, x, y = ZOO["functional"]()
    model.save(tmp_path / "m.keras")
    blocks: list[np.ndarray] = []
    take = serving.Image.take

    def keep(self: Any, i: int) -> np.ndarray:
        array = take(self, i)
        blocks.append(array)
        return array

    with pytest.MonkeyPatch.context() as patch, hornbeam.installed():
        patch.setattr(serving.Image, "take", keep)
        loaded = keras.models.load_model(tmp_path / "m.keras")
    before = [block.tobytes() for block in blocks]
    loaded.fit(x, y, verbose=0, epochs=3)
    assert [block.tobytes() for block in blocks] == before
    assert blocks


@lazy
def test_an_error_while_building_leaves_nothing_patched(tmp_path: Path) -> None:
    from keras.src import backend
    from keras.src.optimizers.base_optimizer import BaseOptimizer
    from keras.src.saving import saving_lib

    @keras.saving.register_keras_serializable("build")
    class Fails(keras.layers.Layer):
        armed = False

        def build(self, shape: Any) -> None:
            self.w = self.add_weight(shape=(3,))
            if Fails.armed:
                raise RuntimeError("in build")

        def call(self, x: Any) -> Any:
            return x

    def patchable() -> list[Any]:
        return [
            backend.Variable._initialize_with_initializer,
            BaseOptimizer.save_own_variables,
            *(getattr(saving_lib, n) for n in ("_walk_saveable", "_save_model_to_fileobj", "load_weights_only")),
        ]

    before = patchable()
    chain(Fails()).save(tmp_path / "m.keras")
    Fails.armed = True
    with pytest.raises(RuntimeError, match="in build"), hornbeam.installed(), hornbeam.options(fallback=False):
        keras.models.load_model(tmp_path / "m.keras")
    assert patchable() == before
    assert type(keras.Variable(np.ones(2))) is backend.Variable


def test_a_model_may_be_loaded_while_one_is_loaded(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("build")
    class LoadsInside(keras.layers.Layer):
        def __init__(self, path: str, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.source = path
            self.inner = keras.models.load_model(path)
            self.first = np.asarray(keras.ops.convert_to_numpy(self.inner(floats(2, 6))))

        def call(self, x: Any) -> Any:
            return self.inner(x)

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "path": self.source}

    inner = chain(keras.layers.Dense(3))
    inner.save(tmp_path / "inner.keras")
    model = chain(LoadsInside(str(tmp_path / "inner.keras")))
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.save(tmp_path / "outer.keras")
        loaded = keras.models.load_model(tmp_path / "outer.keras")
    np.testing.assert_array_equal(loaded.layers[1].first, keras.ops.convert_to_numpy(inner(floats(2, 6))))
    assert values(loaded) == values(model)


def test_loads_in_several_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    names = ["functional", "sequential", "convolutional", "nested", "mixed_precision", "optimizer_Adam"]
    names = [name for name in [*names, "recurrent", "attention"] if name in ZOO]
    models = {name: ZOO[name]()[0] for name in names}

    def round_trip(job: tuple[int, str]) -> bool:
        i, name = job
        path = tmp_path / f"{i}.keras"
        with hornbeam.options(fallback=False):
            models[name].save(path)
            loaded = keras.models.load_model(path)
        return saved(loaded) == saved(models[name])

    with hornbeam.installed(), ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trip, enumerate(names * 2)))
    assert hornbeam.stats().loads == 2 * len(names)
