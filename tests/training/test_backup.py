"""`BackupAndRestore`: killed trainings end as others do, Keras' own tests, what is logged, what is left."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import logging
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

import hornbeam
from hornbeam.base import writer
from hornbeam.callbacks import BackupAndRestore, ModelCheckpoint
from hornbeam.checkpoint import CheckpointManager
from hornbeam.data import resumable
from hornbeam.errors import CheckpointError
from hornbeam.seam import keras_names
from support.helpers import TESTS, values

BACKEND = keras.backend.backend()
SOAK = bool(os.environ.get("HORNBEAM_SOAK"))
pytestmark = [pytest.mark.trains, pytest.mark.keras_versions]

#: Trainings of `support/resumes.py`; those of the first list run for every change, all of them in `make soak`.
SHORT = {
    "tensorflow": [
        *["arrays", "together", "steps_tfdata_unknown", "async", "best", "jit", "early", "loop", "example"],
        "mirrored",
    ],
    "jax": ["arrays", "together", "steps_tfdata_unknown", "async", "best", "loop"],
    "torch": ["arrays", "together", "batchwise", "async", "best", "loop"],
}
LONG = [
    "pydataset",
    "steps_arrays",
    "steps_tfdata",
    "mixed",
    "ema",
    "eager",
    "tape",
    "unshuffled",
    "tfdata",
    "tfdata_endless",
    "steps_pydataset",
    "steps_tfdata_endless",
    "schedule",
    "whole_steps",
]
NEEDS_TENSORFLOW = {"tape", "mirrored", "tfdata_endless"}  # the last is told to be inexact elsewhere
CASES = SHORT.get(BACKEND, [])
if SOAK:
    others = [case for case in {case: 0 for list in SHORT.values() for case in list} if case not in CASES]
    CASES = [case for case in [*CASES, *others, *LONG] if BACKEND == "tensorflow" or case not in NEEDS_TENSORFLOW]
    if importlib.util.find_spec("tensorflow") is None:
        CASES = [case for case in CASES if "tfdata" not in case]


@pytest.fixture(autouse=True)
def _young_iterators() -> Iterator[None]:
    """What a test has left of `tf.data` is collected at once: the longer an iterator lives, the longer that takes."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def resumes() -> dict[str, Any]:
    """What each training ended with; all of them run in one process, which forks."""
    source = Path(hornbeam.__file__).parents[1]
    command = [sys.executable, "-m", "support.resumes", ",".join(CASES)]
    done = subprocess.run(
        [*command, "10" if SOAK else "1", "11"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(TESTS)])},
        capture_output=True,
        text=True,
        timeout=None if SOAK else 280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {found["case"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_restarted(case: str, resumes: dict[str, Any]) -> None:
    found = resumes[case]
    assert found["kills"] >= 1
    for result in found["found"]:
        assert result["digest"] == found["reference"]["digest"]
        assert result["left"] == found["reference"]["left"]


COUNTED = "_epoch" in vars(ArrayDataAdapter(np.zeros((2, 1))))
X = np.random.default_rng(0).normal(size=(24, 3)).astype("float32")
Y = X[:, :1] * 2


def build(**compiled: Any) -> Any:
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dropout(0.3), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse", **compiled)
    return model


class Interrupt(keras.callbacks.Callback):
    def __init__(self, epoch: int | None = None, batch: int | None = None) -> None:
        super().__init__()
        self.at, self.epoch = (epoch, batch), -1

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.at == (self.epoch, batch):
            raise KeyboardInterrupt

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.at == (epoch, None):
            raise KeyboardInterrupt


def test_metrics_go_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    def data() -> Any:
        return resumable((X, Y), batch_size=4, shuffle=True, seed=1)

    whole = build(metrics=["mae"]).fit(data(), epochs=2, verbose=0, callbacks=[BackupAndRestore(tmp_path / "a", 2)])
    with pytest.raises(KeyboardInterrupt):
        build(metrics=["mae"]).fit(
            data(), epochs=2, verbose=0, callbacks=[BackupAndRestore(tmp_path / "b", 2), Interrupt(1, 4)]
        )
    steps: list[int] = []
    seen = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(batch))
    again = build(metrics=["mae"]).fit(
        data(), epochs=2, verbose=0, callbacks=[BackupAndRestore(tmp_path / "b", 2), seen]
    )
    assert steps == [4, 5]
    assert again.epoch == [1]
    assert {name: value[-1:] for name, value in whole.history.items()} == again.history


def test_where_it_stands_in_the_list_does_not_matter(tmp_path: Path) -> None:
    def train(root: Path, first: bool, interrupted: bool) -> Any:
        model = build()
        mine = [keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=0, min_delta=10.0)]
        saver = BackupAndRestore(root, seed=3)
        callbacks = [saver, *mine] if first else [*mine, saver]
        model.fit(X, Y, epochs=4, verbose=0, callbacks=[*callbacks, Interrupt(epoch=2 if interrupted else None)])
        return values(model)

    expected = train(tmp_path / "a", False, False)
    for first in (True, False):
        root = tmp_path / str(first)
        with pytest.raises(KeyboardInterrupt):
            train(root, first, True)
        assert train(root, first, False) == expected
        assert not root.exists()


