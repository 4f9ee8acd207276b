"""`hornbeam.callbacks.ModelCheckpoint`: Keras' behaviour, retention, memory, errors."""

from __future__ import annotations

import json
import logging
import os
import pickle
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import hornbeam
from hornbeam import _core
from hornbeam._core import FileLock
from hornbeam.base import writer
from hornbeam.base.retention import Entry, plan_retention
from hornbeam.callbacks import ModelCheckpoint, best_checkpoint, latest_checkpoint
from hornbeam.errors import CheckpointError, UnsupportedError
from hornbeam.saving import load_model
from hornbeam.training import model_checkpoint
from hornbeam.training.accounts import PatternAccount
from support.helpers import saved, script
from support.keras_suite import KERAS, failures, pytest_on
from support.training import At, Scores, fit, hidden, model, names
from support.writing import held
from support.zoo import floats

BACKEND = keras.backend.backend()
pytestmark = pytest.mark.trains


def test_without_our_arguments_nothing_but_the_files_is_there(tmp_path: Path) -> None:
    made = model()
    found: list[bool] = []
    later = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda e, logs: found.append((tmp_path / f"{e + 1}.keras").exists())
    )
    callback = ModelCheckpoint(tmp_path / "{epoch}.keras")
    fit(made, callback, later, epochs=3)
    assert found == [True] * 3
    assert sorted(os.listdir(tmp_path)) == ["1.keras", "2.keras", "3.keras"]
    assert callback.history == []
    assert saved(load_model(tmp_path / "3.keras")) == saved(made)
    assert latest_checkpoint(tmp_path / "{epoch}.keras") is None


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_retention_and_what_is_told(
    asynchronous: bool, weights: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ending = ".weights.h5" if weights else ".keras"
    pattern = str(tmp_path / "deep" / ("m-{epoch:02d}-{val_loss:.1f}" + ending))
    scores = Scores([0.5, 0.2, 0.9, 0.8, 0.7, 0.6])
    callback = ModelCheckpoint(
        pattern, save_weights_only=weights, asynchronous=asynchronous, keep_last=2, keep_best=1, keep_every=4
    )
    made = model()
    with caplog.at_level(logging.INFO, logger="hornbeam"):
        fit(made, scores, callback, epochs=6)
    kept = [f"m-02-0.2{ending}", f"m-04-0.8{ending}", f"m-05-0.7{ending}", f"m-06-0.6{ending}"]
    assert names(tmp_path / "deep") == kept
    name = ".m-{epoch}-{val_loss}" + ending
    assert hidden(tmp_path / "deep") == [f"{name}.checkpoints.json", f"{name}.lock"]
    for place in (pattern, tmp_path / "deep"):
        assert best_checkpoint(place) == str(tmp_path / "deep" / kept[0])
        assert latest_checkpoint(place) == str(tmp_path / "deep" / kept[-1])
    for name, epoch in zip(kept, (2, 4, 5, 6), strict=True):
        if weights:
            made.load_weights(tmp_path / "deep" / name)
            assert saved(made) == scores.states[epoch]
        else:
            assert saved(load_model(tmp_path / "deep" / name)) == scores.states[epoch]
    assert [r["step"] for r in callback.history] == [1, 2, 3, 4, 5, 6]
    assert [r["metric"] for r in callback.history] == scores.scores
    assert [r["deleted"] for r in callback.history][1:4] == [[], [f"m-01-0.5{ending}"], []]
    records = [r for r in caplog.records if hasattr(r, "hornbeam")]
    assert [r.hornbeam for r in records] == callback.history
    for record, entry in zip(records, callback.history, strict=True):
        assert entry["path"] in record.getMessage()
        assert {"bytes", "stall_seconds", "write_seconds", "kept", "reason", "batch", "epoch"} <= entry.keys()
        assert entry["bytes"] > 0


def test_after_batches(tmp_path: Path) -> None:
    made = model(run_eagerly=BACKEND != "jax")
    callback = ModelCheckpoint(tmp_path / "{epoch}-{batch}.keras", monitor="loss", save_freq=3, keep_every=6)
    fit(made, callback, epochs=4)  # 16 steps
    assert [(r["step"], r["reason"]) for r in callback.history] == [(n, "batch") for n in (3, 6, 9, 12, 15)]
    assert names(tmp_path) == ["2-2.keras", "3-4.keras", "4-3.keras"]


def test_after_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)

    def monotonic() -> float:
        clock.now += 1  # a second for every look at it
        return clock.now

    stub = SimpleNamespace(monotonic=monotonic, perf_counter=lambda: 0.0, time=lambda: clock.now)
    monkeypatch.setattr(model_checkpoint, "time", stub)
    callback = ModelCheckpoint(tmp_path / "{epoch}-{batch}.keras", monitor="loss", save_freq=10**6, every_seconds=3.5)
    fit(model(), callback, epochs=3)
    assert {r["reason"] for r in callback.history} == {"seconds"}
    assert [r["step"] for r in callback.history] == [4, 8, 12]


