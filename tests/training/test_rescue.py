"""`ModelCheckpoint` when training is interrupted: by a signal, by an exception."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from hornbeam._core import FileLock
from hornbeam.base import writer
from hornbeam.callbacks import ModelCheckpoint, best_checkpoint, latest_checkpoint
from hornbeam.errors import CheckpointError
from hornbeam.saving import load_model
from hornbeam.training.accounts import PatternAccount
from support.helpers import saved, script
from support.training import At, Scores, fit, model, names
from support.writing import held

BACKEND = keras.backend.backend()
pytestmark = pytest.mark.trains


class Stopped(BaseException):
    """What a signal's handler ends training with."""


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("best_only", [False, True])
def test_a_signal_saves_and_goes_its_way(asynchronous: bool, best_only: bool, tmp_path: Path) -> None:
    def handler(number: int, frame: Any) -> None:
        raise Stopped

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        path = tmp_path / "m.keras"
        at = At(5, lambda: signal.raise_signal(signal.SIGUSR1))
        callback = ModelCheckpoint(
            path,
            save_best_only=best_only,
            asynchronous=asynchronous,
            save_on_signal=[signal.SIGUSR1],
            save_on_exception=True,
        )
        scores = Scores([0.5, 0.4])
        with pytest.raises(Stopped):
            fit(model(), at, scores, callback, epochs=2)
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)
    rescued = tmp_path / ("m-interrupted.keras" if best_only else "m.keras")
    assert saved(load_model(rescued)) == at.state
    assert callback.history[-1]["reason"] == "signal"
    assert latest_checkpoint(path) == str(rescued)
    if best_only:
        assert saved(load_model(path)) == scores.states[1]
        assert best_checkpoint(path) == str(path)
    assert names(tmp_path) == sorted({"m.keras", rescued.name})


TERMINATED = r"""
import os, signal, sys
import keras, numpy as np
from hornbeam.callbacks import ModelCheckpoint

path, best_only, asynchronous = sys.argv[1], sys.argv[2] == "True", sys.argv[3] == "True"
inputs = keras.Input((6,))
model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(8)(inputs)))
model.compile("adam", "mse")

class Terminate(keras.callbacks.Callback):  # as a cluster does, in the middle of the second epoch
    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 6:  # self.model: JAX holds the state elsewhere meanwhile
            np.savez(path + ".npz", *self.model.get_weights())
            os.kill(os.getpid(), signal.SIGTERM)

checkpoint = ModelCheckpoint(
    path, "loss", save_best_only=best_only, asynchronous=asynchronous, save_on_signal=[signal.SIGTERM]
)
x, y = np.random.rand(32, 6), np.random.rand(32, 1)
model.fit(x, y, batch_size=8, epochs=50, verbose=0, callbacks=[Terminate(), checkpoint])
"""