def test_a_training_that_had_stopped_stays_stopped(tmp_path: Path) -> None:
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.stop_training = epoch == 1

    model = build()
    keep = BackupAndRestore(tmp_path / "a", delete_checkpoint=False, seed=3)
    assert model.fit(X, Y, epochs=5, verbose=0, callbacks=[Stop(), keep]).epoch == [0, 1]
    again = build()
    more = BackupAndRestore(tmp_path / "a", seed=3)
    assert again.fit(X, Y, epochs=5, verbose=0, callbacks=[Stop(), more]).epoch == []
    assert values(again)[:4] == values(model)[:4]
    assert again._initial_epoch is None


def test_a_training_killed_at_its_very_end_has_its_random_state(tmp_path: Path) -> None:
    """Its backup is complete, and no epoch is left that would restore what comes before an epoch."""

    def drawn(root: Path, *others: Any) -> Any:
        build().fit(X, Y, epochs=2, verbose=0, callbacks=[*others, BackupAndRestore(root, seed=3)])
        return random.random(), np.random.random(), keras.ops.convert_to_numpy(keras.random.normal((2,))).tolist()

    class Kill(keras.callbacks.Callback):
        def on_train_end(self, logs: Any = None) -> None:
            raise KeyboardInterrupt

    expected = drawn(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "b", Kill())
    random.seed(9)
    np.random.seed(9)
    assert drawn(tmp_path / "b") == expected


def test_keras_own_backups_are_taken_over(tmp_path: Path) -> None:
    model = build()
    with pytest.raises(KeyboardInterrupt):
        model.fit(
            X, Y, epochs=3, verbose=0, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "b"), Interrupt(epoch=1)]
        )
    again = build()
    assert again.fit(X, Y, epochs=3, verbose=0, callbacks=[BackupAndRestore(tmp_path / "b")]).epoch == [2]
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("double", [True, False])
def test_a_damaged_backup(double: bool, tmp_path: Path) -> None:
    root = tmp_path / "b"
    with pytest.raises(KeyboardInterrupt):
        build().fit(
            X,
            Y,
            epochs=4,
            verbose=0,
            callbacks=[BackupAndRestore(root, double_checkpoint=double, seed=1), Interrupt(epoch=1)],
        )
    backups = CheckpointManager(root).all()
    assert len(backups) == 1 + double
    data = bytearray(backups[-1].model.read_bytes())
    data[-3] ^= 1
    backups[-1].model.write_bytes(data)
    again = BackupAndRestore(root, double_checkpoint=double, seed=1)
    if double:
        assert build().fit(X, Y, epochs=4, verbose=0, callbacks=[again]).epoch == [1, 2, 3]
    else:
        with pytest.raises(CheckpointError, match="damaged"):
            build().fit(X, Y, epochs=4, verbose=0, callbacks=[again])


