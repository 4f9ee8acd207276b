"""Shortcuts through Keras' construction and description of layers, for the time of a load or save and its thread.

Each leaves the same objects behind, and is tried once against the real thing before it is used.
`hornbeam.options(shortcuts=False)` does without them.

Small models do without those that take long to try, until they add up to what trying them costs.

- `attributes`: what is set on a layer and is no variable, layer, metric or seed generator goes past Keras' and
  TensorFlow's trackers, which track nothing else; lists, dictionaries and sets get Keras' tracking wrapper directly.
- `signatures`: `inspect.signature` of a function is taken once, not for every layer of a class.
- `copies` (saves and `to_json` only): the config of a model, which Keras has just made of new objects, is not copied
  once more before it becomes text.
- `tensors` (saves, too): whether an object is a TensorFlow tensor is asked once for a class of Keras' or Python's own,
  since TensorFlow's answer goes through the protocols of `typing`.
- `variables`: a TensorFlow variable that gets its value from the file is put together directly, with one kernel for all
  variables of a shape, where TensorFlow compiles one for every name. It needs TensorFlow's private functions. (The
  variable keeps its name; errors of kernels about uninitialised ones show another.)
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Set
from types import FunctionType, MethodType
from typing import Any, TypeVar

import keras
from keras.src.layers import layer as layer_module
from keras.src.models import functional as functional_module
from keras.src.models import sequential as sequential_module
from keras.src.ops import operation as operation_module
from keras.src.saving import serialization_lib
from keras.src.utils import tracking

from hornbeam.base import settings
from hornbeam.base.trials import Tried
from hornbeam.seam.operation import changed, running
from hornbeam.seam.patches import Patch
from hornbeam.values import creating, tf_variables

T = TypeVar("T")
#: Trying the shortcuts out takes longer than building so many variables without them.
WORTH_TRYING = 64
_built = 0  # variables that this process has built, and layers that it has described
#: Those for building a model, and for describing one.
BUILDING = frozenset(["attributes", "signatures", "tensors", "variables"])
DESCRIBING = frozenset(["copies", "tensors"])


class _Scope:
    """What one load has learned."""

    def __init__(self, shortcuts: frozenset[str]) -> None:
        self.shortcuts = shortcuts
        self.tensorflow = keras.backend.backend() == "tensorflow"
        self.plain: dict[type, bool] = {}
        self.tracked: dict[type, bool] = {}
        self.handle_data: dict[Any, Any] = {}
        self.no_tensors: set[type] = set()
        self.signatures: dict[Any, Any] = {}


#: What Keras tracks the elements of, and how.
_WRAPPERS: dict[type, type] = {
    list: tracking.TrackedList,
    dict: tracking.TrackedDict,
    set: tracking.TrackedSet,
}
_FUNCTIONS = (FunctionType, MethodType)
_GETTERS = frozenset(["__getattr__", "__getattribute__"])
_ATOMS = frozenset([bool, int, float, str, type(None)])


def _set_attribute(original: Callable[..., None]) -> Callable[..., None]:
    """`Layer.__setattr__`."""

    def set_attribute(self: Any, name: str, value: Any) -> None:
        scope = running().shortcuts
        if (
            scope is None
            or "attributes" not in scope.shortcuts
            or "_tracker" not in self.__dict__
            or not (scope.plain.get(type(self)) or _is_plain(scope, type(self)))
        ):
            original(self, name, value)
            return
        kind = type(value)
        if kind in _WRAPPERS:
            if not tracking.is_tracking_enabled():  # TensorFlow may have a wrapper of its own for it
                original(self, name, value)
                return
            value = _WRAPPERS[kind](value, self._tracker)
            if scope.tensorflow and getattr(self, "_self_setattr_tracking", True) and hasattr(self, "_tracked"):
                self._tracked.append(name)
        elif _is_tracked(scope, kind) and not (kind is tuple and _ATOMS.issuperset(map(type, value))):
            original(self, name, value)
            return
        elif scope.tensorflow and hasattr(type(self), name):  # a property or class attribute
            try:
                if getattr(self, name) is value:  # which TensorFlow does not set again
                    return
            except AttributeError:
                pass
        object.__setattr__(self, name, value)

    return set_attribute


def _is_tracked(scope: _Scope, kind: type) -> bool:
    """Whether values of a class mean something to a tracker."""
    known = scope.tracked.get(kind)
    if known is None:
        known = scope.tracked[kind] = issubclass(kind, _tracked_classes())
    return known


@functools.cache
def _tracked_classes() -> tuple[type, ...]:
    classes = [keras.Variable, keras.layers.Layer, keras.metrics.Metric, keras.random.SeedGenerator]
    classes += [tuple, list, dict, set, tracking.Tracker]
    if keras.backend.backend() == "tensorflow":
        classes += tf_variables.tracked_classes()
    return tuple(classes)


def _is_plain(scope: _Scope, cls: type) -> bool:
    """Whether only Keras and the backend have a say in what a layer's attributes are."""
    known = scope.plain.get(cls)
    if known is None:
        beyond = cls.__mro__[cls.__mro__.index(keras.layers.Layer) + 1 :]
        involved = [base for base in beyond if "__setattr__" in vars(base)]
        involved += [base for base in cls.__mro__ if not vars(base).keys().isdisjoint(_GETTERS)]
        hook = getattr(cls, "_setattr_hook", None)
        ours = all(base.__module__.split(".")[0] in ("keras", "tensorflow", "builtins") for base in involved)
        tracker = getattr(cls, "_initialize_tracker", None)
        known = ours and all(f is None or f.__module__.startswith("keras.") for f in (hook, tracker))
        scope.plain[cls] = known
    return known


