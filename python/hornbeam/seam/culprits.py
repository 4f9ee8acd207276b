"""What hornbeam adds to the errors of Keras and TensorFlow: which object of the model it was, and where that is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
from keras.src.saving import saving_lib

from hornbeam import _core
from hornbeam.base import counters


def explain(error: BaseException, text: Callable[[], str]) -> None:
    """Adds what `text` says to the message of an error; its type and traceback stay.

    Users' objects are asked about themselves here. What they raise is only logged: it must not take the error's place.
    """
    try:
        more = text()
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (f"{error.args[0].rstrip()}\n{more}",)
        else:
            error.add_note(more)
    except Exception:
        counters.logger.debug("an error could not be explained further", exc_info=True)


def describe(what: Any) -> str:
    """Path and class of a layer, or of the one that a method belongs to; the name of a function."""
    if inspect.ismethod(what):
        return f"`{what.__name__}` of {describe(what.__self__)}"
    if isinstance(what, keras.Layer):
        return f"'{what.path or what.name}' ({type(what).__name__})"
    function = getattr(what, "python_function", what)
    return f"'{getattr(function, '__qualname__', repr(what))}'"


def unbuilt(layer: Any) -> str:
    """The layers inside that are not built."""
    inner = [describe(child) for child in layer._flatten_layers(include_self=False) if not child.built]
    return f"; not built in it: {', '.join(inner[:8])}{' and more' if len(inner) > 8 else ''}" if inner else ""


def culprit(model: Any) -> str:
    """Whose config cannot be serialised: the innermost layer that fails alone, or what `compile()` got."""
    layers = list(model._flatten_layers()) if isinstance(model, keras.Layer) else []
    for layer in reversed(layers):
        try:
            _core.encode_json(saving_lib.serialize_keras_object(layer.get_config()))
        except Exception:
            where = "" if layer is model else f" in the model '{model.name}'"
            return f"The object is {describe(layer)}{where}."
    if layers:
        return f"What `compile()` got is in the way: the layers of '{model.name}' can be serialised."
    return f"The object is {describe(model)}."