def test_the_second_of_two_writers_is_told(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "b"), pytest.raises(CheckpointError, match="in use"):
        build().fit(X, Y, verbose=0, callbacks=[BackupAndRestore(tmp_path / "b")])


def test_inexact_inputs_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def batches() -> Any:
        while True:
            yield X[:4], Y[:4]

    class Endless(Batches):
        num_batches = None

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = True

    def said(data: Any, backup: dict[str, Any] | None = None, *others: Any, **kwargs: Any) -> list[str]:
        caplog.clear()
        saver = BackupAndRestore(tmp_path / "b", **(backup or {}))
        with caplog.at_level(logging.WARNING, "hornbeam"):
            for _ in range(2):
                build().fit(*data, verbose=0, callbacks=[saver, *others], **kwargs)
        return [record.getMessage() for record in caplog.records if record.name == "hornbeam"]

    (text,) = said([batches()], steps_per_epoch=2)
    assert "GeneratorData" in text
    (text,) = said([Endless()], {}, Stop())
    assert "infinite" in text
    (text,) = said([X, Y], {"seed": 1}, steps_per_epoch=2, batch_size=4)
    assert "steps_per_epoch" in text
    (text,) = said([X, Y], {"seed": 1, "save_freq": 2})
    assert "resumable" in text
    assert said([X, Y], {"seed": 1}) == []
    assert said([X, Y], shuffle=False) == []
    assert said([resumable((X, Y))], {"save_freq": 2}) == []
    # TensorFlow's order has a state of its own, but where the adapter counts the epochs, as from Keras 3.16 on.
    assert (said([X, Y]) == []) == (BACKEND != "tensorflow" or COUNTED)
    if importlib.util.find_spec("tensorflow") is not None:
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices((X, Y))
        assert said([data.batch(4)], shuffle=False) == []
        endless = said([data.repeat().batch(4)], shuffle=False, steps_per_epoch=2)
        assert ["steps_per_epoch" in text for text in endless] == ([] if BACKEND == "tensorflow" else [True])
        tf.random.set_seed(None)  # else it seeds the shuffling
        (text,) = said([data.shuffle(9).batch(4)], shuffle=False)
        assert "without a seed" in text
        (text,) = said([data.map(lambda x, y: (x + tf.random.normal((3,)), y)).batch(4)], shuffle=False)
        assert "stateful" in text
    if BACKEND == "tensorflow":
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
            for distributed, backup in ((data.batch(4), {}), (resumable(data.batch(4)), {"save_freq": 2})):
                (text,) = said([distributed], backup, shuffle=False)
                assert "distributed" in text


def test_layers_that_decide_what_is_saved_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Half(keras.layers.Dense):
        def save_own_variables(self, store: Any) -> None:
            store["0"] = self.kernel
            store["1"] = np.round(keras.ops.convert_to_numpy(self.bias))

    model = keras.Sequential([keras.Input((3,)), Half(1, name="half")])
    model.compile("sgd", "mse")
    saver = BackupAndRestore(tmp_path / "b", seed=1)
    for _ in range(2):
        model.fit(X, Y, verbose=0, callbacks=[saver])
    (text,) = [r.getMessage() for r in caplog.records if r.name == "hornbeam" and r.levelno == logging.WARNING]
    assert "['half']" in text


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="tf.data needs TensorFlow")
def test_keras_does_not_read_ahead_of_the_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    if BACKEND == "jax":  # Keras reads ahead where this is no CPU, Keras 3.12 always
        import jax

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    data = resumable(dataset)
    states = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            data.step = batch + 1
            states.append(data.get_state())

    build().fit(data, verbose=0, callbacks=[BackupAndRestore(tmp_path / "b", save_freq=2), Look()])
    expected = [np.asarray(x) for x, _ in resumable(dataset)]
    for i, state in enumerate(states[:-1]):
        again = resumable(dataset)
        again.set_state(state)
        rest = [np.asarray(x) for x, _ in again]
        np.testing.assert_array_equal(np.concatenate(rest), np.concatenate(expected[i + 1 :]))


class Score(keras.callbacks.Callback):
    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = scores

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs["score"] = self.scores[epoch]


