"""What a load assigns: noted for its report, done without a copy where that is safe, undone when the load fails."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.variables import Variable as KerasVariable
from keras.src.saving import saving_lib
from keras.src.saving.keras_saveable import KerasSaveable

from hornbeam.base import dtypes
from hornbeam.base.deferred import Unread
from hornbeam.seam import walking
from hornbeam.seam.operation import changed, running
from hornbeam.seam.patches import Patch
from hornbeam.values import holding, on_tensorflow, ownership


class Journal:
    """The assignments of one load.

    Attributes:
        assigned: Variables that got a value, by id.
        cast: `(path, dtype in the file, dtype of the variable)` of those that were converted.
        places: Path in the file of every object that Keras came to, by id.
        part: What is loaded, if not everything.
    """

    def __init__(self, *, undoable: bool, part: Part | None = None) -> None:
        self.assigned: dict[int, Any] = {}
        self.cast: list[tuple[str, str, str]] = []
        self.places: dict[int, str] = {}
        self.part = part
        self.undoable = undoable
        self._held: set[int] = set()
        self._alive: list[Any] = []
        self._values: list[Callable[[], None]] = []
        self._states: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def before(self, variable: Any) -> None:
        """Keeps what `variable` has, if that may be needed again."""
        if self.undoable and id(variable) not in self._held:
            self._held.add(id(variable))
            self._values.append(holding.hold(variable))

    def after(self, variable: Any, value: Any) -> None:
        """Notes that `variable` has got `value`."""
        self.assigned[id(variable)] = variable
        if isinstance(value, np.ndarray) and dtypes.name_of(value.dtype) != variable._dtype:
            noted = (variable.path, value.dtype.name, variable._dtype)
            if self.cast[-1:] != [noted]:  # an `assign` of others may call ours twice
                self.cast.append(noted)

    def visit(self, saveable: Any, path: str) -> None:
        """Notes an object before it loads its state; keeps its attributes, if they may be needed again."""
        self.places.setdefault(id(saveable), path)
        if self.undoable and hasattr(saveable, "load_own_variables"):
            attributes = getattr(saveable, "__dict__", None)
            if attributes is not None:
                self._states.append((attributes, dict(attributes)))
                if not walking.is_by_keras(saveable, "load_own_variables"):
                    self._keep_contents(saveable)

    def _keep_contents(self, saveable: Any) -> None:
        """Keeps what code that is not Keras' may change without an assignment, in what the object consists of too.

        That is: variables, arrays, containers, and the attributes of layers.
        """
        todo, seen = list(vars(saveable).values()), {id(saveable)}
        while todo:
            value = todo.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, KerasVariable):
                if value._value is not None:
                    self.before(value)
            elif id(value) not in self._held:
                restore = _content_restorer(value)
                if restore is not None:
                    self._held.add(id(value))
                    self._alive.append(value)  # as long as it lives, no other object has its id
                    self._values.append(restore)
            if isinstance(value, KerasSaveable) and not isinstance(value, KerasVariable):
                attributes = vars(value)
                self._states.append((attributes, dict(attributes)))
                todo += attributes.values()
            elif isinstance(value, dict):
                todo += value.values()
            elif isinstance(value, list | tuple | set):
                todo += value

    def absorb(self, inner: Journal) -> None:
        """Makes what a load inside of this one did a part of it."""
        self.assigned.update(inner.assigned)
        self.cast += inner.cast
        self._held |= inner._held
        self._alive += inner._alive
        self._values += inner._values
        self._states += inner._states

    def roll_back(self) -> None:
        """Gives every variable the value, and every object the attributes, that it had."""
        failed: BaseException | None = None
        for restore in reversed(self._values):
            try:
                restore()
            except BaseException as error:  # another Ctrl-C, say: first everything else is restored
                failed = error
        for attributes, before in reversed(self._states):
            if attributes.keys() != before.keys() or any(attributes[k] is not v for k, v in before.items()):
                attributes.clear()
                attributes.update(before)
        if failed is not None:
            raise failed


def _content_restorer(value: Any) -> Callable[[], None] | None:
    """What gives a container, an array or a variable of the backend its content back; `None` for anything else."""
    if isinstance(value, np.ndarray):
        array = value.copy()
        return functools.partial(np.copyto, value, array) if value.flags.writeable else None
    # Methods of list, set and dict themselves: those of Keras' containers track what is added, and may be locked.
    if issubclass(type(value), list):
        items = list(value)
        return lambda: value.__setitem__(slice(None), items)
    if issubclass(type(value), set):
        members = set(value)

        def refill() -> None:
            set.clear(value)
            set.update(value, members)

        return refill
    if issubclass(type(value), dict):
        return functools.partial(_restore_dict, value, list(value.items()))
    return holding.hold_raw(value)


def _restore_dict(value: dict[Any, Any], items: list[tuple[Any, Any]]) -> None:
    base = OrderedDict if isinstance(value, OrderedDict) else dict
    base.clear(value)
    for key, item in items:
        base.__setitem__(value, key, item)


class Store(Protocol):
    """What a load is served from.

    Attributes:
        passes: Whether nothing is loaded for the object that is being walked.
        by_keras: Whether Keras' own code loads it.
    """

    passes: bool
    by_keras: bool


class Part(Protocol):
    """What of a model is loaded."""

    def has(self, path: str) -> bool:
        """Whether anything of the object at `path` is."""

    def keeps(self, path: str, saveable: Any) -> list[Any]:
        """Variables of the object that are not, although others are."""


def current() -> Journal | None:
    """The journal of the load that this thread is in."""
    found: Journal | None = running().journal
    return found


class _OfShape:
    """A variable for `KerasVariable.assign` to compare its shape with another's, without a value."""

    def __init__(self, variable: Any) -> None:
        self._variable, self._dtype, self.shape = variable, variable._dtype, variable.shape

    def _convert_to_tensor(self, value: Unread, dtype: Any = None) -> Any:
        return SimpleNamespace(shape=on_tensorflow.native_shape(value.shape))

    def __str__(self) -> str:
        return str(self._variable)


