"""Building a model without initialising it: a variable gets its first value from the file.

While `scope()` lasts, a variable that Keras would fill from one of its own initialisers stays without a value. The
first of these ends that:

- the file's tensor is assigned: it becomes the first value;
- anybody reads the value, say in `build()`: the real initialiser runs, as it would have in stock Keras;
- the scope ends: so does it.

During shape inference Keras' own placeholder for uninitialised variables stands in. Initialisers hold their seed from
when they are made, so not calling one changes no random state; those that hold a `SeedGenerator` always run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras.src.backend import config
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from hornbeam.base import dtypes
from hornbeam.seam import assignments, patches, shortcuts
from hornbeam.seam.operation import changed, running
from hornbeam.values import creating, on_tensorflow, ownership


class _Lazy:
    """Mixed into the class of a variable while it has no value."""

    _pending: tuple[Any, Any, Any]  # initialiser, what `creating.note_creation` noted, and what runs the initialiser

    @property
    def _value(self) -> Any:
        _initialize(self)
        return self._value

    @_value.setter
    def _value(self, value: Any) -> None:
        _make_ordinary(self)
        self._value = value

    @property
    def value(self) -> Any:
        variable: Any = self
        if in_stateless_scope():
            known = get_stateless_scope().get_current_value(variable)
            if known is not None:
                return variable._maybe_autocast(known)
            if in_symbolic_scope():
                placeholder = variable._pending[0](variable._shape, dtype=variable._dtype)
                return variable._maybe_autocast(placeholder)
        _initialize(variable)
        return variable.value

    def assign(self, value: Any) -> Any:
        variable: Any = self
        if in_stateless_scope() or not isinstance(value, np.ndarray) or value.shape != tuple(variable._shape):
            return super().assign(value)  # type: ignore[misc]
        journal = assignments.current()
        if journal is not None:
            journal.before(variable)
            if not isinstance(variable, _Lazy):  # the journal has read its value, so it has one now
                return variable.assign(value)
        tensor = None
        # Keras' own code drops what our store gave it; any other array may be changed later.
        if ownership.is_given_away(value) and dtypes.name_of(value.dtype) == variable._dtype:
            tensor = on_tensorflow.share(value)
        if tensor is None:
            tensor = variable._convert_to_tensor(value, dtype=variable._dtype)
        _set_first_value(variable, tensor)
        if journal is not None:
            journal.after(variable, value)
        return tensor

    def _direct_assign(self, value: Any) -> None:
        variable: Any = self
        _set_first_value(variable, variable._convert_to_tensor(value, dtype=variable._dtype))


_classes: dict[type, type] = {}


def _lazy_class(cls: type) -> type:
    if cls not in _classes:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _classes[cls] = type(cls.__name__, (_Lazy, cls), names)
    return _classes[cls]


def _make_ordinary(variable: Any) -> tuple[Any, Any, Any]:
    """Makes the variable an ordinary one, still without a value."""
    pending: tuple[Any, Any, Any] = variable.__dict__.pop("_pending")
    variable.__class__ = variable.__dict__.pop("_plain_class")
    return pending


def _set_first_value(variable: Any, value: Any) -> None:
    """The variable's first value."""
    _, creation, _ = _make_ordinary(variable)
    made = shortcuts.make_variable(variable, value, creation)
    if made is None:
        creating.create(creation, variable, lambda: variable._initialize(value))
    else:
        variable._value = made


def _initialize(variable: Any) -> None:
    """What stock Keras does at once."""
    initializer, creation, initialize = _make_ordinary(variable)
    creating.create(creation, variable, lambda: initialize(variable, initializer))


def _may_wait(variable: Any, initializer: Any) -> bool:
    return (
        type(variable) is keras.Variable
        and isinstance(initializer, keras.initializers.Initializer)
        and type(initializer).__module__.startswith("keras.")
        and not any(isinstance(v, keras.random.SeedGenerator) for v in vars(initializer).values())
        and getattr(variable, "_layout", None) is None  # Keras 3.12 has it on JAX only
        and global_state.get_global_attribute("distribution") is None
        and not in_stateless_scope()
        and not _is_nnx()
    )


def _is_nnx() -> bool:
    """Whether variables are Flax objects, which keep their value elsewhere."""
    return bool(getattr(config, "is_nnx_enabled", lambda: False)())


def _initialize_later(original: Callable[..., None]) -> Callable[..., None]:
    """`Variable._initialize_with_initializer`, for later."""

    def initialize(variable: Any, initializer: Any) -> None:
        pending = running().pending
        if pending is None or not _may_wait(variable, initializer):
            original(variable, initializer)
            return
        creation = creating.note_creation(variable)
        if creation is None:
            original(variable, initializer)
            return
        variable.__dict__.pop("_value", None)
        variable._pending = (initializer, creation, original)
        variable._plain_class = type(variable)
        variable.__class__ = _lazy_class(type(variable))
        pending.append(variable)

    return initialize


def _slot(original: Callable[..., Any]) -> Callable[..., Any]:
    """`TFOptimizer.add_variable_from_reference` without placing the slot beside a variable that is nowhere yet."""

    def add(self: Any, reference_variable: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(reference_variable, _Lazy):
            from keras.src.optimizers.base_optimizer import BaseOptimizer

            return BaseOptimizer.add_variable_from_reference(self, reference_variable, *args, **kwargs)
        return original(self, reference_variable, *args, **kwargs)

    return add


def _key(original: Callable[..., Any]) -> Callable[..., Any]:
    """`TFOptimizer._var_key`: the key that the variable will have."""

    def key(self: Any, variable: Any) -> Any:
        return variable._pending[1].key if isinstance(variable, _Lazy) else original(self, variable)

    return key


_variable_patch = patches.Patch(_initialize_later)
_slot_patch = patches.Patch(_slot)
_key_patch = patches.Patch(_key)


@contextlib.contextmanager
def scope(variables: int = shortcuts.WORTH_TRYING) -> Iterator[None]:
    """Variables made by this thread wait for their value; nested scopes belong to the outermost.

    The cyclic garbage collector rests meanwhile: a model is millions of objects that all stay.

    Args:
        variables: How many there will be; if nobody knows, enough for every shortcut.
    """
    if running().pending is not None or keras.backend.backend() not in ("tensorflow", "jax"):
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_variable_patch(keras.Variable, "_initialize_with_initializer"))
        if keras.backend.backend() == "tensorflow":
            from keras.src.backend.tensorflow.optimizer import TFOptimizer

            stack.enter_context(_slot_patch(TFOptimizer, "add_variable_from_reference"))
            stack.enter_context(_key_patch(TFOptimizer, "_var_key"))
        stack.enter_context(shortcuts.scope(shortcuts.BUILDING, variables))
        stack.enter_context(patches.collector_rests())
        pending: list[Any] = []
        with changed(pending=pending):
            yield
        # After an error the model is dropped; a variable somebody kept initialises itself when it is read.
        for variable in pending:
            if isinstance(variable, _Lazy):
                _initialize(variable)
