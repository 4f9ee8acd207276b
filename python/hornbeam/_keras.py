"""What of Keras is replaced: detects what is there, patches it, restores it.

Every save and load of Keras goes through a few functions of five modules, looked up there at each call. They
are replaced by dispatchers, which are inert unless `install()` is in force or the calling thread is inside `scope()`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from hornbeam import _async, _displaced, _hook, _names, _state
from hornbeam._patch import Patch, Users, reaches
from hornbeam.errors import UnsupportedError

#: Module of Keras' → function that is replaced → what it takes as hornbeam's stands in for it.
_REPLACED: dict[str, dict[str, tuple[str, ...]]] = {
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
assert tuple(_REPLACED) == _hook.MODULES

_lock = threading.RLock()
#: (module, function) → the original and the dispatcher that stands in its place, or below what others put over it.
_placed: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., Any]]] = {}
#: The same of those placed last: one dispatcher for a function, so that references to it stay good.
_made: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., Any]]] = {}
_users = Users()  # scopes in force
_local = threading.local()


def _active() -> bool:
    if getattr(_local, "stock", False):  # inside of what stock Keras does as a whole
        return False
    return _hook.is_installed() or bool(getattr(_local, "scopes", None))


@functools.cache
def _ours(module: str, name: str) -> Callable[..., Any]:
    places = _OURS[module]
    for place in places[::-1] if "load" in name else places:  # imports no more than it must
        function = getattr(importlib.import_module(place), name.rpartition(".")[2].lstrip("_"), None)
        if function is not None:
            return function
    raise AttributeError(name)


def _operation(module: str, name: str) -> str:
    """The operation that a function belongs to, as `_names` calls it."""
    if module in (_hook.SAVING_LIB, _hook.LEGACY_H5):
        kind = "load" if "load" in name else "save"
        return kind if module == _hook.SAVING_LIB else f"legacy {kind}"
    return {_hook.SAVING_API: "formats", _hook.MODEL: "json", _hook.EXPORTS: "export"}[module]


def _dispatcher(module: str, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    operation, wanted = _operation(module, name), _REPLACED[module][name]

    @functools.cache
    def translated() -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Hornbeam's function and Keras', as each calls the other."""
        ours = _ours(module, name)
        if tuple(inspect.signature(original).parameters) == wanted:
            return ours, original
        return _translated(ours, original, wanted)

    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        if not _active():
            return original(*args, **kwargs)
        reason = _names.unknown(operation)
        if reason is not None:
            return stock_only(reason, original, *args, **kwargs)
        ours, stock = translated()
        return ours(stock, *args, **kwargs)

    dispatch.__hornbeam__ = True  # type: ignore[attr-defined]
    return dispatch


