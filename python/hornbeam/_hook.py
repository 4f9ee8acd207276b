"""`install`, `uninstall`, `installed`: route Keras' own entry points through hornbeam. Imports no Keras.

`install()` before `import keras` only leaves a hook on the import of Keras' saving modules, so that the backend may
still be chosen afterwards.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType

SAVING_LIB = "keras.src.saving.saving_lib"
SAVING_API = "keras.src.saving.saving_api"
LEGACY_H5 = "keras.src.legacy.saving.legacy_h5_format"
MODEL = "keras.src.models.model"
EXPORTS = "keras.src.export.saved_model"
MODULES = (SAVING_LIB, SAVING_API, LEGACY_H5, MODEL, EXPORTS)

_lock = threading.RLock()
_forever = False  # between install() and uninstall()
_blocks = 0  # `with installed()` blocks in force, in all threads


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


class _Finder(importlib.abc.MetaPathFinder):
    """Watches for the import of Keras' saving modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


_finder = _Finder()


def _patch(module: ModuleType) -> None:
    from hornbeam import _keras

    _keras.patch(module)


def install() -> None:
    """Sends every Keras save and load of this process through hornbeam, until `uninstall()`.

    `model.save`, `model.save_weights`, `model.load_weights`, `keras.saving.*`, `keras.models.*`, checkpoint callbacks,
    `copy.deepcopy` and `pickle` of models are covered, also through references taken before. Calling it again is
    harmless. Before `import keras` it imports neither Keras nor a backend.
    """
    global _forever
    _await_import()
    with _lock:
        _forever = True
        _update()


def uninstall() -> None:
    """Undoes `install()` exactly; `installed()` blocks go on. Harmless when nothing is installed."""
    global _forever
    with _lock:
        _forever = False
        _update()


def _await_import() -> None:
    """Waits for another thread that imports Keras: half a module cannot be patched. It may need `_lock` meanwhile."""
    for name in ("keras", *MODULES):
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if getattr(spec, "_initializing", False):
            importlib.import_module(name)


def _update() -> None:
    """Puts the dispatchers, and the hook that will, in place or away."""
    loaded = [sys.modules[name] for name in MODULES if name in sys.modules]
    if is_installed():
        for module in loaded:
            _patch(module)
        if len(loaded) < len(MODULES) and _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
    elif _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    if loaded:
        from hornbeam import _keras

        if is_installed():
            _keras.follow_aliases()
        else:
            _keras.restore_aliases()
            for module in loaded:
                _keras.unpatch(module)


def is_installed() -> bool:
    """Whether `install()` or an `installed()` block is in force."""
    return _forever or _blocks > 0


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """`install()` for the length of a `with` block; what others installed stays installed."""
    global _blocks
    _await_import()
    with _lock:
        _blocks += 1
        _update()
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            _update()
