"""Trainings of several processes: who they are, how they meet, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import pytest

import hornbeam
from hornbeam.base import barrier
from hornbeam.base.barrier import Group, Place
from hornbeam.callbacks import ModelCheckpoint
from hornbeam.checkpoint import CheckpointManager
from hornbeam.errors import CheckpointError, UnsupportedError
from hornbeam.training import processes as processes_

BACKEND = keras.backend.backend()


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({}, (0, 1)),
        ({"cluster": {"worker": ["a", "b", "c"]}, "task": {"type": "worker", "index": 2}}, (2, 3)),
        ({"cluster": {"worker": ["a", "b"], "chief": ["c"]}, "task": {"type": "worker", "index": 0}}, (1, 3)),
        ({"cluster": {"worker": ["a", "b"], "chief": ["c"]}, "task": {"type": "chief", "index": 0}}, (0, 3)),
        ({"cluster": {"worker": ["a", "b"]}, "task": {"type": "evaluator", "index": 0}}, (-1, 2)),
        ({"cluster": {"worker": ["a"], "chief": ["b"], "ps": ["c"]}, "task": {"type": "chief", "index": 0}}, (0, 1)),
        ({"cluster": {"worker": ["a"], "chief": ["b"], "ps": ["c"]}, "task": {"type": "worker", "index": 0}}, (-1, 1)),
    ],
)
def test_tf_config(config: Any, place: tuple[int, int]) -> None:
    assert processes_._from_tf_config(json.dumps(config)) == Place(*place)


def test_tf_config_that_cannot_be() -> None:
    for text in ("{", "[]", '{"task": {"index": "x"}}'):
        with pytest.raises(CheckpointError, match="malformed"):
            processes_._from_tf_config(text)


def test_an_evaluator_only_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(4, model)
    monkeypatch.setattr(processes_, "current", lambda: Place(-1, 2))
    assert CheckpointManager(tmp_path).restore(model) == 5
    with pytest.raises(CheckpointError, match="only reads"):
        CheckpointManager(tmp_path).save(5, model)


def together(count: int, work: Any) -> list[Any]:
    """Runs `work(rank)` for every rank at once."""
    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(work, rank) for rank in range(count)]]


def test_they_meet(tmp_path: Path) -> None:
    arrived = [0, 0, 0]

    def work(rank: int) -> None:
        group = Group(tmp_path, Place(rank, 3), 30)
        for turn in range(1, 6):
            arrived[rank] = turn
            group.meet()
            assert min(arrived) >= turn

    together(3, work)
    arrived[:] = [0, 0, 0]
    together(3, work)  # what the first run left is no answer in the second


def test_whoever_waits_in_vain_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Process 0 of 3 .* to join: \[1, 2\]"):
        Group(tmp_path / "a", Place(0, 3), 0.05)
    with pytest.raises(CheckpointError, match=r"Process 1 of 2 .* to lead: \[0\]"):
        Group(tmp_path / "b", Place(1, 2), 0.05)

    def work(rank: int) -> None:
        group = Group(tmp_path / "c", Place(rank, 2), 10)
        if rank == 0:
            group.meet(failed="OSError: no space")
        else:
            with pytest.raises(CheckpointError, match="process 0 could not save: OSError: no space"):
                group.meet()

    together(2, work)


def test_only_the_chief_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = threading.local()
    monkeypatch.setattr(processes_, "current", lambda: Place(local.rank, 2))
    models = [keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]) for _ in range(2)]
    opened = threading.Barrier(2, timeout=30)

    def work(rank: int) -> list[int]:
        local.rank, model = rank, models[rank]
        with CheckpointManager(tmp_path / "c", keep_last=2, timeout=30) as ckpt:
            assert (ckpt._lock is not None) == (rank == 0)
            for step in range(3):
                saved = ckpt.save(step, model, extra={"rank": rank})
                assert saved.step == step
                saved.check()
                opened.wait()  # the chief does not save the next one while the files are compared
            assert ckpt.restore(model) == 3
            assert ckpt.extra == {"rank": 0}
            found = [c.step for c in ckpt.all()]
            opened.wait()
            ckpt.delete_all()
        return found

    assert together(2, work) == [[1, 2], [1, 2]]
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("how", ["close", "delete_all"])
def test_a_directory_is_used_again_and_again(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = threading.local()
    monkeypatch.setattr(processes_, "current", lambda: Place(local.rank, 2))
    original = shutil.rmtree
    models = [keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]) for _ in range(2)]
    done = [0, 0]

    def watched(path: Any, *args: Any, **kwargs: Any) -> None:
        assert min(done) == max(done), "the other one did not wait"
        original(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)

    def work(rank: int) -> None:
        local.rank = rank
        for turn in range(5):
            manager = CheckpointManager(tmp_path / "c", keep_last=None, timeout=30)
            manager.save(turn, models[rank])
            assert turn in [c.step for c in manager.all()]
            getattr(manager, how)()
            done[rank] += 1

    together(2, work)


def test_nobody_saves_before_all_have_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = threading.local()
    models = [keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]) for _ in range(2)]
    with CheckpointManager(tmp_path / "c") as ckpt:
        ckpt.save(0, models[0])
    monkeypatch.setattr(processes_, "current", lambda: Place(local.rank, 2))

    def work(rank: int) -> list[int]:
        local.rank = rank
        with CheckpointManager(tmp_path / "c", timeout=30) as ckpt:
            end = time.monotonic() + 30
            while rank == 1 and barrier._read(ckpt._group._file(0)).get("met", 0) < 1:  # the chief is in `save`
                assert time.monotonic() < end
            start = ckpt.restore(models[rank])
            ckpt.save(start, models[rank])
        return [start]

    assert together(2, work) == [[1], [1]]


def test_a_failing_save_fails_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = threading.local()
    monkeypatch.setattr(processes_, "current", lambda: Place(local.rank, 2))
    models = [keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]) for _ in range(2)]

    def work(rank: int) -> None:
        local.rank, model = rank, models[rank]
        with CheckpointManager(tmp_path, timeout=30) as ckpt:
            kind = hornbeam.errors.InvalidError if rank == 0 else CheckpointError
            with pytest.raises(kind, match="cannot hold 'object'"):
                ckpt.save(0, model, extra={"bad": object()})
            ckpt.save(1, model)
            assert [c.step for c in ckpt.all()] == [1]

    together(2, work)


class Part:
    """Stands for an array of which this process has a part."""

    is_fully_addressable = False

    def __init__(self, path: str, replicated: bool) -> None:
        self.path, self.is_fully_replicated = path, replicated
        self.value = self


def test_arrays_of_others_are_refused() -> None:
    processes_.refuse_remote([Part("a", True)])
    with pytest.raises(UnsupportedError, match=r"yet: dense/kernel, dense_1/kernel$"):
        processes_.refuse_remote([Part("dense/kernel", False), Part("a", True), Part("dense_1/kernel", False)])


def processes(script: str, *arguments: Any, environments: list[dict[str, str]]) -> list[str]:
    source = Path(hornbeam.__file__).parents[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(source), "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
    results = [process.communicate(timeout=120) for process in running]
    assert [p.returncode for p in running] == [0] * len(running), [error[-2000:] for _, error in results]
    return [out for out, _ in results]


WORKER = r"""
import sys
import keras, numpy as np
from hornbeam.callbacks import BackupAndRestore
from hornbeam.checkpoint import CheckpointManager
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
with CheckpointManager(sys.argv[1] + "/a", timeout=60) as ckpt:
    start = ckpt.restore(model)
    for step in range(start, start + 2):
        model.train_on_batch(np.ones((4, 2)), np.ones((4, 1)))
        ckpt.save(step, model)
    print([c.step for c in ckpt.all()], ckpt._place)
