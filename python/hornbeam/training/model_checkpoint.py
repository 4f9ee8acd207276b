"""`ModelCheckpoint`: Keras' own; on request asynchronous, with retention, a remembered best, saves on signals."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import keras
import keras.callbacks as _stock
from keras.src.utils.io_utils import print_msg

from hornbeam import _core
from hornbeam.base import barrier, durability, retention, writer
from hornbeam.base.counters import logger
from hornbeam.base.reports import SaveReport
from hornbeam.base.settings import options
from hornbeam.errors import CheckpointError, UnsupportedError
from hornbeam.seam import entry, fits, operation
from hornbeam.training import processes
from hornbeam.training.accounts import PatternAccount
from hornbeam.training.copies import BeginsAnew

#: Lock → the callback of this process that has taken it.
_owners: weakref.WeakValueDictionary[str, ModelCheckpoint] = weakref.WeakValueDictionary()


class ModelCheckpoint(BeginsAnew, _stock.ModelCheckpoint, fits.FitWatcher):
    """`keras.callbacks.ModelCheckpoint` through hornbeam, as Keras has it while only its arguments are given.

    With any of the others, the callback also keeps an account of its checkpoints in a hidden JSON file beside them:
    `latest_checkpoint` and `best_checkpoint` read it, and so does the next process, which goes on from the best score.

    Args:
        filepath: As Keras, like all up to `initial_value_threshold`. With any of our arguments, what a relative path
            means is decided here, not at each save.
        monitor: …
        verbose: …
        save_best_only: …
        save_weights_only: …
        mode: …
        save_freq: …
        initial_value_threshold: …
        asynchronous: Training goes on while the file is written. Errors end training at the next save or at its end.
        keep_last: The newest so many checkpoints are kept, others are deleted once a newer one is complete.
        keep_best: The best so many are kept, by `monitor`.
        keep_every: Those whose epoch, or step of the optimizer when saved after a batch, is a multiple of it are kept.
        every_seconds: Save also at the first batch end after so many seconds without a save.
        durable: A checkpoint counts as saved when it is on stable storage.
        save_on_exception: Save once more when an exception leaves `fit`, to `<name>-interrupted.<extension>`.
        save_on_signal: Signals, say `(signal.SIGTERM,)`, after which the next batch end saves; then whatever would have
            handled the signal does. With `save_best_only` to `<name>-interrupted.<extension>`.
        remember: Whether the best score of earlier processes counts; by default, if any of `asynchronous`, `keep_*`,
            `every_seconds` and `save_on_*` is given.
        timeout: Seconds that processes of one training wait for the chief's save; `None`: they do not wait. As
            `durable`, it does not make the callback keep an account.

    Attributes:
        history: For every save `path`, `epoch`, `batch`, `step`, `metric`, `reason`, `stall_seconds`, and when it is
            complete `bytes`, `write_seconds`, `kept` and `deleted`.
        remembers: Whether the best score is that of the files, also those of earlier processes.

    Raises:
        ValueError: For invalid arguments.
        UnsupportedError: For an asynchronous save to legacy HDF5.
        CheckpointError: When training begins, and another process trains with the same `filepath`.
    """

    best: Any

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
        *,
        asynchronous: bool = False,
        keep_last: int | None = None,
        keep_best: int | None = None,
        keep_every: int | None = None,
        every_seconds: float | None = None,
        durable: bool = True,
        save_on_exception: bool = False,
        save_on_signal: Iterable[int] = (),
        remember: bool | None = None,
        timeout: float | None = 600.0,
    ) -> None:
        super().__init__(
            filepath, monitor, verbose, save_best_only, save_weights_only, mode, save_freq, initial_value_threshold
        )
        retention.check(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        if every_seconds is not None and not every_seconds > 0:
            raise ValueError(f"`every_seconds` must be more than 0, or None. Received: {every_seconds}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"`timeout` must be more than 0, or None. Received: {timeout}")
        if asynchronous and self.filepath.endswith(".h5") and not self.filepath.endswith(".weights.h5"):
            raise UnsupportedError(f"Legacy HDF5 files are not written asynchronously. Received: {filepath}")
        self.asynchronous = asynchronous
        self.durable = durable
        self.every_seconds = every_seconds
        self.save_on_exception = save_on_exception
        self.save_on_signal = tuple(signal.Signals(number) for number in save_on_signal)
        self._rules = {"keep_last": keep_last, "keep_best": keep_best, "keep_every": keep_every}
        wanted = (asynchronous, every_seconds, save_on_exception, self.save_on_signal, *self._rules.values(), remember)
        self._extended = any(w not in (None, False, ()) for w in wanted)
        self.remembers = self._extended if remember is None else remember
        self.timeout = timeout
        self._threshold = initial_value_threshold
        self._base = os.getcwd() if self._extended and "://" not in self.filepath else ""  # of a relative path
        self._forget()

    def _forget(self) -> None:
        """Makes it a callback that no training has begun with yet."""
        self._model = self.params = None
        self.history: list[dict[str, Any]] = []
        self._group: barrier.Group | None = None
        self._known: PatternAccount | None = None
        self._lock = threading.RLock()  # the writer's thread confirms
        self._watched = False  # `fit` tells how it ends
        self._warned: set[str] = set()
        self._signals: list[int] = []  # not answered yet
        self._answering = False  # its handler may end training
        self._handlers: dict[int, Any] = {}
        self._process = 0  # whose handlers they are
        self._saved_at = time.monotonic()
        self._held: _core.FileLock | None = None
        self._trained = False  # a batch, so that there is something to save when training is interrupted
        self._begun_at: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The arguments, and what Keras' own counts, the best score too; while it is as Keras has it, the model too."""
        state = super().__getstate__()
        return state if self._extended else state | {"_model": self._model, "params": self.params}

    # ---- what Keras calls ----

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Recalls the best score, meets the other processes, and watches for signals."""
        super().on_train_begin(logs)
        if not self._extended:
            return
        self._trained, self._begun_at = False, self._iterations()
        watchers = fits.fit_watchers()
        if watchers is None and (self.save_on_exception or self.save_on_signal):
            logger.warning("this is not Keras' `fit`: an exception is not noticed, signal handlers stay")
        self._group = processes.assemble(Path(self._account().processes), self.timeout)
        with barrier.together(self._group):  # before the chief can save anything
            self._claim()
            self._watched = watchers is not None
            if watchers is not None:
                watchers.append(self)
            self._recall()
        self._saved_at = time.monotonic()
        self._catch_signals()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves if it is time."""
        self._trained = True
        super().on_train_batch_end(batch, logs)
        if not self._extended:
            return
        if self._signals:
            self._answer(self._current_epoch, batch, logs)
        elif self.every_seconds is not None and time.monotonic() - self._saved_at >= self.every_seconds:
            self._saved_at = time.monotonic()  # also if there is nothing to save
            self._save(self._current_epoch, batch, logs, "seconds")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves if it is time."""
        super().on_epoch_end(epoch, logs)
        if self._signals:
            self._answer(epoch, None, logs)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Waits for pending saves, and raises what went wrong with them."""
        super().on_train_end(logs)
        if not self._extended:
            return
        if self._signals:
            self._answer(getattr(self, "_current_epoch", 0), None, logs)
        if self.asynchronous:
            with barrier.together(self._group):
                writer.wait()
        if not self._watched:
            self.fit_ended()

    def _get_file_path(self, epoch: int, batch: int | None, logs: dict[str, Any] | None) -> str:
        return os.path.join(self._base, super()._get_file_path(epoch, batch, logs))

    def _save_model(self, epoch: int, batch: int | None, logs: dict[str, Any] | None) -> None:
        if self._extended:
            # Also if this is no better than the best: scores may differ.
            with barrier.together(None if self.asynchronous else self._group):
                self._save(epoch, batch, logs, "epoch" if batch is None else "batch")
            return
        path = self._get_file_path(epoch, batch, logs)
        with entry.scope(), options(durable=self.durable), durability.directories(path, durable=self.durable):
            super()._save_model(epoch, batch, logs)

    def _should_save_model(self, epoch: int, batch: int | None, logs: dict[str, Any] | None, filepath: str) -> bool:
        if self._extended and self.save_best_only:
            with self._lock:
                best = self._better(*self._account().scores())
            if _number((logs or {}).get(self.monitor)) is not None:
                if self.monitor_op is None:
                    self._set_monitor_op()  # Keras does it at the end of the first epoch
                if self.best is not None and self.best != self.best:
                    self.best = None  # everything is better than NaN
            elif best is not None:
                self._warn_once(f"without '{self.monitor}' nothing is saved over the best model")
                return False
        return bool(super()._should_save_model(epoch, batch, logs, filepath))

    # ---- saving ----

    def _save(self, epoch: int, batch: int | None, logs: dict[str, Any] | None, reason: str) -> None:
        """As Keras' `_save_model`, with all that was asked for."""
        logs = logs or {}
        try:
            filepath = self._get_file_path(epoch, batch, logs)
        except KeyError as error:
            if reason != "seconds":
                raise
            self._warn_once(f"no save every {self.every_seconds:g} s, but at the end of the epoch: {error.args[0]}")
            return
        if not self._should_save_model(epoch, batch, logs, filepath):
            return
        if self.monitor_op is None and self._rules["keep_best"] is not None:
            self._set_monitor_op()
        if not processes.is_chief():
            self._saved_at = time.monotonic()
            return
        try:
            self._write(filepath, epoch, batch, _number(logs.get(self.monitor)), reason)
        except IsADirectoryError as error:
            raise OSError(
                "Please specify a non-directory filepath for ModelCheckpoint. Filepath used is an existing directory: "
                f"{filepath}"
            ) from error

    def _write(self, path: str, epoch: int, batch: int | None, metric: float | None, reason: str) -> None:
        record = self._record(path, epoch, batch, metric, reason)
        account, pending = self._account(), None
        try:
            _core.make_directories(os.path.dirname(path) or ".", durable=self.durable)
            with self._lock:
                account.mode = self._mode() or account.mode
                pending = account.begin(path, record["step"], metric, durable=self.durable)
                if self.save_best_only and metric is not None:  # an earlier save may have failed since it was compared
                    self.best = self._better(self.best, metric)
            since = time.perf_counter()
            # A save after a signal has to be complete before the signal goes its way.
            asynchronous = self.asynchronous and reason != "signal"
            around = functools.partial(self._in_the_background, record, pending) if asynchronous else None
            with self._saving(path, around) as (save, request):
                save(path, overwrite=True)
        except BaseException:
            self._abandon(pending)
            raise
        handle = request.handle if request is not None else None
        self._saved_at = time.monotonic()
        record["stall_seconds"] = time.perf_counter() - since if handle is None else handle.stall_seconds
        self.history.append(record)
        if handle is None:
            self._confirm(record, pending, os.path.getsize(path), record["stall_seconds"])

    def _in_the_background(self, record: dict[str, Any], pending: Any, handle: writer.Handle, write: Any) -> SaveReport:
        """What the writer's thread does with a save."""
        since = time.perf_counter()
        try:
            report: SaveReport = write()
        except BaseException:
            self._abandon(pending)
            raise
        record["stall_seconds"] = handle.stall_seconds
        self._confirm(record, pending, report.bytes, time.perf_counter() - since)
        return report

    def _record(self, path: str, epoch: int, batch: int | None, metric: float | None, reason: str) -> dict[str, Any]:
        """What `history` has of a save, to begin with."""
        record = {"path": path, "epoch": epoch, "batch": batch, "metric": metric, "reason": reason}
        return record | {"step": epoch + 1 if batch is None else self._steps(batch)}

    @contextlib.contextmanager
    def _saving(self, path: str, around: writer.Around | None = None) -> Iterator[tuple[Any, Any]]:
        """What saves the model to `path` inside; with `around` while training goes on."""
        with (
            entry.scope(),
            options(durable=self.durable),
            writer.reserve(around is not None, around) as request,
            operation.offered(self.model, path, request),
        ):
            yield self.model.save_weights if self.save_weights_only else self.model.save, request

    def _abandon(self, pending: dict[str, Any] | None) -> None:
        """A save came to nothing: the best is what is there, or still being written."""
        with self._lock:
            account = self._account()
            if pending is not None:
                account.abandon(pending)
            if self.save_best_only:
                self.best = self._better(self._threshold, *account.scores())
            try:
                account.write(durable=self.durable)
            except OSError as error:  # the next save writes it; what the save raised is told already
                logger.warning("cannot write '%s': %s", account.path, error)

    def _mode(self) -> str | None:
        """Which scores are better; `None` as long as Keras has not decided."""
        if self.monitor_op is None:
            return self.mode if self.mode in ("min", "max") else None
        return "max" if self.monitor_op is keras.ops.greater else "min"

    def _better(self, *scores: float | None) -> float | None:
        """The best of those that are scores."""
        known = [score for score in scores if score is not None and score == score]
        better: Callable[..., float] = max if self._account().mode == "max" else min
        return better(known, default=None)

    def _confirm(self, record: dict[str, Any], pending: dict[str, Any], size: Any, written: Any) -> None:
        """The file is in its place: notes it, deletes old ones, tells the log."""
        account = self._account()
        try:
            with self._lock:
                deleted = account.confirm(pending, self._rules, durable=self.durable)
                kept = [e.name for e in account.entries]
        except Exception as error:
            logger.error("'%s' was saved, but its account '%s' was not: %s", record["path"], account.path, error)
            raise
        record.update(bytes=size, write_seconds=written, kept=kept, deleted=deleted)
        stall = record["stall_seconds"]
        text = f"saved '{record['path']}': {size / 1e6:.1f} MB, training stood still for {stall:.3f} s, "
        text += f"written in {written:.2f} s; {len(kept)} kept"
        text += f", deleted {', '.join(deleted)}" if deleted else ""
        logger.info(text, extra={"hornbeam": record})
        if self.verbose > 0:
            print_msg(f"\nEpoch {record['epoch'] + 1}: finished saving model to {record['path']}")

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("ModelCheckpoint('%s'): %s", self.filepath, text)

    def _iterations(self) -> int | None:
        optimizer = getattr(self.model, "optimizer", None)
        return None if optimizer is None else int(keras.ops.convert_to_numpy(optimizer.iterations))

    def _steps(self, batch: int) -> int:
        iterations = self._iterations()
        return batch + 1 if iterations is None else iterations

    def _account(self) -> PatternAccount:
        if self._known is None:
            self._known = PatternAccount(self.filepath, self._base)
            self._known.monitor = self.monitor
        return self._known

    def _claim(self) -> None:
        """Keeps others from the checkpoints; takes them from a `fit` of this process that did not tell how it ended."""
        if not processes.is_chief():
            return
        path = self._account().lock
        owner = _owners.get(path)
        if owner is not None and owner._held is not None and owner._held.held:
            if owner._watched:
                self._refuse("a `fit` of this process that is running has a ModelCheckpoint of it")
            if owner._account().busy:
                writer.finish()
            owner._held.release()
        _core.make_directories(os.path.dirname(path) or ".", durable=self.durable)
        try:
            self._held = _core.FileLock(path)
        except BlockingIOError:
            self._refuse("another process trains with a ModelCheckpoint of it")
        _owners[path] = self

    def _refuse(self, why: str) -> NoReturn:
        raise CheckpointError(
            f"'{self.filepath}' is in use: {why}, and each would write over the other's checkpoints. Wait for that "
            "one, or give another `filepath`."
        ) from None

    def _recall(self) -> None:
        """Goes on where an earlier training was, of this process or another."""
        if not self.remembers:
            return
        account = self._account()
        known = account.read()
        if known and account.monitor != self.monitor:
            text = "the scores in '%s' are of %s, not of %s: they do not count"
            logger.warning(text, account.path, account.monitor, self.monitor)
            account.entries = [e._replace(metric=None) for e in account.entries]
        account.monitor, account.mode = self.monitor, self._mode() or account.mode
        best = account.best()
        if best is None or best.metric is None or not self.save_best_only:
            return
        self.best = self._better(self.best, best.metric)
        logger.info("the best %s so far is %s, in '%s'", self.monitor, best.metric, account.full(best.name))

    # ---- signals and exceptions ----

    def _catch_signals(self) -> None:
        if not self.save_on_signal or self._handlers:
            return
        if threading.current_thread() is not threading.main_thread():
            logger.warning("signals reach only the main thread: `save_on_signal` does nothing in this one")
            return
        self._process = os.getpid()
        for number in self.save_on_signal:
            if signal.getsignal(number) is None:  # Python could not give it back
                logger.warning("%s has a handler that is not Python's: it stays, and no save is made", number.name)
                continue
            self._handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        if os.getpid() != self._process:  # a forked child, which does not train: as if it had no handler of ours
            signal.signal(number, self._handlers[number])
            signal.raise_signal(number)
        elif number not in self._signals:
            self._signals.append(number)

    def _answer(self, epoch: int, batch: int | None, logs: dict[str, Any] | None) -> None:
        """Saves after signals, and lets each go its way."""
        failed = self._failure_of_pending()
        try:
            if self._trained:
                self._rescue(epoch, batch, logs, "signal")
            self._answering = True
        except BaseException as error:  # the signal may leave no chance to tell
            logger.error("nothing could be saved after a signal: %s: %s", type(error).__name__, error)
            raise
        finally:
            while self._signals:
                number = self._signals.pop(0)
                handler = self._handlers[number]
                ours = signal.signal(number, handler)
                signal.raise_signal(number)
                signal.signal(number, ours or self._note)  # it was survived: this callback's, or that of a later one
            self._answering = False
        if failed is not None:
            raise failed

    def _failure_of_pending(self) -> Exception | None:
        """Waits for pending saves; what went wrong with them keeps nobody from saving once more."""
        try:
            if self.asynchronous:
                writer.wait()
        except Exception as error:
            return error
        return None

    def _rescue(self, epoch: int, batch: int | None, logs: dict[str, Any] | None, reason: str) -> str:
        """Saves out of turn: as usual where that harms nothing, else beside the others."""
        account = self._account()
        if not processes.is_chief():
            return account.rescue
        if reason == "signal" and not self.save_best_only:
            try:
                path = self._get_file_path(epoch, batch, logs or {})
            except KeyError:  # a metric that there is not after a batch
                pass
            else:
                self._write(path, epoch, batch, _number((logs or {}).get(self.monitor)), reason)
                return path
        record = self._record(account.rescue, epoch, batch, None, reason)
        since = time.perf_counter()
        _core.make_directories(account.directory or ".", durable=self.durable)
        with self._saving(account.rescue) as (save, _):
            save(account.rescue, overwrite=True)
        with self._lock:
            account.interrupted = retention.Entry(os.path.basename(account.rescue), record["step"], None, time.time())
            account.write(durable=self.durable)
        record |= {"stall_seconds": time.perf_counter() - since, "bytes": os.path.getsize(account.rescue)}
        self.history.append(record)
        cause = "an exception" if reason == "exception" else "a signal"
        logger.warning("saved '%s' after %s", account.rescue, cause, extra={"hornbeam": record})
        return account.rescue

    def fit_failed(self, error: BaseException) -> None:
        """Saves after an exception, never over the best or an ordinary checkpoint; says so if it cannot."""
        failed = self._failure_of_pending()  # also for who trains next, who shall not go on from less than there is
        if failed is not None and failed is not error:
            error.add_note(f"A save before this had failed: {type(failed).__name__}: {failed}")
        if not self.save_on_exception or not processes.is_chief():
            return
        if self._answering and not isinstance(error, Exception):
            return  # a signal's handler ended training, and what is worth saving was saved
        try:
            if not self._trained and self._iterations() == self._begun_at:  # what an earlier crash left is worth more
                error.add_note("No batch had been trained: there was nothing to save.")
                return
            path = self._rescue(getattr(self, "_current_epoch", 0), self._last_batch_seen or 0, None, "exception")
        except Exception as failure:
            text = f"Nothing could be saved after this: {type(failure).__name__}: {failure}"
            logger.error("%s", text)
        else:
            text = f"The state of the model at this point was saved to '{path}'."
        error.add_note(text)

    def fit_ended(self) -> None:
        """Gives the signals back, those too that nobody has answered."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        self._answering = self._watched = False
        if self._held is not None and not self._account().busy:  # else somebody does not want to wait: `_claim` does
            self._held.release()
            self._held = None
        with contextlib.ExitStack() as stack:
            while self._signals:
                stack.callback(signal.raise_signal, self._signals.pop())


def _number(value: Any) -> float | None:
    """A score as it can be stored; `None` for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


fits.watch_fit()  # now: where a callback is made inside the call of `fit`, that was looked up before