class _Inspect:
    """The module `inspect`, which remembers what functions take."""

    def signature(self, function: Any, **kwargs: Any) -> inspect.Signature:
        if kwargs or type(function) not in _FUNCTIONS:
            return inspect.signature(function, **kwargs)
        bound = type(function) is MethodType
        return _remembered(inspect.signature, function, (function.__func__ if bound else function, bound))

    def getfullargspec(self, function: Any) -> inspect.FullArgSpec:
        if type(function) is not FunctionType:
            return inspect.getfullargspec(function)
        return _remembered(inspect.getfullargspec, function, function)

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)


def _remembered(inspected: Callable[[Any], T], function: Any, key: Any) -> T:
    scope = running().shortcuts
    if scope is None or "signatures" not in scope.shortcuts:
        return inspected(function)
    if key not in scope.signatures:
        scope.signatures[key] = inspected(function)
    found: T = scope.signatures[key]
    return found


class _Copy:
    """Stands in for the module `copy` in Keras' models."""

    def deepcopy(self, value: Any, memo: Any = None) -> Any:
        """The config itself, where it is about to become text."""
        scope = running().shortcuts
        if memo is None and scope is not None and "copies" in scope.shortcuts:
            return value
        return copy.deepcopy(value, memo)

    def __getattr__(self, name: str) -> Any:
        return getattr(copy, name)


def _is_tensor(original: Callable[..., Any]) -> Callable[..., bool]:
    """`tf.is_tensor`."""

    def is_tensor(value: Any) -> bool:
        scope = running().shortcuts
        if scope is None or "tensors" not in scope.shortcuts:
            return bool(original(value))
        kind = type(value)
        if kind in scope.no_tensors:
            return False
        found = bool(original(value))
        if not found and kind.__module__.partition(".")[0] in ("builtins", "keras"):
            scope.no_tensors.add(kind)
        return found

    return is_tensor


_attribute_patch = Patch(_set_attribute)
_layer_inspect_patch = Patch(lambda _: _Inspect())
_operation_inspect_patch = Patch(lambda _: _Inspect())
_functional_copy_patch = Patch(lambda _: _Copy())
_sequential_copy_patch = Patch(lambda _: _Copy())
_tensor_patch = Patch(_is_tensor)


def make_variable(variable: Any, value: Any, creation: creating.Creation) -> Any | None:
    """The TensorFlow variable that `tf.Variable(value, ...)` would make for a Keras variable; `None` if that must.

    Args:
        variable: The Keras variable.
        value: An eager tensor of its dtype.
        creation: Where it would have been made.
    """
    scope = running().shortcuts
    if scope is None or "variables" not in scope.shortcuts or creation.name_scope is None:
        return None
    if tuple(value.shape) != tuple(variable._shape) or not creating.is_eager():
        return None
    return tf_variables.build(
        variable, value, creation.name_scope, creation.key, trainable=creation.trainable, known=scope.handle_data
    )


@contextlib.contextmanager
def scope(among: Set[str], amount: int) -> Iterator[None]:
    """Takes those shortcuts that work here, unless they are switched off.

    Args:
        among: Those that the caller can use.
        amount: How many variables are going to be built, or layers described. What takes long to try is left out
            until they have been enough in this process.
    """
    global _built
    _built += amount
    wanted = set(among) if settings.current().shortcuts else set()
    if keras.backend.backend() != "tensorflow":
        wanted -= {"tensors", "variables"}
    if _built < WORTH_TRYING:
        wanted -= {"attributes", "copies", "variables"}
    with contextlib.ExitStack() as stack:
        wanted = {shortcut for shortcut in wanted if _works[shortcut]()}
        if "attributes" in wanted:
            stack.enter_context(_attributes())
        if "signatures" in wanted:
            stack.enter_context(_layer_inspect_patch(layer_module, "inspect"))
            stack.enter_context(_operation_inspect_patch(operation_module, "inspect"))
        if "copies" in wanted:
            stack.enter_context(_copies())
        if "tensors" in wanted:
            stack.enter_context(_tensor_patch(tf_variables.module(), "is_tensor"))
        with changed(shortcuts=_Scope(frozenset(wanted))):
            yield


