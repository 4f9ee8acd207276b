"""`CheckpointManager`: a directory of checkpoints that is whole at any moment, for training loops of one's own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from hornbeam import _core
from hornbeam.base import locations, retention, writer
from hornbeam.base.counters import logger
from hornbeam.base.model_file import File
from hornbeam.base.settings import options
from hornbeam.base.writer import Handle
from hornbeam.errors import CheckpointError
from hornbeam.flows.requests import LoadRequest, SaveRequest
from hornbeam.formats import operations
from hornbeam.training import processes, statefile, training_state
from hornbeam.training.copies import BeginsAnew
from hornbeam.values import randomness

__all__ = ["Checkpoint", "CheckpointManager"]

_MANIFEST, _LOCK, _STATE = "checkpoints.json", ".lock", "state.zip"
_WEIGHTS, _MODEL = "model.weights.h5", "model.keras"
_NAME = re.compile(r"step-\d{8,}(-\d+)?")
#: What a save that was killed leaves: a directory, and the file whose lock says that somebody still writes to it.
_LEFTOVER = re.compile(r"\.(step-\d{8,}(?:-\d+)?|checkpoints\.json)\.[0-9a-f]{16,24}\.hornbeam-tmp")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        step: The step it was saved at.
        path: Its directory.
        metrics: What was passed to `save`.
        time: When it was committed, in seconds since 1970.
        bytes: Size of its files.
        files: Their names and sizes.
        crc: CRC-32 of the weights file; a `.keras` file and `state.zip` have their own inside.
    """

    step: int
    path: Path
    metrics: dict[str, float]
    time: float
    bytes: int
    files: dict[str, int]
    crc: int | None = None

    @property
    def model(self) -> Path:
        """The file with weights and optimizer: `.weights.h5`, or `.keras` with the whole model."""
        return self.path / (_MODEL if _MODEL in self.files else _WEIGHTS)

    @property
    def state(self) -> Path:
        """The file with everything else."""
        return self.path / _STATE

    def check(self) -> None:
        """Compares the files with what was committed.

        Raises:
            CheckpointError: One is missing, of another size, or, for a weights file, of other content.
        """
        for name, size in self.files.items():
            file = self.path / name
            try:
                found = file.stat().st_size
            except FileNotFoundError:
                raise CheckpointError(f"'{file}' is missing: the checkpoint was deleted, or retention did it") from None
            if found != size:
                raise CheckpointError(f"'{file}' is damaged. Expected {size} bytes, found {found}.")
        if self.crc is not None and (crc := _crc(self.model)) != self.crc:
            raise CheckpointError(f"'{self.model}' is damaged. Expected the CRC-32 {self.crc:08x}, found {crc:08x}.")


