"""`BackupAndRestore`: Keras' callback, with everything a training is made of in one atomic unit."""

from __future__ import annotations

import copy
import os
import weakref
import zipfile
from typing import Any

import keras
from keras.src.utils.python_utils import pythonify_logs

from hornbeam.base import locations, writer
from hornbeam.base.counters import logger
from hornbeam.errors import HornbeamError
from hornbeam.seam.entry import scope
from hornbeam.training import fit, processes, training_state
from hornbeam.training.accounts import Checkpoint
from hornbeam.training.copies import BeginsAnew
from hornbeam.training.manager import CheckpointManager
from hornbeam.training.model_checkpoint import ModelCheckpoint
from hornbeam.values import randomness

#: Callback of Keras' → the attributes that are its state.
_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    keras.callbacks.EarlyStopping: ("wait", "stopped_epoch", "best", "best_weights", "best_epoch"),
    keras.callbacks.ReduceLROnPlateau: ("best", "cooldown_counter", "wait"),
    keras.callbacks.ModelCheckpoint: ("best", "_current_epoch", "_batches_seen_since_last_saving", "_last_batch_seen"),
    keras.callbacks.SwapEMAWeights: ("_ema_weights_in_model",),
    keras.callbacks.LearningRateScheduler: (),  # changes the learning rate when an epoch begins
}

#: Directory → the callback of this process that has it.
_owners: weakref.WeakValueDictionary[str, BackupAndRestore] = weakref.WeakValueDictionary()


