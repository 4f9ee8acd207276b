"""Partial and renamed loads: which tensor of the file goes where in the model."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Protocol

import keras
import numpy as np
from keras.src.saving import saving_lib

from hornbeam.base.reports import shorten
from hornbeam.flows.recording import RecordStore
from hornbeam.flows.requests import LoadRequest
from hornbeam.seam import walking

Groups = Mapping[str, Iterable[tuple[str, object]]]


class Structure(RecordStore):
    """What a model would store, and under which names: its variables themselves, not their values."""

    def __init__(self, model: Any, visited: set[int]) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}
        self.datasets = self.values
        self._start = f"{model.name}/"
        with walking.fast_walk():
            saving_lib._save_state(
                model, weights_store=self, assets_store=None, inner_path="", visited_saveables=set(visited)
            )

    def __setitem__(self, key: str, value: Any) -> None:
        # Others may be refilled, or changed by who asks for them.
        variable = isinstance(value, keras.Variable)
        self.values[self._path(key)] = value if variable else np.array(keras.ops.convert_to_numpy(value))

    def __getitem__(self, key: str) -> Any:
        return np.array(keras.ops.convert_to_numpy(self.values[self._path(key)]))

    def names(self, path: str) -> list[str]:
        """What a pattern may call the entry at `path`: its path, and its variable's, with and without the model."""
        value = self.values[path]
        if not isinstance(value, keras.Variable):
            return [path]
        return list(dict.fromkeys([path, value.path.removeprefix(self._start), value.path]))


class Names(Protocol):
    """What the names in a file stand for.

    Attributes:
        targets: Name → paths in the model.
    """

    targets: Mapping[str, list[str]]

    def place(self, name: str) -> str:
        """Where the file says that a name belongs."""


class Selection:
    """Which tensor of the file every entry of the model gets.

    Args:
        request: What is asked for.
        structure: What the model would store.
        shapes: The tensors of the file.
        groups: The groups of the file that have attributes.
        names: What the file's names stand for, where they are no paths in the model.

    Attributes:
        source: Path in the model → path in the file, of what is loaded; everything else keeps its value.
        missing: Paths in the model that were asked for and are not in the file.
        lenient: Those of them that need not be.

    Raises:
        ValueError: For a pattern that fits nothing, and names that do not tell one thing from another.
    """

    def __init__(
        self,
        request: LoadRequest,
        structure: Structure,
        shapes: Mapping[str, tuple[int, ...]],
        groups: Groups,
        names: Names | None = None,
    ) -> None:
        self.structure = structure
        self._names = names
        known: dict[str, list[str]] = {}
        for path in structure.values:
            for name in structure.names(path):
                known.setdefault(name, []).append(path)
        selected = {path for path in structure.values if is_selected(structure.names(path), request)}
        for pattern in (*(request.only or ()), *request.skip):
            if not any(is_matched(name, pattern) for path in structure.values for name in structure.names(path)):
                near = difflib.get_close_matches(pattern.rstrip("/*"), known, n=3, cutoff=0.4)
                raise ValueError(f"No variable of the model fits {pattern!r}{_hint(near)}")
        if names is None:
            selected -= _foreign_slots(request, structure, shapes)
        rename = _renamer(request, structure, groups, names)
        self.source: dict[str, str] = {}
        for name in shapes:
            target = rename(name)
            for entry in [] if target is None else self._entries(target, known, request):
                if entry not in selected:
                    continue
                if entry in self.source:
                    raise ValueError(f"Two tensors of the file go to '{entry}': '{self.source[entry]}' and '{name}'.")
                self.source[entry] = name
        self.missing = sorted(selected - self.source.keys())
        self.lenient = {p for p in self.missing if request.by_name or structure.is_optimizer(p)}
        self._places = {name: path for path, name in self.source.items()}
        self._loaded: dict[str, set[str]] = {}
        for path in self.source:
            self._loaded.setdefault(path.rpartition("/")[0], set()).add(path)

    def _entries(self, name: str, known: Mapping[str, list[str]], request: LoadRequest) -> list[str]:
        """The entries of the model that a name stands for: one, or all that are the same variable."""
        if self._names is not None and (request.name_map is None or name in self._names.targets):
            entries = self._names.targets.get(name, [])
        else:
            entries = known.get(name, [])
        if len({id(self.structure.values[path]) for path in entries}) <= 1:
            return entries
        if request.name_map is None and self._names is None:
            return []
        raise ValueError(
            f"Two variables of the model are called '{name}': those at '{entries[0]}' and '{entries[1]}'. Map the "
            "name in the file to one of these with `name_map`."
        )

    def place(self, name: str) -> str:
        """Where a tensor of the file belongs, as paths in `.weights.h5` go; its name, if nobody says."""
        if self._names is None:
            return name
        return self._places.get(name) or self._names.place(name)

    def has(self, path: str) -> bool:
        """Whether anything of the object at `path` is loaded."""
        return _group(path) in self._loaded

    def keeps(self, path: str, saveable: Any) -> list[Any]:
        """Variables of an object that keep their values although others get theirs.

        Raises:
            ValueError: When the object stores values that are not its variables: they cannot be taken apart.
        """
        group = _group(path)
        loaded = self._loaded.get(group, set())
        entries = [p for p in self.structure.values if p.rpartition("/")[0] == group] if loaded else []
        if len(loaded) == len(entries):
            return []
        variables = [self.structure.values[p] for p in entries]
        if not all(isinstance(v, keras.Variable) for v in variables):
            raise ValueError(f"'{path}' stores other values than its variables have: load all of it, or nothing.")
        own = [*getattr(saveable, "_trainable_variables", ()), *getattr(saveable, "_non_trainable_variables", ())]
        named = {id(self.structure.values[p]) for p in loaded}
        return [v for v in {id(v): v for v in [*variables, *own]}.values() if id(v) not in named]