@pytest.mark.parametrize(("asynchronous", "best_only"), [(False, True), (True, False)])
def test_a_terminated_training_leaves_its_last_step(asynchronous: bool, best_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    done = script(TERMINATED, path, best_only, asynchronous)
    assert done.returncode == -signal.SIGTERM, done.stderr[-3000:]
    rescued = latest_checkpoint(path)
    assert rescued == str(tmp_path / ("m-interrupted.keras" if best_only else "m.keras"))
    loaded = load_model(rescued)
    with np.load(f"{path}.npz") as expected:
        for ours, theirs in zip(loaded.get_weights(), expected.values(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert int(loaded.optimizer.iterations) == 6


def test_a_signal_that_is_survived(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        callback = ModelCheckpoint(tmp_path / "{epoch}-{val_loss}.keras", save_on_signal=[signal.SIGUSR1])
        actions = [At(n, lambda: signal.raise_signal(signal.SIGUSR1)) for n in (1, 6)]
        fit(model(), *actions, Scores([0.5, 0.4]), callback, epochs=2)
        assert seen == [signal.SIGUSR1] * 2
        signal.raise_signal(signal.SIGUSR1)
        assert len(seen) == 3
    finally:
        signal.signal(signal.SIGUSR1, before)
    # The pattern has a metric that there is not after a batch.
    assert names(tmp_path) == ["1-0.5.keras", "2-0.4.keras", "interrupted.keras"]


def test_no_signal_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    numbers = [signal.SIGUSR1, signal.SIGUSR2]
    before = [signal.signal(number, lambda number, frame: seen.append(number)) for number in numbers]

    def both() -> None:
        for number in numbers:
            signal.raise_signal(number)

    def fail() -> None:
        both()
        raise RuntimeError("as if")

    try:
        callback = ModelCheckpoint(tmp_path / "m.keras", save_on_signal=numbers, asynchronous=True)
        fit(model(), At(1, both), callback)  # before the next batch's end
        assert seen == numbers
        assert [r["reason"] for r in callback.history] == ["signal", "epoch"]
        with pytest.raises(RuntimeError, match="as if"):
            fit(model(), At(1, fail), callback)
        assert seen == numbers * 2
        original = writer.wait
        monkeypatch.setattr(writer, "wait", lambda: (original(), both()))  # when training waits for its last save
        fit(model(), callback)
        monkeypatch.undo()
        assert seen == numbers * 3
        fit(model(), callback)
        assert seen == numbers * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_two_callbacks_give_a_signal_back(tmp_path: Path) -> None:
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, handler)
    callbacks = [ModelCheckpoint(tmp_path / f"{i}.keras", save_on_signal=[signal.SIGUSR1]) for i in range(2)]

    def fail() -> None:
        signal.raise_signal(signal.SIGUSR1)
        raise RuntimeError("as if")

    try:
        fit(model(), *callbacks)
        assert signal.getsignal(signal.SIGUSR1) is handler
        with pytest.raises(KeyboardInterrupt):  # the signal's answer, after both have let go
            fit(model(), At(1, fail), *callbacks)
        assert signal.getsignal(signal.SIGUSR1) is handler
        assert seen == [signal.SIGUSR1]
        for i in range(2):
            FileLock(tmp_path / f".{i}.keras.lock").release()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_two_callbacks_answer_every_signal(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    callbacks = [
        ModelCheckpoint(tmp_path / f"{i}.keras", save_freq=1000, save_on_signal=[signal.SIGUSR1]) for i in range(2)
    ]
    twice = [At(i, lambda: signal.raise_signal(signal.SIGUSR1)) for i in (1, 6)]
    try:
        fit(model(), *twice, *callbacks, epochs=3)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(seen) == 2
    for callback in callbacks:
        assert [record["reason"] for record in callback.history] == ["signal"] * 2


def test_a_signal_before_the_first_batch_goes_its_way(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    callback = ModelCheckpoint(tmp_path / "m.keras", save_on_signal=[signal.SIGUSR1])
    early = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: signal.raise_signal(signal.SIGUSR1))
    try:
        fit(model(), callback, early, epochs=0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
    assert callback.history == []
    assert names(tmp_path) == []


#: What only the first `fit` of a process shows: Python looks `model.fit` up before the callback is made.
FIRST = r"""
import multiprocessing, signal, sys, time
from pathlib import Path
import keras, numpy as np
from hornbeam._core import FileLock
from hornbeam.callbacks import ModelCheckpoint

path = Path(sys.argv[1])
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")

class Fail(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        # A worker that is forked meanwhile ends as its owner wants.
        fork = multiprocessing.get_context("fork")
        ready = fork.Event()
        child = fork.Process(target=lambda: (ready.set(), time.sleep(600)), daemon=True)
        child.start()
        assert ready.wait(60)
        child.terminate()
        child.join(60)
        assert child.exitcode == -signal.SIGTERM, child.exitcode
        raise RuntimeError("as if")

x = np.ones((8, 3))
try:
    model.fit(x, x[:, :1], verbose=0, callbacks=[
        ModelCheckpoint(path, "loss", save_on_exception=True, save_on_signal=[signal.SIGTERM], save_freq=1000), Fail()
    ])
except RuntimeError as error:
    assert "was saved to" in error.__notes__[-1]
assert path.with_name("m-interrupted.keras").exists()
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
FileLock(path.with_name(".m.keras.lock")).release()
print("fine")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_callback_made_inside_the_call_of_fit(tmp_path: Path) -> None:
    done = script(FIRST, tmp_path / "m.keras")
    assert done.stdout.split() == ["fine"], done.stderr[-3000:]


def test_a_save_that_fails_before_a_signal_ends_training_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def full(self: Any, *args: Any) -> None:
        raise OSError("the disk is full")

    before = signal.signal(signal.SIGUSR1, handler)
    at = At(1, lambda: signal.raise_signal(signal.SIGUSR1))
    callback = ModelCheckpoint(tmp_path / "m.keras", save_on_signal=[signal.SIGUSR1], save_on_exception=True)
    monkeypatch.setattr(ModelCheckpoint, "_write", full)
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            fit(model(), at, callback)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "nothing could be saved after a signal: OSError: the disk is full" in caplog.text
    assert "m-interrupted.keras" in raised.value.__notes__[0]  # it tried once more, elsewhere
    assert saved(load_model(tmp_path / "m-interrupted.keras")) == at.state


@pytest.mark.parametrize("how", ["exception", "signal"])
def test_an_earlier_failure_keeps_nobody_from_saving_once_more(how: str, tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    release = held()

    def act() -> None:
        for path in tmp_path.glob(".m-1.keras.*.hornbeam-tmp"):
            path.unlink()
        release.__exit__(None, None, None)
        if how == "exception":
            raise RuntimeError("as if")
        signal.raise_signal(signal.SIGUSR1)

    at = At(4, act)  # the first batch after the save of the first epoch
    callback = ModelCheckpoint(
        tmp_path / "m-{epoch}.keras", asynchronous=True, save_on_exception=True, save_on_signal=[signal.SIGUSR1]
    )
    release.__enter__()
    try:
        with pytest.raises(RuntimeError if how == "exception" else OSError) as raised:
            fit(model(), at, callback, epochs=3)
    finally:
        signal.signal(signal.SIGUSR1, before)
    rescued = tmp_path / ("m-interrupted.keras" if how == "exception" else "m-2.keras")
    assert saved(load_model(rescued)) == at.state
    if how == "exception":
        assert "A save before this had failed: StorageFileNotFoundError" in raised.value.__notes__[0]
        assert f"was saved to '{rescued}'" in raised.value.__notes__[1]
    else:
        assert seen == [signal.SIGUSR1]


def test_ctrl_c_after_a_survived_signal_saves(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)

    def interrupt() -> None:
        raise KeyboardInterrupt

    interrupted = At(2, interrupt)
    callback = ModelCheckpoint(tmp_path / "m.keras", save_on_exception=True, save_on_signal=[signal.SIGUSR1])
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            fit(model(), At(0, lambda: signal.raise_signal(signal.SIGUSR1)), interrupted, callback)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "m-interrupted.keras" in raised.value.__notes__[0]
    assert saved(load_model(tmp_path / "m-interrupted.keras")) == interrupted.state


def test_an_exception_saves_beside_the_others(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("as if")

    with pytest.raises(RuntimeError, match="as if") as raised:  # one batch was trained: another callback fails after it
        fit(model(), At(0, fail), ModelCheckpoint(tmp_path / "first.keras", save_on_exception=True))
    assert "was saved to" in raised.value.__notes__[-1]
    (tmp_path / "first-interrupted.keras").unlink()

    at, scores = At(6, fail), Scores([0.5, 0.4])
    callback = ModelCheckpoint(tmp_path / "m.keras", save_best_only=True, save_on_exception=True)
    with pytest.raises(RuntimeError, match="as if") as raised:
        fit(model(), at, scores, callback, epochs=2)
    rescued = tmp_path / "m-interrupted.keras"
    assert raised.value.__notes__[-1] == f"The state of the model at this point was saved to '{rescued}'."
    assert names(tmp_path) == ["m-interrupted.keras", "m.keras"]
    assert saved(load_model(tmp_path / "m.keras")) == scores.states[1]
    assert saved(load_model(tmp_path / "m-interrupted.keras")) == at.state


def test_an_exception_whose_state_cannot_be_had(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = model()

    def fail() -> None:
        made.layers[-1].get_config = lambda: 1 / 0
        raise RuntimeError("as if")

    with pytest.raises(RuntimeError, match="as if") as raised:
        fit(
            made,
            At(6, fail),
            Scores([0.5] * 2),
            ModelCheckpoint(tmp_path / "m.keras", save_on_exception=True),
            epochs=2,
        )
    assert "Nothing could be saved after this: ZeroDivisionError" in raised.value.__notes__[-1]
    assert "Nothing could be saved" in caplog.text
    assert names(tmp_path) == ["m.keras"]


@pytest.mark.parametrize("why", ["another process", "another callback", "a damaged account", "the same callback"])
def test_a_start_that_fails_changes_nothing(why: str, tmp_path: Path) -> None:
    def make(name: str = "m.keras") -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, mode="min", save_best_only=True, save_on_exception=True)

    def fail() -> None:
        raise RuntimeError("as if")

    with pytest.raises(RuntimeError, match="as if"):
        fit(model(), Scores([0.1, 0.5]), At(5, fail), make(), epochs=2)
    account = tmp_path / ".m.keras.checkpoints.json"
    if why == "a damaged account":
        account.write_text(account.read_text()[:-3])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"m.keras", "m-interrupted.keras", account.name} <= before.keys()

    failing = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: fail())
    with contextlib.ExitStack() as stack:
        callbacks = [make()]
        if why == "another process":
            lock = FileLock(tmp_path / ".m.keras.lock")
            stack.callback(lock.release)
        elif why == "another callback":
            callbacks.append(failing)
        elif why == "the same callback":
            (tmp_path / "a").mkdir()
            callbacks.append(make("a/../m.keras"))
        with pytest.raises((CheckpointError, RuntimeError, ValueError)) as raised:
            fit(model(), Scores([0.5]), *callbacks)
    assert getattr(raised.value, "__notes__", ["No batch"])[-1].startswith("No batch")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    if why != "a damaged account":
        again = make()
        fit(model(), Scores([0.5]), again)
        assert again.best == 0.1
        assert again.history == []


def test_an_exception_waits_for_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who trains next goes on from it."""

    def make() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "m.keras", mode="min", save_best_only=True, asynchronous=True)

    def stop() -> None:
        raise KeyboardInterrupt

    busy = held()
    busy.__enter__()
    wait = writer.wait
    monkeypatch.setattr(writer, "wait", lambda: (busy.__exit__(None, None, None), wait()))
    with pytest.raises(KeyboardInterrupt):
        fit(model(), Scores([0.1, 0.1]), make(), At(5, stop), epochs=2)
    FileLock(tmp_path / ".m.keras.lock").release()
    again = make()
    fit(model(), Scores([0.5]), again)
    assert again.best == 0.1
    assert again.history == []


def test_an_account_that_cannot_be_written_is_told_with_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("as if")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    callback = ModelCheckpoint(tmp_path / "m.keras", asynchronous=True, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(PatternAccount, "confirm", full)
        with pytest.raises(RuntimeError, match="as if") as raised:
            fit(model(), callback, At(5, fail), epochs=2)
    assert "No space left" in raised.value.__notes__[-1]
    assert f"its account '{tmp_path / '.m.keras.checkpoints.json'}' was not: [Errno 28]" in caplog.text
    fit(model(), callback)


@pytest.mark.backend("tensorflow", reason="the others say themselves how many processes there are")
def test_only_the_chief_says_that_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("as if")

    made = model()
    config = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(RuntimeError, match="as if") as raised:
        fit(made, ModelCheckpoint(tmp_path / "m.keras", save_on_exception=True, timeout=None), At(1, fail))
    assert not hasattr(raised.value, "__notes__")
    assert names(tmp_path) == []
