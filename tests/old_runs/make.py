"""Trainings that commit 5411634 began and did not end.

`KERAS_BACKEND=… python make.py write`, with that commit's hornbeam and Keras 3.15.1, makes `BACKEND.tar.xz`. A process
trains until it kills itself with SIGKILL at a chosen moment. Of every such run the archive has what it left (`run/`),
what that commit's readers said of it (`said.json`), what became of it when that commit went on (`end.json`), and the
values that a training without a kill ends with (`end.npz`).

All numbers of the trainings are small multiples of a power of two, so that no sum is rounded: every processor, and
every order of additions, gives the same bits.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
from keras import layers

from hornbeam.callbacks import BackupAndRestore, ModelCheckpoint, best_checkpoint, latest_checkpoint
from hornbeam.checkpoint import CheckpointManager
from hornbeam.data import resumable

HERE = Path(__file__).parent
ROWS = 16
#: What callbacks are told of each epoch, and the manager of each step.
SCORES = [4.0, 2.0, 3.0, 1.0, 2.5, 3.5, 0.5, 5.0, 1.5, 4.5, 0.75, 6.0]

Values = dict[str, np.ndarray]


@keras.saving.register_keras_serializable("old_runs")
def product(y: Any, p: Any) -> Any:
    """A loss whose gradient is made of the data alone: nothing is rounded."""
    return keras.ops.mean(y * p, axis=-1)


class Scores(keras.callbacks.Callback):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs["score"] = SCORES[epoch]


class Breaks(keras.callbacks.Callback):
    """Raises at the first batch of an epoch that this process has begun with an earlier one."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.at, self.now, self.first = epoch, -1, -1

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.now = epoch
        self.first = epoch if self.first < 0 else self.first

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.now == self.at > self.first:
            raise RuntimeError("no more memory")


def arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.integers(-1, 2, (ROWS, 4)).astype("float32"), rng.integers(-1, 2, (ROWS, 2)).astype("float32")


def build(*, dropout: bool) -> Any:
    keras.backend.clear_session()  # names as in a process of its own
    keras.utils.set_random_seed(1)  # before every start, as a script has it
    inner = [layers.Dropout(0.5)] if dropout else []
    model = keras.Sequential([keras.Input((4,)), *inner, layers.Dense(2, kernel_initializer="ones")])
    model.compile(keras.optimizers.SGD(0.25, momentum=0.5), product)
    return model


def values(model: Any, **others: Any) -> Values:
    """Every variable of the model and its optimizer, and whatever else is told."""
    variables = [*model.variables, *model.optimizer.variables]
    found = {f"{i:02d}": np.asarray(keras.ops.convert_to_numpy(v)) for i, v in enumerate(variables)}
    return found | {key: np.asarray(value) for key, value in others.items()}


def drawn() -> dict[str, Any]:
    """The random state: what is drawn next."""
    ours = keras.ops.convert_to_numpy(keras.random.randint((4,), 0, 1 << 20))
    return {"python": random.random(), "numpy": np.random.random(), "keras": ours}


# ---- ModelCheckpoint ----


def checkpointed(pattern: str, *, weights: bool = False, breaks: bool = False, **arguments: Any) -> Any:
    """A training of five epochs of two batches that goes on from its latest checkpoint."""

    def train(root: Path) -> Values:
        model, (x, y) = build(dropout=False), arrays()
        latest = latest_checkpoint(root / pattern)
        if latest is not None and weights:
            model.optimizer.build(model.trainable_variables)
            model.load_weights(latest)
        elif latest is not None:
            model = keras.models.load_model(latest)
        done = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
        if done % 2:  # an epoch was left after its first batch
            model.train_on_batch(x[8:], y[8:])
        saver = ModelCheckpoint(root / pattern, monitor="score", mode="min", save_weights_only=weights, **arguments)
        others = [Breaks(2)] if breaks and latest is None else []
        try:
            model.fit(
                x, y, batch_size=8, initial_epoch=(done + 1) // 2, epochs=5, shuffle=False, verbose=0,
                callbacks=[Scores(), *others, saver],
            )  # fmt: skip
        except RuntimeError:
            os.kill(os.getpid(), signal.SIGKILL)
        return values(model)

    def said(root: Path) -> Any:
        found = {"latest": latest_checkpoint(root / pattern), "best": best_checkpoint(root / pattern)}
        return {key: None if path is None else os.path.relpath(path, root) for key, path in found.items()}

    return train, said


