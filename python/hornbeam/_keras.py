"""What of Keras is replaced: detects what is there, patches it, restores it.

Every save and load of Keras goes through a few functions of five modules, looked up there at each call. They
are replaced by dispatchers, which are inert unless `install()` is in force or the calling thread is inside `scope()`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import importlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from hornbeam import _displaced, _hook
from hornbeam._state import logger

#: Module of Keras → function → parameters it is known to have, in order.
_SIGNATURES: dict[str, dict[str, tuple[str, ...]]] = {
    _hook.SAVING_LIB: {
        "save_model": ("model", "filepath", "weights_format", "zipped"),
        "_save_model_to_fileobj": ("model", "fileobj", "weights_format"),
        "_save_model_to_dir": ("model", "dirpath", "weights_format"),
        "_load_model_from_fileobj": ("fileobj", "custom_objects", "compile", "safe_mode"),
        "_load_model_from_dir": ("dirpath", "custom_objects", "compile", "safe_mode"),
        "save_weights_only": ("model", "filepath", "max_shard_size", "objects_to_skip"),
        "load_weights_only": ("model", "filepath", "skip_mismatch", "objects_to_skip"),
    },
    _hook.SAVING_API: {
        "save_model": ("model", "filepath", "overwrite", "zipped", "kwargs"),
        "load_model": ("filepath", "custom_objects", "compile", "safe_mode"),
        "save_weights": ("model", "filepath", "overwrite", "max_shard_size", "kwargs"),
        "load_weights": ("model", "filepath", "skip_mismatch", "kwargs"),
    },
    _hook.LEGACY_H5: {
        "save_model_to_hdf5": ("model", "filepath", "overwrite", "include_optimizer"),
        "load_model_from_hdf5": ("filepath", "custom_objects", "compile", "safe_mode"),
    },
    _hook.MODEL: {
        "Model.to_json": ("self", "kwargs"),
        "model_from_json": ("json_string", "custom_objects"),
    },
    _hook.EXPORTS: {  # what the module has not is of the class of its archives
        "get_input_signature": ("model",),
        "track": ("self", "resource"),
        "add_endpoint": ("self", "name", "fn", "input_signature", "kwargs"),
        "add_variable_collection": ("self", "name", "variables"),
        "write_out": ("self", "filepath", "options", "verbose"),
    },
}
#: Where hornbeam's own functions of the same names are (without a leading underscore): what saves, then what loads.
_OURS = {
    _hook.SAVING_LIB: ("hornbeam._save", "hornbeam._load"),
    _hook.SAVING_API: ("hornbeam._formats",),
    _hook.LEGACY_H5: ("hornbeam._legacy_save", "hornbeam._legacy"),
    _hook.MODEL: ("hornbeam._json",),
    _hook.EXPORTS: ("hornbeam._export",),
}
assert tuple(_SIGNATURES) == _hook.MODULES

_lock = threading.RLock()
#: (module, function) → the original and the dispatcher that stands in its place, or below what others put over it.
_placed: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., Any]]] = {}
#: The same of those placed last: one dispatcher for a function, so that references to it stay good.
_made: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., Any]]] = {}
_users = 0  # scopes in force, in all threads
_local = threading.local()


def _active() -> bool:
    return _hook.is_installed() or getattr(_local, "depth", 0) > 0


@functools.cache
def _ours(module: str, name: str) -> Callable[..., Any]:
    places = _OURS[module]
    for place in places[::-1] if "load" in name else places:  # imports no more than it must
        function = getattr(importlib.import_module(place), name.rpartition(".")[2].lstrip("_"), None)
        if function is not None:
            return function
    raise AttributeError(name)


def _dispatcher(module: str, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        if not _active():
            return original(*args, **kwargs)
        return _ours(module, name)(original, *args, **kwargs)

    dispatch.__hornbeam__ = True  # type: ignore[attr-defined]
    return dispatch


@functools.cache
def _is_known(module: str, name: str, function: Callable[..., Any] | None) -> bool:
    known = function is not None and tuple(inspect.signature(function).parameters) == _SIGNATURES[module][name]
    if not known:
        logger.warning("this Keras is unknown to hornbeam and stays stock: see %s.%s", module, name)
    return known


def archive_class() -> Any:
    """The class of Keras' that writes archives of endpoints, or `None`."""
    module: Any = sys.modules[_hook.EXPORTS]
    made = getattr(module, "BackendSavedModelExportArchive", module.ExportArchive)  # Keras 3.12 has one for all
    return next((cls for cls in made.__mro__ if "write_out" in vars(cls)), None)


