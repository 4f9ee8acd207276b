"""What of Keras is replaced: detects what is there, patches it, restores it.

Every save and load of Keras goes through a few functions of five modules, looked up there at each call. They
are replaced by dispatchers, which are inert unless `install()` is in force or the calling thread is inside `scope()`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, TypeVar

from hornbeam.base import counters, durability, settings
from hornbeam.errors import UnsupportedError
from hornbeam.seam import displaced, keras_names, targets
from hornbeam.seam.operation import NotOurs, changed, running
from hornbeam.seam.patches import Users, reaches

T = TypeVar("T")
#: Module of Keras' → function that is replaced → its parameters, for which hornbeam's function is called.
_REPLACED: dict[str, dict[str, tuple[str, ...]]] = {
    targets.SAVING_LIB: {
        "save_model": ("model", "filepath", "weights_format", "zipped"),
        "_save_model_to_fileobj": ("model", "fileobj", "weights_format"),
        "_save_model_to_dir": ("model", "dirpath", "weights_format"),
        "_load_model_from_fileobj": ("fileobj", "custom_objects", "compile", "safe_mode"),
        "_load_model_from_dir": ("dirpath", "custom_objects", "compile", "safe_mode"),
        "save_weights_only": ("model", "filepath", "max_shard_size", "objects_to_skip"),
        "load_weights_only": ("model", "filepath", "skip_mismatch", "objects_to_skip"),
    },
    targets.SAVING_API: {
        "save_model": ("model", "filepath", "overwrite", "zipped", "kwargs"),
        "load_model": ("filepath", "custom_objects", "compile", "safe_mode"),
        "save_weights": ("model", "filepath", "overwrite", "max_shard_size", "kwargs"),
        "load_weights": ("model", "filepath", "skip_mismatch", "kwargs"),
    },
    targets.LEGACY_H5: {
        "save_model_to_hdf5": ("model", "filepath", "overwrite", "include_optimizer"),
        "load_model_from_hdf5": ("filepath", "custom_objects", "compile", "safe_mode"),
    },
    targets.MODEL: {
        "Model.to_json": ("self", "kwargs"),
        "Model.save_weights": ("self", "filepath", "overwrite", "max_shard_size"),
        "model_from_json": ("json_string", "custom_objects"),
    },
    targets.EXPORTS: {  # what the module lacks is a method of its archive class
        "get_input_signature": ("model",),
        "track": ("self", "resource"),
        "add_endpoint": ("self", "name", "fn", "input_signature", "kwargs"),
        "add_variable_collection": ("self", "name", "variables"),
        "write_out": ("self", "filepath", "options", "verbose"),
    },
}
#: Where hornbeam's own are: modules that are imported when one of their functions is first called.
_SAVES, _LOADS = "hornbeam.formats.save_adapters", "hornbeam.formats.load_adapters"
_PREFIXES = {targets.SAVING_LIB: "lib_", targets.SAVING_API: "api_", targets.LEGACY_H5: "h5_"}
_SAVE_WEIGHTS = "Model.save_weights"  # takes no arguments of ours
_OTHERS = {targets.MODEL: "hornbeam.formats.to_json", targets.EXPORTS: "hornbeam.formats.exports"}
_lock = threading.RLock()
#: (module, function) → the original and the dispatcher in its place, which another library's patch may wrap.
_placed: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., Any]]] = {}
#: The same of those placed last: one dispatcher for a function, so that references to it stay good.
_made: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., Any]]] = {}
_users = Users()  # scopes in force


def _active() -> bool:
    operation = running()
    return not operation.stock and bool(targets.installation or operation.routed)


def _operation(module: str, name: str) -> str:
    """The operation that a function belongs to, as `keras_names` calls it."""
    if module in _OTHERS and name != _SAVE_WEIGHTS:
        return "json" if module == targets.MODEL else "export"
    kind = "load" if "load" in name else "save"
    return f"legacy {kind}" if module == targets.LEGACY_H5 else kind


def _ours(module: str, name: str) -> Callable[..., Any]:
    """Hornbeam's function for one of Keras'."""
    if name == _SAVE_WEIGHTS:
        return function(f"{_SAVES}:model_save_weights")
    if module in _OTHERS:
        return function(f"{_OTHERS[module]}:{name.rpartition('.')[2]}")
    return function(f"{_LOADS if 'load' in name else _SAVES}:{_PREFIXES[module]}{name.lstrip('_')}")


def function(name: str) -> Callable[..., Any]:
    """What `module:function` names, imported now."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def _dispatcher(module: str, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    operation, wanted = _operation(module, name), _REPLACED[module][name]

    @functools.cache
    def ours() -> Callable[..., Any]:
        found = _ours(module, name)
        return found if tuple(inspect.signature(original).parameters) == wanted else _translated(found, original)

    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        if not _active():
            return original(*args, **kwargs)
        left = _unknown(operation)
        if left is None:
            try:
                return ours()(*args, **kwargs)
            except NotOurs as error:
                left = error
        return _hand_over(left, original, *args, **kwargs)

    dispatch.__hornbeam__ = True  # type: ignore[attr-defined]
    return dispatch


