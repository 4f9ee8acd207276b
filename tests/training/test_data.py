"""`resumable`: from any position on, the rest is what it would have been."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from hornbeam.data import Resumable, resumable
from hornbeam.errors import CheckpointError, UnsupportedError

pytestmark = pytest.mark.keras_versions

X = np.arange(10.0)[:, None]
has_tensorflow = pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="tf.data needs TensorFlow")


class Rows(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> Any:
        return np.full((2, 1), i), np.zeros((2, 1))


def pipeline(shuffle: int = 5, **kwargs: Any) -> Any:
    import tensorflow as tf

    return tf.data.Dataset.range(10).shuffle(shuffle, seed=3, **kwargs).batch(3).prefetch(2)


MAKERS: dict[str, Callable[[], Resumable]] = {
    "shuffled": lambda: resumable((X, X), batch_size=3, shuffle=True, seed=1),
    "in order": lambda: resumable(X, batch_size=4),
    "PyDataset": lambda: resumable(Rows(), shuffle=True, seed=2),
    "tf.data": lambda: resumable(pipeline()),
    "tf.data, one buffer": lambda: resumable(pipeline(20)),
    "tf.data, always the same": lambda: resumable(pipeline(reshuffle_each_iteration=False)),
}


def rows(batch: Any) -> list[Any]:
    return [np.asarray(leaf).ravel().tolist() for leaf in keras.tree.flatten(batch)]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[has_tensorflow] if "tf.data" in k else []) for k in MAKERS])
def test_every_position(kind: str) -> None:
    data, epochs = MAKERS[kind](), 3
    whole, states = [], [data.get_state()]
    while data.epoch < epochs:
        for batch in data:
            whole.append(rows(batch))
            states.append(data.get_state())
    per_epoch = len(whole) // epochs
    assert per_epoch == data.num_batches
    first, second = whole[:per_epoch], whole[per_epoch : 2 * per_epoch]
    assert (first == second) == (kind in ("in order", "tf.data, always the same"))
    for taken, state in enumerate(states):
        other, rest = MAKERS[kind](), []
        other.set_state(state)
        while other.epoch < epochs:
            for batch in other:
                rest.append(rows(batch))
        assert rest == whole[taken:], taken


@has_tensorflow
def test_what_cannot_be_resumed_is_refused() -> None:
    import tensorflow as tf

    tf.random.set_seed(None)  # one of another test would be the shuffle's
    data = tf.data.Dataset.range(4)
    with pytest.raises(UnsupportedError, match="without a seed"):
        resumable(data.shuffle(2).batch(2))
    with pytest.raises(UnsupportedError, match="stateful"):
        resumable(data.map(lambda _: tf.random.uniform(())))
    with pytest.raises(ValueError, match="batches and shuffles itself"):
        resumable(data, batch_size=2)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="seed"):
        resumable(X, shuffle=True)
    with pytest.raises(ValueError, match="one length"):
        resumable((X, X[1:]))
    with pytest.raises(ValueError, match="must be"):
        resumable(iter([1]))
    with pytest.raises(ValueError, match="batches itself"):
        resumable(Rows(), batch_size=2)
    state = resumable(X, batch_size=4).get_state()
    with pytest.raises(CheckpointError, match="other data"):
        resumable(X, batch_size=2).set_state(state)


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["shuffled", "PyDataset", pytest.param("tf.data", marks=has_tensorflow)])
def test_fit_takes_it(kind: str) -> None:
    seen: list[float] = []

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x: Any) -> Any:
            return self.dense(x)

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append(batch)

    data = MAKERS[kind]()
    if kind == "tf.data":
        data = resumable(pipeline().map(lambda x: (x[:, None], x[:, None])))
    model = Model()
    model.build((None, 1))
    model.compile("sgd", "mse")
    model.fit(data, epochs=2, verbose=0, callbacks=[Note()])
    assert seen == list(range(data.num_batches)) * 2
    assert np.isfinite(model.evaluate(data, verbose=0))


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[has_tensorflow] if "tf.data" in k else []) for k in MAKERS])
def test_a_loop_that_was_left_goes_on(kind: str) -> None:
    data, whole = MAKERS[kind](), [rows(batch) for batch in MAKERS[kind]()]
    found = []
    for batch in data:
        found.append(rows(batch))
        if len(found) == 2:
            break
    found += [rows(batch) for batch in data]
    assert found == whole
    assert (data.epoch, data.step) == (1, 0)


@pytest.mark.trains
@pytest.mark.parametrize("given", [{"y": X}, {"class_weight": {0: 2.0}}, {"sample_weight": X[:, 0]}])
def test_what_fit_would_ignore_is_refused(given: dict[str, Any]) -> None:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    before = [np.array(w) for w in model.get_weights()]
    with pytest.raises(ValueError, match=f"does not apply {next(iter(given))} to data"):
        model.fit(resumable((X, X), batch_size=5), verbose=0, **given)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@has_tensorflow
def test_an_order_that_is_no_function_is_refused() -> None:
    import tensorflow as tf

    data = tf.data.Dataset.range(10)
    options = tf.data.Options()
    options.deterministic = False
    for loose in (data.map(lambda x: x, num_parallel_calls=2, deterministic=False), data.with_options(options)):
        with pytest.raises(UnsupportedError, match="in any order"):
            resumable(loose.batch(2))
