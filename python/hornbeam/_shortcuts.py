"""Shortcuts through Keras' construction of layers, for the time of a load and its thread.

Each leaves the same objects behind, is tried once against the real thing before it is used, and has a switch of its
own: `hornbeam.options(shortcuts=...)`.

- `attributes`: what is set on a layer and is no variable, layer, metric, seed generator or container goes past Keras'
  and TensorFlow's trackers, which track nothing else.
- `signatures`: `inspect.signature` of a function is taken once, not for every layer of a class.
- `variables`: a TensorFlow variable that gets its value from the file is put together directly, with one kernel for all
  variables of a shape, where TensorFlow compiles one for every name. It needs TensorFlow's private functions, so it is
  off by default. (The variable keeps its name; errors of kernels about uninitialised ones show another.)
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Iterator
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


class _Scope:
    """What one load has learned."""

    def __init__(self, shortcuts: frozenset[str]) -> None:
        self.shortcuts = shortcuts
        self.plain: dict[type, bool] = {}
        self.tracked: dict[type, bool] = {}
        self.signatures: dict[Any, inspect.Signature] = {}
        self.specs: dict[Any, inspect.FullArgSpec] = {}


def _scope() -> _Scope | None:
    return getattr(_local, "scope", None)


def _set_attribute(self: Any, name: str, value: Any) -> None:
    """`Layer.__setattr__`."""
    scope = _scope()
    if (
        scope is not None
        and not _is_tracked(scope, type(value))
        and "_tracker" in self.__dict__
        and not hasattr(type(self), name)  # a property, or a default that the trackers compare with
        and _is_plain(scope, type(self))
    ):
        object.__setattr__(self, name, value)
    else:
        _attribute_patch.original(self, name, value)


def _is_tracked(scope: _Scope, kind: type) -> bool:
    """Whether values of a class mean something to a tracker."""
    known = scope.tracked.get(kind)
    if known is None:
        known = scope.tracked[kind] = issubclass(kind, _tracked_classes())
    return known


@functools.cache
def _tracked_classes() -> tuple[type, ...]:
    from keras.src.utils import tracking

    classes = [keras.Variable, keras.layers.Layer, keras.metrics.Metric, keras.random.SeedGenerator]
    classes += [tuple, list, dict, set, tracking.Tracker]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.trackable.data_structures import NoDependency

        classes += [tf.__internal__.tracking.Trackable, NoDependency]
    return tuple(classes)


def _is_plain(scope: _Scope, cls: type) -> bool:
    """Whether only Keras and the backend have a say in what a layer's attributes are."""
    known = scope.plain.get(cls)
    if known is None:
        beyond = cls.__mro__[cls.__mro__.index(keras.layers.Layer) + 1 :]
        setters = [base for base in beyond if "__setattr__" in vars(base)]
        hook = getattr(cls, "_setattr_hook", None)
        ours = all(base.__module__.split(".")[0] in ("keras", "tensorflow", "builtins") for base in setters)
        tracker = getattr(cls, "_initialize_tracker", None)
        known = ours and all(f is None or f.__module__.startswith("keras.") for f in (hook, tracker))
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


def make_variable(variable: Any, value: Any, name_scope: str) -> Any | None:
    """The TensorFlow variable that `tf.Variable(value, ...)` would make for a Keras variable; `None` if that must.

    Args:
        variable: The Keras variable.
        value: An eager tensor of its dtype and shape.
        name_scope: TensorFlow's current name scope.
    """
    scope = _scope()
    if scope is None or "variables" not in scope.shortcuts:
        return None
    return _put_together(variable, value, name_scope)


