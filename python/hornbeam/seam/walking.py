"""Keras' walk over a model in less time."""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from hornbeam.seam.operation import changed, running
from hornbeam.seam.patches import Patch


class FastWalk:
    """`saving_lib._walk_saveable` with the attribute names of like objects listed once, and without dead ends.

    Stock Keras lists `dir()` of every object, and builds a dummy layer for the set of names to skip on every call: it
    reads the cache under one name and writes it under another. Both are pure functions of the class. It also goes into
    every container of strings or numbers, of which each layer has some ten.
    """

    def __init__(self, saving_lib: ModuleType) -> None:
        self.skip_names = functools.partial(_skip_names, saving_lib)
        self.name_key = saving_lib._name_key
        self.names: dict[tuple[Any, ...], list[str]] = {}  # by class and what an instance has

    def __call__(self, stock: Callable[[Any], Iterator[tuple[str, Any]]], saveable: Any) -> Iterator[tuple[str, Any]]:
        """Name and value of what Keras would go on to from `saveable`."""
        from keras.src.saving.keras_saveable import KerasSaveable

        if not isinstance(saveable, KerasSaveable):
            yield from stock(saveable)  # raises
        kind = saveable._obj_type()
        if kind in ("Sequential", "Functional"):
            yield "layers", saveable.layers
        for name in self._names(saveable, kind):
            try:
                child = getattr(saveable, name)
            except Exception:
                continue
            if isinstance(child, KerasSaveable) or (
                isinstance(child, _CONTAINERS) and _contains_saveable(child, KerasSaveable)
            ):
                yield name, child

    def _names(self, saveable: Any, kind: str) -> list[str]:
        skip = self.skip_names(kind)  # also for its side effect
        cls = type(saveable)
        if _dir_method(cls) is not _dir_method(object):  # torch modules list names that are in no `__dict__`
            return self._without_skipped(dir(saveable), skip)
        own = (cls, *vars(saveable))
        names = self.names.get(own)
        if names is None:
            names = self.names[own] = self._without_skipped({*dir(cls), *own[1:]}, skip)
        return names

    def _without_skipped(self, names: Iterable[str], skip: frozenset[str]) -> list[str]:
        return sorted((n for n in names if not n.startswith("__") and n not in skip), key=self.name_key)


_CONTAINERS = (list, dict, tuple)


def _contains_saveable(container: Any, saveable: type, depth: int = 2) -> bool:
    """Whether Keras would find an object in `container`, or in containers inside it; true beyond `depth`."""
    for item in container.values() if isinstance(container, dict) else container:
        if isinstance(item, saveable) or (
            isinstance(item, _CONTAINERS) and (depth == 0 or _contains_saveable(item, saveable, depth - 1))
        ):
            return True
    return False


def _dir_method(cls: type) -> Any:
    return cls.__dir__


class _Naming:
    """Stands in for Keras' `naming` in the walk, which asks for the same few names again and again."""

    def __init__(self, naming: ModuleType) -> None:
        self._naming = naming
        self._known = functools.cache(naming.to_snake_case)

    def to_snake_case(self, name: str) -> Any:
        """`naming.to_snake_case`."""
        return self._known(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._naming, name)


_skip_cache: dict[str, tuple[frozenset[str], dict[str, int]]] = {}


def _skip_names(saving_lib: ModuleType, kind: str) -> frozenset[str]:
    """`saving_lib.get_attr_skipset`; the counters of automatic names go on as if its dummies were built every time."""
    from keras.src.backend.common import global_state

    fresh = collections.defaultdict[str, int](int)
    counters = global_state.get_global_attribute("object_name_uids", fresh, set_to_default=True)
    if kind in _skip_cache:
        names, steps = _skip_cache[kind]
        for name, step in steps.items():
            counters[name] += step
        return names
    with _without_distribution():  # the dummies' variables would wait for the other processes of a `keras.distribution`
        names = frozenset(saving_lib.get_attr_skipset(kind))
        once = dict(counters)
        saving_lib.get_attr_skipset(kind)
    steps = {name: count - once.get(name, 0) for name, count in counters.items() if count != once.get(name, 0)}
    counters.update(once)
    _skip_cache[kind] = names, steps
    return names


@contextlib.contextmanager
def _without_distribution() -> Iterator[None]:
    import keras

    before = keras.distribution.distribution()
    if before is None:
        yield
        return
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)


def _walk(original: Callable[[Any], Iterator[tuple[str, Any]]]) -> Callable[[Any], Iterator[tuple[str, Any]]]:
    """`saving_lib._walk_saveable`."""

    def walk(saveable: Any) -> Iterator[tuple[str, Any]]:
        fast = running().walk
        return original(saveable) if fast is None else fast(original, saveable)

    return walk


def is_by_keras(saveable: Any, method: str) -> bool:
    """Whether the method that stores or loads the state of an object is Keras' own code, or hornbeam's."""
    module = getattr(getattr(saveable, method, None), "__globals__", {}).get("__name__", "")
    return str(module).startswith(("keras.src.", "hornbeam."))


def in_turn(method: str, original: Callable[..., None]) -> Callable[..., None]:
    """`saving_lib._save_state` or `_load_state`, which call themselves through their module.

    Our store learns which object is being walked: what Keras' own code stores or assigns does not change afterwards.
    """

    def take_turn(saveable: Any, weights_store: Any, *args: Any, **kwargs: Any) -> None:
        before = getattr(weights_store, "by_keras", None)
        if before is None:  # not ours
            original(saveable, weights_store, *args, **kwargs)
            return
        weights_store.by_keras = is_by_keras(saveable, method)
        try:
            original(saveable, weights_store, *args, **kwargs)
        finally:
            weights_store.by_keras = before

    return take_turn


def _save_optimizer(original: Callable[..., None]) -> Callable[..., None]:
    """`BaseOptimizer.save_own_variables`; our store takes variables, where stock needs copies of their values."""

    def save_own_variables(self: Any, store: Any) -> None:
        mark = getattr(store, "mark_optimizer", None)  # ours has it
        if mark is None:
            original(self, store)
            return
        mark()
        for i, variable in enumerate(self.variables):
            store[str(i)] = variable

    return save_own_variables


_walk_patch = Patch(_walk)
_save_patch = Patch(lambda original: in_turn("save_own_variables", original))
_naming_patch = Patch(_Naming)
_optimizer_patch = Patch(_save_optimizer)


@contextlib.contextmanager
def fast_walk() -> Iterator[None]:
    """Walks of this thread take less time, also a second one inside; optimizers hand variables to our store."""
    from keras.src.optimizers.base_optimizer import BaseOptimizer
    from keras.src.saving import saving_lib

    if running().walk is not None:
        yield
        return
    with (
        _walk_patch(saving_lib, "_walk_saveable"),
        _save_patch(saving_lib, "_save_state"),
        _naming_patch(saving_lib, "naming"),
        _optimizer_patch(BaseOptimizer, "save_own_variables"),
        changed(walk=FastWalk(saving_lib)),
    ):
        yield
