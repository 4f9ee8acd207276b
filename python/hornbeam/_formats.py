"""Which format a save or load is about, where stock Keras would refuse it: the functions of `saving_api`.

Each function here stands in for the function of `saving_api` of the same name; the first argument is the stock one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras.src.legacy.saving import legacy_h5_format

from hornbeam import _cast, _legacy, _safetensors, _savedmodel

Stock = Callable[..., Any]


def save_model(
    stock: Stock, model: Any, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any
) -> Any:
    """`saving_api.save_model`."""
    if _savedmodel.is_asked_for(filepath, zipped, kwargs.get("save_format")):
        kwargs.pop("save_format", None)
        return _savedmodel.save_model(model, filepath, overwrite, **kwargs)
    as_h5 = kwargs.get("save_format") in ("h5", "hdf5") and not str(filepath).endswith((".h5", ".hdf5", ".keras"))
    with _cast.asked(kwargs, "include_optimizer"):
        if as_h5:
            return _save_as_h5(stock, model, filepath, overwrite, **kwargs)
        return stock(model, filepath, overwrite, zipped, **kwargs)


def _save_as_h5(stock: Stock, model: Any, filepath: Any, overwrite: bool, **kwargs: Any) -> Any:
    """Under exactly that name, as in Keras 2."""
    include_optimizer = kwargs.pop("include_optimizer", True)
    if set(kwargs) != {"save_format"}:
        return stock(model, filepath, overwrite, None, **kwargs)  # raises
    return legacy_h5_format.save_model_to_hdf5(model, filepath, overwrite, include_optimizer)


def load_model(
    stock: Stock, filepath: Any, custom_objects: Any = None, compile: bool = True, safe_mode: bool = True
) -> Any:
    """`saving_api.load_model`."""
    if _savedmodel.is_savedmodel(filepath):
        return _savedmodel.load_model(filepath, custom_objects, compile, safe_mode)
    if not str(filepath).endswith((".h5", ".hdf5")) and _legacy.is_hdf5(filepath):  # Keras 2 called it `.keras`, too
        return legacy_h5_format.load_model_from_hdf5(filepath, custom_objects, compile, safe_mode)
    return stock(filepath, custom_objects, compile, safe_mode)


def save_weights(
    stock: Stock, model: Any, filepath: Any, overwrite: bool = True, max_shard_size: float | None = None, **kwargs: Any
) -> Any:
    """`saving_api.save_weights`."""
    with _cast.asked(kwargs):
        if _safetensors.is_named(filepath):
            return _safetensors.save_weights(model, filepath, overwrite, max_shard_size, **kwargs)
        return stock(model, filepath, overwrite, max_shard_size, **kwargs)


def load_weights(stock: Stock, model: Any, filepath: Any, skip_mismatch: bool = False, **kwargs: Any) -> Any:
    """`saving_api.load_weights`."""
    if _safetensors.is_named(filepath):
        return _safetensors.load_weights(model, filepath, skip_mismatch, **kwargs)
    if _legacy.is_legacy(filepath):
        return _legacy.load_weights(stock, model, filepath, skip_mismatch, **kwargs)
    return stock(model, filepath, skip_mismatch, **kwargs)
