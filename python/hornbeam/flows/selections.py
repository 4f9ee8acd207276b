"""Partial and renamed loads: which tensor of the file goes where in the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import keras
import numpy as np
from keras.src.saving import saving_lib

from hornbeam.flows import parts
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
        self.model, self.visited = model, visited
        with walking.fast_walk():
            saving_lib._save_state(
                model, weights_store=self, assets_store=None, inner_path="", visited_saveables=set(visited)
            )

    def __setitem__(self, key: str, value: Any) -> None:
        # Other arrays are copied: their owner may refill them.
        variable = isinstance(value, keras.Variable)
        self.values[self._path(key)] = value if variable else np.array(keras.ops.convert_to_numpy(value))

    def __getitem__(self, key: str) -> Any:
        return np.array(keras.ops.convert_to_numpy(self.values[self._path(key)]))

    def names(self, path: str) -> list[str]:
        """What a pattern may call the entry at `path`: its path, and its variable's, with and without the model."""
        return parts.names_of(self.model, path, _variable(self.values[path]))

    def choose(self, request: LoadRequest, *, part: bool) -> parts.Choice:
        """What patterns choose; extras become values, of a file that holds a part also those that others stand for."""
        stored = {path: _variable(value) for path, value in self.values.items()}
        choice = parts.Choice(self.model, stored, request, self.visited)
        if not part:
            choice.merge()
        self.values.update(choice.extras)
        return choice


def _variable(value: Any) -> Any:
    return value if isinstance(value, keras.Variable) else None


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
        choice: What is asked for; `None` for everything.
        part: The file holds a part of a model.

    Attributes:
        source: Path in the model → path in the file, of what is loaded; everything else keeps its value.
        direct: Those paths of it whose variables are assigned without their object, and the object of each.
        missing: Paths in the model that were asked for and are not in the file.
        may_be_missing: Those of them that need not be.

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
        choice: parts.Choice | None = None,
        *,
        part: bool = False,
    ) -> None:
        self.structure = structure
        self._names = names
        known: dict[str, list[str]] = {}
        for path in structure.values:
            for name in structure.names(path):
                known.setdefault(name, []).append(path)
        for path, value in structure.values.items() if part else ():
            if isinstance(value, keras.Variable):  # what a layer with LoRA calls it
                known.setdefault(f"{path.rpartition('/')[0]}/{value.name}", [path])
        selected = set(structure.values) if choice is None else set(choice.chosen)
        foreign = _foreign_slots(request, structure, shapes) if names is None else set()
        if not part or request.partial:
            selected -= foreign
        rename = _renamer(request, structure, groups, names)
        self.source: dict[str, str] = {}
        for name in shapes:
            target = rename(name)
            for entry in [] if target is None else self._entries(target, known, request):
                if entry not in selected or entry in foreign:
                    continue
                if entry in self.source:
                    raise ValueError(f"Two tensors of the file go to '{entry}': '{self.source[entry]}' and '{name}'.")
                self.source[entry] = name
        missing = selected - self.source.keys()
        self._inside: dict[str, list[str]] = {}  # group → paths in it
        for path in structure.values:
            self._inside.setdefault(path.rpartition("/")[0], []).append(path)
        self.direct: dict[str, Any] = {}
        self._extras = choice.extras if choice is not None else {}
        if choice is not None:
            missing -= self._note_direct(choice, part=part)
        self.missing = sorted(missing)
        self.may_be_missing = {p for p in self.missing if part or request.by_name or structure.is_optimizer(p)}
        self._places = {name: path for path, name in self.source.items()}
        self._loaded: dict[str, set[str]] = {}
        for path in self.source.keys() - self.direct.keys():
            self._loaded.setdefault(path.rpartition("/")[0], set()).add(path)

    def _note_direct(self, choice: parts.Choice, *, part: bool) -> set[str]:
        """Notes what is assigned without its object; returns what is missing only because something else is there."""
        found: set[str] = set()
        for group in {path.rpartition("/")[0] for path in (*choice.extras, *self.source)} & choice.owners.keys():
            inside = self._inside[group]
            others = {path for path in inside if _variable(self.structure.values[path]) is None}
            merged = bool(others & self.source.keys())
            apart = part and bool(others) and not merged
            for path in inside:
                if path in self.source and (apart or path in choice.extras):
                    self.direct[path] = choice.owners[group]
            if merged:
                found |= choice.extras.keys() & set(inside)
            elif apart:
                found |= others
        return found

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
        entries = [p for p in self._inside.get(group, ()) if p not in self._extras] if loaded else []
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
    in_model = {p: tuple(getattr(v, "shape", ())) for p, v in structure.values.items() if p.startswith("optimizer/")}
    in_file = {p: tuple(shape) for p, shape in shapes.items() if p.startswith("optimizer/")}
    renamed = request.name_map is not None or request.by_name
    if in_model == in_file and not renamed:
        return set()
    if in_model and in_file and not renamed:
        warnings.warn("Skipping the optimizer's state: it belongs to other variables than the model has.", stacklevel=2)
    return set(in_model)


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
    in_model, in_file = _by_layer(structure.groups), _by_layer(groups)
    if not in_file:
        raise ValueError("The file does not say what its layers are called, so `by_name` cannot find them.")
    where = {}
    for called in in_model.keys() & in_file.keys():
        if len(in_model[called]) > 1 or len(in_file[called]) > 1:
            raise ValueError(f"`by_name` cannot tell apart several layers that are called '{'/'.join(called)}'.")
        where[in_file[called][0]] = in_model[called][0]

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