def test_a_backup_is_no_newer_than_the_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    run, finish, save = writer._Job.run, writer.finish, CheckpointManager.save
    seen = []

    def slowly(job: Any) -> Any:
        assert asked.wait(60)  # until somebody waits for it
        return run(job)

    def waits(*args: Any, **kwargs: Any) -> None:
        asked.set()
        finish(*args, **kwargs)

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((best.best, best._account().best().metric))
        asked.clear()
        return save(self, *args, **kwargs)

    monkeypatch.setattr(writer._Job, "run", slowly)
    monkeypatch.setattr(writer, "finish", waits)
    monkeypatch.setattr(CheckpointManager, "save", noted)
    best = ModelCheckpoint(tmp_path / "m.keras", "score", mode="min", save_best_only=True, asynchronous=True)
    callbacks = [Score(0.9, 0.5, 0.7), best, BackupAndRestore(tmp_path / "b", seed=1)]
    build().fit(X, Y, epochs=3, verbose=0, callbacks=callbacks)
    assert seen == [(0.9, 0.9), (0.5, 0.5), (0.5, 0.5)]


def test_the_best_model_is_newer_than_the_backup(tmp_path: Path) -> None:
    def begin(*others: Any) -> Any:
        best = ModelCheckpoint(tmp_path / "m.keras", "score", mode="min", save_best_only=True, remember=True)
        callbacks = [*others[:1], best, *others[1:], BackupAndRestore(tmp_path / "b")]
        build().fit(X, Y, epochs=3, verbose=0, callbacks=callbacks)
        return best

    with pytest.raises(KeyboardInterrupt):
        begin(Score(0.9, 0.4), Interrupt(epoch=1))
    best = begin(Score(0.9, 0.7, 0.8))  # of data that are others in the epoch that is repeated
    assert best.best == 0.4
    assert [r["metric"] for r in best.history] == []
    assert json.loads((tmp_path / ".m.keras.checkpoints.json").read_text())["best"]["score"] == 0.4


def test_keras_own_tests_pass(tmp_path: Path) -> None:
    source = Path(importlib.util.find_spec("keras").submodule_search_locations[0]) / "src"
    test = source / "callbacks" / "backup_and_restore_test.py"
    if not test.exists():
        pytest.skip("this wheel of Keras has no tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "ours.py").write_text(
        "import keras.src.callbacks, hornbeam.callbacks\n"
        "keras.src.callbacks.BackupAndRestore = hornbeam.callbacks.BackupAndRestore\n"
    )
    path = [str(Path(hornbeam.__file__).parents[1]), str(TESTS), str(tmp_path)]
    report = tmp_path / "report.json"
    options = ["-c", str(tmp_path / "pytest.ini"), "--rootdir", str(source), "-q"]
    options += ["-p", "support.keras_plugin", "-p", "ours", "-p", "no:cacheprovider"]
    plain = {"HORNBEAM_SUITE": "stock", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(test)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "HORNBEAM_SUITE_REPORT": str(report)} | plain,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    results = json.loads(report.read_text())
    assert [r["outcome"] for r in results.values()].count("passed") >= 7
    assert sum(r["stats"]["saves"] for r in results.values()) >= 20


def _weights_after(build: Any, directory: Path, stop: int | None, seed: int | None, data: Any, **kwargs: Any) -> Any:
    """A training of five epochs; with `stop`, one that is interrupted when that epoch begins, and restarted."""

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == stop:
                raise KeyboardInterrupt

    for interrupted in (True, False) if stop is not None else (False,):
        model = build()
        keras.utils.set_random_seed(5 if stop is None or interrupted else 77)  # another process draws other numbers
        callbacks = [BackupAndRestore(directory, seed=seed), *([Stop()] if interrupted else [])]
        with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
            model.fit(*data(), epochs=5, verbose=0, callbacks=callbacks, **kwargs)
    return model.get_weights()