# ---- CheckpointManager ----


def loop(**arguments: Any) -> Any:
    """A training loop that saves after every batch: twelve steps."""

    def train(root: Path) -> Values:
        model, noise = build(dropout=True), keras.random.SeedGenerator(3)
        data = resumable(arrays(), batch_size=4, shuffle=True, seed=2)
        extra = {"data": data, "noise": noise}
        with CheckpointManager(root / "ckpt", monitor="score", **arguments) as ckpt:
            step = ckpt.restore(model, extra=extra)
            sums = ckpt.extra.get("sums", {"x": np.zeros((), "float32"), 7: ("no batch", b"")})
            while data.epoch < 3:
                for x, y in data:
                    signs = keras.ops.convert_to_numpy(keras.random.randint(x.shape, 0, 2, seed=noise)).astype(
                        "float32"
                    )
                    x = x * (2 * signs - 1) * np.random.choice([-1.0, 1.0]) * random.choice([-1.0, 1.0])
                    model.train_on_batch(x.astype("float32"), y)
                    sums = {"x": sums["x"] + x.sum(dtype="float32"), 7: ("after", bytes([step]))}
                    metrics = {"score": SCORES[step], "worst": float("inf"), "none": float("nan")}
                    ckpt.save(step, model, metrics=metrics, extra={**extra, "sums": sums})
                    step += 1
        state = keras.ops.convert_to_numpy(noise.state)
        return values(model, noise=state, sums=sums["x"], step=sums[7][1][0], **drawn())

    def said(root: Path) -> Any:
        ckpt = CheckpointManager(root / "ckpt", monitor="score", **arguments)
        latest, best = ckpt.latest(), ckpt.best()
        for checkpoint in ckpt.all():
            checkpoint.check()
        return {
            "latest": None if latest is None else latest.path.name,
            "best": None if best is None else best.path.name,
            "all": [[c.step, c.path.name, c.bytes, c.files, c.crc, repr(c.metrics)] for c in ckpt.all()],
        }

    return train, said


# ---- BackupAndRestore ----


def backed_up(kind: str = "arrays", **arguments: Any) -> Any:
    """A training of three epochs of four batches."""

    def data() -> dict[str, Any]:
        x, y = arrays()
        if kind == "arrays":
            return {"x": x, "y": y, "batch_size": 4}
        if kind == "resumable":
            return {"x": resumable((x, y), batch_size=4, shuffle=True, seed=2)}
        import tensorflow as tf

        return {"x": resumable(tf.data.Dataset.from_tensor_slices((x, y)).shuffle(8, seed=5).batch(4))}

    def train(root: Path) -> Values:
        model, stop = build(dropout=True), keras.callbacks.EarlyStopping(monitor="score", mode="min", patience=5)
        plateau = keras.callbacks.ReduceLROnPlateau(monitor="score", mode="min", factor=0.5, patience=0)
        best = ModelCheckpoint(root / "best.keras", monitor="score", mode="min", save_best_only=True, asynchronous=True)
        backup = BackupAndRestore(root / "backup", delete_checkpoint=False, **arguments)
        callbacks = [Scores(), backup, stop, plateau, best]
        history = model.fit(**data(), epochs=3, verbose=0, callbacks=callbacks).history
        told = {"wait": stop.wait, "best": stop.best, "cooldown": plateau.wait, "loss": history["loss"][-1]}
        return values(model, **told, **drawn())

    def said(root: Path) -> Any:
        manager = CheckpointManager(root / "backup", keep_last=1)
        latest, best = manager.latest(), best_checkpoint(root / "best.keras")
        return {"latest": None if latest is None else latest.path.name, "best": best and os.path.relpath(best, root)}

    return train, said


