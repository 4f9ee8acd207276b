"""`CheckpointManager`: against a model of it, exact resume, crashes, readers, a second writer."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import hornbeam
from hornbeam.checkpoint import CheckpointManager
from hornbeam.data import resumable
from hornbeam.errors import CheckpointError
from hornbeam.training import statefile
from hornbeam.training.accounts import Manifest
from hornbeam.values import randomness
from support.helpers import script, values

pytestmark = pytest.mark.keras_versions

SOAK = bool(os.environ.get("HORNBEAM_SOAK"))
TRAINS = keras.backend.backend() != "numpy"


def build(compiled: bool = True) -> Any:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    x = keras.layers.Dropout(0.4, seed=5)(keras.layers.Dense(6, activation="relu")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.BatchNormalization()(x)))
    if compiled:
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
    return model


def fill(model: Any, number: float) -> None:
    for variable in model.weights:
        variable.assign(np.full(variable.shape, number))


class Machine(RuleBasedStateMachine):
    """Any order of saves, restarts and reads does what a list of (step, value, metric) does."""

    model: Any = None

    @initialize(
        keep_last=st.sampled_from([None, 1, 2]),
        keep_best=st.sampled_from([None, 1, 2]),
        keep_every=st.sampled_from([None, 3]),
        mode=st.sampled_from(["min", "max"]),
    )
    def start(self, mode: str, **keep: int | None) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.keep, self.mode = keep, mode
        self.expected: list[tuple[int, float, float]] = []
        self.value = 0.0
        if Machine.model is None:
            Machine.model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        self.manager: CheckpointManager | None = None
        self.reader = self.make()

    def make(self) -> CheckpointManager:
        return CheckpointManager(self.root, monitor="m", mode=self.mode, durable=False, **self.keep)

    @precondition(lambda self: self.manager is None)
    @rule()
    def open(self) -> None:
        self.manager = self.make().__enter__()

    @precondition(lambda self: self.manager is not None)
    @rule()
    def close(self) -> None:
        self.manager.close()
        self.manager = None
        assert sorted(os.listdir(self.root)) == sorted(
            [".lock", "checkpoints.json", *(c.path.name for c in self.reader.all())]
        )

    @precondition(lambda self: self.manager is not None)
    @rule(step=st.integers(0, 9), metric=st.sampled_from([0.0, 1.0, 2.0, float("nan"), float("inf")]))
    def save(self, step: int, metric: float) -> None:
        self.value += 1
        fill(self.model, self.value)
        self.manager.save(step, self.model, metrics={"m": metric}, extra={"value": self.value})
        self.expected = [e for e in self.expected if e[0] != step] + [(step, self.value, metric)]
        last, best, every = self.keep["keep_last"], self.keep["keep_best"], self.keep["keep_every"]
        if (last, best, every) == (None, None, None):
            return
        keep = {e[1] for e in self.expected[-(last or 1) :]}
        keep |= {e[1] for e in self.ranked()[: best or 0]}
        keep |= {e[1] for e in self.expected if every and e[0] % every == 0}
        self.expected = [e for e in self.expected if e[1] in keep]

    def ranked(self) -> list[tuple[int, float, float]]:
        scored = [e for e in self.expected if e[2] == e[2]]
        return sorted(scored, key=lambda e: e[2] if self.mode == "min" else -e[2])

    @precondition(lambda self: self.manager is not None)
    @rule()
    def save_that_fails(self) -> None:
        with pytest.raises(hornbeam.errors.InvalidError, match="object"):
            self.manager.save(3, self.model, metrics={"m": 0}, extra={"bad": object()})

    @precondition(lambda self: self.manager is not None)
    @rule()
    def second_writer(self) -> None:
        with pytest.raises(CheckpointError, match="in use"), self.make():
            pass

    @rule()
    def restore(self) -> None:
        fill(self.model, -1)
        start = self.reader.restore(self.model)
        if not self.expected:
            assert start == 0
            return
        step, value, _ = self.expected[-1]
        assert (start, self.reader.extra) == (step + 1, {"value": value})
        assert all((np.asarray(v) == value).all() for v in self.model.get_weights())

    @invariant()
    def lists(self) -> None:
        found = self.reader.all()
        assert [(c.step, repr(c.metrics["m"])) for c in found] == [(s, repr(m)) for s, _, m in self.expected]
        best = self.reader.best()
        assert (best and best.step) == (self.ranked()[0][0] if self.ranked() else None)
        assert (self.reader.latest() and self.reader.latest().step) == (found[-1].step if found else None)
        for checkpoint in found:
            checkpoint.check()

    def teardown(self) -> None:
        if getattr(self, "manager", None) is not None:
            self.manager.close()
        shutil.rmtree(getattr(self, "root", ""), ignore_errors=True)


TestMachine = Machine.TestCase
TestMachine.settings = type(TestMachine.settings)(
    max_examples=1000 if SOAK else 25, stateful_step_count=20, deadline=None
)


def test_restores_everything(tmp_path: Path) -> None:
    model = build()
    rng = np.random.default_rng(0)
    for variable in [*model.variables, *model.optimizer.variables]:
        value = rng.integers(1, 100, variable.shape)
        variable.assign(value.astype(variable.dtype))
    other = keras.random.SeedGenerator(3)
    metric = keras.metrics.Mean()
    keras.random.normal((2,), seed=other)
    metric.update_state([1.0, 5.0])
    keras.random.normal((1,))  # makes Keras' own generator
    expected = values(model)
    with CheckpointManager(tmp_path) as ckpt:
        extra = {"other": other, "metric": metric, "note": {"a": (1, 2.5), "b": np.arange(3)}, "n": None}
        saved = ckpt.save(41, model, metrics={"loss": np.float32(0.5)}, extra=extra)
    drawn = [random.random(), np.random.random(), np.asarray(keras.ops.convert_to_numpy(keras.random.normal((3,))))]
    assert saved.metrics == {"loss": 0.5}
    assert saved.bytes == sum(f.stat().st_size for f in saved.path.iterdir())

    again = build()
    other2, metric2 = keras.random.SeedGenerator(9), keras.metrics.Mean()
    assert values(again) != expected
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.restore(again, extra={"other": other2, "metric": metric2}) == 42
        assert ckpt.extra.keys() == {"note", "n"}
        assert ckpt.extra["note"]["a"] == (1, 2.5)
        np.testing.assert_array_equal(ckpt.extra["note"]["b"], np.arange(3))
    assert values(again) == expected
    assert float(metric2.result()) == 3.0
    np.testing.assert_array_equal(np.asarray(other2.state.value), np.asarray(other.state.value))
    assert random.random() == drawn[0]
    assert np.random.random() == drawn[1]
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(keras.random.normal((3,))), drawn[2])
    stock = build()
    stock.load_weights(saved.model)  # by stock Keras
    for ours, theirs in zip(model.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_keras_generator_without_its_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras 3.12 has no GLOBAL_SEED_GENERATOR."""
    from keras.src.random import seed_generator

    keras.random.normal((1,))  # makes Keras' own generator
    spec = importlib.util.spec_from_file_location("older", randomness.__file__)
    assert spec is not None
    assert spec.loader is not None
    older = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.delattr(seed_generator, "GLOBAL_SEED_GENERATOR", raising=False)
        spec.loader.exec_module(older)
    state = older.capture()
    np.testing.assert_array_equal(state["keras"], randomness.capture()["keras"])
    drawn = keras.ops.convert_to_numpy(keras.random.normal((3,)))
    older.restore(state)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(keras.random.normal((3,))), drawn)