@pytest.mark.parametrize("arguments", [{"keep_last": 5}, {"remember": True}, {"asynchronous": True, "mode": "min"}])
def test_a_restart_goes_on_from_the_best(arguments: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "best.keras"
    first = Scores([0.5, 0.3, 0.4])
    fit(model(), first, ModelCheckpoint(path, save_best_only=True, **arguments), epochs=3)
    best = saved(load_model(path))
    assert best == first.states[2]
    callback = ModelCheckpoint(path, save_best_only=True, **arguments)
    fit(model(), Scores([0.6, 0.35]), callback, epochs=2)
    assert callback.best == 0.3
    assert saved(load_model(path)) == best
    third = Scores([0.31, 0.1])
    fit(model(), third, ModelCheckpoint(path, save_best_only=True, **arguments), epochs=2)
    assert saved(load_model(path)) == third.states[2]
    forgetful = Scores([0.9])  # as Keras has it
    fit(model(), forgetful, ModelCheckpoint(path, save_best_only=True, **{**arguments, "remember": False}))
    assert saved(load_model(path)) == forgetful.states[1]


def test_the_threshold_and_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "best.keras"
    fit(model(), Scores([0.5]), ModelCheckpoint(path, save_best_only=True, remember=True))
    for threshold, best in ((0.2, 0.2), (0.9, 0.5)):
        callback = ModelCheckpoint(path, save_best_only=True, remember=True, initial_value_threshold=threshold)
        fit(model(), Scores([0.8]), callback)
        assert callback.best == best
    path.unlink()  # what is not there is not the best
    callback = ModelCheckpoint(path, save_best_only=True, remember=True)
    fit(model(), Scores([0.8]), callback)
    assert callback.best == 0.8
    other = ModelCheckpoint(path, monitor="loss", save_best_only=True, remember=True)
    fit(model(), other)
    assert len(other.history) == 1  # scores of another metric do not count


def test_retention_goes_on_after_a_restart(tmp_path: Path) -> None:
    pattern = tmp_path / "{epoch}.keras"
    fit(model(), Scores([0.1, 0.9, 0.8]), ModelCheckpoint(pattern, keep_last=1, keep_best=1), epochs=3)
    assert names(tmp_path) == ["1.keras", "3.keras"]
    again = ModelCheckpoint(pattern, keep_last=1, keep_best=1)
    made = model()
    made.fit(
        floats(32, 6),
        floats(32, 1),
        epochs=5,
        initial_epoch=3,
        verbose=0,
        callbacks=[Scores([0] * 3 + [0.7, 0.6]), again],
    )
    assert names(tmp_path) == ["1.keras", "5.keras"]


def test_a_crash_between_file_and_account(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    account = PatternAccount(str(path))
    account.monitor, account.mode = "val_loss", "min"
    path.write_text("first")
    rules = {"keep_last": None, "keep_best": None, "keep_every": None}
    account.confirm(account.begin(str(path), 1, 0.5, durable=False), rules, durable=False)
    account.begin(str(path), 2, 0.3, durable=False)  # and killed before the file was replaced
    known = PatternAccount(str(path))
    assert known.read()
    assert known.entries[-1][:3] == ("m.keras", 1, 0.5)
    (tmp_path / "new").write_text("second")
    os.replace(tmp_path / "new", path)  # and killed after it
    known = PatternAccount(str(path))
    assert known.read()
    assert [e[:3] for e in known.entries] == [("m.keras", 2, 0.3)]
    (tmp_path / ".m.keras.checkpoints.json").write_text("{}")
    with pytest.raises(ValueError, match=r"m\.keras\.checkpoints\.json"):
        latest_checkpoint(path)


def test_a_file_written_in_place_by_a_crashed_save_is_no_checkpoint(tmp_path: Path) -> None:
    rules = {"keep_last": None, "keep_best": None, "keep_every": None}
    account = PatternAccount(str(tmp_path / "{epoch}.keras"))
    account.monitor, account.mode = "val_loss", "min"
    for step in (1, 2):
        path = tmp_path / f"{step}.keras"
        path.write_text("whole")
        account.confirm(account.begin(str(path), step, 0.5 / step, durable=False), rules, durable=False)
    with hornbeam.options(atomic=False):
        for step in (2, 3):
            account.begin(str(tmp_path / f"{step}.keras"), step, 0.1, durable=False)
            (tmp_path / f"{step}.keras").write_text("torn")
    assert latest_checkpoint(tmp_path / "{epoch}.keras") == str(tmp_path / "1.keras")
    assert best_checkpoint(tmp_path / "{epoch}.keras") == str(tmp_path / "1.keras")


def test_the_account_is_on_stable_storage_before_the_old_file_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, bool]] = []
    original = _core.write_file

    def noted(path: Any, data: bytes, *, atomic: bool = True, durable: bool = False) -> None:
        written.append((os.path.basename(path), durable))
        original(path, data, atomic=atomic, durable=durable)

    monkeypatch.setattr(_core, "write_file", noted)
    for durable in (True, False):
        fit(model(), ModelCheckpoint(tmp_path / "m.keras", keep_last=1, durable=durable))
    assert written == [(".m.keras.checkpoints.json", durable) for durable in (True, True, False, False)]