#: Name → the training, and where it is killed: at the n-th call of a function of 5411634, before or after its work.
RUNS: dict[str, tuple[Any, tuple[str, int, str] | None]] = {
    "checkpoints-noted": (
        checkpointed("run/{epoch:02d}-{score:.2f}.keras", keep_last=2, keep_best=1, keep_every=4),
        ("hornbeam._ledger:Ledger.begin", 4, "after"),
    ),
    "checkpoints-unconfirmed": (
        checkpointed("run/{epoch:02d}-{score:.2f}.keras", keep_last=2, keep_best=1, keep_every=4),
        ("hornbeam._ledger:Ledger.confirm", 4, "before"),
    ),
    "checkpoints-undeleted": (
        checkpointed("run/{epoch}/all.weights.h5", weights=True, keep_last=1, keep_best=1),
        ("hornbeam._ledger:Ledger._delete", 4, "before"),
    ),
    "checkpoints-queued": (
        checkpointed("run/{epoch:02d}.keras", keep_last=2, asynchronous=True),
        ("hornbeam._model_checkpoint:ModelCheckpoint._confirm", 2, "queued"),
    ),
    "best-noted": (
        checkpointed("best.keras", save_best_only=True, remember=True),
        ("hornbeam._ledger:Ledger.begin", 2, "after"),
    ),
    "best-unconfirmed": (
        checkpointed("best.weights.h5", weights=True, save_best_only=True, asynchronous=True),
        ("hornbeam._ledger:Ledger.confirm", 2, "before"),
    ),
    "one-file": (
        checkpointed("last.keras", remember=True),
        ("hornbeam._ledger:Ledger.confirm", 3, "after"),
    ),
    "interrupted": (
        checkpointed("run/{epoch:02d}.keras", breaks=True, keep_last=2, keep_best=1, save_on_exception=True),
        None,
    ),
    "manager-half-written": (
        loop(keep_last=2, keep_best=1, keep_every=4),
        ("hornbeam._statefile:write", 8, "before"),
    ),
    "manager-unnamed": (
        loop(keep_last=2, keep_best=1, save_weights_only=False),
        ("hornbeam.checkpoint:CheckpointManager._commit", 6, "before"),
    ),
    "manager-undeleted": (
        loop(keep_last=1, keep_best=1, asynchronous=True),
        ("hornbeam.checkpoint:_remove", 6, "before"),
    ),
    "backup-in-epoch": (
        backed_up("resumable", save_freq=1, double_checkpoint=True),
        ("hornbeam.checkpoint:CheckpointManager._commit", 7, "after"),
    ),
    "backup-by-epoch": (
        backed_up("arrays", seed=7),
        ("hornbeam._backup:BackupAndRestore.on_train_batch_begin", 7, "before"),
    ),
    "backup-asynchronous": (
        backed_up("resumable", save_freq=2, asynchronous=True),
        ("hornbeam._statefile:write", 4, "before"),
    ),
    "backup-tfdata": (
        backed_up("tf.data", save_freq=1),
        ("hornbeam._statefile:write", 7, "after"),
    ),
}


def names() -> list[str]:
    """The runs of this backend."""
    return [name for name in RUNS if name != "backup-tfdata" or keras.backend.backend() == "tensorflow"]


# ---- what a directory holds ----


def listing(root: Path) -> dict[str, Any]:
    """Every file and directory, and what the accounts say, without what no two runs have in common: times, sizes of
    files with times inside, identities of files."""
    accounts = {}
    for path in sorted(root.rglob("*checkpoints.json")):
        content = json.loads(path.read_text())
        for row in [*content["checkpoints"], *[row for row in [content.get("interrupted")] if row]]:
            if isinstance(row, dict):
                row.update(time=0, bytes=0, crc=0, files=sorted(row["files"]))
            else:
                row[3] = 0
        for pending in content.get("pending", []):
            pending["entry"][3], pending["before"] = 0, None
        accounts[str(path.relative_to(root))] = content
    return {"files": sorted(str(path.relative_to(root)) for path in root.rglob("*")), "accounts": accounts}


def resume(root: Path, name: str, results: Path) -> None:
    """Goes on with a training; what it ends with goes to `results`."""
    (train, said), _ = RUNS[name]
    (results / "said.json").write_text(json.dumps(said(root), indent=1))
    found = train(root)
    end = listing(root) | {key: value for key, value in said(root).items() if key in ("latest", "best")}
    (results / "end.json").write_text(json.dumps(end, indent=1))
    np.savez(results / "end.npz", **found)


