"""Architectures as JSON text, through the Rust codec: `Model.to_json` and `model_from_json`.

Each function stands in for the one of that name in `keras.src.models.model`.
"""

from __future__ import annotations

from typing import Any

from keras.src.saving import serialization_lib

from hornbeam import _core
from hornbeam.seam import entry, keras2, missing_classes, shortcuts, targets


def to_json(model: Any, **kwargs: Any) -> str:
    """`Model.to_json`; with arguments for `json.dumps`, Keras' own codec writes."""
    if kwargs:
        return entry.original(targets.MODEL, "Model.to_json")(model, **kwargs)
    with shortcuts.describing(model):
        return _core.encode_json(serialization_lib.serialize_keras_object(model)).decode()


def model_from_json(json_string: Any, custom_objects: Any = None) -> Any:
    """`keras.models.model_from_json`."""
    config = _decoded(json_string)
    with missing_classes.explained(lambda: _decoded(json_string), custom_objects):
        return serialization_lib.deserialize_keras_object(config, custom_objects=custom_objects)


def _decoded(text: Any) -> Any:
    config = _core.decode_json(text)
    return keras2.architecture(keras2.keras_config(config) if keras2.is_keras2(config) else config)