def test_another_training_with_the_same_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    callback = ModelCheckpoint(path, save_best_only=True, remember=True)
    lock = FileLock(tmp_path / ".m.keras.lock")  # as another process has it
    with pytest.raises(CheckpointError, match=r"'.*m\.keras' is in use: another process trains"):
        fit(model(), Scores([0.5]), callback)
    assert names(tmp_path) == []
    lock.release()

    def fail() -> None:
        raise RuntimeError("as if")

    with pytest.raises(RuntimeError, match="as if"):
        fit(model(), At(1, fail), callback)
    FileLock(tmp_path / ".m.keras.lock").release()  # an exception gives it back
    callback.set_model(model())
    callback.on_train_begin()  # and is never ended
    fit(model(), Scores([0.5]), ModelCheckpoint(path, save_best_only=True, remember=True))
    assert names(tmp_path) == ["m.keras"]


def test_a_damaged_account_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / ".m.keras.checkpoints.json").write_text("{}")
    callback = ModelCheckpoint(tmp_path / "m.keras", save_best_only=True, remember=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="move it away"):
            fit(model(), callback)
        FileLock(tmp_path / ".m.keras.lock").release()
    assert names(tmp_path) == []


def test_what_others_saved_meanwhile_counts(tmp_path: Path) -> None:
    first, other = (ModelCheckpoint(tmp_path / "m.keras", save_best_only=True, remember=True) for _ in range(2))
    fit(model(), Scores([0.5]), first)
    fit(model(), Scores([0.1]), other)
    fit(model(), Scores([0.4]), first)
    assert first.best == other.best == 0.1
    assert len(first.history) == 1
    with pytest.raises(CheckpointError, match="of this process that is running"):
        fit(model(), Scores([0.5]), first, other)
    nested = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: fit(model(), first))
    with pytest.raises(CheckpointError, match="of this process that is running"):
        fit(model(), first, nested)
    FileLock(tmp_path / ".m.keras.lock").release()


