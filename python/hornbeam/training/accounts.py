"""Which checkpoints there are: accounts of them in JSON files, each replaced as a whole.

`ModelCheckpoint` keeps a `PatternAccount` beside its files, `CheckpointManager` a `Manifest` in its directory. What an
account says is complete is there; what it does not name does not exist.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hornbeam import _core
from hornbeam.base import settings
from hornbeam.base.counters import logger
from hornbeam.base.retention import Entry, best_first, plan_retention
from hornbeam.errors import CheckpointError

_SUFFIX = ".checkpoints.json"
_FIELD = re.compile(r"\{([^{}:!.\[]*)[^{}]*\}")
_NAME = re.compile(r"step-\d{8,}(-\d+)?")
#: What a save that was killed leaves: a directory, and the file whose lock says that somebody still writes to it.
_LEFTOVER = re.compile(r"\.(step-\d{8,}(?:-\d+)?|checkpoints\.json)\.[0-9a-f]{16,24}\.hornbeam-tmp")
WEIGHTS, MODEL, STATE = "model.weights.h5", "model.keras", "state.zip"

#: `keep_last`, `keep_best` and `keep_every`.
Rules = dict[str, int | None]


class Account:
    """The checkpoints of one place.

    Attributes:
        path: The JSON file.
        mode: `"min"` or `"max"`, or `None` as long as that is not known.
        entries: Those that are complete, the newest last.
    """

    def __init__(self, path: str, mode: str | None = None) -> None:
        self.path, self.mode = path, mode
        self.entries: list[Entry] = []

    def best(self) -> Entry | None:
        """The best of the complete ones, of equal ones the older."""
        ranked = best_first(self.entries, self.mode) if self.mode is not None else []
        return ranked[0] if ranked else None

    def add(self, entry: Entry, rules: Rules) -> set[str]:
        """Takes up one that is complete; the names of those that no rule keeps any more."""
        self.entries = _last_of_each([*self.entries, entry])
        given_up = plan_retention(self.entries, mode=self.mode or "min", **rules)
        self.entries = [e for e in self.entries if e.name not in given_up]
        return given_up

    def replace(self, content: dict[str, Any], *, durable: bool) -> None:
        """Replaces the JSON file."""
        _core.write_file(self.path, json.dumps(content, indent=1).encode(), durable=durable)

    def load(self) -> dict[str, Any] | None:
        """What the JSON file has; `None` where there is none.

        Raises:
            ValueError: It is no JSON object.
        """
        try:
            found = _core.decode_json(Path(self.path).read_bytes(), trusted=False)
        except FileNotFoundError:
            return None
        if not isinstance(found, dict):
            raise ValueError(f"expected a JSON object, found {type(found).__name__!r}")
        return found


class PatternAccount(Account):
    """The checkpoints of a file name with placeholders.

    A save is noted before its file takes its place and confirmed afterwards, so that a crash in between loses nothing:
    a file that changed since the save was noted is that save's.

    Args:
        pattern: The path, with Keras' placeholders. All of them below the part without any are in one account.
        base: What a relative path is relative to; without it, the directory that the process is in at each use.

    Attributes:
        path: Its name begins with a dot and ends like no model file.
        lock: The file that the training process holds locked.
        processes: The folder through which several processes wait for each other.
        rescue: Where a model goes that is saved after an exception.
        monitor: The metric that scores are of.
        interrupted: What was saved after an exception or signal, if it is no ordinary checkpoint.
    """

    def __init__(self, pattern: str, base: str = "") -> None:
        static, placeholder, _ = pattern.partition("{")
        inside = os.path.dirname(static if placeholder else pattern)
        self.directory = os.path.join(base, inside) if base else inside
        rest = os.path.relpath(pattern, inside or ".")
        name = os.path.join(self.directory, "." + re.sub(r"[/\\]", "-", _FIELD.sub(r"{\1}", rest)))
        super().__init__(name + _SUFFIX)
        self.processes, self.lock = name + ".processes", os.path.realpath(name + ".lock")
        stem, dot, ending = re.sub(r"[-_.]?\{[^{}]*\}", "", os.path.basename(rest)).partition(".")
        self.rescue = os.path.join(self.directory, f"{stem}-interrupted{dot}{ending}".lstrip("-"))
        self.monitor: str | None = None
        self.interrupted: Entry | None = None
        self._pending: list[dict[str, Any]] = []
        self._deleting: list[str] = []

    def read(self) -> bool:
        """Takes over what an earlier process noted; says whether there was anything.

        Raises:
            ValueError: When the file is not of this kind.
        """
        try:
            found = self.load()
            keys = {"monitor", "mode", "checkpoints", "pending", "deleting", "interrupted"}
            complete = found is None or found.keys() >= keys
        except ValueError:
            complete = False
        if not complete:
            raise ValueError(f"'{self.path}' does not say which checkpoints there are; move it away to start anew.")
        if found is None:
            return False
        self.monitor, self.mode = found["monitor"], found["mode"]
        self.entries = [Entry(*row) for row in found["checkpoints"]]
        adopted: set[str] = set()
        for pending in found["pending"]:
            if pending["entry"][0] not in adopted and self._adopt(pending):
                adopted.add(pending["entry"][0])  # a later save of this name begins only after this one was confirmed
        self.entries = [e for e in self.entries if self._identity(e.name) is not None]
        kept = {e.name for e in self.entries}
        self._deleting = [name for name in found["deleting"] if name not in kept]
        interrupted = found["interrupted"]
        if interrupted is not None and self._identity(interrupted[0]) is not None:
            self.interrupted = Entry(*interrupted)
        return True

    def full(self, name: str) -> str:
        """The path of a checkpoint."""
        return os.path.join(self.directory, name)

    def latest(self) -> Entry | None:
        """The newest of the complete ones, the interrupted one included."""
        known = [*self.entries[-1:], *([self.interrupted] if self.interrupted is not None else [])]
        return max(known, key=lambda e: e.time, default=None)

    def scores(self) -> list[float | None]:
        """Of those that are complete or being written."""
        return [*(e.metric for e in self.entries), *(p["entry"][2] for p in self._pending)]

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return bool(self._pending)

    def begin(self, path: str, step: int, metric: float | None, *, durable: bool) -> dict[str, Any]:
        """Notes a save before its file takes its place; gives what `confirm` and `abandon` want."""
        name = os.path.relpath(path, self.directory or ".")
        atomic = settings.current().atomic
        pending = {"entry": [name, step, metric, time.time()], "before": self._identity(name), "atomic": atomic}
        self._pending.append(pending)
        try:
            self.write(durable=durable)
        except BaseException:
            self._pending = [p for p in self._pending if p is not pending]
            raise
        return pending

    def abandon(self, pending: dict[str, Any]) -> None:
        """The save failed. Its file may be in its place all the same: what failed came after that."""
        self._end(pending)
        self._adopt(pending)

    def confirm(self, pending: dict[str, Any], rules: Rules, *, durable: bool) -> list[str]:
        """The file is in its place: notes that, then deletes those that are not kept.

        Returns:
            The names of the deleted ones.
        """
        self._end(pending)
        name, step, metric, _ = pending["entry"]
        given_up = self.add(Entry(name, step, metric, time.time()), rules)
        self._deleting = sorted({*self._deleting, *given_up} - {e.name for e in self.entries})
        self.write(durable=durable)
        being_written = {p["entry"][0] for p in self._pending}
        unneeded = [n for n in self._deleting if n not in being_written]
        left = delete(unneeded, lambda n: os.remove(self.full(n)))
        self._deleting = [n for n in self._deleting if n in being_written or n in left]
        return [n for n in unneeded if n not in left]

    def write(self, *, durable: bool) -> None:
        """Replaces the JSON file."""
        best = self.best()
        os.makedirs(self.directory or ".", exist_ok=True)
        content = {
            "monitor": self.monitor,
            "mode": self.mode,
            "best": None if best is None else {"name": best.name, "score": best.metric},
            "checkpoints": self.entries,
            "pending": self._pending,
            "deleting": self._deleting,
            "interrupted": self.interrupted,
        }
        self.replace(content, durable=durable)

    def _end(self, pending: dict[str, Any]) -> None:
        """It is no longer under way; others of the name come after what is there now."""
        name = pending["entry"][0]
        self._pending = [p for p in self._pending if p is not pending]
        for other in self._pending:
            if other["entry"][0] == name:
                other["before"] = self._identity(name)

    def _adopt(self, pending: dict[str, Any]) -> bool:
        """Takes a save that nobody confirmed for one of the complete ones, if its file is in its place."""
        entry, before = Entry(*pending["entry"]), pending["before"]
        found = self._identity(entry.name)
        if found in (None, before):
            return False
        written_over = found is not None and before is not None and found[0] == before[0]
        if written_over or not pending.get("atomic", True):  # nobody knows how much of it was written
            self.entries = [e for e in self.entries if e.name != entry.name]
            return False
        self.entries = _last_of_each([*self.entries, entry])
        return True

    def _identity(self, name: str) -> list[int] | None:
        """What changes when another file takes its place."""
        try:
            found = os.stat(self.full(name))
        except OSError:
            return None
        return [found.st_ino, found.st_mtime_ns, found.st_size]


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
        return self.path / (MODEL if MODEL in self.files else WEIGHTS)

    @property
    def state(self) -> Path:
        """The file with everything else."""
        return self.path / STATE

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


class Manifest(Account):
    """The checkpoints of a directory, as its `checkpoints.json` says.

    Args:
        directory: Where they are, each a directory of its own.
        monitor: Which of their metrics is the score.
        mode: As of any account.

    Attributes:
        checkpoints: What `entries` are of.
    """

    def __init__(self, directory: Path, monitor: str | None, mode: str) -> None:
        super().__init__(os.fspath(directory / "checkpoints.json"), mode)
        self.directory, self.monitor = directory, monitor
        self.checkpoints: list[Checkpoint] = []

    def read(self) -> Manifest:
        """Takes over what the file says.

        Raises:
            CheckpointError: It is malformed, or missing although there are checkpoints.
        """
        try:
            found = self.load()
            if found is None and any(self.directories()):
                raise CheckpointError(
                    f"'{self.directory}' has checkpoints, but no 'checkpoints.json' that names the complete ones. "
                    "Restore that file, or move the directories elsewhere; their model files can be loaded."
                )
            if found is not None and found["format"] != 1:
                raise CheckpointError(f"'{self.path}' is of a newer format: expected 1, found {found['format']}")
            self.checkpoints = [_from_row(self.directory, row) for row in found["checkpoints"]] if found else []
            self.entries = [self._entry(c) for c in self.checkpoints]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"'{self.path}' is malformed: {type(error).__name__}: {error}") from error
        return self

    def best_checkpoint(self) -> Checkpoint | None:
        """The one with the best score."""
        best = self.best()
        return next((c for c in self.checkpoints if best is not None and c.path.name == best.name), None)

    def commit(self, saved: Checkpoint, rules: Rules, *, durable: bool) -> None:
        """Names a checkpoint, instead of one of the same step, and no longer those that no rule keeps."""
        self.entries = [e for e in self.entries if e.step != saved.step]
        self.add(self._entry(saved), rules)
        kept = {entry.name for entry in self.entries}
        others = [c for c in self.checkpoints if c.step != saved.step]
        self.checkpoints = [c for c in [*others, saved] if c.path.name in kept]
        self.write(durable=durable)

    def write(self, *, durable: bool) -> None:
        """Replaces the file."""
        self.replace({"format": 1, "checkpoints": [_to_row(c) for c in self.checkpoints]}, durable=durable)

    def _entry(self, checkpoint: Checkpoint) -> Entry:
        score = checkpoint.metrics.get(self.monitor or "")
        return Entry(checkpoint.path.name, checkpoint.step, score, checkpoint.time)

    def directories(self) -> list[Path]:
        """Those that are called like checkpoints."""
        try:
            names = sorted(os.listdir(self.directory))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [self.directory / name for name in names if _NAME.fullmatch(name) and (self.directory / name).is_dir()]

    def unnamed(self) -> list[Path]:
        """Directories of checkpoints that the file does not name."""
        named = {entry.name for entry in self.entries}
        return [path for path in self.directories() if path.name not in named]

    def unused_path(self, step: int) -> Path:
        """A checkpoint never takes the place of another: the file alone says which of two is meant."""
        name, number = f"step-{step:08d}", 0
        while (path := self.directory / (f"{name}-{number}" if number else name)).exists():
            number += 1
        return path

    def clear_leftovers(self) -> None:
        """Removes temporary directories, unless somebody holds their lock."""
        left = [_LEFTOVER.fullmatch(name) for name in os.listdir(self.directory)]
        for target in {match[1] for match in left if match}:
            _core.clear_leftovers(self.directory / target)


def delete(names: Iterable[Any], remove: Callable[[Any], None]) -> list[Any]:
    """Deletes old checkpoints; those that could not be deleted, and are left to the next save."""
    left = []
    for name in names:
        try:
            remove(name)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("cannot delete the old checkpoint '%s': %s", name, error)
            left.append(name)
    return left


def _last_of_each(entries: Iterable[Entry]) -> list[Entry]:
    """Without those whose file was written over by a later one."""
    known: dict[str, Entry] = {}
    for entry in entries:
        known.pop(entry.name, None)
        known[entry.name] = entry
    return list(known.values())


def _crc(path: Path) -> int:
    crc, block = 0, memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            crc = zlib.crc32(block[:size], crc)
    return crc


def _to_row(checkpoint: Checkpoint) -> dict[str, Any]:
    row = dataclasses.asdict(checkpoint)
    row["name"] = row.pop("path").name
    row["metrics"] = {k: v if math.isfinite(v) else str(v) for k, v in checkpoint.metrics.items()}
    return row


def _from_row(directory: Path, row: dict[str, Any]) -> Checkpoint:
    name = row["name"]
    if not _NAME.fullmatch(name):
        raise ValueError(f"a checkpoint cannot be called {name!r}")
    metrics = {key: float(value) for key, value in row["metrics"].items()}  # "nan" and "inf" are texts
    time, size = float(row["time"]), int(row["bytes"])
    return Checkpoint(int(row["step"]), directory / name, metrics, time, size, dict(row["files"]), row["crc"])


def _accounts(place: str | os.PathLike[str]) -> list[PatternAccount]:
    """Those of a directory, or the one of a pattern."""
    text = os.fspath(place)
    found = []
    if os.path.isdir(text) and not text.endswith(".keras"):
        for name in sorted(os.listdir(text)):
            if name.startswith(".") and name.endswith(_SUFFIX):
                found.append(PatternAccount(os.path.join(text, "any")))
                found[-1].path = os.path.join(text, name)
    else:
        found.append(PatternAccount(text))
    return [account for account in found if account.read()]


def latest_checkpoint(place: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint that `ModelCheckpoint` wrote, by its own account.

    Args:
        place: The `filepath` that the callback was given, placeholders and all, or the directory of the checkpoints.

    Returns:
        Its path; `None` where there is none, or where the callback kept no account (it had none of our arguments).

    Raises:
        ValueError: When the account is damaged.
    """
    found = [(e.time, account.full(e.name)) for account in _accounts(place) if (e := account.latest()) is not None]
    return max(found)[1] if found else None


def best_checkpoint(place: str | os.PathLike[str]) -> str | None:
    """The complete checkpoint with the best score.

    Args:
        place: As for `latest_checkpoint`.

    Returns:
        Its path, or `None`.

    Raises:
        ValueError: When the directory holds checkpoints of several callbacks that monitor different things.
    """
    found = [(account, e) for account in _accounts(place) if (e := account.best()) is not None]
    if len({(account.monitor, account.mode) for account, _ in found}) > 1:
        raise ValueError(f"The checkpoints in '{place}' have scores of several kinds; give the `filepath` of one kind.")
    if not found:
        return None
    entries = [Entry(account.full(e.name), *e[1:]) for account, e in found]
    return best_first(entries, found[0][0].mode or "min")[0].name
