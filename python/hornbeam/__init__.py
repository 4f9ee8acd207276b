"""hornbeam: Keras model files, written and read by a Rust core.

Swap an import (`from hornbeam.saving import load_model`), call `hornbeam.install()` once, or run
`python -m hornbeam script.py`. Importing this module imports neither Keras nor a backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hornbeam import errors
from hornbeam._async import Handle, wait
from hornbeam._core import build_info
from hornbeam._hook import install, installed, uninstall
from hornbeam._progress import Progress
from hornbeam._report import LoadReport, SaveReport, last_report, last_save_report
from hornbeam._state import Stats, options, stats
from hornbeam.errors import HornbeamError, IncompleteLoadError, UnsupportedError

if TYPE_CHECKING:
    from hornbeam import callbacks, checkpoint, data, export, models, saving
    from hornbeam._open import File, Tensor, open
    from hornbeam.checkpoint import Checkpoint, CheckpointManager

__version__: str = build_info()["version"]
__all__ = [
    "Checkpoint",
    "CheckpointManager",
    "File",
    "Handle",
    "HornbeamError",
    "IncompleteLoadError",
    "LoadReport",
    "Progress",
    "SaveReport",
    "Stats",
    "Tensor",
    "UnsupportedError",
    "callbacks",
    "checkpoint",
    "data",
    "errors",
    "export",
    "install",
    "installed",
    "last_report",
    "last_save_report",
    "models",
    "open",
    "options",
    "saving",
    "stats",
    "uninstall",
    "wait",
]

if build_info()["debug"]:
    import warnings

    warnings.warn(
        "hornbeam._core is a debug build: it is slow. Build it with --release.",
        RuntimeWarning,
        stacklevel=2,
    )


def __getattr__(name: str) -> Any:
    # These import Keras, so they are imported when they are used.
    if name in ("saving", "models", "callbacks", "export", "checkpoint", "data"):
        return importlib.import_module(f"hornbeam.{name}")
    if name in ("CheckpointManager", "Checkpoint"):
        return getattr(importlib.import_module("hornbeam.checkpoint"), name)
    if name in ("open", "File", "Tensor"):  # needs NumPy
        return getattr(importlib.import_module("hornbeam._open"), name)
    raise AttributeError(f"module 'hornbeam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