@pytest.mark.parametrize("full", ["account", "directory"])
def test_the_best_is_what_is_there_after_a_save_that_did_not_begin(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = ModelCheckpoint(tmp_path / "m.keras", mode="min", save_best_only=True, remember=True)
    fit(model(), Scores([0.9]), callback)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if full == "account":
            patch.setattr(PatternAccount, "write", fail)
        else:
            patch.setattr(callback, "_claim", lambda: None)  # it makes the directory, too
            patch.setattr(_core, "make_directories", fail)
        with pytest.raises(OSError, match="No space left"):
            fit(model(), Scores([0.1]), callback)
    assert callback.best == 0.9
    fit(model(), Scores([0.5]), callback)
    assert [record["metric"] for record in callback.history] == [0.9, 0.5]


def test_the_best_the_other_way_round(tmp_path: Path) -> None:
    def make(mode: str, **arguments: Any) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "{epoch}.keras", mode=mode, remember=True, **arguments)

    fit(model(), Scores([0.3, 0.9, 0.5]), make("min"), epochs=3)
    callback = make("max", save_best_only=True)
    fit(model(), Scores([0.4]), callback)
    assert callback.best == 0.9
    assert callback.history == []


def test_the_account_knows_the_direction_from_the_first_score_on(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    callback = ModelCheckpoint(path, "loss", save_best_only=True, save_freq=3, remember=True)
    fit(model(), callback)  # four batches: one save
    assert [r["reason"] for r in callback.history] == ["batch"]
    assert best_checkpoint(path) == str(path)
    again = ModelCheckpoint(path, "loss", save_best_only=True, remember=True)
    made = model()
    made.fit(floats(32, 6), floats(32, 1) + 100, verbose=0, callbacks=[again])
    assert again.history == []
    assert again.best == callback.best


@pytest.mark.filterwarnings("ignore:Can save best model only")
def test_a_score_that_is_none(tmp_path: Path) -> None:
    scores = Scores([float("nan"), 0.5, float("nan"), np.array([9.0, 9.0])])
    callback = ModelCheckpoint(tmp_path / "m.keras", save_best_only=True, remember=True)
    fit(model(), scores, callback, epochs=4)
    assert [r["epoch"] for r in callback.history] == [0, 1]
    assert saved(load_model(tmp_path / "m.keras")) == scores.states[2]


def test_what_only_has_arguments_of_keras_can_be_pickled(tmp_path: Path) -> None:
    callback = pickle.loads(pickle.dumps(ModelCheckpoint(tmp_path / "m.keras")))
    fit(model(), callback)
    assert names(tmp_path) == ["m.keras"]


@pytest.mark.filterwarnings("ignore:Can save best model only")
def test_nothing_without_a_score_takes_the_place_of_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scores, path = Scores([0.5, 0.9]), tmp_path / "m.keras"
    callback = ModelCheckpoint(path, save_best_only=True, every_seconds=1e-9)
    fit(model(), scores, callback, epochs=2)
    # Before there is a score, what has none is better than nothing.
    assert [(r["epoch"], r["reason"], r["metric"]) for r in callback.history] == [
        *[(0, "seconds", None)] * 4,
        (0, "epoch", 0.5),
    ]
    assert saved(load_model(path)) == scores.states[1]
    assert best_checkpoint(path) == str(path)
    assert caplog.text.count("without 'val_loss' nothing is saved over the best model") == 1
    again = ModelCheckpoint(path, save_best_only=True, save_freq=2, remember=True)
    fit(model(), again)
    assert again.history == []
    assert saved(load_model(path)) == scores.states[1]


def test_a_name_with_a_score_waits_for_the_end_of_the_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = ModelCheckpoint(tmp_path / "{epoch}-{val_loss}.keras", every_seconds=1e-9)
    fit(model(), Scores([0.5, 0.4]), callback, epochs=2)
    assert names(tmp_path) == ["1-0.5.keras", "2-0.4.keras"]
    assert caplog.text.count("at the end of the epoch") == 1


def test_the_best_of_a_directory(tmp_path: Path) -> None:
    made = model()
    fit(made, Scores([0.5]), ModelCheckpoint(tmp_path / "a-{epoch}.keras", keep_best=1))
    fit(made, Scores([0.4]), ModelCheckpoint(tmp_path / "b-{epoch}.keras", keep_best=1))
    assert best_checkpoint(tmp_path) == str(tmp_path / "b-1.keras")
    fit(made, ModelCheckpoint(tmp_path / "c-{epoch}.keras", monitor="loss", keep_best=1))
    with pytest.raises(ValueError, match="several kinds"):
        best_checkpoint(tmp_path)
    assert best_checkpoint(tmp_path / "a-{epoch}.keras") == str(tmp_path / "a-1.keras")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "c-1.keras")


