"""`keras.callbacks`, name by name: the checkpoint callbacks save and load through hornbeam, the rest is Keras' own."""

from __future__ import annotations

from typing import Any

import keras.callbacks as _stock

from hornbeam._keras import scope
from hornbeam._ledger import best_checkpoint, latest_checkpoint
from hornbeam._model_checkpoint import ModelCheckpoint

__all__ = ["BackupAndRestore", "ModelCheckpoint", "best_checkpoint", "latest_checkpoint"]


class BackupAndRestore(_stock.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` through hornbeam; arguments and behaviour are Keras'."""

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Restores the last backup."""
        with scope():
            super().on_train_begin(logs)

    def _save_model(self, *args: Any, **kwargs: Any) -> None:
        with scope():
            super()._save_model(*args, **kwargs)


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)


def __dir__() -> list[str]:
    return sorted({*dir(_stock), *__all__})
