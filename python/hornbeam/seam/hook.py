"""`install`, `uninstall`, `installed`: route Keras' own entry points through hornbeam. Imports no Keras.

`install()` before `import keras` only leaves a hook on the import of Keras' saving modules, so that the backend may
still be chosen afterwards.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from hornbeam.base.counters import logger
from hornbeam.errors import UnknownKerasWarning
from hornbeam.seam.targets import MODULES, installation

_lock = threading.RLock()
_asking = threading.local()
_seen: set[str] = set()  # modules that were there when the dispatchers were last put in place


class _Loader(importlib.abc.Loader):
    """Runs the module as its own loader would, then patches it."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        with _lock:
            if is_installed():
                _patch(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Watches for the import of Keras' saving modules, which those behind it in `sys.meta_path` find.

    What one before it has found is not seen by it; that is patched when the next module is imported.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            _catch_up()
            return None
        names: set[str] = _asking.__dict__.setdefault("names", set())
        if fullname in names:  # a finder that asks all others has come back to this one
            return None
        names.add(fullname)
        try:
            spec = self._ask(fullname, path, target)
        finally:
            names.discard(fullname)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec

    def _ask(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find = getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                return spec
        return None


_finder = _Finder()


def _patch(module: ModuleType) -> None:
    from hornbeam.seam import entry

    entry.patch(module)
    if not entry.is_patched(module):
        text = f"hornbeam is installed, but {module.__name__} cannot be patched: its saves and loads are stock Keras'."
        logger.warning("%s", text)
        warnings.warn(text, UnknownKerasWarning, stacklevel=2)


def _catch_up() -> None:
    """Patches modules that were imported by what comes before the hook."""
    if not _is_behind() or not _lock.acquire(blocking=False):  # whoever holds it may be waiting for this import
        return
    try:
        if is_installed() and _is_behind():
            _update()
    finally:
        _lock.release()


def _is_behind() -> bool:
    """Whether modules are there that were not looked at, and nobody is looking at them."""
    return not _seen.issuperset(_loaded()) and not getattr(_asking, "updating", False)


def _loaded() -> list[str]:
    """Those of the modules that are there and complete."""
    found = [(name, sys.modules.get(name)) for name in MODULES]
    return [n for n, m in found if m is not None and not getattr(m.__spec__, "_initializing", False)]


def install() -> None:
    """Sends every Keras save and load of this process through hornbeam, until `uninstall()`.

    `model.save`, `model.save_weights`, `model.load_weights`, `keras.saving.*`, `keras.models.*`, checkpoint callbacks,
    `copy.deepcopy` and `pickle` of models are covered, also through references taken before. Calling it again is
    harmless. Before `import keras` it imports neither Keras nor a backend.
    """
    _await_import()
    with _lock:
        installation.forever = True
        _update()


def uninstall() -> None:
    """Undoes `install()` exactly; `installed()` blocks go on. Harmless when nothing is installed."""
    with _lock:
        installation.forever = False
        _update()


def _await_import() -> None:
    """Waits for another thread that imports Keras: half a module cannot be patched. It may need `_lock` meanwhile."""
    for name in ("keras", *MODULES):
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if getattr(spec, "_initializing", False):
            importlib.import_module(name)


def _update() -> None:
    """Puts the dispatchers, and the hook that will, in place or away."""
    _asking.updating = True
    try:
        _update_all()
    finally:
        _asking.updating = False


def _update_all() -> None:
    loaded = [sys.modules[name] for name in MODULES if name in sys.modules]
    _seen.clear()
    _seen.update(_loaded())
    if is_installed():
        for module in loaded:
            _patch(module)
        if len(loaded) < len(MODULES) and _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
    elif _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    if loaded:
        from hornbeam.seam import entry

        if is_installed():
            entry.follow_aliases()
        else:
            entry.restore_aliases()
            for module in loaded:
                entry.unpatch(module)


def is_installed() -> bool:
    """Whether `install()` or an `installed()` block is in force."""
    return bool(installation)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """`install()` for the length of a `with` block; what others installed stays installed."""
    _await_import()
    token = object()
    try:
        with _lock:
            installation.blocks.add(token)
            _update()
        yield
    finally:
        with _lock:
            installation.blocks.discard(token)
            _update()


def _start_anew() -> None:
    """In a forked child: other threads are not there, and neither are their locks and blocks."""
    global _lock
    _lock = threading.RLock()
    _asking.__dict__.clear()
    installation.blocks.keep_own()
    if not is_installed() and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