# ---- errors ----


@pytest.mark.parametrize("epochs", [1, 3])
def test_an_error_of_the_writer_ends_training(epochs: int, tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "d" / "m.keras", save_best_only=True, asynchronous=True)
    made = model()
    fit(made, Scores([0.5]), callback)

    class Lose(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch > 0:
                return  # one save is lost: how far the next one is by now is anybody's guess
            for path in (tmp_path / "d").glob(".m.keras.*.hornbeam-tmp"):
                path.unlink()
            release.__exit__(None, None, None)
            callback_handles[0].exception()

    callback_handles: list[Any] = []
    release = held()
    callback_handles.append(release.__enter__())
    with pytest.raises(OSError, match=r"m\.keras"):
        fit(made, Scores([0.1, 0.05, 0.01]), callback, Lose(), epochs=epochs)
    assert len(callback.history) >= 1
    assert best_checkpoint(tmp_path / "d" / "m.keras") == str(tmp_path / "d" / "m.keras")
    load_model(tmp_path / "d" / "m.keras")
    writer.wait()


@pytest.mark.backend("tensorflow", "jax", reason="there is room for one copy: the second save waits for the first")
def test_the_best_is_what_is_there_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = ModelCheckpoint(tmp_path / "{epoch}.keras", save_best_only=True, asynchronous=True)
    callback.set_model(model())
    callback.on_train_begin()
    release, run = threading.Event(), writer._Job.run
    monkeypatch.setattr(writer._Job, "run", lambda job: run(job) if release.wait(60) else None)

    def save(epoch: int, score: float) -> None:
        callback.on_epoch_begin(epoch)
        callback.on_epoch_end(epoch, {"val_loss": score})

    save(0, 0.5)
    for path in tmp_path.glob(".1.keras.*.hornbeam-tmp"):
        path.unlink()  # it will fail
    save(1, 0.4)  # and this one, which waits behind it, will not
    release.set()
    with pytest.raises(OSError, match=r"1\.keras"):
        writer.wait()
    assert callback.best == 0.4
    assert best_checkpoint(tmp_path / "{epoch}.keras") == str(tmp_path / "2.keras")
    callback.on_train_end()


def test_arguments_that_mean_nothing(tmp_path: Path) -> None:
    for wrong in ({"keep_last": 0}, {"keep_best": -1}, {"every_seconds": 0}, {"save_on_signal": [0]}):
        with pytest.raises(ValueError):  # noqa: PT011
            ModelCheckpoint(tmp_path / "m.keras", **wrong)
    with pytest.raises(UnsupportedError):
        ModelCheckpoint(tmp_path / "m.h5", asynchronous=True)
    with pytest.raises(TypeError):
        ModelCheckpoint(tmp_path / "m.keras", unknown=True)


@pytest.mark.backend("tensorflow", reason="the others say themselves how many processes there are")
def test_only_the_chief_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, index, writes in (("worker", 1, False), ("worker", 0, True), ("evaluator", 0, False)):
        config = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": kind, "index": index}}
        callback = ModelCheckpoint(tmp_path / f"{kind}{index}.keras", save_best_only=True, keep_last=1, timeout=None)
        made = model()
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))
        fit(made, Scores([0.5]), callback)
        monkeypatch.delenv("TF_CONFIG")
        assert (tmp_path / f"{kind}{index}.keras").exists() == writes
        assert callback.best == 0.5  # all of them know