saver = BackupAndRestore(sys.argv[1] + "/b", seed=1)
model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=2, verbose=0, callbacks=[saver])
"""


@pytest.mark.backend("tensorflow", reason="TF_CONFIG is TensorFlow's")
def test_two_workers_of_tf_config(tmp_path: Path) -> None:
    cluster = {"worker": ["localhost:1", "localhost:2"]}
    configs = [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": rank}}) for rank in range(2)]
    out = processes(WORKER, tmp_path, environments=[{"TF_CONFIG": config} for config in configs])
    assert out == [f"[0, 1] Place(rank={rank}, count=2)\n" for rank in range(2)]
    assert sorted(os.listdir(tmp_path)) == [".a.processes", ".b.processes", "a"]


TRAINING = r"""
import json, os, sys, time
import keras, numpy as np
from hornbeam.base import barrier
from hornbeam.training import processes
from hornbeam.callbacks import ModelCheckpoint
from hornbeam.errors import CheckpointError
from hornbeam.saving import load_model

rank = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
if keras.backend.backend() != "tensorflow":
    processes.current = lambda: processes.Place(rank, 2)
os.chdir(sys.argv[1])
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")

class Late(ModelCheckpoint):
    # The chief saves when the other one has come to wait for it.
    fails = False

    def _write(self, path, *rest):
        end = time.monotonic() + 60
        while barrier._read(self._group._file(1)).get("met", 0) <= self._group._met:
            assert time.monotonic() < end, "nobody waits"
            time.sleep(0.002)
        assert not os.path.exists(path)
        if self.fails:
            raise OSError("no space")
        super()._write(path, *rest)

class Named(Late):
    def _get_file_path(self, epoch, batch, logs):
        return f"m-{turn}-{epoch}.keras"

class Look(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        both = zip(load_model(f"m-{turn}-{epoch}.keras").get_weights(), model.get_weights())
        seen.append(all((a == b).all() for a, b in both))

def fit(*callbacks):
    model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=2, verbose=0, callbacks=list(callbacks))

seen = []
for turn in range(3):  # three trainings, which meet at the same place
    fit(Named("m-{epoch}.keras", keep_every=1, remember=False, timeout=60), Look())
print(seen)
Late.fails = True
try:
    fit(Late("f.keras", keep_last=1, timeout=60))
except (CheckpointError, OSError) as error:
    print(type(error).__name__, error)