def _place(where: str, name: str) -> tuple[Any, str]:
    """What has the function, a module or a class in it, and what it is called there."""
    module = sys.modules[where]
    owner, _, attribute = name.rpartition(".")
    if where == _hook.EXPORTS and not hasattr(module, name):
        return archive_class(), name
    return (getattr(module, owner) if owner else module), attribute


def _reaches(function: Any, ours: Any) -> bool:
    """Whether a function is ours, or one that somebody put around it by `functools.wraps`."""
    while function is not None and function is not ours:
        function = getattr(function, "__wrapped__", None)
    return function is ours


def patch(module: ModuleType) -> None:
    """Puts the dispatchers of a module in place; one with an unknown signature among them stays stock as a whole."""
    where = module.__name__
    if where == _hook.EXPORTS and archive_class() is None:
        return  # a backend that exports nothing
    with _lock:
        found = {name: getattr(*_place(where, name), None) for name in _SIGNATURES[where]}
        placed = {name: _placed[where, name][1] for name in found if (where, name) in _placed}
        wanted = {name: original for name, original in found.items() if not _reaches(original, placed.get(name, ()))}
        if not all(_is_known(where, name, original) for name, original in wanted.items()):
            return
        for name, original in wanted.items():
            if original is not None:
                known, dispatcher = _made.get((where, name), (None, original))
                if known is not original:
                    dispatcher = _dispatcher(where, name, original)
                    if getattr(sys.modules.get(original.__module__), name, None) is original:
                        dispatcher.__module__ = where  # else `pickle` would look where the original comes from
                _placed[where, name] = _made[where, name] = original, dispatcher
                _displaced.displace(original, "original")  # at every moment both can be found, by other threads too
                setattr(*_place(where, name), dispatcher)
                _displaced.put_back(dispatcher)


def unpatch(module: ModuleType) -> None:
    """Restores the originals, unless a scope or `install()` still needs the dispatchers.

    What somebody else has put over a dispatcher since then stays: below it the dispatcher does nothing.
    """
    where = module.__name__
    with _lock:
        if _users or _hook.is_installed():
            return
        for name in _SIGNATURES[where]:
            original, dispatcher = _placed.get((where, name), (None, None))
            if original is not None and getattr(*_place(where, name)) is dispatcher:
                _displaced.displace(dispatcher, "dispatcher")
                setattr(*_place(where, name), original)
                _displaced.put_back(original)
                del _placed[where, name]


def follow_aliases() -> None:
    """Makes Keras' public names (`keras.models.load_model`, say) those that its modules have now.

    References that anybody else took before stay what they were: they meet the dispatchers further inside, but the
    arguments that stock Keras refuses at once are refused.
    """
    with _lock:
        for (_where, name), (original, dispatcher) in list(_placed.items()):
            _replace_aliases(name, original, dispatcher)


def restore_aliases() -> None:
    """Undoes `follow_aliases`, and what modules imported since then have taken from the dispatchers."""
    with _lock:
        for (where, name), (original, dispatcher) in list(_placed.items()):
            _replace_aliases(name, dispatcher, original, but=where)


def _replace_aliases(name: str, old: Any, new: Any, but: str | None = None) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "keras" and module_name != but and vars(module).get(name) is old:
            setattr(module, name, new)


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Routes the calling thread's saves and loads through hornbeam, whether or not it is installed."""
    global _users
    modules = [importlib.import_module(name) for name in _SIGNATURES]
    with _lock:
        _users += 1
        for module in modules:
            patch(module)
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        yield
    finally:
        _local.depth -= 1
        with _lock:
            _users -= 1
            for module in modules:
                unpatch(module)


def unsupported(weights_format: str = "h5", path: Any = None) -> str | None:
    """Why stock Keras must do a save or load, if it must."""
    from keras.src.saving import saving_lib

    if weights_format != "h5":
        return f"weights_format={weights_format!r}"
    if saving_lib.H5IOStore.__module__ != saving_lib.__name__:  # a patch of somebody else's
        return "saving_lib.H5IOStore is replaced"
    if path is not None and saving_lib.file_utils.is_remote_path(str(path)):
        return "remote path"
    return None


