"""`keras.models`, name by name: `save_model` and `load_model` are hornbeam's, the rest is Keras' own."""

from __future__ import annotations

from typing import Any

import keras.models as _stock

from hornbeam.saving import load_model, save_model

__all__ = ["load_model", "save_model"]


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)


def __dir__() -> list[str]:
    return sorted({*dir(_stock), *__all__})