def _put_together(variable: Any, value: Any, name_scope: str) -> Any:
    from tensorflow.python.eager import context
    from tensorflow.python.framework import ops
    from tensorflow.python.ops import gen_resource_variable_ops as generated
    from tensorflow.python.ops import handle_data_util, resource_variable_ops

    # As ResourceVariable._init_from_args in eager mode.
    name = f"{name_scope}/{variable.name}" if name_scope else variable.name
    shape, dtype = value.shape, value.dtype
    shared = context.anonymous_name()
    handle = generated.var_handle_op(shape=shape, dtype=dtype, shared_name=shared, debug_name="hornbeam", container="")
    data = handle_data_util.create_handle_data(shape, dtype)
    resource_variable_ops._set_handle_shapes_and_types(handle, data, False)
    generated.assign_variable_op(handle, value)
    made = resource_variable_ops.ResourceVariable.__new__(resource_variable_ops.ResourceVariable)
    handle._parent_trackable = weakref.ref(made)
    handle._name = f"{name}:0"
    handle._unique_id = f"{name}_{ops.uid()}"
    made._in_graph_mode = False
    resource_variable_ops.BaseResourceVariable.__init__(
        made,
        trainable=variable.trainable,
        shape=shape,
        dtype=dtype,
        handle=handle,
        synchronization=variable._map_synchronization(variable.synchronization),
        aggregation=variable._map_aggregation(variable.aggregation),
        name=name,
        unique_id=handle._unique_id,
        handle_name=name,
        in_graph_mode=False,
    )
    return made


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
        if "variables" in wanted and not _variables_work():
            wanted -= {"variables"}
        before = _scope()
        _local.scope = _Scope(wanted)
        try:
            yield
        finally:
            _local.scope = before


def _attributes() -> contextlib.AbstractContextManager[None]:
    return _attribute_patch(keras.layers.Layer, "__setattr__", _set_attribute)


def _same(shortcut: str, ours: Any, real: Any) -> bool:
    if ours != real:
        _state.logger.warning("the shortcut %r does not work with this Keras, and is not taken", shortcut)
    return bool(ours == real)


@functools.cache
def _attributes_work() -> bool:
    def work() -> Any:
        layer = keras.layers.Layer(name="hornbeam_tries")
        values = [
            1,
            1.5,
            "a",
            True,
            None,
            (1, 2),
            [3],
            {"a": 4},
            len,
            keras.initializers.Zeros(),
            keras.DTypePolicy("int8"),
        ]
        values += [keras.layers.Layer(name="inner"), keras.Variable(1.0), keras.random.SeedGenerator(1), int]
        for i, value in enumerate(values):
            setattr(layer, f"tried_{i}", value)
            setattr(layer, f"tried_{i}", value)
        found = [(name, type(value)) for name, value in vars(layer).items() if name.startswith("tried_")]
        return found, sorted(vars(layer)), {name: len(ids) for name, ids in layer._tracker.stored_ids.items()}

    real, before = work(), _scope()
    _local.scope = _Scope(frozenset(["attributes"]))
    try:
        with _attributes():
            return _same("attributes", work(), real)
    finally:
        _local.scope = before


@functools.cache
def _variables_work() -> bool:
    """Whether what is put together equals the real thing, attribute by attribute, and is updated alike."""
    if not _tensors.shares():
        return False
    import tensorflow as tf

    def describe(made: Any) -> Any:
        made.assign_add([[1.0, 2.0]])
        handle = made.handle
        odd = {"_handle", "_unique_id", "_handle_name", "_graph_key"}
        return (
            {key: str(value) for key, value in vars(made).items() if key not in odd},
            (type(made), made.name, made.dtype, made.shape, made.device, made.trainable, made.numpy().tolist()),
            (handle.dtype, handle.shape, handle.device, handle._name, handle._parent_trackable() is made),
            (handle._handle_data, made._graph_key, made._unique_id.rpartition("_")[0], made._handle_name),
            tf.function(lambda: made + 1.0)().numpy().tolist(),
        )

    try:
        variable = keras.Variable([[1.0, 2.0]], name="hornbeam_tries")
        real = describe(variable._value)
        value = tf.constant([[1.0, 2.0]])
        with tf.init_scope():
            ours = describe(_put_together(variable, value, ""))
        return _same("variables", ours, real)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        _state.logger.warning("the shortcut 'variables' does not work with this TensorFlow: %s", error)
        return False
