"""What a load did, with every tensor of the file and every variable of the model; what a save and an export did."""

from __future__ import annotations

import dataclasses
import html
import time
import warnings
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, overload


@dataclasses.dataclass
class LoadReport:
    """What a load did.

    Names in the file are paths of datasets (`layers/dense/vars/0`); names in the model are paths of variables
    (`dense/kernel`) or, in `mismatched`, of objects as the file names them (`layers/dense`).

    Attributes:
        path: The file, or `None` for a file object.
        loaded: Names in the file that the model took.
        missing: Variables of the model that got nothing from the file.
        unexpected: Names in the file that nothing in the model asked for.
        skipped: Names in the file that were left out on purpose: by `only`, `skip`, `name_map` or `compile=False`, or
            because the model has no optimizer.
        mismatched: `(object, why)` of what did not fit.
        refused: Names in the file that belong to those; with `skip_mismatch`, some of their values may have been set,
            as in Keras.
        unmatched: Names that `name_map` has and the file has not.
        initialised: Variables that got their initial value because the file had none; only `load_model` does that.
        cast: `(variable, dtype in the file, dtype of the variable)` of what was converted.
        bytes: Bytes of the tensors taken.
        seconds: Seconds by stage: `open`, `build` (`load_model`), `read` (waiting for it), `assign`.
        crc: `"verified"`, `"partial"` (not all of the file was read) or `"none"` (the file has no checksum).
        engine: `"direct"`, `"libhdf5"` or `"stock"`, which reports nothing else.
        partial: Whether the file says that it holds a part of a model: what else the model has is in `missing`.
    """

    kind: ClassVar = "load"
    path: str | None = None
    loaded: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    mismatched: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    refused: list[str] = dataclasses.field(default_factory=list)
    unmatched: list[str] = dataclasses.field(default_factory=list)
    initialised: list[str] = dataclasses.field(default_factory=list)
    cast: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    bytes: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    crc: str = "none"
    engine: str = "stock"
    partial: bool = False

    def __post_init__(self) -> None:
        self._since = time.perf_counter()

    @property
    def complete(self) -> bool:
        """Whether all that was asked for was loaded: every variable, or those that `only` and the like leave.

        And nothing in the file was left over, but what is in `skipped`.
        """
        return self.engine != "stock" and not (self.missing or self.unexpected or self.mismatched or self.unmatched)

    def warn_if_nothing_fits(self) -> None:
        """Warns where what was asked for is not in the file: names that fit nothing are mostly misspelt."""
        what = f"'{self.path or 'a file object'}'"
        if self.missing and not self.loaded:
            named = f"the model has {shorten(self.missing, 3)}"
            warnings.warn(f"Nothing was loaded from {what}: no name in it fits; {named}.", stacklevel=2)
        elif self.unmatched:
            warnings.warn(f"`name_map` has names that are not in {what}: {shorten(self.unmatched)}.", stacklevel=2)

    def stage(self, name: str) -> None:
        """Ends a stage that began where the last one ended."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can hold."""
        return {**dataclasses.asdict(self), "complete": self.complete}

    def _rows(self) -> list[tuple[str, str]]:
        total = sum(self.seconds.values())
        stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.seconds.items())
        rows = [
            ("loaded", f"{len(self.loaded)} tensors, {_size(self.bytes)}, {total:.3f} s ({stages})"),
            ("checksum", self.crc),
            ("engine", self.engine),
        ]
        if self.partial:
            rows.append(("partial", "the file holds a part of a model"))
        for name in ("missing", "unexpected", "mismatched", "refused", "unmatched", "initialised", "cast", "skipped"):
            items = [_item(i) for i in getattr(self, name)]
            if items:
                rows.append((name, f"{len(items)}: {shorten(items)}"))
        return rows

    def __str__(self) -> str:
        head = f"{'complete' if self.complete else 'incomplete'} load of {self.path or 'a file object'}"
        return "\n".join([head, *(f"  {name:<12}{text}" for name, text in self._rows())])

    def _repr_html_(self) -> str:
        head = html.escape(str(self).split("\n", 1)[0])
        rows = (f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in self._rows())
        return f"<table><caption>{head}</caption>{''.join(rows)}</table>"


@dataclasses.dataclass
class Cast:
    """What a weight lost when it was saved in a narrower type.

    Attributes:
        name: Its variable.
        dtype: The variable's type.
        saved_as: The type in the file.
        max_abs: The largest difference of a value from what was saved for it, those aside that are not finite.
        max_rel: The same, relative to the value.
        zeros: How many values became zero.
        infinite: How many became infinite.
    """

    name: str
    dtype: str
    saved_as: str
    max_abs: float = 0.0
    max_rel: float = 0.0
    zeros: int = 0
    infinite: int = 0


