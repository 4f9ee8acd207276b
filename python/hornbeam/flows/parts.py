"""Parts of a model: what patterns choose, for saves and loads alike, and what a save leaves out."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import keras

from hornbeam.base.reports import shorten
from hornbeam.errors import InvalidError, UnsupportedError
from hornbeam.flows import marks
from hornbeam.flows.recording import RecordStore
from hornbeam.flows.requests import SaveRequest
from hornbeam.flows.serving import LoadStore
from hornbeam.seam import assignments


class Patterns(Protocol):
    """What is asked for: a request of a save or a load."""

    @property
    def only(self) -> tuple[str, ...] | None:
        """Patterns of what is wanted; `None` for everything."""

    @property
    def skip(self) -> tuple[str, ...]:
        """Patterns of what is not."""


class Choice:
    """What patterns choose of a model.

    A layer with LoRA stores its kernel with the product of the low-rank factors added. Such a value, which is that of
    no variable, is chosen with all variables of its layer; otherwise those that are chosen are stored as they are. Its
    name stands for those of them that Keras does not store.

    Args:
        model: The model.
        stored: Path → variable that Keras stores there; `None` for another value.
        request: Has the patterns.
        visited: Objects, by id, that are left out.
        is_slot: Says what is of an optimizer and chosen only by a pattern that names it; nothing, by default.

    Attributes:
        owners: Group → the layer that stores it.
        extras: Path → variable, of those chosen that Keras does not store; the path ends in the variable's name.
        chosen: All paths that are chosen, extras included.
        merged: Groups of which a value that is that of no variable is chosen.
        lone_values: Such values that were chosen by their names alone, and stand for no variables.
        left_out: The paths that are not.

    Raises:
        ValueError: For a pattern that fits nothing.
    """

    def __init__(
        self,
        model: Any,
        stored: Mapping[str, Any],
        request: Patterns,
        visited: Iterable[int] = (),
        is_slot: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.owners = _owners(model, visited)
        known = {id(variable) for variable in stored.values()}
        extras: dict[str, Any] = {}
        for group, owner in self.owners.items():
            for variable in (*owner._trainable_variables, *owner._non_trainable_variables):
                if id(variable) not in known:
                    known.add(id(variable))
                    counted = (f"{variable.name}_{i}" for i in itertools.count(1))
                    keys = (f"{group}/{key}" for key in itertools.chain([variable.name], counted))
                    extras[next(key for key in keys if key not in stored and key not in extras)] = variable
        names = {path: names_of(model, path, v) for path, v in (*stored.items(), *extras.items())}
        check(request, itertools.chain(*names.values()))
        naming = tuple(p for p in request.only or () if not set(p.partition("/")[0]) & set("*?["))
        self.chosen = {
            path for path in names if selected(names[path], naming if is_slot(path) else request.only, request.skip)
        }
        variables: dict[str, set[str]] = {}
        for path in names:
            if path in extras or stored[path] is not None:
                variables.setdefault(_group(path), set()).add(path)
        others: dict[str, set[str]] = {}
        for path in stored:
            if stored[path] is None and _group(path) in variables:
                others.setdefault(_group(path), set()).add(path)
        self.lone_values: set[str] = set()
        for group, values in others.items():
            beside, named = extras.keys() & variables[group], values & self.chosen
            skipped = any(not selected([path], None, request.skip) for path in values)
            if skipped:
                self.chosen -= beside
            elif named and request.only is not None:
                self.chosen |= {path for path in beside if selected(names[path], None, request.skip)}
            self.chosen -= values
            if not skipped and self.chosen >= variables[group]:
                self.chosen |= values
            elif not beside and request.only is not None:
                self.lone_values |= named
        self.chosen |= self.lone_values
        self.merged = {group for group, values in others.items() if values & self.chosen}
        self.extras = {path: variable for path, variable in extras.items() if path in self.chosen}
        self.left_out = [
            path for path in names if path not in self.chosen and not (path in extras and _group(path) in self.merged)
        ]

    def merge(self) -> None:
        """Takes away the extras that are merged into a value that is chosen."""
        gone = {path for path in self.extras if _group(path) in self.merged}
        self.chosen -= gone
        self.extras = {path: variable for path, variable in self.extras.items() if path not in gone}


def _group(path: str) -> str:
    return path.rpartition("/")[0]


def _owners(model: Any, visited: Iterable[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def visit(saveable: Any, path: str) -> None:
        if isinstance(saveable, keras.Layer):
            found[f"{path}/vars" if path else "vars"] = saveable

    assignments.walk(model, LoadStore([]), set(visited), visit)
    return found


def names_of(model: Any, path: str, variable: Any) -> list[str]:
    """What a pattern may call an entry: its path, and its variable's, with and without the model."""
    if variable is None:
        return [path]
    return list(dict.fromkeys([path, variable.path.removeprefix(f"{model.name}/"), variable.path]))


