"""Shortcuts through Keras' construction of layers, for the time of a load and its thread.

Each leaves the same objects behind, is tried once against the real thing before it is used, and has a switch of its
own: `hornbeam.options(shortcuts=...)`.

- `attributes`: a number, string or `None` set on a layer is not looked at by Keras' and TensorFlow's trackers, which
  track none of these.
- `signatures`: `inspect.signature` of a function is taken once, not for every layer of a class.
- `handles`: TensorFlow compiles a kernel for every name of a variable; here the name in the kernel is the same for all.
  (The variable itself keeps its name. Errors about uninitialised variables show the other.) It replaces a function of
  TensorFlow's private modules, so it is off by default.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import keras
from keras.src.layers import layer as layer_module
from keras.src.ops import operation as operation_module

from hornbeam import _keras, _state, _tensors

_local = threading.local()
_attribute_patch = _keras._Patch()
_layer_inspect_patch = _keras._Patch()
_operation_inspect_patch = _keras._Patch()
_handle_patch = _keras._Patch()
_PLAIN = frozenset([int, float, str, bool, type(None)])


class _Scope:
    """What one load has learned."""

    def __init__(self, shortcuts: frozenset[str]) -> None:
        self.shortcuts = shortcuts
        self.plain: dict[type, bool] = {}
        self.signatures: dict[Any, inspect.Signature] = {}
        self.specs: dict[Any, inspect.FullArgSpec] = {}


def _scope() -> _Scope | None:
    return getattr(_local, "scope", None)


def _set_attribute(self: Any, name: str, value: Any) -> None:
    """`Layer.__setattr__`."""
    scope = _scope()
    if (
        scope is not None
        and type(value) in _PLAIN
        and "_tracker" in self.__dict__
        and not hasattr(type(self), name)  # a property, or a default that the trackers compare with
        and _is_plain(scope, type(self))
    ):
        object.__setattr__(self, name, value)
    else:
        _attribute_patch.original(self, name, value)


def _is_plain(scope: _Scope, cls: type) -> bool:
    """Whether only Keras and the backend have a say in what a layer's attributes are."""
    known = scope.plain.get(cls)
    if known is None:
        beyond = cls.__mro__[cls.__mro__.index(keras.layers.Layer) + 1 :]
        setters = [base for base in beyond if "__setattr__" in vars(base)]
        hook = getattr(cls, "_setattr_hook", None)
        ours = all(base.__module__.split(".")[0] in ("keras", "tensorflow", "builtins") for base in setters)
        known = ours and (hook is None or hook.__module__.startswith("keras."))
        scope.plain[cls] = known
    return known


class _Inspect:
    """The module `inspect`, which remembers signatures."""

    def signature(self, function: Any, **kwargs: Any) -> inspect.Signature:
        scope = _scope()
        if scope is None or kwargs or type(function) not in (FunctionType, MethodType):
            return inspect.signature(function, **kwargs)
        key = (function.__func__, "bound") if type(function) is MethodType else function
        found = scope.signatures.get(key)
        if found is None:
            found = scope.signatures[key] = inspect.signature(function)
        return found

    def getfullargspec(self, function: Any) -> inspect.FullArgSpec:
        scope = _scope()
        if scope is None or type(function) is not FunctionType:
            return inspect.getfullargspec(function)
        found = scope.specs.get(function)
        if found is None:
            found = scope.specs[function] = inspect.getfullargspec(function)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)


def _make_handle(*args: Any, **kwargs: Any) -> Any:
    """`gen_resource_variable_ops.var_handle_op`."""
    scope = _scope()
    if scope is not None and "handles" in scope.shortcuts and "debug_name" in kwargs:
        kwargs["debug_name"] = "hornbeam"
    return _handle_patch.original(*args, **kwargs)


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Takes the shortcuts that are switched on and work here."""
    wanted = _state.current().shortcuts
    with contextlib.ExitStack() as stack:
        if "attributes" in wanted and _attributes_work():
            stack.enter_context(_attributes())
        if "signatures" in wanted:
            stack.enter_context(_layer_inspect_patch(layer_module, "inspect", _Inspect()))
            stack.enter_context(_operation_inspect_patch(operation_module, "inspect", _Inspect()))
        if "handles" in wanted and _handles_work():
            stack.enter_context(_handles())
        before = _scope()
        _local.scope = _Scope(wanted)
        try:
            yield
        finally:
            _local.scope = before


def _attributes() -> contextlib.AbstractContextManager[None]:
    return _attribute_patch(keras.layers.Layer, "__setattr__", _set_attribute)


def _handles() -> contextlib.AbstractContextManager[None]:
    from tensorflow.python.ops import gen_resource_variable_ops

    return _handle_patch(gen_resource_variable_ops, "var_handle_op", _make_handle)


def _with_and_without(shortcut: str, patch: Callable[[], Any], work: Callable[[], Any]) -> bool:
    """Whether `work` gives the same with and without a shortcut."""
    expected = work()
    before = _scope()
    _local.scope = _Scope(frozenset([shortcut]))
    try:
        with patch():
            same = work() == expected
    finally:
        _local.scope = before
    if not same:
        _state.logger.warning("the shortcut %r does not work with this Keras, and is not taken", shortcut)
    return bool(same)


@functools.cache
def _attributes_work() -> bool:
    def work() -> Any:
        layer = keras.layers.Layer(name="hornbeam_tries")
        values = [1, 1.5, "a", True, None, (1, 2), [3], {"a": 4}]
        for i, value in enumerate(values):
            setattr(layer, f"tried_{i}", value)
            setattr(layer, f"tried_{i}", value)
        found = [(name, type(value), value) for name, value in vars(layer).items() if name.startswith("tried_")]
        return found, sorted(vars(layer)), {name: len(ids) for name, ids in layer._tracker.stored_ids.items()}

    return _with_and_without("attributes", _attributes, work)


@functools.cache
def _handles_work() -> bool:
    if not _tensors.shares():
        return False
    import tensorflow as tf

    def work() -> Any:
        made = [tf.Variable([i, i], dtype="float32", name=f"hornbeam_tries_{i}") for i in range(3)]
        for variable in made:
            variable.assign_add([1.0, 2.0])
        ids = {v.handle._id for v in made} | {v._unique_id for v in made}
        return [(v.name, v.dtype, v.shape, v.device, v.numpy().tolist()) for v in made], len(ids)

    return _with_and_without("handles", _handles, work)
