"""`install`, `uninstall`, `installed`: route Keras' own entry points through hornbeam. Imports no Keras.

`install()` before `import keras` only leaves a hook on the import of Keras' saving module, so that the backend may
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

_lock = threading.RLock()
_depth = 0  # 1 while install() is in force; calls do not add up


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
            if _depth:
                _patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Watches for the import of Keras' saving module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != SAVING_LIB:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


_finder = _Finder()


def _patch(saving_lib: ModuleType) -> None:
    from hornbeam import _keras

    _keras.patch(saving_lib)


def install() -> None:
    """Sends every Keras save and load of this process through hornbeam, until `uninstall()`.

    `model.save`, `model.save_weights`, `model.load_weights`, `keras.saving.*`, `keras.models.*`, checkpoint callbacks,
    `copy.deepcopy` and `pickle` of models are covered, also through references taken before. Calling it again is
    harmless. Before `import keras` it imports neither Keras nor a backend.
    """
    global _depth
    with _lock:
        if _depth == 0:
            _depth = 1
            module = sys.modules.get(SAVING_LIB)
            if module is not None:
                _patch(module)
            else:
                sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Undoes `install()` exactly. Harmless when nothing is installed."""
    global _depth
    with _lock:
        _depth = 0
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(_finder)
        module = sys.modules.get(SAVING_LIB)
        if module is not None:
            from hornbeam import _keras

            _keras.unpatch(module)


def is_installed() -> bool:
    """Whether `install()` is in force."""
    return _depth > 0


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """`install()` for the length of a `with` block; what was installed before stays installed."""
    before = is_installed()
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()