def test_whole_models(tmp_path: Path) -> None:
    model = build()
    with CheckpointManager(tmp_path, save_weights_only=False) as ckpt:
        saved = ckpt.save(0, model)
        assert values(keras.models.load_model(saved.model))[:4] == values(model)[:4]
        fill(model, 7)
        assert ckpt.restore(model) == 1
    assert values(model) == values(build())


def test_a_model_that_was_not_trained_yet(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(0, model)
        expected = values(model)
        for variable in [*model.variables, *model.optimizer.variables]:  # "training"
            variable.assign(np.ones(variable.shape))
        assert ckpt.restore(model) == 1
        assert values(model) == expected
        fresh = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        fresh.compile("adam", "mse")
        assert ckpt.restore(fresh) == 1
        assert values(fresh) == expected


@pytest.mark.parametrize("weights_only", [True, False])
def test_lora_is_exact(weights_only: bool, tmp_path: Path) -> None:
    def adapted() -> Any:
        ids = keras.Input((3,), dtype="int32")
        inner = keras.Sequential([keras.Input((3, 4)), keras.layers.Dense(5, name="inner")])
        model = keras.Model(ids, keras.layers.Dense(2)(inner(keras.layers.Embedding(7, 4)(ids))))
        model.layers[1].enable_lora(2)
        inner.layers[0].enable_lora(2)
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
        return model

    model, rng = adapted(), np.random.default_rng(0)
    for variable in [*model.variables, *model.optimizer.variables]:
        variable.assign((rng.normal(size=variable.shape) * 10).astype(variable.dtype))
    expected = values(model)
    with CheckpointManager(tmp_path, save_weights_only=weights_only) as ckpt:
        ckpt.save(0, model)
        assert values(model) == expected
        other = adapted()
        assert values(other) != expected
        ckpt.restore(other)
        assert values(other) == expected


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(0, build())
        smaller = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6)])
        before = values(smaller)
        with pytest.raises(CheckpointError, match="another model"):
            ckpt.restore(smaller)
        inputs = keras.Input((4,))
        x = keras.layers.Dropout(0.4)(keras.layers.Dense(5)(inputs))
        with pytest.raises(ValueError, match="could not be loaded"):
            ckpt.restore(keras.Model(inputs, keras.layers.Dense(2)(keras.layers.BatchNormalization()(x))))
        with pytest.raises(CheckpointError, match=r"nothing for \['data'\]"):
            ckpt.restore(smaller, extra={"data": keras.metrics.Mean()})
        with pytest.raises(CheckpointError, match=r"no step 5. Found: \[0\]"):
            ckpt.restore(smaller, step=5)
        with pytest.raises(ValueError, match="built"):
            ckpt.restore(keras.Sequential([keras.layers.Dense(1)]))
        assert values(smaller) == before


