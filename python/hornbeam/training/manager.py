"""`CheckpointManager`: a directory of checkpoints that is whole at any moment, for training loops of one's own."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from hornbeam import _core
from hornbeam.base import barrier, locations, retention, writer
from hornbeam.base.counters import logger
from hornbeam.base.model_file import File
from hornbeam.base.reports import SaveReport
from hornbeam.base.settings import options
from hornbeam.base.writer import Handle
from hornbeam.errors import CheckpointError
from hornbeam.flows.requests import LoadRequest, SaveRequest
from hornbeam.formats import operations
from hornbeam.training import accounts, processes, statefile, training_state
from hornbeam.training.accounts import Checkpoint
from hornbeam.training.copies import BeginsAnew
from hornbeam.values import randomness


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
        ValueError: For invalid arguments.
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
        self._pending: Handle | None = None
        self._place = barrier.Place(0, 1)
        self._group: barrier.Group | None = None
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
        manifest = self._manifest()
        manifest.checkpoints = []
        with contextlib.suppress(FileNotFoundError):
            manifest.write(durable=self.durable)  # killed from here on, the directory is one without checkpoints
            for path in manifest.directories():
                shutil.rmtree(path)
            if os.path.ismount(self.directory):  # it stays, and they meet in it
                os.unlink(manifest.path)
            else:
                shutil.rmtree(self.directory)

    def wait(self) -> None:
        """Waits for what is being written or deleted.

        Raises:
            OSError: An asynchronous save could not be written; or whatever else it raised. Once.
        """
        failed = self._pending.new_error() if self._pending is not None else None
        self._pending = None
        if self._cleaner is not None:
            self._cleaner.join()
            self._cleaner = None
        if failed is not None:
            raise failed

    # Reading

    def _manifest(self) -> accounts.Manifest:
        return accounts.Manifest(self.directory, self.monitor, self.mode).read()

    def all(self) -> list[Checkpoint]:
        """Every complete checkpoint, in the order they were committed.

        Raises:
            CheckpointError: The manifest is malformed, or missing although there are checkpoints.
        """
        return self._manifest().checkpoints

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
        return self._manifest().best_checkpoint()

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
        where = str(chosen.state)
        state = statefile.read(chosen.state)
        missing = extra.keys() - state["extra"].keys()
        if missing:
            raise CheckpointError(f"'{where}' has nothing for {sorted(missing)}. Found: {sorted(state['extra'])}")
        if not model.built:
            raise ValueError(f"The model must be built before it takes a checkpoint. Received: {model}")
        prepared = [training_state.prepare(model, state["model"], where)]
        for name, item in extra.items():
            prepared.append(training_state.prepare_given(item, state["extra"][name], f"{where}: {name}", model))
        with File(chosen.model) as file:
            groups = {tensor.rpartition("/")[0] for tensor in file}
            named = {group: file.attributes(group).get("name") for group in groups.intersection(file.groups)}
        training_state.check_places(model, {g: n for g, n in named.items() if n is not None}, str(chosen.model))
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None and not optimizer.built and state["optimizer"]:
            optimizer.build(model.trainable_variables)
        operations.load_weights(LoadRequest(str(chosen.model), model, strict=True))
        for give in prepared:
            give()
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
        return barrier.together(self._group)

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
        target = self._manifest().unused_path(step)
        file = accounts.WEIGHTS if self.save_weights_only else accounts.MODEL
        directory = _core.Directory(target, [file, accounts.STATE], durable=self.durable)
        root = Path(directory.path)

        def complete(report: SaveReport | None) -> Checkpoint:
            """Makes what was written a checkpoint."""
            statefile.write(root / accounts.STATE, encoded, durable=self.durable)
            files = {name: (root / name).stat().st_size for name in (file, accounts.STATE)}
            directory.commit()
            crc = report.crc if report is not None and self.save_weights_only else None
            saved = Checkpoint(step, target, metrics, time.time(), sum(files.values()), files, crc)
            try:
                self._commit(saved, time.monotonic() - started)
            except BaseException:
                self._discard(target)
                raise
            return saved

        def in_the_background(_: Handle, write: Callable[[], SaveReport]) -> SaveReport:
            with directory:
                report = write()
                complete(report)
            accounts.delete(self._manifest().unnamed(), shutil.rmtree)
            return report

        with contextlib.ExitStack() as stack:
            stack.enter_context(directory)  # what was not committed is removed
            with options(durable=self.durable, atomic=False), writer.reserve(asynchronous, in_the_background) as queue:
                request = SaveRequest(model, str(root / file), writer=queue)
                save = operations.save_weights if self.save_weights_only else operations.save_model
                written = save(request)
            if isinstance(written, Handle):
                stack.pop_all()  # the writer does it
                self._pending = written
                return None
            saved = complete(written)
        self._delete(self._manifest().unnamed())
        return saved

    def _commit(self, saved: Checkpoint, seconds: float) -> None:
        """Makes it one of those that the manifest names."""
        manifest = self._manifest()
        before = len(manifest.entries)
        rules = {"keep_last": self.keep_last, "keep_best": self.keep_best, "keep_every": self.keep_every}
        manifest.commit(saved, rules, durable=self.durable)
        kept = [entry.step for entry in manifest.entries]
        text = f"saved step {saved.step} to '{saved.path}': {saved.bytes / 1e6:.1f} MB in {seconds:.2f} s, "
        text += f"{len(kept)} kept, {before + 1 - len(kept)} to be deleted"
        logger.info(text, extra={"step": saved.step, "bytes": saved.bytes, "seconds": seconds, "kept": kept})

    def _discard(self, target: Path) -> None:
        """Deletes a checkpoint whose commit failed, unless the manifest names it all the same, or cannot be read."""
        try:
            unnamed = self._manifest().unnamed()
        except (OSError, CheckpointError) as error:
            logger.warning("'%s' stays, since the manifest cannot be read: %s", target, error)
        else:
            accounts.delete({target}.intersection(unnamed), shutil.rmtree)

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
                self._group = processes.assemble(self._processes_folder(), self.timeout)
            except BaseException:
                self.close()
                raise
        self._opened = True

    def _processes_folder(self) -> Path:
        """Where several processes meet: beside the directory, which may be deleted meanwhile, if they share that."""
        real = Path(os.path.realpath(self.directory))
        return real / ".processes" if os.path.ismount(real) else real.with_name(f".{real.name}.processes")

    def _take(self) -> None:
        lock = self.directory / ".lock"
        _core.make_directories(self.directory, durable=self.durable)
        manifest = self._manifest()  # raises where there are checkpoints without one
        try:
            self._lock = _core.FileLock(lock)
        except BlockingIOError:
            raise CheckpointError(
                f"'{self.directory}' is in use: another process, or another manager of this one, writes to it. "
                "Close that one first, or use another directory."
            ) from None
        try:
            if not os.path.exists(manifest.path):
                manifest.write(durable=self.durable)
            manifest = self._manifest()
            self._delete(manifest.unnamed())
            manifest.clear_leftovers()
        except BaseException:
            self.close()
            raise

    def _delete(self, paths: list[Path]) -> None:
        """Deletes in a thread: freeing the pages of large files takes the kernel a while."""
        if paths:
            self._cleaner = threading.Thread(
                target=accounts.delete, args=(paths, shutil.rmtree), name="hornbeam-delete"
            )
            self._cleaner.start()