def _assign(original: Callable[..., Any]) -> Callable[..., Any]:
    """`KerasVariable.assign`; a tensor of ours becomes the variable's memory where that is safe."""

    def assign(self: Any, value: Any) -> Any:
        journal = current()
        if journal is None or in_stateless_scope():
            return original(self, value)
        if value is self:  # what is not loaded keeps its value
            return value
        if isinstance(value, Unread):
            if value.shape != tuple(self.shape):
                original(_OfShape(self), value)  # raises
            value = value.read()
        journal.before(self)
        adopted = (
            isinstance(value, np.ndarray)
            and ownership.is_given_away(value)
            and dtypes.name_of(value.dtype) == self._dtype
            and value.shape == tuple(self._shape)
            and on_tensorflow.adopt(self, value)
        )
        result = self.value if adopted else original(self, value)
        journal.after(self, value)
        return result

    return assign


def _load_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """`saving_lib._load_state`, which calls itself through its module."""
    in_turn = walking.in_turn("load_own_variables", original)

    def load(saveable: Any, weights_store: Any, assets_store: Any, inner_path: str, *args: Any, **kwargs: Any) -> Any:
        journal = current()
        if journal is None:
            return original(saveable, weights_store, assets_store, inner_path, *args, **kwargs)
        journal.visit(saveable, inner_path)
        kept: list[Callable[[], None]] = []
        if journal.part is not None:
            weights_store.passes = not journal.part.has(inner_path)
            kept = [holding.hold(variable) for variable in journal.part.keeps(inner_path, saveable)]
        try:
            return in_turn(saveable, weights_store, assets_store, inner_path, *args, **kwargs)
        finally:
            for restore in kept:
                restore()

    return load


_assign_patch = Patch(_assign)
_load_patch = Patch(_load_state)


class _Walk(Journal):
    """Notes what Keras comes to, and loads nothing."""

    def __init__(self, visit: Callable[[Any, str], None]) -> None:
        super().__init__(undoable=False)
        self._visit = visit

    def visit(self, saveable: Any, path: str) -> None:
        if id(saveable) not in self.places:
            self.places[id(saveable)] = path
            self._visit(saveable, path)


def walk(model: Any, store: Store, visited: set[int], visit: Callable[[Any, str], None]) -> None:
    """Calls `visit` with every object whose state a load of `model` asks `store` for, and its path; loads nothing."""
    store.passes = True
    planned = _Walk(lambda o, path: visit(o, path) if hasattr(o, "load_own_variables") else None)
    with _load_patch(saving_lib, "_load_state"), walking.fast_walk(), changed(journal=planned):
        try:
            saving_lib._load_state(model, store, None, "", visited_saveables=set(visited))
        finally:
            store.passes = False


@contextlib.contextmanager
def journal(*, undoable: bool, part: Part | None = None) -> Iterator[Journal]:
    """Notes this thread's assignments; with `undoable`, an exception leaves everything as it was."""
    outer = current()
    made = Journal(undoable=undoable or (outer is not None and outer.undoable), part=part)
    with _assign_patch(KerasVariable, "assign"), _load_patch(saving_lib, "_load_state"):
        try:
            with changed(journal=made):
                yield made
        except BaseException:
            with changed(journal=None):
                made.roll_back()
            raise
        if outer is not None:
            outer.absorb(made)
