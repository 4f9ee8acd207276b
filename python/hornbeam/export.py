"""`keras.export`, name by name; everything is Keras' own."""

from __future__ import annotations

from typing import Any

import keras.export as _stock

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)


def __dir__() -> list[str]:
    return sorted(dir(_stock))