def check(request: Patterns, names: Iterable[str]) -> None:
    """Refuses a pattern that fits nothing.

    Raises:
        ValueError: With the nearest names.
    """
    names = list(dict.fromkeys(names))
    for pattern in (*(request.only or ()), *request.skip):
        if not any(_fits(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.rstrip("/*"), names, n=3, cutoff=0.4)
            hint = f"; nearest: {shorten(near)}" if near else ""
            raise ValueError(f"No variable of the model fits {pattern!r}{hint}")


def selected(names: Sequence[str], only: Sequence[str] | None, skip: Sequence[str]) -> bool:
    """Whether patterns choose what has these names."""
    if any(_fits(name, pattern) for name in names for pattern in skip):
        return False
    return only is None or any(_fits(name, pattern) for name in names for pattern in only)


def _fits(name: str, pattern: str) -> bool:
    """As `fnmatch`; a pattern may also name a group, and stands for all below it."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern.rstrip('/')}/")


def keep(store: RecordStore, request: SaveRequest) -> list[str]:
    """Leaves in a recorded save what is asked for, and marks it as a part.

    Returns:
        What was left out.

    Raises:
        ValueError: For a pattern that fits nothing, or where nothing is left.
        UnsupportedError: For a part of an optimizer's state in HDF5, where its places are only numbers.
    """
    stored = {path: dataset.variable for path, dataset in store.datasets.items()}
    visited = {id(o) for o in request.objects_to_skip or ()}
    choice = Choice(request.model, stored, request, visited, store.is_optimizer)
    choice.merge()
    if not choice.chosen:
        raise InvalidError(
            f"Nothing is left to save: only={request.only!r}, skip={request.skip!r}. The optimizer's state is saved "
            "where a pattern names it, without a wildcard before its first slash: 'optimizer', 'adam/*'."
        )
    if choice.lone_values:
        raise UnsupportedError(
            f"'{min(choice.lone_values)}' is the value of no variable, and its object loads all that it stores, or "
            "nothing: name its variables as well."
        )
    slots = {path for path in stored if store.is_optimizer(path)}
    for group in {_group(path) for path in slots & choice.chosen}:
        missing = sorted(path for path in slots - choice.chosen if _group(path) == group)
        if missing and not request.safetensors:
            raise UnsupportedError(
                f"'{request.target}' cannot hold a part of the optimizer's state '{group}', for HDF5 has numbers "
                f"instead of names for it, and '{missing[0]}' is left out: save all of it, none of it, or save to "
                "`.safetensors`."
            )
    for path, variable in choice.extras.items():
        store.put(path, variable)
    kept = set(choice.chosen)
    for path in choice.chosen:  # `by_name` needs the names of all layers around
        parts = path.split("/")[:-2]
        kept.update("/".join([*parts[:n], "vars"]) for n in range(len(parts) + 1))
    store.drop(lambda path: path not in kept)
    store.groups[""] = [(marks.MARK, json.dumps({"only": request.only, "skip": request.skip}))]
    return choice.left_out
