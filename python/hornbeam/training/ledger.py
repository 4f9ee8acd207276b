"""What is known of the checkpoints of one file pattern: a small JSON file beside them, replaced as a whole.

A save is noted before its file takes its place and confirmed afterwards, so that a crash in between loses nothing: a
file that changed since it was noted is the noted one.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from hornbeam import _core
from hornbeam.base import settings
from hornbeam.base.counters import logger
from hornbeam.base.retention import Entry, best_first, plan_retention

_SUFFIX = ".checkpoints.json"
_FIELD = re.compile(r"\{([^{}:!.\[]*)[^{}]*\}")


class Ledger:
    """The checkpoints of a pattern.

    Args:
        pattern: The path, with Keras' placeholders. All of them below the part without any are in one ledger.
        base: What a relative path is relative to; without it, the directory that the process is in at each use.

    Attributes:
        path: The JSON file. Its name begins with a dot and ends like no model file.
        lock: The file that whoever trains with the pattern has locked.
        meeting: The folder where several processes meet.
        monitor: The metric that scores are of.
        mode: `"min"` or `"max"`, or `None` as long as that is not known.
        entries: Those that are complete, the newest last.
        interrupted: What was saved after an exception or signal, if it is no ordinary checkpoint.
    """

    def __init__(self, pattern: str, base: str = "") -> None:
        static, placeholder, _ = pattern.partition("{")
        inside = os.path.dirname(static if placeholder else pattern)
        self.directory = os.path.join(base, inside) if base else inside
        rest = os.path.relpath(pattern, inside or ".")
        name = os.path.join(self.directory, "." + re.sub(r"[/\\]", "-", _FIELD.sub(r"{\1}", rest)))
        self.path, self.meeting = name + _SUFFIX, name + ".processes"
        self.lock = os.path.realpath(name + ".lock")
        stem, dot, ending = re.sub(r"[-_.]?\{[^{}]*\}", "", os.path.basename(rest)).partition(".")
        self.rescue = os.path.join(self.directory, f"{stem}-interrupted{dot}{ending}".lstrip("-"))
        self.monitor: str | None = None
        self.mode: str | None = None
        self.entries: list[Entry] = []
        self.interrupted: Entry | None = None
        self._pending: list[dict[str, Any]] = []
        self._doomed: list[str] = []

    def read(self) -> bool:
        """Takes over what an earlier process noted; says whether there was anything.

        Raises:
            ValueError: When the file is not of this kind.
        """
        found = _load(self.path)
        if found is None:
            return False
        self.monitor, self.mode = found["monitor"], found["mode"]
        self.entries = [Entry(*row) for row in found["checkpoints"]]
        adopted: set[str] = set()
        for pending in found["pending"]:
            if pending["entry"][0] not in adopted and self._adopt(pending):
                adopted.add(pending["entry"][0])  # the next of this name would not have begun before this was confirmed
        self.entries = _last_of_each(e for e in self.entries if self._identity(e.name) is not None)
        kept = {e.name for e in self.entries}
        self._doomed = [name for name in found["deleting"] if name not in kept]
        interrupted = found["interrupted"]
        if interrupted is not None and self._identity(interrupted[0]) is not None:
            self.interrupted = Entry(*interrupted)
        return True

    def full(self, name: str) -> str:
        """The path of a checkpoint."""
        return os.path.join(self.directory, name)

    def best(self) -> Entry | None:
        """The best of the complete ones."""
        ranked = best_first(self.entries, self.mode) if self.mode is not None else []
        return ranked[0] if ranked else None

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
        self._drop(pending)
        if self._adopt(pending):
            self.entries = _last_of_each(self.entries)

    def _drop(self, pending: dict[str, Any]) -> None:
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
        self.entries.append(entry)
        return True

    def confirm(
        self,
        pending: dict[str, Any],
        *,
        keep_last: int | None,
        keep_best: int | None,
        keep_every: int | None,
        durable: bool,
    ) -> list[str]:
        """The file is in its place: notes that, then deletes those that are not kept.

        Returns:
            The names of the deleted ones.
        """
        self._drop(pending)
        name, step, metric, _ = pending["entry"]
        self.entries = _last_of_each([*self.entries, Entry(name, step, metric, time.time())])
        doomed = plan_retention(
            self.entries, keep_last=keep_last, keep_best=keep_best, keep_every=keep_every, mode=self.mode or "min"
        )
        self.entries = [e for e in self.entries if e.name not in doomed]
        kept = {e.name for e in self.entries}
        self._doomed = sorted({*self._doomed, *doomed} - kept)
        self.write(durable=durable)
        return self._delete()

    def write(self, *, durable: bool) -> None:
        """Replaces the JSON file."""
        best = self.best()
        text = json.dumps(
            {
                "monitor": self.monitor,
                "mode": self.mode,
                "best": None if best is None else {"name": best.name, "score": best.metric},
                "checkpoints": self.entries,
                "pending": self._pending,
                "deleting": self._doomed,
                "interrupted": self.interrupted,
            },
            indent=1,
        )
        os.makedirs(self.directory or ".", exist_ok=True)
        _core.write_file(self.path, text.encode(), durable=durable)

    def _delete(self) -> list[str]:
        pending = {p["entry"][0] for p in self._pending}
        deleted = []
        for name in [name for name in self._doomed if name not in pending]:
            try:
                os.remove(self.full(name))
                deleted.append(name)
            except FileNotFoundError:
                pass
            except OSError as error:  # tried again after the next save
                logger.warning("cannot delete the old checkpoint '%s': %s", self.full(name), error)
                continue
            self._doomed.remove(name)
        return deleted

    def _identity(self, name: str) -> list[int] | None:
        try:
            found = os.stat(self.full(name))
        except OSError:
            return None
        return [found.st_ino, found.st_mtime_ns, found.st_size]


def _last_of_each(entries: Any) -> list[Entry]:
    """Without those whose file was written over by a later one."""
    known: dict[str, Entry] = {}
    for entry in entries:
        known.pop(entry.name, None)
        known[entry.name] = entry
    return list(known.values())


def _load(path: str) -> dict[str, Any] | None:
    try:
        found = json.loads(Path(path).read_bytes())
        complete = {"monitor", "mode", "checkpoints", "pending", "deleting", "interrupted"} <= found.keys()
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(f"'{path}' does not say which checkpoints there are; move it away to start anew.")
    result: dict[str, Any] = found
    return result


def _ledgers(place: str | os.PathLike[str]) -> list[Ledger]:
    """Those of a directory, or the one of a pattern."""
    text = os.fspath(place)
    found = []
    if os.path.isdir(text) and not text.endswith(".keras"):
        for name in sorted(os.listdir(text)):
            if name.startswith(".") and name.endswith(_SUFFIX):
                ledger = Ledger(os.path.join(text, "any"))
                ledger.path = os.path.join(text, name)
                found.append(ledger)
    else:
        found.append(Ledger(text))
    return [ledger for ledger in found if ledger.read()]


def latest_checkpoint(place: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint that `ModelCheckpoint` wrote, by its own account.

    Args:
        place: The `filepath` that the callback was given, placeholders and all, or the directory of the checkpoints.

    Returns:
        Its path; `None` where there is none, or where the callback kept no account (it had none of our arguments).

    Raises:
        ValueError: When the account is damaged.
    """
    found = [(e.time, ledger.full(e.name)) for ledger in _ledgers(place) if (e := ledger.latest()) is not None]
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
    found = [(ledger, e) for ledger in _ledgers(place) if (e := ledger.best()) is not None]
    if len({(ledger.monitor, ledger.mode) for ledger, _ in found}) > 1:
        raise ValueError(f"The checkpoints in '{place}' have scores of several kinds; give the `filepath` of one kind.")
    if not found:
        return None
    entries = [Entry(ledger.full(e.name), *e[1:]) for ledger, e in found]
    return best_first(entries, found[0][0].mode or "min")[0].name
