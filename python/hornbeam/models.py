"""`keras.models`, name by name: what saves, loads and reads JSON is hornbeam's, the rest is Keras' own."""

from __future__ import annotations

import functools
from typing import Any

import keras
import keras.models as _stock
from keras.src.models import model as _model

from hornbeam.saving import load_model, save_model
from hornbeam.seam import entry

__all__ = ["load_model", "model_from_json", "save_model"]


def model_from_json(json_string: str | bytes, custom_objects: dict[str, Any] | None = None) -> keras.Model:
    """Builds the model that `Model.to_json` describes, with new weights.

    Args:
        json_string: The text; everything that `json.loads` takes.
        custom_objects: Names of custom classes and functions, and what they stand for.

    Raises:
        TypeError: When classes or functions are missing: one error that names all of them.
        json.JSONDecodeError: For what is no JSON.
    """
    stock = functools.partial(_model.model_from_json, json_string, custom_objects)
    return entry.run("json", "hornbeam.formats.to_json:model_from_json", stock, json_string, custom_objects)


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)


def __dir__() -> list[str]:
    return sorted({*dir(_stock), *__all__})
