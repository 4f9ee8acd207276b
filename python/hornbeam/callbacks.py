"""`keras.callbacks`, name by name: the checkpoint callbacks save and load through hornbeam, the rest is Keras' own."""

from __future__ import annotations

from typing import Any

import keras.callbacks as _stock

from hornbeam._backup import BackupAndRestore
from hornbeam._keras import scope

__all__ = ["BackupAndRestore", "ModelCheckpoint"]


class ModelCheckpoint(_stock.ModelCheckpoint):
    """`keras.callbacks.ModelCheckpoint` whose files are written by hornbeam; arguments and behaviour are Keras'."""

    def _save_model(self, *args: Any, **kwargs: Any) -> None:
        with scope():
            super()._save_model(*args, **kwargs)


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)


def __dir__() -> list[str]:
    return sorted({*dir(_stock), *__all__})