def run(
    operation: str,
    ours: str,
    stock: Callable[[], Any],
    *args: Any,
    beyond: Sequence[str] = (),
    **kwargs: Any,
) -> Any:
    """Calls hornbeam's function, or Keras' where hornbeam's leaves it to that.

    What stock Keras does is counted and logged; nothing that it calls comes back to hornbeam.

    Args:
        operation: What is needed, as `keras_names` calls it.
        ours: Hornbeam's function, as `module:function`, imported when this Keras is known.
        stock: Calls Keras' function.
        *args: What `ours` is called with.
        beyond: What was asked for that stock Keras does not do.
        **kwargs: As `args`.

    Raises:
        UnsupportedError: Where more was asked for than stock Keras does, and with `options(fallback=False)`.
    """
    left = _unknown(operation)
    if left is None:
        try:
            return function(ours)(*args, **kwargs)
        except NotOurs as error:
            left = error
    else:
        left.beyond = [*beyond, *left.beyond]
    return _hand_over(left, stock)


def _unknown(operation: str) -> NotOurs | None:
    """What there is to say where this Keras is not one that hornbeam knows."""
    reason = keras_names.unknown(operation)
    if reason is None:
        return None
    saves = "load" not in operation
    durable = saves and settings.current().durable
    return NotOurs(reason, ["does not wait for stable storage"] if durable else [], saves=saves)


def _hand_over(left: NotOurs, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stock Keras does all of it.

    Raises:
        UnsupportedError: As `run`.
    """
    options = settings.current()
    more = list(left.beyond)
    if options.compression is not None and left.saves:
        more.append("does not compress")
    if left.reason is not None and more:
        raise UnsupportedError(f"Stock Keras would have to do this ({left.reason}), and {', and '.join(more)}.")
    with changed(stock=True):
        if left.reason is None:
            return stock(*args, **kwargs)
        with durability.directories(left.path, durable=options.durable):
            result = counters.hand_over(left.reason, stock, *args, **kwargs)
        if left.saves:
            durability.sync_handed_over(left.path)
        return result


def original(module: str, name: str) -> Callable[..., Any]:
    """What a dispatcher stands for; what is there, where there is none."""
    placed = _placed.get((module, name))
    return placed[0] if placed is not None else getattr(*_place(module, name))


def _translated(ours: Callable[..., T], original: Callable[..., Any]) -> Callable[..., T]:
    """Hornbeam's function for a Keras whose own takes other arguments than hornbeam's."""
    theirs = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> T:
        try:
            given = theirs.bind(*args, **kwargs)
        except TypeError:
            raise NotOurs(None) from None  # Keras says what is wrong
        return ours(**_by_name(given))

    return call


def _by_name(given: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments by name."""
    named = dict(given.arguments)
    for parameter in given.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def _place(where: str, name: str) -> tuple[Any, str]:
    """What has the function, a module or a class in it, and what it is called there."""
    module = sys.modules[where]
    owner, _, attribute = name.rpartition(".")
    if where == targets.EXPORTS and not hasattr(module, name):
        return keras_names.archive_class(), name
    return (getattr(module, owner) if owner else module), attribute


def patch(module: ModuleType) -> None:
    """Puts the dispatchers of a module in place, over whatever is there of what they replace."""
    where = module.__name__
    if where == targets.EXPORTS and keras_names.archive_class() is None:
        return  # this backend cannot export
    with _lock:
        for name in _REPLACED[where]:
            original: Any = getattr(*_place(where, name), None)
            if original is None or reaches(original, _placed.get((where, name), ((), ()))[1]):
                continue
            made = _made.get((where, name))
            if made is not None and original in made:  # somebody has put an old dispatcher back: use it again
                original, dispatcher = made
            else:
                dispatcher = _dispatcher(where, name, original)
                if getattr(sys.modules.get(original.__module__), name, None) is original:
                    dispatcher.__module__ = where  # so that `pickle` finds it: the original is from another module
            _placed[where, name] = _made[where, name] = original, dispatcher
            displaced.displace(original, "original")  # first, so that other threads can pickle both at any moment
            setattr(*_place(where, name), dispatcher)
            displaced.put_back(dispatcher)


def is_patched(module: ModuleType) -> bool:
    """Whether what is there of what `patch` replaces is replaced."""
    where = module.__name__
    if where == targets.EXPORTS and keras_names.archive_class() is None:
        return True
    found = {name: getattr(*_place(where, name), None) for name in _REPLACED[where]}
    return all(f is None or reaches(f, _placed.get((where, name), ((), ()))[1]) for name, f in found.items())


def unpatch(module: ModuleType) -> None:
    """Restores the originals, unless a scope or `install()` still needs the dispatchers.

    What somebody else has put over a dispatcher since then stays: below it the dispatcher does nothing.
    """
    where = module.__name__
    with _lock:
        if _users or targets.installation:
            return
        for name in _REPLACED[where]:
            original, dispatcher = _placed.get((where, name), (None, None))
            if original is not None and getattr(*_place(where, name), None) is dispatcher:
                displaced.displace(dispatcher, "dispatcher")
                setattr(*_place(where, name), original)
                displaced.put_back(original)
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
    """Routes this thread's or task's saves and loads through hornbeam, whether or not it is installed."""
    modules = [importlib.import_module(name) for name in _REPLACED]
    token = object()
    try:
        with _lock:
            _users.add(token)
            for module in modules:
                patch(module)
        with changed(routed=True):
            yield
    finally:
        with _lock:
            _users.discard(token)
            for module in modules:
                unpatch(module)


def _start_anew() -> None:
    """In a forked child: other threads are not there, and neither are their locks and scopes."""
    global _lock
    _lock = threading.RLock()
    _users.keep_own()
    if not targets.installation:
        restore_aliases()
    for name in _REPLACED:
        if name in sys.modules:
            unpatch(sys.modules[name])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