class BackupAndRestore(BeginsAnew, keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore`, exact: killed at any moment, training ends as if it had not been.

    A backup is one atomic unit: weights, optimizer, epoch and step, the state of the other callbacks, seed generators,
    metrics, the random state of Python, NumPy, Keras and the backend, and the position in the data. It is on stable
    storage before the one before it is released.

    Training goes on with the epoch after the last complete one; for data made by `hornbeam.data.resumable`, at the
    batch after the backup. With an epoch repeated from its beginning, what an epoch sees must be a function of its
    number: `docs/checkpointing.md` says when it is. Where it is not, that is logged once.

    Callbacks whose state belongs to the backup (`EarlyStopping`, `ReduceLROnPlateau`, `ModelCheckpoint`,
    `SwapEMAWeights`, `LearningRateScheduler`, and any with `get_state` and `set_state`) are called before this one,
    wherever it stands in the list.

    Args:
        backup_dir: A directory for this alone.
        save_freq: `"epoch"`, or a number of batches.
        double_checkpoint: Keep the backup before the last, too, for the case that the last is damaged.
        delete_checkpoint: Delete the directory when training is complete.
        seed: Makes the randomness of each epoch a function of this and the epoch's number: Python, NumPy, backend and
            the shuffling of arrays on TensorFlow.
        asynchronous: Training goes on while a backup is written.
        durable: A backup is on stable storage before the one before it is deleted.
        timeout: Seconds that processes of one training wait for each other.

    Raises:
        ValueError: As Keras' own.
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: str | int = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
        *,
        seed: int | None = None,
        asynchronous: bool = False,
        durable: bool = True,
        timeout: float = 600.0,
    ) -> None:
        backup_dir = locations.absolute(backup_dir) if backup_dir else backup_dir  # as it is meant now
        super().__init__(backup_dir, save_freq, double_checkpoint, delete_checkpoint)
        self.seed = seed
        self._manager = CheckpointManager(
            backup_dir,
            keep_last=2 if double_checkpoint else 1,
            asynchronous=asynchronous,
            durable=durable,
            timeout=timeout,
        )
        self._forget()

    def _forget(self) -> None:
        """Makes it a callback that no training has begun with yet."""
        self._model = self.params = None
        self._number = 0  # of the next backup
        self._others: list[Any] = []
        self._input: fit.Input | None = None
        self._resumed: dict[str, Any] | None = None  # the backup, until its epoch begins
        self._postponed = False
        self._held_back: dict[str, Any] | None = None
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_manager": copy.copy(self._manager)}

    def set_model(self, model: Any) -> None:
        """Takes the place behind the callbacks whose state belongs to the backup."""
        super().set_model(model)
        callbacks = fit.callback_list()
        if callbacks is None or self not in callbacks.callbacks:
            return
        self._others = [c for c in callbacks.callbacks if c is not self and _is_stateful(c)]
        if self._others:
            ordered = [c for c in callbacks.callbacks if c is not self]
            last = max(i for i, c in enumerate(ordered) if any(c is other for other in self._others))
            place = max(last + 1, callbacks.callbacks.index(self))
            ordered.insert(place, self)
            callbacks.callbacks = ordered  # a new list: the old one is being gone through

    # Restoring

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Restores the last backup."""
        self._claim()
        self._input = fit.Input(self.model, self.seed)
        self._postponed = False
        self._resumed = self._held_back = None
        backups = self._manager.all()
        self._number = max((c.step for c in backups), default=-1) + 1
        if not backups:
            with scope():
                super().on_train_begin(logs)  # one that Keras' own callback made
        else:
            self._restore(backups)
        inexact = self._input.inexact
        if inexact is None and self.save_freq != "epoch" and self._input.resumable is None:
            inexact = "an epoch is repeated from its beginning; wrap the data in hornbeam.data.resumable"
        inexact = inexact or self._own_saving()
        if inexact is not None and not self._warned:
            self._warned = True
            logger.warning("BackupAndRestore: a restart is not exact: %s", inexact)

    def _own_saving(self) -> str | None:
        """Which layers, and optimizers, decide themselves what a weights file has of them."""
        optimizer = self.model.optimizer
        parts = [*self.model._flatten_layers(), *([optimizer] if optimizer is not None else [])]
        known = ("keras.src.", "hornbeam.")
        own = [part.name for part in parts if not type(part).save_own_variables.__module__.startswith(known)]
        return f"what `save_own_variables` of {own} writes may be less than their variables hold" if own else None

    def _claim(self) -> None:
        """Takes the directory; from a `fit` of this process that was interrupted, too."""
        key = os.path.realpath(self.backup_dir)
        owner = _owners.get(key)
        if owner is not None and owner is not self:
            owner._manager.close()
        _owners[key] = self
        self._manager.__enter__()

    def _restore(self, backups: list[Checkpoint]) -> None:
        for backup in reversed(backups):
            try:
                self._manager.restore(self.model, step=backup.step, random_state=False)
                break
            except (HornbeamError, OSError, zipfile.BadZipFile) as error:
                if backup is backups[0]:
                    raise
                logger.warning("the last backup cannot be restored, the one before it is: %s", error)
        self._note_paths()
        state = self._manager.extra["fit"]
        self._resumed = {**state, "random": self._manager.random}
        self._current_epoch = state["epoch"]
        self._batches_seen_since_last_saving = state["since"]
        self._give_callbacks(state["callbacks"])
        # `fit` goes through range(_initial_epoch, epochs): a training that was stopped has nothing to do.
        epochs = self.params.get("epochs", 0) if self.params else 0
        self.model._initial_epoch = max(state["epoch"], epochs) if state["stopped"] else state["epoch"]

    def _give_callbacks(self, states: list[tuple[str, Any]]) -> None:
        expected, found = [name for name, _ in states], [type(c).__name__ for c in self._others]
        if expected != found:
            text = (
                "BackupAndRestore: the callbacks are others than in the backup, and begin anew. Expected %s, found %s"
            )
            logger.warning(text, expected, found)
            return
        for callback, (_, state) in zip(self._others, states, strict=True):
            if hasattr(callback, "set_state"):
                callback.set_state(state)
            else:
                vars(callback).update(state)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Restores what `fit` resets before an epoch begins."""
        self._current_epoch = epoch
        resumed, self._resumed = self._resumed, None
        middle = resumed is not None and resumed["data"] is not None and resumed["step"] > 0
        self._last_batch_seen = resumed["last"] if resumed is not None and middle else 0
        assert self._input is not None
        if not middle:
            self._input.begin(epoch, self.seed)
        if resumed is not None:
            self._input.restore(resumed["data"])
            if middle:
                self._restore_metrics(resumed["metrics"])
                self._expect_no_batch(resumed.get("logs", {}))
                if resumed["learning_rate"] is not None:  # a scheduler may have changed it again
                    self.model.optimizer.learning_rate = resumed["learning_rate"]
            if processes.is_chief():  # it is that of the process that saved
                randomness.restore(resumed["random"])
        if self.seed is not None and not middle:
            randomness.reseed(self.seed, epoch)

    def _restore_metrics(self, state: training_state.Values) -> None:
        compiled = getattr(self.model, "_compile_metrics", None)
        if compiled is not None and not compiled.built:
            assert self._input is not None
            self.model._symbolic_build(data_batch=self._input.example())
        training_state.assign(self.model.metrics_variables, state, "metrics of the backup", self.model)

    def _expect_no_batch(self, logs: dict[str, Any]) -> None:
        """The backup may be of the last batch of data of unknown length: `fit` then has no logs for the epoch's end."""
        attributes = self.model.__dict__
        original = self.model._get_metrics_result_or_logs

        def once(found: Any) -> Any:
            attributes.pop("_get_metrics_result_or_logs", None)
            return original(found or logs)

        attributes["_get_metrics_result_or_logs"] = once

    # Saving

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves every `save_freq` batches."""
        if not self._should_save_on_batch(batch):
            return
        assert self._input is not None
        length = self._input.length
        if self._input.resumable is not None and length is not None and batch + 1 >= length:
            self._postponed = True  # until the epoch's end has happened, which must not happen twice
            return
        state = self._state(self._current_epoch, batch + 1, logs)
        if self._input.looks_ahead:
            self._held_back = state  # until it is known that this batch was not the last
        else:
            self._save(state)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves what was held back until there is another batch."""
        held_back, self._held_back = self._held_back, None
        if held_back is not None:
            self._save(held_back)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves, with `save_freq="epoch"`."""
        self._current_epoch = epoch + 1
        self._last_batch_seen = 0
        if self.save_freq == "epoch" or self._postponed or self._held_back is not None:
            self._postponed, self._held_back = False, None
            self._save(self._state(epoch + 1, 0))

    def _state(self, epoch: int, step: int, logs: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a backup has beyond the model, after that batch."""
        assert self._input is not None
        model = self.model
        middle = step > 0 and self._input.resumable is not None
        data = self._input.state(epoch, step) if step == 0 or middle else None
        optimizer = model.optimizer
        rate = getattr(optimizer, "_learning_rate", None)
        return {
            "epoch": epoch,
            "step": step if middle else 0,
            "last": self._last_batch_seen,
            "since": self._batches_seen_since_last_saving,
            "stopped": bool(model.stop_training),
            "data": data,
            "logs": pythonify_logs(logs) if middle else {},
            "metrics": training_state.values(model.metrics_variables) if middle else [],
            "learning_rate": float(keras.ops.convert_to_numpy(rate)) if isinstance(rate, keras.Variable) else None,
            "callbacks": [(type(c).__name__, _callback_state(c)) for c in self._others],
        }

    def _save(self, state: dict[str, Any]) -> None:
        if not self._manager.asynchronous and any(getattr(c, "asynchronous", False) for c in self._others):
            with self._manager.together():
                writer.finish()  # a backup must not be newer than the best model that it is of
        self._manager.save(self._number, self.model, extra={"fit": state})
        self._number += 1
        self._note_paths()

    def _note_paths(self) -> None:
        """Keras' attributes that say where things are."""
        for checkpoint, prefix in zip(reversed(self._manager.all()), ("_", "_prev_"), strict=False):
            setattr(self, f"{prefix}weights_path", str(checkpoint.model))
            setattr(self, f"{prefix}training_metadata_path", str(checkpoint.state))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Deletes the backup, unless it is to stay."""
        self.model._initial_epoch = None
        self.model.__dict__.pop("_get_metrics_result_or_logs", None)
        if self._resumed is not None and processes.is_chief():  # no epoch was left that would have done it
            randomness.restore(self._resumed["random"])
        if self.delete_checkpoint:
            self._manager.delete_all()
        self._manager.close()
        self._input = None


def _is_stateful(callback: Any) -> bool:
    both = callable(getattr(callback, "get_state", None)) and callable(getattr(callback, "set_state", None))
    return both or isinstance(callback, tuple(_ATTRIBUTES))


def _callback_state(callback: Any) -> Any:
    if callable(getattr(callback, "get_state", None)):
        return callback.get_state()
    names = {name for cls, names in _ATTRIBUTES.items() if isinstance(callback, cls) for name in names}
    if isinstance(callback, ModelCheckpoint) and callback.remembers:
        names.discard("best")  # its files are newer than a backup, or older: it knows itself what they hold
    return {name: vars(callback)[name] for name in sorted(names) if name in vars(callback)}