class Batches(keras.utils.PyDataset):
    """Batches that are functions of their index."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return X[index * 4 : index * 4 + 4], Y[index * 4 : index * 4 + 4]


SOURCES = {
    "arrays": (lambda: (X, Y), {"batch_size": 4}),
    "batch": (lambda: (X, Y), {"batch_size": 4, "shuffle": "batch"}),
    "steps": (lambda: (X, Y), {"batch_size": 4, "steps_per_epoch": 6}),
    "pydataset": (lambda: (Batches(),), {}),
    "workers": (lambda: (Batches(workers=2),), {}),
}


def plain() -> Any:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("source", SOURCES)
def test_an_order_that_the_adapter_counts_goes_on(
    source: str, seed: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, kwargs = SOURCES[source]
    whole = _weights_after(plain, tmp_path / "a", None, seed, data, **kwargs)
    with caplog.at_level(logging.WARNING, "hornbeam"):
        restarted = _weights_after(plain, tmp_path / "b", 3, seed, data, **kwargs)
    if [r for r in caplog.records if "not exact" in r.getMessage()]:  # TensorFlow's own shuffling, up to Keras 3.15
        assert (BACKEND, seed, COUNTED) == ("tensorflow", None, False)
        return
    for found, expected in zip(restarted, whole, strict=True):
        np.testing.assert_array_equal(found, expected)


def tensorflow_data(unknown: bool = False, repeat: bool = False) -> Any:
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X[:22], Y[:22])).shuffle(8, seed=5)
    data = data.filter(lambda x, y: True) if unknown else data
    return resumable((data.repeat() if repeat else data).batch(4))


#: The last batch is smaller, which cannot be stacked with others; and is missing from the last of the steps.
TOGETHER = {
    "arrays": (lambda: resumable((X[:22], Y[:22]), batch_size=4, shuffle=True, seed=2), {}),
    "pydataset": (lambda: resumable(Batches(), shuffle=True, seed=2), {}),
    "tfdata": (tensorflow_data, {}),
    "unknown": (lambda: tensorflow_data(unknown=True), {}),
    "endless": (lambda: tensorflow_data(repeat=True), {"steps_per_epoch": 5}),
}


@pytest.mark.backend("tensorflow", "jax", reason="on torch `steps_per_execution` must be 1")
@pytest.mark.parametrize("size", [4, *([2, 3] if SOAK else [])])
@pytest.mark.parametrize("source", TOGETHER)
def test_several_steps_at_once_go_on(source: str, size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With `steps_per_execution`; Keras 3.16 takes their batches as one on JAX."""
    if source in ("tfdata", "unknown", "endless") and importlib.util.find_spec("tensorflow") is None:
        pytest.skip("tf.data needs TensorFlow")
    make, kwargs = TOGETHER[source]
    seen: list[tuple[int, int]] = []

    class Watch(Interrupt):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append((self.epoch, batch))
            super().on_train_batch_end(batch)

    def fit(name: str, *stop: int, seed: int = 5) -> Any:
        model, data = build(steps_per_execution=size), make()
        keras.utils.set_random_seed(seed)  # what is drawn from here on is the backup's
        saver = BackupAndRestore(tmp_path / name, save_freq=1)
        with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
            model.fit(data, epochs=3, verbose=0, callbacks=[saver, Watch(*stop)], **kwargs)
        return values(model)

    with caplog.at_level(logging.WARNING, "hornbeam"):
        whole = fit("whole")
        moments = seen.copy()
        ends = [batch for epoch, batch in moments if epoch == 1]
        assert len(ends) > 1
        for i, stop in enumerate((ends[0], ends[-1])):
            fit(f"stopped {i}", 1, stop)
            seen.clear()
            assert fit(f"stopped {i}", seed=77) == whole
            again = len(seen) - (len(moments) - moments.index((1, stop)) - 1)
            assert again in (0, 1)  # what was not saved yet: the last batches of an epoch, or what may be the last
            assert seen == moments[-len(seen) :]
    assert not [r for r in caplog.records if "not exact" in r.getMessage()]