# ---- archives ----


def identity(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_ino, found.st_mtime_ns, found.st_size]


def identities(root: Path) -> dict[str, list[int]]:
    """What accounts know files by."""
    return {str(p.relative_to(root)): identity(p) for p in sorted(root.rglob("*")) if p.is_file()}


def unpack(archive: Path, root: Path) -> None:
    """Unpacks the runs of an archive. Accounts know files by inode and time: they are told those of the new files."""
    with tarfile.open(archive) as file:
        file.extractall(root, filter="data")
    for run in root.iterdir():
        inodes = {}
        for name, (inode, time_ns, _) in json.loads((run / "identities.json").read_text()).items():
            os.utime(run / "run" / name, ns=(time_ns, time_ns))
            inodes[inode] = identity(run / "run" / name)[0]
        for path in (run / "run").rglob(".*.checkpoints.json"):
            content = json.loads(path.read_text())
            for pending in content["pending"]:
                if pending["before"] is not None:
                    pending["before"][0] = inodes.get(pending["before"][0], -1)
            path.write_text(json.dumps(content, indent=1))


# ---- writing, with 5411634 ----


def kill_at(place: str, number: int, when: str) -> None:
    """Has this process kill itself at the n-th call of a function."""
    module, _, inside = place.partition(":")
    __import__(module)
    owner: Any = sys.modules[module]
    *outer, last = inside.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), [0]

    def killing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number and when != "after":
            while when == "queued" and len(args[0]._account()._pending) < 2:  # the next save is noted, too
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, last, killing)


def forked(work: Callable[[], Any]) -> int:
    """Runs something in a child; the signal that killed it, or 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def write(name: str, target: Path) -> None:
    """Leaves in `target` what the archive has of a run."""
    (train, _), kill = RUNS[name]
    run, whole, resumed = target / "run", target / "whole", target / "resumed"
    for path in (run, whole / "run", resumed):
        path.mkdir(parents=True)

    def begin() -> None:
        if kill is not None:
            kill_at(*kill)
        train(run)

    def uninterrupted() -> None:
        if kill is None:  # without what ends it
            checkpointed("run/{epoch:02d}.keras", keep_last=2, keep_best=1, save_on_exception=True)[0](whole / "run")
        np.savez(whole / "end.npz", **train(whole / "run"))

    assert forked(begin) == signal.SIGKILL, name
    assert forked(uninterrupted) == 0, name
    (target / "identities.json").write_text(json.dumps(identities(run)))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as file:
        file.add(run, "run")
    assert forked(lambda: resume(run, name, resumed)) == 0, name
    shutil.rmtree(run)
    packed.seek(0)
    with tarfile.open(fileobj=packed) as file:
        file.extractall(target, filter="data")
    with np.load(whole / "end.npz") as wanted, np.load(resumed / "end.npz") as found:
        assert wanted.files == found.files, name
        for key in wanted.files:
            assert wanted[key].tobytes() == found[key].tobytes(), (name, key)
            assert not key.isdigit() or np.all(wanted[key] * 2.0**18 % 1 == 0), (name, key)
    for path in (whole / "end.npz", resumed / "said.json", resumed / "end.json"):
        shutil.copy(path, target)
    shutil.rmtree(whole)
    shutil.rmtree(resumed)


def main() -> None:
    backend = keras.backend.backend()
    with tempfile.TemporaryDirectory() as folder:
        for name in names():
            write(name, Path(folder) / name)
            print(name, (Path(folder) / name / "said.json").read_text(), file=sys.stderr)
        with tarfile.open(HERE / f"{backend}.tar.xz", "w:xz", preset=9) as archive:
            for name in names():
                archive.add(Path(folder) / name, name, filter=plain)


def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        main()
    else:  # resume ROOT, where the runs were unpacked
        for run_name in names():
            place = Path(sys.argv[2]) / run_name
            (place / "now").mkdir()
            resume(place / "run", run_name, place / "now")
