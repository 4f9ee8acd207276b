"""What a load assigns: noted for its report, done without a copy where that is safe, undone when the load fails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.variables import Variable as KerasVariable
from keras.src.saving import saving_lib

from hornbeam import _keras, _tensors

_local = threading.local()
_assign_patch = _keras._Patch()
_load_patch = _keras._Patch()


class Journal:
    """The assignments of one load.

    Attributes:
        assigned: Variables that got a value, by id.
        cast: `(path, dtype in the file, dtype of the variable)` of those that were converted.
        places: Path in the file of every object that Keras tried to load, by id.
    """

    def __init__(self, *, undoable: bool) -> None:
        self.assigned: dict[int, Any] = {}
        self.cast: list[tuple[str, str, str]] = []
        self.places: dict[int, str] = {}
        self._undoable = undoable
        self._values: list[Callable[[], None]] = []
        self._states: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def note(self, variable: Any, value: Any) -> None:
        """Notes that `variable` gets `value`; keeps what it had, if that may be needed again."""
        if id(variable) not in self.assigned:
            if self._undoable:
                self._values.append(_tensors.hold(variable))
            self.assigned[id(variable)] = variable
        if isinstance(value, np.ndarray) and value.dtype.name != variable._dtype:
            self.cast.append((variable.path, value.dtype.name, variable._dtype))

    def visit(self, saveable: Any, path: str) -> None:
        """Notes an object before it loads its state; keeps its attributes, if they may be needed again."""
        self.places.setdefault(id(saveable), path)
        if self._undoable and hasattr(saveable, "load_own_variables"):
            attributes = getattr(saveable, "__dict__", None)
            if attributes is not None:
                self._states.append((attributes, dict(attributes)))

    def roll_back(self) -> None:
        """Gives every variable the value, and every object the attributes, that it had."""
        for restore in reversed(self._values):
            restore()
        for attributes, before in reversed(self._states):
            if attributes.keys() != before.keys() or any(attributes[k] is not v for k, v in before.items()):
                attributes.clear()
                attributes.update(before)


def current() -> Journal | None:
    """The journal of the load that this thread is in."""
    return getattr(_local, "journal", None)


def _dispatch_assign(self: Any, value: Any) -> Any:
    """`KerasVariable.assign`; a tensor of ours becomes the variable's memory where that is safe."""
    journal = current()
    if journal is None or in_stateless_scope() or value is self:
        return value if value is self and journal is not None else _assign_patch.original(self, value)
    journal.note(self, value)
    if (
        isinstance(value, np.ndarray)
        and _tensors.is_given_away(value)
        and value.dtype.name == self._dtype
        and value.shape == tuple(self._shape)
        and _tensors.adopt(self, value)
    ):
        return self.value
    return _assign_patch.original(self, value)


def _dispatch_load(saveable: Any, *args: Any, **kwargs: Any) -> Any:
    """`saving_lib._load_state`, which calls itself through its module."""
    journal = current()
    if journal is not None:
        journal.visit(saveable, kwargs["inner_path"] if "inner_path" in kwargs else args[2])
    return _load_patch.original(saveable, *args, **kwargs)


@contextlib.contextmanager
def journal(*, undoable: bool) -> Iterator[Journal]:
    """Notes this thread's assignments; with `undoable`, an exception leaves everything as it was."""
    before, made = current(), Journal(undoable=undoable)
    with (
        _assign_patch(KerasVariable, "assign", _dispatch_assign),
        _load_patch(saving_lib, "_load_state", _dispatch_load),
    ):
        _local.journal = made
        try:
            yield made
        except BaseException:
            _local.journal = None
            made.roll_back()
            raise
        finally:
            _local.journal = before