def describing(saveable: Any) -> contextlib.AbstractContextManager[None]:
    """For the time in which a config, of a model mostly, becomes text."""
    layers = saveable._flatten_layers() if isinstance(saveable, keras.layers.Layer) else ()
    return scope(DESCRIBING, sum(1 for _ in layers))


def _attributes() -> contextlib.AbstractContextManager[None]:
    return _attribute_patch(keras.layers.Layer, "__setattr__")


@contextlib.contextmanager
def _copies() -> Iterator[None]:
    with _functional_copy_patch(functional_module, "copy"), _sequential_copy_patch(sequential_module, "copy"):
        yield


@contextlib.contextmanager
def _with_only(shortcut: str) -> Iterator[None]:
    """For the trying thread, which has no scope yet."""
    with changed(shortcuts=_Scope(frozenset([shortcut]))):
        yield


class _WithDefault(keras.layers.Layer):
    default = False


# None of the trials may use random numbers: Python's and NumPy's states belong to the user.
def _try_attributes() -> bool:
    def work() -> Any:
        layer = _WithDefault(name="hornbeam_tries")
        layer.default = False
        atoms: list[Any] = [1, 1.5, "a", True, None, len, int, (1, "a"), (), [3], [], {"a": [4]}, {5}]
        values = [*atoms, keras.initializers.Zeros(), keras.DTypePolicy("int8"), collections.OrderedDict(a=1)]
        values += [keras.layers.Layer(name="inner"), keras.Variable(1.0), keras.random.SeedGenerator(1)]
        values += [(keras.layers.Layer(name="a"),), [keras.layers.Layer(name="b")], {"c": keras.Variable(2.0)}]
        for i, value in enumerate(values):
            setattr(layer, f"tried_{i}", value)
            setattr(layer, f"tried_{i}", value)
        with tracking.DotNotTrackScope():
            layer.untracked, layer.untracked_list, layer.untracked_dict = 1, [1], {"a": 1}
        layer.supports_masking, layer.input_spec, layer.built = True, keras.layers.InputSpec(ndim=2), True
        layer.build = layer.compute_mask
        found = [(name, type(value)) for name, value in vars(layer).items()]
        same = [str(getattr(layer, f"tried_{i}")) for i in range(len(atoms))]
        tracked = {name: len(ids) for name, ids in layer._tracker.stored_ids.items()}
        return found, same, tracked, getattr(layer, "_tracked", None), layer.supports_masking, str(layer.input_spec)

    real = work()
    with _with_only("attributes"), _attributes():
        return bool(work() == real)


def _try_signatures() -> bool:
    functions = [keras.layers.Dense.call, keras.layers.Layer.add_weight, keras.layers.Flatten().call]
    with _with_only("signatures"):
        for function in [*functions, *functions]:
            if _Inspect().signature(function) != inspect.signature(function):
                return False
            if _Inspect().getfullargspec(function) != inspect.getfullargspec(function):
                return False
    return True


def _try_copies() -> bool:
    """Whether a config is the same, and what it holds is no part of the model, so that nobody would see it change."""
    layers = keras.layers
    x = inputs = keras.Input((2, 2), name="tries")
    x = layers.Add(name="tries_add")([x, layers.Permute([2, 1], name="tries_permute")(x)])
    inner = keras.Sequential([keras.Input((2, 2)), layers.Reshape([4], name="tries_shape")], name="tries_inner")
    model = keras.Model(inputs, inner(x), name="tries_model")
    real = json.dumps(serialization_lib.serialize_keras_object(model))
    with _with_only("copies"), _copies():
        found = [serialization_lib.serialize_keras_object(model), model.get_config()]
        same = json.dumps(found[0]) == real
        _empty(found)
        return same and json.dumps(serialization_lib.serialize_keras_object(model)) == real


def _empty(item: Any) -> None:
    """Empties every list and dictionary."""
    if isinstance(item, list | dict):
        for value in [*(item.values() if isinstance(item, dict) else item)]:
            _empty(value)
        item.clear()


def _try_tensors() -> bool:
    values: list[Any] = [1, 1.5, "a", None, (), {}, keras.Variable(1.0), keras.layers.Layer(), Any]
    values += [keras.KerasTensor((2,)), *tf_variables.samples()]
    tf = tf_variables.module()
    real = [bool(tf.is_tensor(value)) for value in values]
    with _with_only("tensors"), _tensor_patch(tf, "is_tensor"):
        return [bool(tf.is_tensor(value)) for value in [*values, *values]] == [*real, *real]


_works = {
    "attributes": Tried("the shortcut 'attributes'", _try_attributes),
    "copies": Tried("the shortcut 'copies'", _try_copies),
    "signatures": Tried("the shortcut 'signatures'", _try_signatures),
    "tensors": Tried("the shortcut 'tensors'", _try_tensors),
    "variables": Tried("the shortcut 'variables'", tf_variables.try_build),
}