class CheckpointManager(BeginsAnew):
    """A directory of checkpoints, each of them whole; at any moment one process writes to it and any number read it.

    A checkpoint is a directory of two files, the model's and `state.zip`. It is written under a temporary name and
    renamed when it is complete; then the manifest, `checkpoints.json`, is replaced by one that names it; then what
    retention no longer keeps is deleted. What the manifest does not name does not exist. `docs/format.md` has the rest.

    As a context manager it takes the directory for writing; `save` does, too. Without that it only reads; so does a
    copy, or what was pickled, until then.

    Args:
        directory: Where they are; it is made by the first writer. What a relative one means is decided here.
        keep_last: The newest so many are kept.
        keep_best: The best so many are kept, by `monitor`.
        keep_every: Those whose step is a multiple of it are kept. With all three `None`, all are.
        monitor: The name in `metrics` that says which one is the best.
        mode: `"min"` or `"max"`: which value of it is better.
        save_weights_only: Weights and optimizer (`.weights.h5`), or the whole model (`.keras`).
        asynchronous: `save` returns when the values are safe from what training does next, and `None`; a thread writes.
            The next `save`, `wait` and `close` wait for it, and raise what went wrong.
        durable: A checkpoint is on stable storage before the manifest names it.
        timeout: Seconds that processes of one training wait for each other. The first one writes; all call `save`.

    Attributes:
        extra: What the last `restore` found of what was passed to `save`.
        random: The random state it found.

    Raises:
        ValueError: For arguments that mean nothing.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        keep_last: int | None = 3,
        keep_best: int | None = None,
        keep_every: int | None = None,
        monitor: str | None = None,
        mode: str = "min",
        save_weights_only: bool = True,
        asynchronous: bool = False,
        durable: bool = True,
        timeout: float = 600.0,
    ) -> None:
        retention.check(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        if mode not in ("min", "max"):
            raise ValueError(f"`mode` must be 'min' or 'max'. Received: mode={mode!r}")
        if keep_best is not None and monitor is None:
            raise ValueError(f"`keep_best` needs to know the `monitor`. Received: keep_best={keep_best}")
        self.directory = Path(locations.absolute(directory))
        self.keep_last, self.keep_best, self.keep_every = keep_last, keep_best, keep_every
        self.monitor, self.mode = monitor, mode
        self.save_weights_only = save_weights_only
        self.asynchronous = asynchronous
        self.durable = durable
        self.timeout = timeout
        self._forget()

    def _forget(self) -> None:
        """Makes it a manager that neither has the directory nor restored anything."""
        self.extra: dict[str, Any] = {}
        self.random: dict[str, Any] | None = None
        self._lock: _core.FileLock | None = None
        self._cleaner: threading.Thread | None = None
        self._pending: _Pending | None = None
        self._place = processes.Place(0, 1)
        self._group: processes.Group | None = None
        self._opened = False

    def __enter__(self) -> CheckpointManager:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            logger.exception("a save failed, too, while '%s' was left by an exception", self.directory)

    def close(self) -> None:
        """Waits for what is under way, and gives the directory back. Harmless when it is closed.

        Raises:
            OSError: As `wait`.
        """
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()
            self._lock = self._group = None
            self._opened = False

    def delete_all(self) -> None:
        """Deletes the directory, when every process of the training has asked for it, and closes."""
        self._open()
        self.wait()
        with self.together():
            pass
        with self.together():  # nobody opens it anew while it is being deleted
            if self._place.rank == 0:
                self._delete_directory()
        self.close()

    def _delete_directory(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._write_manifest([])  # killed from here on, the directory is one without checkpoints
            for path in self._directories():
                shutil.rmtree(path)
            if os.path.ismount(self.directory):  # it stays, and they meet in it
                (self.directory / _MANIFEST).unlink()
            else:
                shutil.rmtree(self.directory)

    def wait(self) -> None:
        """Waits for what is being written or deleted.

        Raises:
            OSError: An asynchronous save could not be written; or whatever else it raised. Once.
        """
        failed = self._pending.wait() if self._pending is not None else None
        self._pending = None
        if self._cleaner is not None:
            self._cleaner.join()
            self._cleaner = None
        if failed is not None:
            raise failed

    # Reading

    def all(self) -> list[Checkpoint]:
        """Every complete checkpoint, in the order they were committed.

        Raises:
            CheckpointError: The manifest is malformed, or missing although there are checkpoints.
        """
        manifest = self.directory / _MANIFEST
        try:
            text = manifest.read_bytes()
        except FileNotFoundError:
            if any(self._directories()):
                raise CheckpointError(
                    f"'{self.directory}' has checkpoints, but no '{_MANIFEST}' that names the complete ones. "
                    "Restore that file, or move the directories elsewhere; their model files can be loaded."
                ) from None
            return []
        try:
            content = _core.decode_json(text, trusted=False)
            if content["format"] != 1:
                raise CheckpointError(f"'{manifest}' is of a newer format: expected 1, found {content['format']}")
            return [_from_entry(self.directory, entry) for entry in content["checkpoints"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"'{manifest}' is malformed: {type(error).__name__}: {error}") from error

    def latest(self) -> Checkpoint | None:
        """The checkpoint that was committed last."""
        return next(reversed(self.all()), None)

    def best(self) -> Checkpoint | None:
        """The one with the best value of `monitor`, of equal ones the older; `None` if none has any.

        Raises:
            ValueError: There is no `monitor`.
        """
        if self.monitor is None:
            raise ValueError("`best` needs to know the `monitor`: CheckpointManager(…, monitor='val_loss')")
        found = self.all()
        ordered = retention.best_first([self._rank(c) for c in found], self.mode)
        return next((c for c in found if ordered and c.path.name == ordered[0].name), None)

    def restore(
        self,
        model: Any,
        *,
        step: int | None = None,
        extra: Mapping[str, Any] | None = None,
        random_state: bool = True,
    ) -> int:
        """Gives a model, and the process, the state that they had when a checkpoint was saved.

        Weights, optimizer, seed generators, and the random state of Python, NumPy, Keras and the backend, which is that
        of the process that saved: others of the same training keep theirs. Everything is read and compared before
        anything is changed. What was passed as `extra` to `save` is in `self.extra`
        afterwards, except what `extra` has an object for.

        Args:
            model: The model; it must be built.
            step: Which checkpoint; without it the latest.
            extra: Objects that take their state from the checkpoint, by the names they were saved under: whatever has
                `set_state`, Keras' optimizers, metrics, layers, seed generators.
            random_state: Whether random state is restored, too.

        Returns:
            The step to go on with: the one after the restored one, or 0 if there is nothing to restore.

        Raises:
            CheckpointError: There is no such checkpoint, it is damaged, or of another model.
            ValueError: The weights are of another model.
        """
        self.wait()
        for _ in range(10):
            chosen = self._choose(step)
            if chosen is None:
                self.extra = {}
                return 0
            try:
                return self._restore(chosen, model, extra or {}, random_state)
            except (OSError, CheckpointError) as error:
                # A reader may have chosen what the writer has deleted since.
                if chosen.path.name in {c.path.name for c in self.all()}:
                    raise
                if step is not None:
                    raise CheckpointError(f"The checkpoint '{chosen.path}' was deleted while it was read.") from error
        raise CheckpointError(f"The checkpoints in '{self.directory}' were deleted faster than they could be read.")

    def _choose(self, step: int | None) -> Checkpoint | None:
        if step is None:
            return self.latest()
        found = self.all()
        for checkpoint in found:
            if checkpoint.step == step:
                return checkpoint
        raise CheckpointError(f"'{self.directory}' has no step {step}. Found: {[c.step for c in found]}")

    def _restore(self, chosen: Checkpoint, model: Any, extra: Mapping[str, Any], random_state: bool) -> int:
        chosen.check()
        where = str(chosen.path / _STATE)
        state = statefile.read(chosen.path / _STATE)
        missing = extra.keys() - state["extra"].keys()
        if missing:
            raise CheckpointError(f"'{where}' has nothing for {sorted(missing)}. Found: {sorted(state['extra'])}")
        if not model.built:
            raise ValueError(f"The model must be built before it takes a checkpoint. Received: {model}")
        training_state.check(model, state["model"], where)
        for name, item in extra.items():
            training_state.check_given(item, state["extra"][name], f"{where}: {name}", model)
        with File(chosen.model) as file:
            groups = {tensor.rpartition("/")[0] for tensor in file}
            named = {group: file.attributes(group).get("name") for group in groups.intersection(file.groups)}
        training_state.check_places(model, {g: n for g, n in named.items() if n is not None}, str(chosen.model))
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None and not optimizer.built and state["optimizer"]:
            optimizer.build(model.trainable_variables)
        operations.load_weights(LoadRequest(str(chosen.model), model, strict=True))
        training_state.apply(model, state["model"], where)
        for name, item in extra.items():
            training_state.give_state(item, state["extra"][name], f"{where}: {name}", model)
        self.random = state["model"]["random"]
        if random_state and processes.is_chief():  # last: what was called above may have drawn numbers
            randomness.restore(state["model"]["random"])
        self.extra = {name: value for name, value in state["extra"].items() if name not in extra}
        logger.info("restored step %d from '%s'", chosen.step, chosen.path)
        return chosen.step + 1

    # Writing

    def save(
        self,
        step: int,
        model: Any,
        *,
        metrics: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Checkpoint | None:
        """Saves a checkpoint; the old ones stay until it is complete and named by the manifest.

        Args:
            step: What it is called. One of the same step is replaced.
            model: The model. An optimizer that has no variables yet is built.
            metrics: Numbers to choose the best by, and for the record.
            extra: What else belongs to it: JSON-able values, bytes, arrays; objects with `get_state`; Keras'
                optimizers, metrics, layers and seed generators that are no part of the model.

        Returns:
            What was committed; `None` if that is still to come (`asynchronous`).

        Raises:
            CheckpointError: Another process, or manager, writes to this directory.
            ValueError: For what a checkpoint cannot hold, or without the metric that `keep_best` needs.
            OSError: When something cannot be written. The checkpoints are then as they were.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"`step` must be a whole number, 0 or more. Received: step={step!r}")
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        if self.keep_best is not None and self.monitor not in numbers:
            raise ValueError(f"`keep_best` needs '{self.monitor}'. Received: metrics={dict(metrics or {})}")
        self._open()
        with self.together():  # after that nobody still restores the one before, or looks for it
            self.wait()
            self.all()  # raises where somebody took the manifest away, before anything is written
            optimizer = getattr(model, "optimizer", None)
            if optimizer is not None and model.built and not optimizer.built:  # to fit a model that was trained
                optimizer.build(model.trainable_variables)
            if self._group is not None:
                processes.refuse_remote([*model.variables, *getattr(optimizer, "variables", ())])
        with self.together():
            if self._place.rank == 0:
                return self._save(step, model, numbers, extra or {}, self.asynchronous and self._group is None)
        return next((c for c in self.all() if c.step == step), None)

    def together(self) -> contextlib.AbstractContextManager[None]:
        """A block that ends when every process of the training is there; what one of them raises in it fails all."""
        return contextlib.nullcontext() if self._group is None else self._group.together()

    def _save(
        self, step: int, model: Any, metrics: dict[str, float], extra: Mapping[str, Any], asynchronous: bool
    ) -> Checkpoint | None:
        """Takes the values, and writes and commits them now or in the writer's thread."""
        started = time.monotonic()
        state = {
            "format": 1,
            "step": step,
            "optimizer": bool(getattr(getattr(model, "optimizer", None), "built", False)),
            "model": training_state.capture(model),
            "extra": {name: training_state.state_of(item) for name, item in extra.items()},
        }
        encoded = statefile.encode(state, copy=asynchronous)
        target = self.directory / self._unused_name(step)
        file = _WEIGHTS if self.save_weights_only else _MODEL
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(_core.Directory(target, [file, _STATE], durable=self.durable))
            root = Path(directory.path)
            with options(durable=self.durable, atomic=False), writer.reserve(asynchronous) as queue:
                request = SaveRequest(model, str(root / file), writer=queue)
                save = operations.save_weights if self.save_weights_only else operations.save_model
                written = save(request)
            temporary = stack.pop_all()

        def finish() -> Checkpoint:
            with temporary:
                statefile.write(root / _STATE, encoded, durable=self.durable)
                files = {inner: (root / inner).stat().st_size for inner in (file, _STATE)}
                directory.commit()
            report = written.report if isinstance(written, Handle) else written
            known = report.crc if report is not None and self.save_weights_only else None
            saved = Checkpoint(step, target, metrics, time.time(), sum(files.values()), files, known)
            try:
                self._commit(saved, time.monotonic() - started)
            except BaseException:
                self._discard(target)
                raise
            return saved

        if not isinstance(written, Handle):
            saved = finish()
            self._delete(self._unlisted())
            return saved
        self._pending = _Pending(written, finish, temporary, lambda: _remove(self._unlisted()))
        return None

    def _commit(self, saved: Checkpoint, seconds: float) -> None:
        """Makes it one of those that the manifest names."""
        before = self.all()
        listed = self._retain([*(c for c in before if c.step != saved.step), saved])
        self._write_manifest(listed)
        logger.info(
            "saved step %d to '%s': %.1f MB in %.2f s, %d kept, %d to be deleted",
            saved.step,
            saved.path,
            saved.bytes / 1e6,
            seconds,
            len(listed),
            len(before) + 1 - len(listed),
            extra={"step": saved.step, "bytes": saved.bytes, "seconds": seconds, "kept": [c.step for c in listed]},
        )

    def _discard(self, target: Path) -> None:
        """Deletes a checkpoint whose commit failed, unless the manifest names it all the same, or cannot be read."""
        try:
            unlisted = target in self._unlisted()
        except (OSError, CheckpointError) as error:
            logger.warning("'%s' stays, since the manifest cannot be read: %s", target, error)
            return
        if unlisted:
            _remove([target])

    def _unlisted(self) -> list[Path]:
        """Directories of checkpoints that the manifest does not name."""
        listed = {c.path.name for c in self.all()}
        return [path for path in self._directories() if path.name not in listed]

    def _retain(self, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
        gone = retention.plan_retention(
            [self._rank(c) for c in checkpoints],
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            keep_every=self.keep_every,
            mode=self.mode,
        )
        return [c for c in checkpoints if c.path.name not in gone]

    def _rank(self, checkpoint: Checkpoint) -> retention.Entry:
        metric = checkpoint.metrics.get(self.monitor or "")
        return retention.Entry(checkpoint.path.name, checkpoint.step, metric, checkpoint.time)

    def _write_manifest(self, checkpoints: Iterable[Checkpoint]) -> None:
        entries = [_to_entry(c) for c in checkpoints]
        text = json.dumps({"format": 1, "checkpoints": entries}, indent=1)
        _core.write_file(self.directory / _MANIFEST, text.encode(), durable=self.durable)

    def _unused_name(self, step: int) -> str:
        """A checkpoint never takes the place of another: the manifest alone says which of two is meant."""
        endings = itertools.chain([""], (f"-{i}" for i in itertools.count(1)))
        names = (f"step-{step:08d}{ending}" for ending in endings)
        return next(name for name in names if not (self.directory / name).exists())

    # Ownership

    def _open(self) -> None:
        """Takes the directory for writing, and clears what a killed writer left; meets the other processes."""
        if self._opened and (self._lock is None or self._lock.held):
            return
        self._place = processes.current()
        if self._place.rank < 0:
            raise CheckpointError(f"TF_CONFIG says that this process does not train: it only reads '{self.directory}'.")
        if self._place.rank == 0:
            self._take()
        if self._place.count > 1:
            try:
                self._group = processes.assemble(self._meeting(), self.timeout)
            except BaseException:
                self.close()
                raise
        self._opened = True

    def _meeting(self) -> Path:
        """Where several processes meet: beside the directory, which may be deleted meanwhile, if they share that."""
        real = Path(os.path.realpath(self.directory))
        return real / ".processes" if os.path.ismount(real) else real.with_name(f".{real.name}.processes")

    def _take(self) -> None:
        _core.make_directories(self.directory, durable=self.durable)
        listed = self.all()  # raises where there are checkpoints without a manifest
        try:
            self._lock = _core.FileLock(self.directory / _LOCK)
        except BlockingIOError:
            raise CheckpointError(
                f"'{self.directory}' is in use: another process, or another manager of this one, writes to it. "
                "Close that one first, or use another directory."
            ) from None
        try:
            if not (self.directory / _MANIFEST).exists():
                self._write_manifest(listed)
            self._delete(self._unlisted())
            self._clear_leftovers()
        except BaseException:
            self.close()
            raise

    def _directories(self) -> Iterable[Path]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for name in sorted(os.listdir(self.directory)):
                if _NAME.fullmatch(name) and (self.directory / name).is_dir():
                    yield self.directory / name

    def _clear_leftovers(self) -> None:
        """Removes temporary directories, unless somebody holds their lock."""
        left = [_LEFTOVER.fullmatch(name) for name in os.listdir(self.directory)]
        for target in {match[1] for match in left if match}:
            _core.clear_leftovers(self.directory / target)

    def _delete(self, paths: list[Path]) -> None:
        """Deletes in a thread: freeing the pages of large files takes the kernel a while."""
        if paths:
            self._cleaner = threading.Thread(target=_remove, args=(paths,), name="hornbeam-delete")
            self._cleaner.start()


class _Pending:
    """An asynchronous save, until it is committed or has failed."""

    def __init__(
        self, handle: Handle, finish: Callable[[], Any], temporary: contextlib.ExitStack, clean: Callable[[], None]
    ) -> None:
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._process, self._path = os.getpid(), handle.path
        self._finish, self._temporary, self._clean = finish, temporary, clean
        handle.add_done_callback(self._written)

    def _written(self, handle: Handle) -> None:
        """Called by the writer's thread."""
        try:
            error = handle.exception()
            if error is not None:
                self._temporary.__exit__(type(error), error, None)
                raise error
            try:
                self._finish()
                self._clean()
            except BaseException as error:
                logger.error("the asynchronous checkpoint of '%s' failed: %s", self._path, error, exc_info=error)
                raise
        except BaseException as error:
            self._error = error
            writer.unreported[self] = self._path, error
        finally:
            del self._finish, self._temporary, self._clean  # they refer to the manager, which refers to this
            self._done.set()

    def wait(self) -> BaseException | None:
        """Waits for the end; what went wrong. In a forked child there is nothing to wait for: it is the parent's.

        Raises:
            UnsupportedError: In a callback of a save, which this one waits for.
        """
        if os.getpid() != self._process:
            return None
        writer.refuse_waiting_for(self._done)
        self._done.wait()
        writer.unreported.pop(self, None)
        return self._error


def _remove(paths: list[Path]) -> None:
    for path in paths:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            pass
        except OSError as error:  # the next writer tries again
            logger.warning("cannot delete '%s': %s", path, error)


def _crc(path: Path) -> int:
    crc, block = 0, memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            crc = zlib.crc32(block[:size], crc)
    return crc


def _to_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    entry = dataclasses.asdict(checkpoint)
    entry["name"] = entry.pop("path").name
    entry["metrics"] = {k: v if math.isfinite(v) else str(v) for k, v in checkpoint.metrics.items()}
    return entry


def _from_entry(directory: Path, entry: dict[str, Any]) -> Checkpoint:
    name = entry["name"]
    if not _NAME.fullmatch(name):
        raise ValueError(f"a checkpoint cannot be called {name!r}")
    metrics = {key: float(value) for key, value in entry["metrics"].items()}  # "nan" and "inf" are texts
    return Checkpoint(
        int(entry["step"]),
        directory / name,
        metrics,
        float(entry["time"]),
        int(entry["bytes"]),
        dict(entry["files"]),
        entry["crc"],
    )
