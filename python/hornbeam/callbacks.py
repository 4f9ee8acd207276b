"""`keras.callbacks`, name by name: the checkpoint callbacks save and load through hornbeam, the rest is Keras' own."""

from __future__ import annotations

from typing import Any

import keras.callbacks as _stock

from hornbeam.seam import keras_names

for operation in ("training", "save", "load"):
    keras_names.require(operation)  # before what it takes is imported

from hornbeam.training.accounts import best_checkpoint, latest_checkpoint
from hornbeam.training.backup import BackupAndRestore
from hornbeam.training.model_checkpoint import ModelCheckpoint

__all__ = ["BackupAndRestore", "ModelCheckpoint", "best_checkpoint", "latest_checkpoint"]


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)


def __dir__() -> list[str]:
    return sorted({*dir(_stock), *__all__})