def _translated(
    ours: Callable[..., Any], original: Callable[..., Any], wanted: tuple[str, ...]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two functions with the parameters of the other, where a Keras has fewer than hornbeam's knows."""
    theirs = inspect.signature(original)
    _, *parameters = inspect.signature(ours).parameters.values()
    mine = inspect.Signature([p for p in parameters if p.name in wanted])

    def call(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            given = theirs.bind(*args, **kwargs)
        except TypeError:
            return original(*args, **kwargs)  # raises, in Keras' words
        return ours(stock, **_named(given))

    def stock(*args: Any, **kwargs: Any) -> Any:
        given = _named(mine.bind(*args, **kwargs))
        return original(**{name: value for name, value in given.items() if name in theirs.parameters or name in kwargs})

    return call, stock


def _named(given: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments by name."""
    named = dict(given.arguments)
    for parameter in given.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def stock_only(reason: str, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stock Keras does all of it: nothing that it calls comes back to hornbeam.

    Raises:
        UnsupportedError: Under `options(strict=True)`, and where more was asked for than stock Keras does.
    """
    _refuse_requests(reason)
    before = getattr(_local, "stock", False)
    _local.stock = True
    try:
        return _state.hand_over(reason, stock, *args, **kwargs)
    finally:
        _local.stock = before


def _refuse_requests(reason: str) -> None:
    """What is asked of this thread's next save or load beyond Keras' arguments; who asks has imported the module."""
    options, more = _state.current(), []
    if _async.claim() is not None:
        more.append("does not save asynchronously")
    cast, load = sys.modules.get("hornbeam._cast"), sys.modules.get("hornbeam._load")
    if cast is not None and cast.take_request() != cast.Smaller():
        more.append("neither casts weights nor leaves the optimizer's state out")
    if load is not None and load.take_request() != load.Request():
        more.append("does not load strictly or in part")
    if options.compression is not None:
        more.append("does not compress")
    if options.durable:
        more.append("does not wait for stable storage")
    if more:
        raise UnsupportedError(f"Stock Keras would have to do this ({reason}), and {', and '.join(more)}.")


def _place(where: str, name: str) -> tuple[Any, str]:
    """What has the function, a module or a class in it, and what it is called there."""
    module = sys.modules[where]
    owner, _, attribute = name.rpartition(".")
    if where == _hook.EXPORTS and not hasattr(module, name):
        return _names.archive_class(), name
    return (getattr(module, owner) if owner else module), attribute


def patch(module: ModuleType) -> None:
    """Puts the dispatchers of a module in place, over whatever is there of what they replace."""
    where = module.__name__
    if where == _hook.EXPORTS and _names.archive_class() is None:
        return  # a backend that exports nothing
    with _lock:
        for name in _REPLACED[where]:
            original: Any = getattr(*_place(where, name), None)
            if original is None or reaches(original, _placed.get((where, name), ((), ()))[1]):
                continue
            made = _made.get((where, name))
            if made is not None and original in made:  # ours is there when somebody has put it back since
                original, dispatcher = made
            else:
                dispatcher = _dispatcher(where, name, original)
                if getattr(sys.modules.get(original.__module__), name, None) is original:
                    dispatcher.__module__ = where  # else `pickle` would look where the original comes from
            _placed[where, name] = _made[where, name] = original, dispatcher
            _displaced.displace(original, "original")  # at every moment both can be found, by other threads too
            setattr(*_place(where, name), dispatcher)
            _displaced.put_back(dispatcher)


def is_patched(module: ModuleType) -> bool:
    """Whether what is there of what `patch` replaces is replaced."""
    where = module.__name__
    if where == _hook.EXPORTS and _names.archive_class() is None:
        return True
    found = {name: getattr(*_place(where, name), None) for name in _REPLACED[where]}
    return all(f is None or reaches(f, _placed.get((where, name), ((), ()))[1]) for name, f in found.items())


def unpatch(module: ModuleType) -> None:
    """Restores the originals, unless a scope or `install()` still needs the dispatchers.

    What somebody else has put over a dispatcher since then stays: below it the dispatcher does nothing.
    """
    where = module.__name__
    with _lock:
        if _users or _hook.is_installed():
            return
        for name in _REPLACED[where]:
            original, dispatcher = _placed.get((where, name), (None, None))
            if original is not None and getattr(*_place(where, name), None) is dispatcher:
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
        names = getattr(module, "__dict__", {})  # `None` stands for what cannot be imported
        if module_name.partition(".")[0] == "keras" and module_name != but and names.get(name) is old:
            setattr(module, name, new)


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Routes the calling thread's saves and loads through hornbeam, whether or not it is installed."""
    modules = [importlib.import_module(name) for name in _REPLACED]
    token = object()
    scopes: set[object] = _local.__dict__.setdefault("scopes", set())
    try:
        with _lock:
            _users.add(token)
            for module in modules:
                patch(module)
        scopes.add(token)
        yield
    finally:
        scopes.discard(token)
        with _lock:
            _users.discard(token)
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
            if isinstance(child, KerasSaveable) or (isinstance(child, _CONTAINERS) and _leads_on(child, KerasSaveable)):
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


_CONTAINERS = (list, dict, tuple)


def _leads_on(container: Any, saveable: type, depth: int = 2) -> bool:
    """Whether Keras would find an object in `container`, or in containers inside it; true beyond `depth`."""
    for item in container.values() if isinstance(container, dict) else container:
        if isinstance(item, saveable) or (
            isinstance(item, _CONTAINERS) and (depth == 0 or _leads_on(item, saveable, depth - 1))
        ):
            return True
    return False


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


def _walk(original: Callable[[Any], Iterator[tuple[str, Any]]]) -> Callable[[Any], Iterator[tuple[str, Any]]]:
    """`saving_lib._walk_saveable`."""

    def walk(saveable: Any) -> Iterator[tuple[str, Any]]:
        fast = getattr(_local, "walk", None)
        return original(saveable) if fast is None else fast(original, saveable)

    return walk


def _save_optimizer(original: Callable[..., None]) -> Callable[..., None]:
    """`BaseOptimizer.save_own_variables`; our store takes variables, where stock needs copies of their values."""

    def save_own_variables(self: Any, store: Any) -> None:
        from hornbeam._store import RecordStore

        if not isinstance(store, RecordStore):
            original(self, store)
            return
        store.mark_optimizer()
        for i, variable in enumerate(self.variables):
            store[str(i)] = variable

    return save_own_variables


_walk_patch = Patch(_walk)
_naming_patch = Patch(_Naming)
_file_utils_patch = Patch(_FileUtils)
_optimizer_patch = Patch(_save_optimizer)


@contextlib.contextmanager
def fast_walk() -> Iterator[None]:
    """Walks of this thread take less time, also a second one inside; optimizers hand variables to our store."""
    from keras.src.optimizers.base_optimizer import BaseOptimizer
    from keras.src.saving import saving_lib

    if getattr(_local, "walk", None) is not None:
        yield
        return
    with (
        _walk_patch(saving_lib, "_walk_saveable"),
        _naming_patch(saving_lib, "naming"),
        _file_utils_patch(saving_lib, "file_utils"),
        _optimizer_patch(BaseOptimizer, "save_own_variables"),
    ):
        _local.walk = FastWalk(saving_lib)
        try:
            yield
        finally:
            _local.walk = None


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


def _start_anew() -> None:
    """In a forked child: other threads are not there, and neither are their locks and scopes."""
    global _lock
    _lock = threading.RLock()
    _users.keep_own()
    if not _hook.is_installed():
        restore_aliases()
    for name in _REPLACED:
        if name in sys.modules:
            unpatch(sys.modules[name])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
