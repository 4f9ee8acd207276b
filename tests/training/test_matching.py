"""What a checkpoint gives to which variable: by name, and an error where names do not say, never by place alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from hornbeam.callbacks import BackupAndRestore
from hornbeam.checkpoint import CheckpointManager
from hornbeam.errors import CheckpointError
from hornbeam.saving import load_model, save_model
from hornbeam.training.matching import automatic_names, match, names_of
from support.zoo import chain

KERAS = ("dense", "dropout", "sequential", "seed_generator", "adam", "lstm_cell", "lstm")


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([], [], []),
        (["a"], ["b"], [0]),  # nothing else could be meant
        (["a", "b"], ["a"], None),
        (["a", "b"], ["a", "b"], [0, 1]),
        (["b", "a"], ["a", "b"], [1, 0]),
        (["a", "a"], ["a", "a"], [0, 1]),
        (["a", "b"], ["a", "c"], None),
        (["a", "b"], ["c", "d"], None),
        (["dense_4", "dense_5"], ["dense", "dense_1"], [0, 1]),
        (["dense_1", "dense_2"], ["dense", "dense_1"], [0, 1]),
        (["dense_9", "dense_10"], ["dense_10", "dense_11"], [0, 1]),
        (["dense_5", "dense_4"], ["dense", "dense_1"], None),  # by place, or by count?
        (["dense_5", "dense_4"], ["dense_1", "dense"], [0, 1]),
        (["dense_1", "dense"], ["dense", "dense_1"], [1, 0]),
        (["block_1/w", "block_2/w"], ["block_2/w", "block_3/w"], None),  # somebody's own names
        (["x_dense_1", "x_dense_2"], ["x_dense_2", "x_dense_3"], None),
        (["dense_4/kernel", "dropout_3/seed"], ["dense/kernel", "dropout/seed"], [0, 1]),
        (["dense_4/kernel", "dropout_3/seed"], ["dropout/seed", "dense/kernel"], None),
        (
            ["adam_1/sequential_1_dense_4_kernel_momentum", "adam_1/sequential_1_dense_5_kernel_momentum"],
            ["adam/sequential_dense_kernel_momentum", "adam/sequential_dense_1_kernel_momentum"],
            [0, 1],
        ),
        (["lstm_1/lstm_cell_1/a", "lstm_2/lstm_cell_2/a"], ["lstm/lstm_cell/a", "lstm_1/lstm_cell_1/a"], [0, 1]),
        (["dense_a/k", "dense_b/k"], ["dense_b/k", "dense_c/k"], None),
        (["dense_a/k", "dense_b/k"], ["dense_b/k", "dense_a/k"], [1, 0]),
    ],
)
def test_names(ours: list[str], theirs: list[str], expected: list[int] | None) -> None:
    assert match(ours, theirs, KERAS) == expected


@pytest.mark.parametrize("names", [["dense", "dense_1"], ["a/dense", "b/dense"], ["x", "y"]])
def test_whatever_the_order_a_name_keeps_its_value(names: list[str]) -> None:
    for ours in (names, names[::-1]):
        places = match(ours, names, KERAS)
        assert places is not None
        assert [names[i] for i in places] == ours


# ---- models ----


def branches(order: str, *, names: Callable[[str], Any] = lambda name: {"name": name}) -> Any:
    """Branches that are all alike, listed in an order: weights, seeds, statistics, slots."""
    inputs = keras.Input((4,), name="input")
    made = {
        name: [
            layers.Dense(4, **names(f"{name}_dense")),
            layers.BatchNormalization(**names(f"{name}_norm")),
            layers.Dropout(0.5, **names(f"{name}_drop")),
        ]
        for name in sorted(order)
    }
    outputs = []
    for name in order:
        x = inputs
        for layer in made[name]:
            x = layer(x)
        outputs.append(x)
    model = keras.Model(inputs, layers.Add(name="add")(outputs))
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def drops(order: str) -> Any:
    """Branches without weights."""
    inputs = keras.Input((4,), name="input")
    made = {name: layers.Dropout(0.5, seed=ord(name), name=name) for name in sorted(order)}
    return keras.Model(inputs, layers.Add(name="add")([made[name](inputs) for name in order]))


def seeds(model: Any) -> dict[str, list[int]]:
    return {
        layer.name: np.asarray(keras.ops.convert_to_numpy(layer.seed_generator.state)).tolist()
        for layer in model.layers
        if getattr(layer, "seed_generator", None) is not None
    }


def everything(model: Any) -> list[list[float]]:
    return [
        np.asarray(keras.ops.convert_to_numpy(v)).ravel().tolist()
        for v in [*model.variables, *model.optimizer.variables]
    ]


def number(model: Any) -> None:
    """Makes every value another one."""
    for i, variable in enumerate([*model.variables, *model.optimizer.variables]):
        variable.assign(np.full(variable.shape, i))


def restored(saved: Any, into: Any, root: Path, **extra: Any) -> None:
    with CheckpointManager(root, durable=False) as manager:
        manager.save(0, saved, extra={name: pair[0] for name, pair in extra.items()})
    CheckpointManager(root).restore(into, extra={name: pair[1] for name, pair in extra.items()})


def test_seeds_find_their_layers(tmp_path: Path) -> None:
    saved, into = drops("abc"), drops("cab")
    for layer in into.layers[1:-1]:
        layer.seed_generator.state.assign([0, 0])
    restored(saved, into, tmp_path)
    assert seeds(into) == seeds(saved) == {"a": [97, 0], "b": [98, 0], "c": [99, 0]}


def test_layers_in_another_order_are_refused(tmp_path: Path) -> None:
    """A weights file has them by their places."""
    saved, into = branches("ab"), branches("ba")
    number(saved)
    before = everything(into)
    with pytest.raises(CheckpointError, match=r"another order.*a_dense"):
        restored(saved, into, tmp_path)
    assert everything(into) == before


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_same_model_again_in_one_process(order: str, tmp_path: Path) -> None:
    """Automatic names count on."""
    saved, into = (branches(order, names=lambda _: {}) for _ in range(2))
    assert saved.layers[1].name != into.layers[1].name
    number(saved)
    restored(saved, into, tmp_path)
    assert everything(into) == everything(saved)


def test_automatic_names_that_contradict_places_are_refused(tmp_path: Path) -> None:
    saved, into = branches("ab", names=lambda _: {}), branches("ba", names=lambda _: {})
    before = everything(into)
    with pytest.raises(CheckpointError):
        restored(saved, into, tmp_path)
    assert everything(into) == before


def test_a_model_that_was_loaded_has_other_paths(tmp_path: Path) -> None:
    saved = branches("ab")
    number(saved)
    save_model(saved, tmp_path / "m.keras")
    into = load_model(tmp_path / "m.keras")
    for variable in [*into.variables, *into.optimizer.variables]:
        variable.assign(np.zeros(variable.shape))
    restored(saved, into, tmp_path / "c")
    assert everything(into) == everything(saved)


def test_another_name_for_a_layer_with_weights(tmp_path: Path) -> None:
    """Keras goes by places, and nothing says that this is another layer."""

    def plain(name: str) -> Any:
        return keras.Sequential([keras.Input((4,)), layers.Dense(4, name=name), layers.Dense(4, name="last")])

    saved, into = plain("old"), plain("new")
    restored(saved, into, tmp_path)
    assert [w.tolist() for w in into.get_weights()] == [w.tolist() for w in saved.get_weights()]


def test_seeds_of_other_layers_are_refused_by_name(tmp_path: Path) -> None:
    saved, into = drops("ab"), drops("ac")
    before = seeds(into)
    with pytest.raises(CheckpointError, match=r"only in the checkpoint: \['b/.*only in the model: \['c/"):
        restored(saved, into, tmp_path)
    assert seeds(into) == before


class Attributes(keras.Model):
    """Keras stores its layers by the names of the attributes, and the optimizer's slots by the order of the layers."""

    def __init__(self, order: str) -> None:
        super().__init__(name="attributes")
        for name in order:
            setattr(self, name, layers.Dense(4, name=name))
        self.compile("adam", "mse")

    def call(self, x: Any) -> Any:
        return self.a(x) + self.b(x)