class FastWalk:
    """`saving_lib._walk_saveable` with the attribute names of like objects listed once.

    Stock Keras lists `dir()` of every object, and builds a dummy layer for the set of names to skip on every call: it
    reads the cache under one name and writes it under another. Both are pure functions of the class.
    """

    def __init__(self, saving_lib: ModuleType) -> None:
        self.stock = _walk_patch.original
        self.skip_names = functools.partial(_skip_names, saving_lib)
        self.name_key = saving_lib._name_key
        self.names: dict[tuple[Any, ...], list[str]] = {}  # by class and what an instance has

    def __call__(self, saveable: Any) -> Iterator[tuple[str, Any]]:
        from keras.src.saving.keras_saveable import KerasSaveable

        if not isinstance(saveable, KerasSaveable):
            yield from self.stock(saveable)  # raises
        kind = saveable._obj_type()
        if kind in ("Sequential", "Functional"):
            yield "layers", saveable.layers
        for name in self._names(saveable, kind):
            try:
                child = getattr(saveable, name)
            except Exception:
                continue
            yield name, child

    def _names(self, saveable: Any, kind: str) -> list[str]:
        skip = self.skip_names(kind)  # also for its side effect
        cls = type(saveable)
        if _listing(cls) is not _listing(object):  # torch modules list what is in no __dict__
            return self._chosen(dir(saveable), skip)
        own = (cls, *vars(saveable))
        names = self.names.get(own)
        if names is None:
            names = self.names[own] = self._chosen({*dir(cls), *own[1:]}, skip)
        return names

    def _chosen(self, names: Iterable[str], skip: frozenset[str]) -> list[str]:
        return sorted((n for n in names if not n.startswith("__") and n not in skip), key=self.name_key)


def _listing(cls: type) -> Any:
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


class _FileUtils:
    """Stands in for Keras' `file_utils` in the walk, where every path inside the model is looked at like a URL."""

    def __init__(self, file_utils: ModuleType) -> None:
        self._file_utils = file_utils

    def join(self, path: Any, *paths: Any) -> Any:
        """`file_utils.join`; only what starts with a slash or has a scheme can be remote."""
        if type(path) is str and path[:1] != "/" and "://" not in path:
            return os.path.join(path, *paths)
        return self._file_utils.join(path, *paths)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file_utils, name)


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
    with _undistributed():  # the dummies' variables would wait for the other processes of a `keras.distribution`
        names = frozenset(saving_lib.get_attr_skipset(kind))
        once = dict(counters)
        saving_lib.get_attr_skipset(kind)
    steps = {name: count - once.get(name, 0) for name, count in counters.items() if count != once.get(name, 0)}
    counters.update(once)
    _skip_cache[kind] = names, steps
    return names


@contextlib.contextmanager
def _undistributed() -> Iterator[None]:
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


class _Patch:
    """An attribute replaced while somebody needs it, in any thread; the replacement decides per thread."""

    def __init__(self) -> None:
        self.users = 0
        self.original: Any = None
        self.replacement: Any = ()  # nothing reaches it

    @contextlib.contextmanager
    def __call__(self, owner: Any, name: str, replacement: Any) -> Iterator[None]:
        with _lock:
            if self.users == 0:
                now = getattr(owner, name)
                if not _reaches(now, self.replacement):
                    self.original, self.replacement = now, replacement
                    setattr(owner, name, replacement)
            self.users += 1
        try:
            yield
        finally:
            with _lock:
                self.users -= 1
                if self.users == 0 and getattr(owner, name) is self.replacement:
                    setattr(owner, name, self.original)
                    self.replacement = ()


_walk_patch = _Patch()
_naming_patch = _Patch()
_file_utils_patch = _Patch()
_optimizer_patch = _Patch()


def _dispatch_walk(saveable: Any) -> Iterator[tuple[str, Any]]:
    walk = getattr(_local, "walk", None) or _walk_patch.original
    return walk(saveable)


