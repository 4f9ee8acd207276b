"""Retention against a model of it that says for each checkpoint why it stays."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hornbeam.base.retention import Entry, best_first, plan_retention

metrics = st.none() | st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf, -math.inf]) | st.floats(allow_nan=True)
entries = st.lists(st.tuples(st.sampled_from("abcdefghij"), st.integers(0, 12), metrics), max_size=12).map(
    lambda rows: [Entry(name, step, metric, float(i)) for i, (name, step, metric) in enumerate(rows)]
)
rule = st.none() | st.integers(1, 5)


def stays(entry: Entry, rest: list[Entry], last: int | None, best: int | None, every: int | None, mode: str) -> bool:
    """Counts who is ahead of an entry, instead of sorting."""
    newer = sum(other.time > entry.time for other in rest)
    if newer == 0 or (last is not None and newer < last):
        return True
    if every is not None and entry.step % every == 0:
        return True
    if best is None or entry.metric is None or math.isnan(entry.metric):
        return False

    def ahead(other: Entry) -> bool:
        if other.metric is None or math.isnan(other.metric):
            return False
        if other.metric == entry.metric:
            return other.time < entry.time
        return other.metric < entry.metric if mode == "min" else other.metric > entry.metric

    return sum(ahead(other) for other in rest) < best


@given(entries, rule, rule, rule, st.sampled_from(["min", "max"]))
def test_agrees_with_the_model(
    given_entries: list[Entry], last: int | None, best: int | None, every: int | None, mode: str
) -> None:
    deleted = plan_retention(given_entries, keep_last=last, keep_best=best, keep_every=every, mode=mode)
    latest = [e for i, e in enumerate(given_entries) if e.name not in {o.name for o in given_entries[i + 1 :]}]
    ruled = (last, best, every) != (None, None, None)
    assert deleted == {e.name for e in latest if ruled and not stays(e, latest, last, best, every, mode)}
    if given_entries:
        assert given_entries[-1].name not in deleted
    if best is not None and best_first(latest, mode):
        assert best_first(latest, mode)[0].name not in deleted


@given(entries, rule, rule, rule, st.sampled_from(["min", "max"]))
def test_a_second_time_deletes_nothing(
    given_entries: list[Entry], last: int | None, best: int | None, every: int | None, mode: str
) -> None:
    rules = {"keep_last": last, "keep_best": best, "keep_every": every, "mode": mode}
    deleted = plan_retention(given_entries, **rules)
    assert plan_retention([e for e in given_entries if e.name not in deleted], **rules) == set()


def test_by_hand() -> None:
    rows = [Entry("a", 1, 0.3), Entry("b", 2, 0.1), Entry("c", 3, 0.1), Entry("d", 4, 0.9), Entry("e", 5, None)]
    assert plan_retention(rows) == set()
    assert plan_retention(rows, keep_last=2) == {"a", "b", "c"}
    assert plan_retention(rows, keep_best=1) == {"a", "c", "d"}  # of equal ones the older
    assert plan_retention(rows, keep_best=1, mode="max") == {"a", "b", "c"}
    assert plan_retention(rows, keep_every=2) == {"a", "c"}
    assert plan_retention(rows, keep_last=1, keep_best=2, keep_every=4) == {"a"}


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "3"])
@pytest.mark.parametrize("name", ["keep_last", "keep_best", "keep_every"])
def test_refuses_what_means_nothing(name: str, wrong: object) -> None:
    with pytest.raises(ValueError, match=name):
        plan_retention([], **{name: wrong})