def test_slots_of_variables_in_another_order_are_refused(tmp_path: Path) -> None:
    saved, into = Attributes("ab"), Attributes("ba")
    for model in (saved, into):
        model(np.ones((1, 4)))
        model.optimizer.build(model.trainable_variables)
    before = everything(into)
    with pytest.raises(CheckpointError, match="optimizer's state"):
        restored(saved, into, tmp_path)
    assert everything(into) == before
    again = Attributes("ab")
    again(np.ones((1, 4)))
    number(saved)
    restored(saved, again, tmp_path / "again")
    assert everything(again) == everything(saved)


def slots(optimizer: Any) -> list[list[float]]:
    return [np.asarray(keras.ops.convert_to_numpy(v)).ravel().tolist() for v in optimizer.variables]


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_an_optimizer_of_ones_own(order: str, tmp_path: Path) -> None:
    """Its slots find their variables."""
    saved, into = branches("ab"), branches(order)
    theirs, ours = keras.optimizers.Adam(name="own"), keras.optimizers.Adam(name="own")
    theirs.build(saved.trainable_variables)
    ours.build(into.trainable_variables)
    for i, variable in enumerate(theirs.variables):
        variable.assign(np.full(variable.shape, i))
    empty = chain(layers.Dense(1, name="only"))
    restored(empty, empty, tmp_path, own=(theirs, ours))
    by_path = {v.path: float(np.max(keras.ops.convert_to_numpy(v))) for v in theirs.variables}
    assert {v.path: float(np.max(keras.ops.convert_to_numpy(v))) for v in ours.variables} == by_path