def _dispatch_optimizer(self: Any, store: Any) -> None:
    """`BaseOptimizer.save_own_variables`; our store takes variables, where stock needs copies of their values."""
    from hornbeam._store import RecordStore

    if isinstance(store, RecordStore):
        store.mark_optimizer()
        for i, variable in enumerate(self.variables):
            store[str(i)] = variable
    else:
        _optimizer_patch.original(self, store)


@contextlib.contextmanager
def fast_walk() -> Iterator[None]:
    """Walks of this thread take less time; optimizers hand variables to our store."""
    from keras.src.optimizers.base_optimizer import BaseOptimizer
    from keras.src.saving import saving_lib

    with (
        _walk_patch(saving_lib, "_walk_saveable", _dispatch_walk),
        _naming_patch(saving_lib, "naming", _Naming(saving_lib.naming)),
        _file_utils_patch(saving_lib, "file_utils", _FileUtils(saving_lib.file_utils)),
        _optimizer_patch(BaseOptimizer, "save_own_variables", _dispatch_optimizer),
    ):
        before = getattr(_local, "walk", None)
        _local.walk = FastWalk(saving_lib)
        try:
            yield
        finally:
            _local.walk = before


class FitWatcher:
    """Who wants to know how a `fit` ends, and has called `fit_watchers().append(self)` inside it."""

    def fit_failed(self, error: BaseException) -> None:
        """An exception is about to leave `fit`."""

    def fit_ended(self) -> None:
        """Called last, whatever happened."""


def fit_watchers() -> list[FitWatcher] | None:
    """Those of the calling thread's innermost `fit`; `None` outside of Keras' own."""
    found: list[list[FitWatcher]] = getattr(_local, "fits", [])
    return found[-1] if found else None


def watch_fit() -> None:
    """Has `fit` tell its watchers how it ends. Keras has no callback for an exception."""
    import keras

    with _lock:
        owner = next(cls for cls in keras.Model.__mro__ if "fit" in vars(cls))
        original = vars(owner)["fit"]
        if hasattr(original, "__hornbeam__"):
            return

        @functools.wraps(original)
        def fit(self: Any, *args: Any, **kwargs: Any) -> Any:
            fits = _local.__dict__.setdefault("fits", [])
            watchers: list[FitWatcher] = []
            fits.append(watchers)
            try:
                return original(self, *args, **kwargs)
            except BaseException as error:
                for watcher in watchers:
                    watcher.fit_failed(error)
                raise
            finally:
                fits.pop()
                with contextlib.ExitStack() as stack:  # the last to come is the first to go, and all do
                    for watcher in watchers:
                        stack.callback(watcher.fit_ended)

        fit.__hornbeam__ = True  # type: ignore[attr-defined]
        owner.fit = fit
        _displaced.displace(original, "original")


_collector_lock = threading.Lock()
_collector_users = 0
_collector_threshold = (0, 0, 0)  # before the first of them


@contextlib.contextmanager
def collector_rests() -> Iterator[None]:
    """The cyclic garbage collector does not run meanwhile, in any thread; whether it is enabled stays the caller's."""
    global _collector_users, _collector_threshold
    with _collector_lock:
        if _collector_users == 0:
            _collector_threshold = gc.get_threshold()
            gc.set_threshold(0, *_collector_threshold[1:])
        _collector_users += 1
    _local.resting = getattr(_local, "resting", 0) + 1
    try:
        yield
    finally:
        _local.resting -= 1
        with _collector_lock:
            _collector_users -= 1
            if _collector_users == 0:
                _wake_collector()


def _wake_collector() -> None:
    if gc.isenabled() and gc.get_freeze_count() == 0:  # else they would be somebody's
        gc.freeze()  # what was built is old now: no collection goes through it at once
        gc.unfreeze()
    if gc.get_threshold() == (0, *_collector_threshold[1:]):  # nobody has set another one meanwhile
        gc.set_threshold(*_collector_threshold)


def _start_anew() -> None:
    """In a forked child: other threads are not there, and neither are their locks and what they had resting."""
    global _lock, _collector_lock, _collector_users
    _lock, _collector_lock = threading.RLock(), threading.Lock()
    users, _collector_users = _collector_users, getattr(_local, "resting", 0)
    if users > 0 and _collector_users == 0:
        _wake_collector()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