class Picky:
    """Takes no state."""

    def get_state(self) -> int:
        return 3

    def set_state(self, state: Any) -> None:
        raise AssertionError

    def check_state(self, state: Any) -> None:
        raise CheckpointError(f"not {state}")


def test_extra_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        data = resumable(np.zeros((4, 2)), batch_size=2)
        extra = {"data": data, "metric": keras.metrics.Mean(), "n": 3, "picky": Picky(), "pair": [1, 2]}
        ckpt.save(0, build(), extra=extra)
        model = build()
        fill(model, 7)
        before = values(model)
        other = resumable(np.zeros((6, 2)), batch_size=2)
        other.epoch = 5
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"data": other}, "other data"),
            ({"metric": data}, "not of data"),
            ({"metric": keras.metrics.BinaryAccuracy(), "data": other}, "other data"),
            ({"metric": build()}, "another model"),
            ({"n": keras.metrics.Mean()}, "another object"),
            ({"pair": keras.metrics.Mean()}, "another object"),
            ({"n": 3}, "Nothing can take"),
            ({"picky": Picky()}, "not 3"),
        ]
        for extra, match in wrong:
            with pytest.raises(CheckpointError, match=match):
                ckpt.restore(model, extra=extra)
            assert values(model) == before
            assert (other.epoch, other.step) == (5, 0)