def test_an_optimizer_of_other_variables_is_refused(tmp_path: Path) -> None:
    theirs, ours = keras.optimizers.Adam(), keras.optimizers.Adam()
    theirs.build(branches("ab").trainable_variables)
    ours.build(branches("ac").trainable_variables)
    before = slots(ours)
    empty = chain(layers.Dense(1, name="only"))
    with pytest.raises(CheckpointError, match="only in the checkpoint"):
        restored(empty, empty, tmp_path, own=(theirs, ours))
    assert slots(ours) == before


def test_layers_and_generators_of_ones_own(tmp_path: Path) -> None:
    """An object is the one of its name; what is in it has names of its own."""
    theirs = (layers.Dense(3), keras.random.SeedGenerator(7), keras.metrics.MeanSquaredError(), drops("ab"))
    ours = (layers.Dense(3), keras.random.SeedGenerator(1), keras.metrics.MeanSquaredError(), drops("ba"))
    for first, *_rest in (theirs, ours):
        first.build((None, 2))
    theirs[2].update_state([1.0], [3.0])
    empty = chain(layers.Dense(1, name="only"))
    pairs = {f"item{i}": pair for i, pair in enumerate(zip(theirs, ours, strict=True))}
    restored(empty, empty, tmp_path, **pairs)
    assert [w.tolist() for w in ours[0].get_weights()] == [w.tolist() for w in theirs[0].get_weights()]
    assert np.asarray(keras.ops.convert_to_numpy(ours[1].state)).tolist() == [7, 0]
    assert float(ours[2].result()) == 4.0
    assert seeds(ours[3]) == seeds(theirs[3])


def test_other_shapes_are_listed(tmp_path: Path) -> None:
    empty = chain(layers.Dense(1, name="only"))
    theirs, ours = layers.Dense(3, name="d"), layers.Dense(4, name="d")
    for layer in (theirs, ours):
        layer.build((None, 2))
    with pytest.raises(CheckpointError, match=r"kernel \(2, 4\), found \(2, 3\); .*bias \(4,\), found \(3,\)"):
        restored(empty, empty, tmp_path, d=(theirs, ours))


def test_names_in_states_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints had Keras' paths, and did not say what the slots are for."""
    from hornbeam.training import training_state

    def before(model: Any) -> dict[str, Any]:
        state = original(model)
        del state["trained"]
        outside = training_state._outside_files(model)
        return state | {
            "variables": [(v.path, value) for v, (_, value) in zip(outside, state["variables"], strict=True)]
        }

    original = training_state.capture
    monkeypatch.setattr(training_state, "capture", before)
    saved, into = drops("ab"), drops("ab")
    for layer in into.layers[1:-1]:
        layer.seed_generator.state.assign([0, 0])
    restored(saved, into, tmp_path)
    assert seeds(into) == seeds(saved)


@pytest.mark.trains
def test_metrics_of_a_backup_find_their_names(tmp_path: Path) -> None:
    def made(metrics: list[str]) -> Any:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1, kernel_initializer="ones")])
        model.compile("sgd", "mse", metrics=metrics)
        model.fit(np.ones((8, 4)), np.zeros((8, 1)), verbose=0)
        return model

    saved, into = made(["mae", "mse"]), made(["mse", "mae"])
    from hornbeam.training import training_state

    state = training_state.values(saved.metrics_variables)
    callback = BackupAndRestore(tmp_path)
    callback.set_model(into)
    results = {name: float(value) for name, value in saved.get_metrics_result().items()}
    into.reset_metrics()
    callback._restore_metrics(state)
    assert {name: float(value) for name, value in into.get_metrics_result().items()} == results


def test_where_names_come_from() -> None:
    cell = layers.RNN(layers.LSTMCell(2, dropout=0.1, name="cell"), name="rnn")
    model = keras.Sequential([keras.Input((3, 2)), cell, layers.Dropout(0.1, name="drop")])
    assert names_of(model, model.variables) == [
        "rnn/cell/kernel",
        "rnn/cell/recurrent_kernel",
        "rnn/cell/bias",
        "rnn/cell/seed_generator/0",
        "drop/seed_generator/0",
    ]
    assert {"sequential", "rnn", "lstm_cell", "dropout", "seed_generator"} <= automatic_names(model)