@dataclasses.dataclass
class SaveReport:
    """What a save did.

    Attributes:
        path: The file or directory, or `None` for a file object.
        tensors: How many tensors it holds.
        bytes: Bytes of the file; of a directory or shards, of their weights.
        engine: `"direct"`, `"libhdf5"`, `"safetensors"` or `"stock"`, which reports nothing else.
        dtype: What weights were cast to, or `None`.
        cast: Those that were, and what they lost.
        left_out: Names of what was left out: the optimizer's state, or what `only` and `skip` say.
        crc: CRC-32 of the weights image, where hornbeam wrote one file of it.
    """

    kind: ClassVar = "save"
    path: str | None = None
    tensors: int = 0
    bytes: int = 0
    engine: str = "stock"
    dtype: str | None = None
    cast: list[Cast] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    crc: int | None = None

    @property
    def max_abs(self) -> float:
        """The largest difference that a cast made."""
        return max((c.max_abs for c in self.cast), default=0.0)

    @property
    def max_rel(self) -> float:
        """The largest relative difference that a cast made."""
        return max((c.max_rel for c in self.cast), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can hold."""
        return {**dataclasses.asdict(self), "max_abs": self.max_abs, "max_rel": self.max_rel}

    def __str__(self) -> str:
        rows = [f"saved {self.path or 'a file object'}", f"  {'tensors':<12}{self.tensors}, {_size(self.bytes)}"]
        rows.append(f"  {'engine':<12}{self.engine}")
        if self.cast:
            absolute = max(self.cast, key=lambda c: c.max_abs)
            relative = max(self.cast, key=lambda c: c.max_rel)
            rows.append(f"  {'cast':<12}{len(self.cast)} to {self.dtype}")
            rows.append(f"  {'error':<12}{absolute.max_abs:.3g} at most ({absolute.name})")
            rows.append(f"  {'relative':<12}{relative.max_rel:.3g} at most ({relative.name})")
        for name in ("zeros", "infinite"):
            lost = [(getattr(c, name), c.name) for c in self.cast if getattr(c, name)]
            if lost:
                total = sum(n for n, _ in lost)
                rows.append(f"  {name:<12}{total} values became so: {shorten([f'{n} of {c}' for n, c in lost])}")
        if self.left_out:
            rows.append(f"  {'left out':<12}{len(self.left_out)}: {shorten(self.left_out)}")
        return "\n".join(rows)


@dataclasses.dataclass
class ExportReport:
    """What an export wrote.

    Attributes:
        path: The directory.
        endpoints: The endpoints, in the order they were added.
        differences: Endpoint and output (`serve`, `serve/logits`) → the largest difference between what the reloaded
            artifact and the model answered; empty unless they were compared.
    """

    kind: ClassVar = "export"
    path: str
    endpoints: list[str]
    differences: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def largest(self) -> float | None:
        """The largest difference of all, or `None` if nothing was compared."""
        return max(self.differences.values(), default=None)


def _item(item: Any) -> str:
    if isinstance(item, str):
        return item
    return f"{item[0]} ({item[1]} → {item[2]})" if len(item) == 3 else f"{item[0]} ({item[1].splitlines()[0]})"


def shorten(items: list[str], most: int = 8) -> str:
    """The first items, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _size(nbytes: int) -> str:
    size, unit = float(nbytes), "bytes"
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


#: What a thread or task has done: kind → its newest report.
_newest: ContextVar[dict[str, LoadReport | SaveReport | ExportReport]] = ContextVar("hornbeam_reports")


@overload
def last_report(kind: Literal["load"]) -> LoadReport | None: ...
@overload
def last_report(kind: Literal["save"]) -> SaveReport | None: ...
@overload
def last_report(kind: Literal["export"]) -> ExportReport | None: ...
def last_report(kind: str) -> Any:
    """The report of the last load, save or export of the calling thread or task that went through hornbeam.

    An asynchronous save has ended later, and its report is that of its handle: `Handle.report`.

    Args:
        kind: `"load"`, `"save"` or `"export"`.

    Returns:
        A `LoadReport`, `SaveReport` or `ExportReport`; `None` before there is one. What fails makes none: the report
        is that of the one before it.

    Raises:
        ValueError: For another kind.
    """
    if kind not in ("load", "save", "export"):
        raise ValueError(f"kind must be 'load', 'save' or 'export'. Received: kind={kind!r}")
    return _newest.get({}).get(kind)


def remember(report: LoadReport | SaveReport | ExportReport) -> None:
    """Makes `report` the last one of its kind; who was called from outside does that, once."""
    _newest.set({**_newest.get({}), report.kind: report})