@pytest.mark.parametrize("shuffle", [True, "batch"])
def test_the_order_of_arrays_is_a_function_of_seed_and_epoch(shuffle: bool | str, tmp_path: Path) -> None:
    def orders(seed: int, name: str) -> list[list[int]]:
        seen: list[list[int]] = []

        class See(keras.Model):
            def __init__(self) -> None:
                super().__init__()
                self.inner = keras.layers.Dense(1)

            def call(self, x: Any) -> Any:
                return self.inner(x)

            def train_step(self, *args: Any) -> Any:
                (data,) = args[-1:]
                seen.append(np.asarray(keras.ops.convert_to_numpy(data[0])).ravel().astype(int).tolist())
                return ({"loss": 0.0}, args[0]) if BACKEND == "jax" else {"loss": 0.0}

        model, numbers = See(), np.arange(16, dtype="float32")[:, None]
        model(numbers[:1])
        model.compile("sgd", "mse", run_eagerly=True)
        saver = BackupAndRestore(tmp_path / name, seed=seed)
        model.fit(numbers, numbers, epochs=3, batch_size=8, shuffle=shuffle, verbose=0, callbacks=[saver])
        return [[*seen[i], *seen[i + 1]] for i in range(0, 6, 2)]

    first, again, other = orders(3, "a"), orders(3, "b"), orders(4, "c")
    assert first == again
    assert first != other
    assert len({tuple(epoch) for epoch in first}) == 3
    assert all(sorted(epoch) == list(range(16)) for epoch in first)


@pytest.mark.parametrize("change", ["subclass", "attribute", "code", "iterator", "method"])
def test_what_is_not_recognised_is_told_to_be_inexact(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter or epoch iterator of a Keras to come: never taken for exact because nothing is known against it."""
    from keras.src.trainers import data_adapters, epoch_iterator

    class ArrayDataAdapterOfAKerasToCome(ArrayDataAdapter):
        def _get_iterator(self, *args: Any) -> Any:
            return super()._get_iterator(*args)

    def get_data_adapter(*args: Any, **kwargs: Any) -> Any:
        made = adapter(*args, **kwargs)
        if change == "subclass":
            made.__class__ = ArrayDataAdapterOfAKerasToCome
        elif change == "attribute":
            made._generator = np.random.default_rng()
        return made

    adapter = data_adapters.get_data_adapter
    monkeypatch.setattr(data_adapters, "get_data_adapter", get_data_adapter)
    if change == "code":
        monkeypatch.setattr(ArrayDataAdapter, "draw", lambda self: random.random(), raising=False)
    elif change == "iterator":
        monkeypatch.setattr(epoch_iterator.EpochIterator, "reorder", lambda self: random.random(), raising=False)
    elif change == "method":
        reset = epoch_iterator.EpochIterator.reset
        monkeypatch.setattr(
            epoch_iterator.EpochIterator, "reset", lambda self: (setattr(self, "_seed", 1), reset(self))
        )
    keras_names._fingerprint.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "hornbeam"):
            plain().fit(X, Y, verbose=0, shuffle=False, callbacks=[BackupAndRestore(tmp_path / "b", seed=1)])
            if change in ("iterator", "method"):
                again = BackupAndRestore(tmp_path / "c", save_freq=2)
                plain().fit(resumable((X, Y)), verbose=0, callbacks=[again])
    finally:
        keras_names._fingerprint.cache_clear()
    told = [
        r.getMessage() for r in caplog.records if "a restart is not exact: hornbeam does not know" in r.getMessage()
    ]
    assert len(told) == (2 if change in ("iterator", "method") else 1)


def test_a_subclass_of_an_epoch_iterator_is_not_recognised() -> None:
    from keras.src.trainers.epoch_iterator import EpochIterator

    class EpochIteratorOfOnes(EpochIterator):
        pass

    assert keras_names.is_recognised(EpochIterator(X))
    assert not keras_names.is_recognised(EpochIteratorOfOnes(X))
    assert not keras_names.is_recognised(type("EpochIterator", (EpochIterator,), {})(X))
    assert keras_names.is_recognised(ArrayDataAdapter(X))
    assert not keras_names.is_recognised(type("ArrayDataAdapter", (ArrayDataAdapter,), {})(X))
