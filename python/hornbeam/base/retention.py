"""Which checkpoints are kept: a pure function, so that every policy can be tested without a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Entry(NamedTuple):
    """A checkpoint that is complete.

    Attributes:
        name: Its name; of two entries with the same name, the later one is meant.
        step: The epoch or step it was made at; what `keep_every` counts.
        metric: Its score, or `None` where there is none.
        time: When it was committed, in seconds since 1970. It also says which of several accounts, or of an interrupted
            save, is the newest.
    """

    name: str
    step: int
    metric: float | None = None
    time: float = 0.0


def check(*, keep_last: int | None, keep_best: int | None, keep_every: int | None) -> None:
    """Refuses invalid numbers.

    Raises:
        ValueError: For anything but `None` and whole numbers from 1 on.
    """
    for name, value in (("keep_last", keep_last), ("keep_best", keep_best), ("keep_every", keep_every)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be a whole number from 1 on, or None. Received: {name}={value!r}")


def best_first(entries: Sequence[Entry], mode: str) -> list[Entry]:
    """The entries that have a score, the best first; of equal ones the older, as Keras asks for an improvement."""
    sign = {"min": 1.0, "max": -1.0}[mode]
    scored = [(sign * e.metric, i) for i, e in enumerate(entries) if e.metric is not None and not math.isnan(e.metric)]
    return [entries[i] for _, i in sorted(scored)]


def plan_retention(
    entries: Sequence[Entry],
    *,
    keep_last: int | None = None,
    keep_best: int | None = None,
    keep_every: int | None = None,
    mode: str = "min",
) -> set[str]:
    """Which checkpoints are to be deleted: those that no rule keeps.

    Args:
        entries: All complete checkpoints, in the order they were committed: the newest comes last.
        keep_last: The newest so many are kept.
        keep_best: The best so many are kept.
        keep_every: Those whose step is a multiple of it are kept.
        mode: `"min"` or `"max"`: which score is the better one.

    Returns:
        Their names. The newest is never among them, nor, with `keep_best`, the best. Without any rule nothing is.

    Raises:
        ValueError: For anything but `None` and whole numbers from 1 on.
    """
    check(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
    if keep_last is None and keep_best is None and keep_every is None:
        return set()
    known: dict[str, Entry] = {}
    for entry in entries:
        known.pop(entry.name, None)  # the later of two with one name, in its place
        known[entry.name] = entry
    ordered = list(known.values())
    kept = {entry.name for entry in ordered[-(keep_last or 1) :]}
    if keep_best is not None:
        kept.update(entry.name for entry in best_first(ordered, mode)[:keep_best])
    if keep_every is not None:
        kept.update(entry.name for entry in ordered if entry.step % keep_every == 0)
    return known.keys() - kept
