"""Which format a save or load is about, where stock Keras would refuse it: the functions of `saving_api`.

Each function here stands in for the function of `saving_api` of the same name; the first argument is the stock one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hornbeam import _cast, _safetensors, _savedmodel
from hornbeam.errors import UnsupportedError

Stock = Callable[..., Any]


def save_model(
    stock: Stock, model: Any, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any
) -> Any:
    """`saving_api.save_model`."""
    if _savedmodel.is_asked_for(filepath, zipped, kwargs.get("save_format")):
        kwargs.pop("save_format", None)
        return _savedmodel.save_model(model, filepath, overwrite, **kwargs)
    if kwargs.get("dtype") is not None and str(filepath).endswith((".h5", ".hdf5")):
        raise UnsupportedError(f"Legacy HDF5 files are saved in the types of the model. Received: {filepath}")
    with _cast.asked(kwargs, "include_optimizer"):
        return stock(model, filepath, overwrite, zipped, **kwargs)


def load_model(
    stock: Stock, filepath: Any, custom_objects: Any = None, compile: bool = True, safe_mode: bool = True
) -> Any:
    """`saving_api.load_model`."""
    if _savedmodel.is_savedmodel(filepath):
        return _savedmodel.load_model(filepath, custom_objects, compile, safe_mode)
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
    return stock(model, filepath, skip_mismatch, **kwargs)