def _group(path: str) -> str:
    return f"{path}/vars" if path else "vars"


def _foreign_slots(request: LoadRequest, structure: Structure, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The optimizer's entries, where those of the file may belong to other variables: slots have only numbers."""
    ours = {p: tuple(getattr(v, "shape", ())) for p, v in structure.values.items() if p.startswith("optimizer/")}
    theirs = {p: tuple(shape) for p, shape in shapes.items() if p.startswith("optimizer/")}
    renamed = request.name_map is not None or request.by_name
    if ours == theirs and not renamed:
        return set()
    if ours and theirs and not renamed:
        warnings.warn("Skipping the optimizer's state: it belongs to other variables than the model has.", stacklevel=2)
    return set(ours)


def is_selected(names: list[str], request: LoadRequest) -> bool:
    """Whether an entry of these names is asked for, by `only` and `skip`."""
    if any(is_matched(name, pattern) for name in names for pattern in request.skip):
        return False
    return request.only is None or any(is_matched(name, pattern) for name in names for pattern in request.only)


def is_matched(name: str, pattern: str) -> bool:
    """As `fnmatch`; a pattern may also name a group, and stands for all below it."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern.rstrip('/')}/")


def _renamer(
    request: LoadRequest, structure: Structure, groups: Groups, names: Names | None
) -> Callable[[str], str | None]:
    name_map = request.name_map
    if callable(name_map):
        return name_map
    if name_map is not None:
        return lambda name: name_map.get(name, name)
    if not request.by_name or names is not None:
        return lambda name: name
    ours, theirs = _by_layer(structure.groups), _by_layer(groups)
    if not theirs:
        raise ValueError("The file does not say what its layers are called, so `by_name` cannot find them.")
    where = {}
    for called in ours.keys() & theirs.keys():
        if len(ours[called]) > 1 or len(theirs[called]) > 1:
            raise ValueError(f"`by_name` cannot tell apart several layers that are called '{'/'.join(called)}'.")
        where[theirs[called][0]] = ours[called][0]

    def rename(name: str) -> str | None:
        group, _, key = name.rpartition("/")
        return f"{where[group]}/{key}" if group in where else None

    return rename


def _by_layer(groups: Groups) -> dict[tuple[str, ...], list[str]]:
    """Names of a layer and of those around it → its groups. The model's own name does not count."""
    called = {path.removesuffix("/vars"): dict(attributes).get("name") for path, attributes in groups.items()}
    found: dict[tuple[str, ...], list[str]] = {}
    for path in called:
        parts = path.split("/")
        around = ("/".join(parts[:n]) for n in range(1, len(parts) + 1))
        names = tuple(name for prefix in around if isinstance(name := called.get(prefix), str))
        if names and path != "vars":
            found.setdefault(names, []).append(f"{path}/vars")
    return found


def _hint(near: list[str]) -> str:
    return f"; nearest: {shorten(near)}" if near else ""
