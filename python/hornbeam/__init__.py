"""hornbeam: Keras model files, written and read by a Rust core.

Swap an import (`from hornbeam.saving import load_model`), call `hornbeam.install()` once, or run
`python -m hornbeam script.py`. Importing this module imports neither Keras nor a backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hornbeam import errors
from hornbeam._core import build_info
from hornbeam.base.counters import Stats, stats
from hornbeam.base.progress import Progress
from hornbeam.base.reports import ExportReport, LoadReport, SaveReport, last_report
from hornbeam.base.settings import options
from hornbeam.base.writer import Handle, wait
from hornbeam.errors import HornbeamError, IncompleteLoadError, UnsupportedError
from hornbeam.seam.hook import install, installed, uninstall

if TYPE_CHECKING:
    from hornbeam import callbacks as callbacks
    from hornbeam import checkpoint as checkpoint
    from hornbeam import data as data
    from hornbeam import export as export
    from hornbeam import models as models
    from hornbeam import saving as saving
    from hornbeam.base.model_file import File as File
    from hornbeam.base.model_file import Tensor as Tensor
    from hornbeam.base.model_file import open as open
    from hornbeam.checkpoint import Checkpoint as Checkpoint
    from hornbeam.checkpoint import CheckpointManager as CheckpointManager

__version__: str = build_info()["version"]
#: What `import *` gives: nothing that hides a builtin (`open`) or imports Keras or NumPy.
__all__ = [
    "ExportReport",
    "Handle",
    "HornbeamError",
    "IncompleteLoadError",
    "LoadReport",
    "Progress",
    "SaveReport",
    "Stats",
    "UnsupportedError",
    "errors",
    "install",
    "installed",
    "last_report",
    "options",
    "stats",
    "uninstall",
    "wait",
]
#: Name → the module that has it, or that it is; imported when it is used.
_LATER = {
    "callbacks": "hornbeam.callbacks",
    "checkpoint": "hornbeam.checkpoint",
    "data": "hornbeam.data",
    "export": "hornbeam.export",
    "models": "hornbeam.models",
    "saving": "hornbeam.saving",
    "Checkpoint": "hornbeam.checkpoint",
    "CheckpointManager": "hornbeam.checkpoint",
    "File": "hornbeam.base.model_file",
    "Tensor": "hornbeam.base.model_file",
    "open": "hornbeam.base.model_file",
}

if build_info()["debug"]:
    import warnings

    warnings.warn(
        "hornbeam._core is a debug build: it is slow. Build it with --release.",
        RuntimeWarning,
        stacklevel=2,
    )


def __getattr__(name: str) -> Any:
    # These import Keras, or NumPy, so they are imported when they are used.
    if name not in _LATER:
        raise AttributeError(f"module 'hornbeam' has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    return module if module.__name__ == f"hornbeam.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_LATER])