@pytest.mark.parametrize("dtype", ["V2", "M8[s]", "U3", [("a", "f4")], object])
def test_arrays_that_could_not_be_read_are_refused(dtype: Any, tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        with pytest.raises(hornbeam.errors.InvalidError, match="arrays of dtype"):
            ckpt.save(0, build(), extra={"odd": np.zeros(3, dtype)})
        assert ckpt.all() == []


@pytest.mark.parametrize("file", ["state.zip", "model.weights.h5"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_damage_is_told(file: str, how: str, tmp_path: Path) -> None:
    model = build()
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(0, model)
        good = ckpt.save(1, model)
        fill(model, 3)
        before = values(model)
        path = good.path / file
        data = bytearray(path.read_bytes())
        if how == "gone":
            path.unlink()
        else:
            data[len(data) // 2] ^= 0x40
            path.write_bytes(data[:-5] if how == "cut" else data)
        with pytest.raises((hornbeam.HornbeamError, OSError), match=file.replace(".", r"\.")):
            ckpt.restore(model)
        assert values(model) == before
        assert ckpt.restore(model, step=0) == 1


def test_what_crashes_leave(tmp_path: Path) -> None:
    model = build()
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, model)
    # A complete checkpoint that no manifest names, and two unfinished ones, of which one is held.
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002")
    for name in ("1" * 16, "2" * 16):
        (tmp_path / f".step-00000003.{name}.hornbeam-tmp").touch()
        (tmp_path / f".step-00000003.{name}.hornbeam-dir").mkdir()
    (tmp_path / "mine.txt").touch()
    held = hornbeam._core.FileLock(tmp_path / f".step-00000003.{'2' * 16}.hornbeam-tmp")
    assert [c.step for c in CheckpointManager(tmp_path).all()] == [1]
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.restore(model) == 2
    assert sorted(os.listdir(tmp_path)) == [
        ".lock",
        f".step-00000003.{'2' * 16}.hornbeam-dir",
        f".step-00000003.{'2' * 16}.hornbeam-tmp",
        "checkpoints.json",
        "mine.txt",
        "step-00000001",
    ]
    held.release()
    (tmp_path / "checkpoints.json").unlink()
    for use in (CheckpointManager(tmp_path).all, lambda: CheckpointManager(tmp_path).save(4, model)):
        with pytest.raises(CheckpointError, match=r"no 'checkpoints\.json'"):
            use()
    assert (tmp_path / "step-00000001").is_dir()
    for text in ("{", '{"format": 2}', '{"format": 1, "checkpoints": [{"name": "../x"}]}'):
        (tmp_path / "checkpoints.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"checkpoints\.json"):
            CheckpointManager(tmp_path).all()


def test_a_manager_that_is_dropped_gives_the_directory_back(tmp_path: Path) -> None:
    model = build()
    for asynchronous in (False, True, False):
        ckpt = CheckpointManager(tmp_path, asynchronous=asynchronous)
        ckpt.save(1, model)
        hornbeam.wait()
        del ckpt
    assert [c.step for c in CheckpointManager(tmp_path).all()] == [1]


def test_deleting_all_can_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, unlink, interrupted = build(), os.unlink, 0
    while True:
        ckpt = CheckpointManager(tmp_path / "run").__enter__()  # takes over what the interrupted one left
        ckpt.save(1, model)
        ckpt.save(2, model)
        left = interrupted

        def interrupt(*arguments: Any, **keywords: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            unlink(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", interrupt)
            try:
                ckpt.delete_all()
                break
            except KeyboardInterrupt:
                interrupted += 1
        ckpt.close()
        assert CheckpointManager(tmp_path / "run").all() == []
    assert interrupted >= 4  # two files of each checkpoint, at least
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_manifest_that_cannot_be_written(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    model = build()
    with CheckpointManager(tmp_path, asynchronous=asynchronous) as ckpt:
        ckpt.save(1, model)
        ckpt.wait()
        before = sorted(os.listdir(tmp_path))
        monkeypatch.setattr(Manifest, "write", refuse)
        for step in (1, 2):
            with pytest.raises(OSError, match="no space"):  # noqa: PT012
                ckpt.save(step, model)
                ckpt.wait()
            assert sorted(os.listdir(tmp_path)) == before
        assert [c.step for c in ckpt.all()] == [1]
        assert caplog.text.count("the asynchronous save of") == (2 if asynchronous else 0)  # a sync one raised

        monkeypatch.undo()
        original = Manifest.write

        def write_and_raise(manifest: Manifest, *, durable: bool) -> None:
            original(manifest, durable=durable)
            raise OSError("not on stable storage")

        monkeypatch.setattr(Manifest, "write", write_and_raise)
        with pytest.raises(OSError, match="stable storage"):  # noqa: PT012
            ckpt.save(3, model)
            ckpt.wait()
        ckpt.latest().check()
        assert [c.step for c in ckpt.all()] == [1, 3]


def test_a_manifest_that_goes_while_the_directory_is_held(tmp_path: Path) -> None:
    model = build()
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, model)
        (tmp_path / "checkpoints.json").unlink()
        for use in (ckpt.all, lambda: ckpt.save(2, model)):
            with pytest.raises(CheckpointError, match=r"no 'checkpoints\.json'"):
                use()
    assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000001"]


def test_a_reader_whose_checkpoint_is_deleted_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    with CheckpointManager(tmp_path, keep_last=1) as ckpt:
        ckpt.save(1, model)
        reader = CheckpointManager(tmp_path)
        original = statefile.read

        def read(path: Path) -> Any:
            if "step-00000001" in str(path):
                ckpt.save(2, model)
                ckpt._cleaner.join()
            return original(path)

        monkeypatch.setattr(statefile, "read", read)
        assert reader.restore(build()) == 3
        monkeypatch.undo()
        stale = reader.latest()
        ckpt.save(3, model)
        ckpt._cleaner.join()
        with pytest.raises(CheckpointError, match="missing"):
            stale.check()


def test_a_forked_child_is_no_writer(tmp_path: Path) -> None:
    code = r"""
import os, sys, keras
from hornbeam.checkpoint import CheckpointManager
from hornbeam.errors import CheckpointError
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
ckpt = CheckpointManager(sys.argv[1]).__enter__()
ckpt.save(0, model)
child = os.fork()
if child == 0:
    try:
        ckpt.save(1, model)
    except CheckpointError:
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
ckpt.save(2, model)  # the lock is still ours
ckpt.close()
with CheckpointManager(sys.argv[1]) as again:
    assert [c.step for c in again.all()] == [0, 2]
"""
    run(code, tmp_path)


def test_a_forked_child_does_not_wait_for_its_parent(tmp_path: Path) -> None:
    code = r"""
import faulthandler, os, sys, threading, keras
from hornbeam.base import writer
from hornbeam.checkpoint import CheckpointManager
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
release, run = threading.Event(), writer._Job.run
writer._Job.run = lambda job: release.wait() and run(job)
with CheckpointManager(sys.argv[1], asynchronous=True) as ckpt:
    ckpt.save(0, model)
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(30, exit=True)
        ckpt.wait()
        assert ckpt.restore(model) == 0
        ckpt.close()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    release.set()
    ckpt.wait()
    assert ckpt.restore(model) == 1
"""
    run(code, tmp_path)


def test_a_forked_child_removes_nothing_of_its_parent(tmp_path: Path) -> None:
    code = r"""
import gc, os, sys
from hornbeam import _core
directory = _core.Directory(sys.argv[1] + "/d", ["a"])
open(os.path.join(directory.path, "a"), "w").close()
for leave in (lambda: directory.__exit__(), lambda: globals().pop("directory")):
    child = os.fork()
    if child == 0:
        leave()
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
assert len(os.listdir(sys.argv[1])) == 2
directory.commit()
assert os.listdir(sys.argv[1]) == ["d"] and os.listdir(sys.argv[1] + "/d") == ["a"]
"""
    run(code, tmp_path)


def run(code: str, *arguments: Any) -> None:
    done = script(code, *arguments, timeout=3000 if SOAK else 300, KERAS_BACKEND="numpy")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"keep_last": 0}, "keep_last"),
        ({"keep_best": 2}, "monitor"),
        ({"mode": "auto"}, "mode"),
    ],
)
def test_arguments(arguments: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        CheckpointManager(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_arguments_of_save(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, keep_best=1, monitor="loss") as ckpt:
        for step in (-1, True, 1.0):
            with pytest.raises(ValueError, match="step"):
                ckpt.save(step, build())
        with pytest.raises(ValueError, match="loss"):
            ckpt.save(1, build())
        assert ckpt.all() == []
    with pytest.raises(ValueError, match="monitor"):
        CheckpointManager(tmp_path).best()
    assert json.loads((tmp_path / "checkpoints.json").read_text()) == {"format": 1, "checkpoints": []}


def test_asynchronous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, note = build(), np.zeros(3)
    with CheckpointManager(tmp_path, asynchronous=True, keep_last=2) as ckpt:
        for step in range(4):
            fill(model, step)
            note[:] = step
            assert ckpt.save(step, model, extra={"note": note}) is None
            fill(model, -1)  # what comes after the call is in no checkpoint
            note[:] = -1
        ckpt.wait()
        assert [c.step for c in ckpt.all()] == [2, 3]
        for step in (2, 3):
            assert ckpt.restore(model, step=step) == step + 1
            assert all((np.asarray(v) == step).all() for v in model.get_weights())
            assert (ckpt.extra["note"] == step).all()

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError("no space")

        monkeypatch.setattr(statefile, "write", refuse)
        ckpt.save(4, model)
        with pytest.raises(OSError, match="no space"):
            ckpt.wait()
        ckpt.save(5, model)
        with pytest.raises(OSError, match="no space"):
            ckpt.save(6, model)
        monkeypatch.undo()
        assert [c.step for c in ckpt.all()] == [2, 3]
        ckpt.save(7, model)
    assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoints.json", "step-00000003", "step-00000007"]


KILLED = r"""
import os, random, signal, sys, time
import keras, numpy as np
from hornbeam.checkpoint import CheckpointManager
from support.kills import kill

root, kills = sys.argv[1], int(sys.argv[2])
inputs = keras.Input((500,))
model = keras.Model(inputs, keras.layers.Dense(300)(keras.layers.Dense(2000)(inputs)))
keep = {"keep_last": 2, "keep_best": 1, "keep_every": 5, "monitor": "m", "asynchronous": sys.argv[3] == "True"}

def fill(step):
    for variable in model.variables:
        variable.assign(np.full(variable.shape, step, "float32"))

def train(ckpt, step):
    fill(step)
    ckpt.save(step, model, metrics={"m": -(step % 7)}, extra={"step": step})
    ckpt.wait()

rng = random.Random(5)
started = time.perf_counter()
with CheckpointManager(root, **keep) as ckpt:
    train(ckpt, 0)
once, step, seen = time.perf_counter() - started, 0, []
for _ in range(kills):
    def work(tell):
        global step
        with CheckpointManager(root, **keep) as ckpt:
            while True:
                step += 1
                tell(b"start")
                train(ckpt, step)
                tell(b"%d" % step)

    words = kill(work, rng, once, starts=3)
    told = int([b"%d" % step, *(word for word in words if word != b"start")][-1])
    reader = CheckpointManager(root, **keep)  # before anybody clears up
    fill(-1)
    step = reader.restore(model) - 1
    assert step in (told, told + 1), (step, told)
    for checkpoint in reader.all():
        reader.restore(model, step=checkpoint.step)
        assert reader.extra == {"step": checkpoint.step}
        assert all((np.asarray(v.value) == checkpoint.step).all() for v in model.variables)
    seen.append(len(os.listdir(root)) - 2 - len(reader.all()))
    with CheckpointManager(root, **keep) as ckpt:
        pass
    assert sorted(os.listdir(root)) == sorted([".lock", "checkpoints.json", *(c.path.name for c in reader.all())])
assert sum(n > 0 for n in seen) >= kills // 10, seen  # some hit in the middle of something
"""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_any_moment(asynchronous: bool, tmp_path: Path) -> None:
    run(KILLED, tmp_path, 300 if SOAK else 20, asynchronous)
