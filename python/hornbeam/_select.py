"""Partial and renamed loads: which tensor of the file goes where in the model."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import keras
from keras.src.saving import saving_lib

from hornbeam import _keras
from hornbeam._report import shorten
from hornbeam._store import Attributes, RecordStore

NameMap = Mapping[str, str | None] | Callable[[str], str | None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What `hornbeam.saving` asks of the next load, beyond what Keras' functions can say.

    Attributes:
        strict: Raise unless the load is complete.
        only: Patterns of what is loaded; `None` for everything.
        skip: Patterns of what is not.
        name_map: Name in the file → name in the model.
        by_name: Match layers by their names instead of their places.
    """

    strict: bool = False
    only: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    name_map: NameMap | None = None
    by_name: bool = False

    @property
    def partial(self) -> bool:
        """Whether not simply everything goes where Keras would put it."""
        return self.only is not None or bool(self.skip) or self.name_map is not None or self.by_name


class Structure(RecordStore):
    """What a model would store, and under which names: its variables themselves, not their values."""

    def __init__(self, model: Any, visited: set[int]) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}
        self._start = f"{model.name}/"
        with _keras.fast_walk():
            saving_lib._save_state(
                model, weights_store=self, assets_store=None, inner_path="", visited_saveables=set(visited)
            )

    def __setitem__(self, key: str, value: Any) -> None:
        self.values[self._path(key)] = value

    def __getitem__(self, key: str) -> Any:
        return self.values[self._path(key)]

    def __delitem__(self, key: str) -> None:
        del self.values[self._path(key)]

    def __contains__(self, key: object) -> bool:
        return self._path(str(key)) in self.values

    def names(self, path: str) -> list[str]:
        """What a pattern may call the entry at `path`: its path, and its variable's, with and without the model."""
        value = self.values[path]
        if not isinstance(value, keras.Variable):
            return [path]
        return list(dict.fromkeys([path, value.path.removeprefix(self._start), value.path]))


class Selection:
    """Which tensor of the file every entry of the model gets.

    Attributes:
        structure: What the model would store.
        source: Path in the model → path in the file, of what is loaded; everything else keeps its value.
        missing: Paths in the model that should have been loaded and are not in the file.

    Raises:
        ValueError: For a pattern that fits nothing, and names that do not tell one thing from another.
    """

    def __init__(
        self,
        request: Request,
        structure: Structure,
        names: Iterable[str],
        groups: Mapping[str, Attributes],
    ) -> None:
        self.structure = structure
        known: dict[str, str] = {}
        for path in structure.values:
            for name in structure.names(path):
                known.setdefault(name, path)
        selected = {path for path in structure.values if _selected(structure.names(path), request)}
        for pattern in (*(request.only or ()), *request.skip):
            if not any(_fits(name, pattern) for path in structure.values for name in structure.names(path)):
                near = difflib.get_close_matches(pattern.rstrip("/*"), known, n=3, cutoff=0.4)
                raise ValueError(f"No variable of the model fits {pattern!r}{_hint(near)}")
        # Slots of an optimizer are numbered: without names, only whole states fit.
        if request.name_map is not None or request.by_name:
            selected -= {p for p in selected if p.startswith("optimizer/") and not request.only}
        rename = _renamer(request, structure, groups)
        self.source: dict[str, str] = {}
        for name in names:
            target = known.get(rename(name) or "")
            if target is None or target not in selected:
                continue
            if target in self.source:
                raise ValueError(f"Two tensors of the file go to '{target}': '{self.source[target]}' and '{name}'.")
            self.source[target] = name
        lenient = {p for p in selected if request.by_name or p.startswith("optimizer/")}
        self.missing = sorted(selected - self.source.keys() - lenient)


def _selected(names: list[str], request: Request) -> bool:
    if any(_fits(name, pattern) for name in names for pattern in request.skip):
        return False
    return request.only is None or any(_fits(name, pattern) for name in names for pattern in request.only)


def _fits(name: str, pattern: str) -> bool:
    """As `fnmatch`; a pattern may also name a group, and stands for all below it."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern.rstrip('/')}/")


def _renamer(request: Request, structure: Structure, groups: Mapping[str, Attributes]) -> Callable[[str], str | None]:
    name_map = request.name_map
    if callable(name_map):
        return name_map
    if name_map is not None:
        return lambda name: name_map.get(name, name)
    if not request.by_name:
        return lambda name: name
    ours, theirs = _by_layer(structure.groups), _by_layer(groups)
    where = {theirs[layer]: ours[layer] for layer in theirs.keys() & ours.keys()}

    def rename(name: str) -> str | None:
        group, _, key = name.rpartition("/")
        return f"{where[group]}/{key}" if group in where else None

    return rename


def _by_layer(groups: Mapping[str, Attributes]) -> dict[str, str]:
    """Name of a layer → its group. A name that comes twice tells nothing, so it is left out."""
    found: dict[str, str] = {}
    twice = set()
    for path, attributes in groups.items():
        name = dict(attributes).get("name")
        if name is not None:
            twice.update([name] if name in found else [])
            found[name] = path
    return {name: path for name, path in found.items() if name not in twice}


def _hint(near: list[str]) -> str:
    return f"; nearest: {shorten(near)}" if near else ""
