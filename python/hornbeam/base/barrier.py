"""Processes that wait for each other through files in a directory that they share.

Nothing but the directory is needed: the barrier of a backend belongs to the runtime of its collectives, which only a
strategy starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hornbeam import _core
from hornbeam.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of its training.

    Attributes:
        rank: 0 for the chief, which writes; -1 for one that does not train: an evaluator, a parameter server.
        count: How many there are.
    """

    rank: int
    count: int


class Group:
    """The processes of a training, which meet at a shared directory.

    To join, each leaves a nonce there. The chief chooses an identity, and tells it with the nonces of those it is meant
    for: what an earlier run left is of another one. The files of the meetings, with the number of each process's last
    one, are in a folder of that name, so that whoever joins again disturbs nobody who still looks for the last meeting.
    """

    def __init__(self, directory: Path, place: Place, timeout: float) -> None:
        """Waits for all of them.

        Raises:
            CheckpointError: Not all came in time.
        """
        self._directory, self._place, self._timeout = directory, place, timeout
        self._nonce, self._run, self._met = secrets.token_hex(8), "", 0
        self._failures: dict[str, str] = {}  # by the number of the meeting: who fails does not wait to be heard
        directory.mkdir(parents=True, exist_ok=True)
        if place.rank == 0:
            self._run = secrets.token_hex(8)
            (directory / self._run).mkdir()
            self._wait(self._gather, "join")
            for left in directory.iterdir():  # everybody is here
                if left.is_dir() and left.name != self._run:
                    shutil.rmtree(left, ignore_errors=True)
        else:
            said = json.dumps({"nonce": self._nonce})
            _core.write_file(directory / f"process-{place.rank}.json", said.encode())
            self._wait(self._join, "lead")
        self._write()

    def meet(self, *, failed: str | None = None) -> None:
        """Says that this process is here, and waits until all are.

        Args:
            failed: Why what the others wait for did not happen; they raise it, and this process does not wait.

        Raises:
            CheckpointError: Not all came in time, or the chief has failed.
        """
        self._met += 1
        if failed is not None:
            self._failures[str(self._met)] = failed
        self._write()
        if failed is None:
            self._wait(self._all_here, "come to save")

    def _file(self, rank: int) -> Path:
        return self._directory / self._run / f"{rank}.json"

    def _write(self) -> None:
        said = {"met": self._met, "failures": self._failures}
        _core.write_file(self._file(self._place.rank), json.dumps(said).encode())

    def _gather(self) -> list[int]:
        """Of the chief: tells everybody's nonce back with the identity; who does not answer there is missing."""
        others = range(1, self._place.count)
        nonces = {str(rank): _read(self._directory / f"process-{rank}.json").get("nonce") for rank in others}
        told = {"run": self._run, "nonces": nonces}
        if _read(self._directory / "run.json") != told:
            _core.write_file(self._directory / "run.json", json.dumps(told).encode())
        return [rank for rank in others if not _read(self._file(rank))]

    def _join(self) -> list[int]:
        told = _read(self._directory / "run.json")
        if told.get("nonces", {}).get(str(self._place.rank)) != self._nonce:
            return [0]
        self._run = told["run"]
        return []

    def _all_here(self) -> list[int]:
        missing = []
        for rank in range(self._place.count):
            if rank == self._place.rank:
                continue
            said = _read(self._file(rank))
            if said.get("met", -1) < self._met:
                missing.append(rank)
            elif (why := said["failures"].get(str(self._met))) is not None:
                raise CheckpointError(f"process {rank} could not save: {why}")
        return missing

    def _wait(self, missing: Callable[[], list[int]], what: str) -> None:
        end, pause = time.monotonic() + self._timeout, 0.005
        while late := missing():
            if time.monotonic() > end:
                raise CheckpointError(
                    f"Process {self._place.rank} of {self._place.count} has waited {self._timeout:g} s at "
                    f"'{self._directory}' for others to {what}: {late}. All must call the same saves, and share "
                    "the directory."
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.2)


@contextlib.contextmanager
def together(group: Group | None) -> Iterator[None]:
    """A block that ends when every process of the training is there; what one of them raises in it fails all."""
    try:
        yield
    except BaseException as error:
        if group is not None:
            group.meet(failed=f"{type(error).__name__}: {error}")
        raise
    if group is not None:
        group.meet()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