DISTRIBUTED = r"""
import os, sys
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from hornbeam.callbacks import ModelCheckpoint
from hornbeam.saving import load_model
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(8)(inputs)))
    model.compile("adam", "mse")
states = {}
note = keras.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: states.update({e + 1: model.get_weights()}))
x, y = np.random.rand(32, 6), np.random.rand(32, 1)
path = os.path.join(sys.argv[1], "{epoch}.keras")
checkpoint = ModelCheckpoint(path, asynchronous=True, keep_last=2)
model.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=[note, checkpoint])
assert sorted(n for n in os.listdir(sys.argv[1]) if n[0] != ".") == ["3.keras", "4.keras"]
for epoch in (3, 4):
    for a, b in zip(load_model(path.format(epoch=epoch)).get_weights(), states[epoch], strict=True):
        np.testing.assert_array_equal(a, b)
"""


@pytest.mark.backend("tensorflow", reason="TensorFlow's strategy")
def test_under_a_distribution_strategy(tmp_path: Path) -> None:
    done = script(DISTRIBUTED, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- the account against a model of it ----


class Account(RuleBasedStateMachine):
    """Saves, crashes at every point, and restarts."""

    @initialize(
        last=st.none() | st.integers(1, 3), best=st.none() | st.integers(1, 2), every=st.none() | st.integers(2, 4)
    )
    def begin(self, last: int | None, best: int | None, every: int | None) -> None:
        self.root = tempfile.TemporaryDirectory()
        self.rules = {"keep_last": last, "keep_best": best, "keep_every": every}
        self.committed: list[Entry] = []  # whose file took its place, and that no rule has given up
        self.step = 0
        self.restart()

    def teardown(self) -> None:
        if hasattr(self, "root"):
            self.root.cleanup()

    def path(self, name: str) -> str:
        return os.path.join(self.root.name, name)

    @rule()
    def restart(self) -> None:
        self.account = PatternAccount(self.path("{epoch}.keras"))
        self.account.read()
        self.account.monitor, self.account.mode = "val_loss", "min"

    @rule(
        name=st.sampled_from("abcd"),
        metric=st.none() | st.sampled_from([0.1, 0.2, 0.3]),
        crash=st.sampled_from([None, None, "before", "after"]),
    )
    def save(self, name: str, metric: float | None, crash: str | None) -> None:
        self.step += 1
        pending = self.account.begin(self.path(name), self.step, metric, durable=False)
        if crash == "before":
            return self.restart()
        with open(self.path("temporary"), "w", encoding="utf-8") as file:
            file.write(str(self.step))
        os.replace(self.path("temporary"), self.path(name))
        self.committed = [e for e in self.committed if e.name != name] + [Entry(name, self.step, metric)]
        if crash == "after":
            return self.restart()
        self.account.confirm(pending, self.rules, durable=False)
        gone = plan_retention(self.committed, mode="min", **self.rules)
        self.committed = [e for e in self.committed if e.name not in gone]
        return None

    @invariant()
    def the_account_is_right(self) -> None:
        if not hasattr(self, "account"):
            return
        assert [e[:3] for e in self.account.entries] == [e[:3] for e in self.committed]
        assert sorted(n for n in os.listdir(self.root.name) if n[0] != ".") == sorted(e.name for e in self.committed)
        for entry in self.committed:
            with open(self.path(entry.name), encoding="utf-8") as file:
                assert file.read() == str(entry.step)


TestAccount = Account.TestCase
TestAccount.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


OWN = "callbacks/model_checkpoint_test.py"


@pytest.mark.skipif(not (KERAS / OWN).exists(), reason="this wheel of Keras has no tests")
@pytest.mark.parametrize("arguments", [{}, {"asynchronous": True, "keep_every": 1, "remember": False}])
def test_our_model_checkpoint(arguments: dict[str, Any]) -> None:
    """Keras' tests of its callback pass with ours, as it is by default, and with everything else behind it."""
    tests = pytest_on([OWN], callbacks=json.dumps(arguments))
    assert failures(tests) == {}
    assert sum(r["outcome"] == "passed" for r in tests.values()) >= 2
    assert sum(r["stats"]["saves"] for r in tests.values()) >= 35