later = ModelCheckpoint("a-{epoch}.keras", asynchronous=True, timeout=60)
fit(later)
print(os.path.exists("a-1.keras"), os.path.exists("a-2.keras"), len(later.history))
"""


@pytest.mark.trains
def test_all_wait_for_the_chief_of_a_training(tmp_path: Path) -> None:
    cluster = {"worker": ["localhost:1", "localhost:2"]}
    configs = [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": rank}}) for rank in range(2)]
    out = processes(TRAINING, tmp_path, environments=[{"TF_CONFIG": config} for config in configs])
    told = ["OSError no space", "CheckpointError process 0 could not save: OSError: no space"]
    for text, failure, saves in zip(out, told, (2, 0), strict=True):
        assert text.splitlines() == [str([True] * 6), failure, f"True True {saves}"]
    names = [f"m-{turn}-{epoch}.keras" for turn in range(3) for epoch in range(2)]
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["a-1.keras", "a-2.keras", *names]


@pytest.mark.trains
def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    monkeypatch.setattr(processes_, "current", lambda: Place(1, 2))

    def begin(**arguments: Any) -> None:
        callback = ModelCheckpoint(tmp_path / "m.keras", **arguments)
        callback.set_model(model)
        callback.on_train_begin()
        assert callback._group is None
        assert not list(tmp_path.iterdir())

    begin()
    begin(keep_last=1, timeout=None)
    with pytest.raises(CheckpointError, match=r"Process 1 of 2 has waited 0\.05 s at .*\.m\.keras\.processes"):
        begin(keep_last=1, timeout=0.05)
    with pytest.raises(ValueError, match="`timeout` must be more than 0"):
        ModelCheckpoint(tmp_path / "m.keras", timeout=0)


JAX = r"""
import os, sys
import jax
rank = int(os.environ["RANK"])
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, rank)
import keras, numpy as np
from hornbeam.checkpoint import CheckpointManager
from hornbeam.errors import UnsupportedError
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
with CheckpointManager(sys.argv[1], timeout=60) as ckpt:
    ckpt.save(0, model)
    print(ckpt._place, [c.step for c in ckpt.all()])
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    kernel = model.layers[0].kernel
    kernel._value = jax.make_array_from_callback((4, 4), sharding, lambda i: np.ones((4, 4), "float32")[i])
    try:
        ckpt.save(1, model)
    except UnsupportedError as error:
        print(str(error).split(": ")[1] == kernel.path)
"""


@pytest.mark.backend("jax", reason="JAX's own processes")
def test_two_processes_of_jax(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = processes(JAX, tmp_path, port, environments=[{"RANK": str(rank)} for rank in range(2)])
    assert out == [f"Place(rank={rank}, count=2) [0]\nTrue\n" for rank in range(2)]


DISTRIBUTED = r"""
import os, sys
import jax
rank = int(os.environ["RANK"])
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, rank)
import keras, numpy as np
from hornbeam.values import tensors
from hornbeam.callbacks import BackupAndRestore, ModelCheckpoint
from hornbeam.checkpoint import CheckpointManager
from hornbeam.saving import load_model
os.chdir(sys.argv[1])
keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
x, y = np.random.default_rng(0).random((2, 16, 4), "float32")

def make():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(4)])
    model.compile("adam", "mse")
    return model

def fit(model, epochs, *callbacks):
    model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, callbacks=list(callbacks))

def values(model):
    return [np.array(v._value).tolist() for v in [*model.weights, *model.optimizer.variables]]

class Stops(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise KeyError

model = make()
for asynchronous in (False, True):
    name = f"{asynchronous}.keras"
    fit(model, 2, ModelCheckpoint(name, asynchronous=asynchronous, keep_last=1, timeout=60))
    loaded = load_model(name)
    print(values(loaded) == values(model), not loaded.layers[0].kernel._value.is_fully_addressable)

views = [tensors.view(v) for v in model.variables]
before = [view.copy() for view in views]
with CheckpointManager("c", asynchronous=True, timeout=60) as ckpt:
    expected = values(model)
    ckpt.save(7, model)
    fit(model, 2)
    print(all((view == value).all() for view, value in zip(views, before)), expected != values(model))
    print(ckpt.restore(model), expected == values(model))

whole, part, resumed = make(), make(), make()
fit(whole, 4, BackupAndRestore("whole", seed=1))
try:
    fit(part, 4, BackupAndRestore("b", seed=1), Stops())
except KeyError:
    fit(resumed, 4, BackupAndRestore("b", seed=1))
print(values(resumed) == values(whole))
"""


@pytest.mark.backend("jax", reason="JAX's own processes")
def test_data_parallel_processes_of_jax(tmp_path: Path) -> None:
    """Their variables are on the devices of both processes: each has a copy, and only the chief saves."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = processes(DISTRIBUTED, tmp_path, port, environments=[{"RANK": str(rank)} for rank in range(2)])
    lines = ["True True", "True True", "True True", "8 True", "True"]
    assert [text.splitlines()[-len(lines) :] for text in out] == [lines, lines]  # the first is Gloo's
