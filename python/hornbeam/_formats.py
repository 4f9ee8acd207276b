"""Which format a save or load is about, where stock Keras would refuse it: the functions of `saving_api`.

Each function here stands in for the function of `saving_api` of the same name; the first argument is the stock one.
What handles a format is imported when one of its files comes: a first load of a small model is mostly imports.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras.src.legacy.saving import legacy_h5_format
from keras.src.utils import file_utils

from hornbeam import _async, _core, _keras, _names

Stock = Callable[..., Any]
_SAVEDMODEL = ("tf", "tensorflow")  # what Keras 2 called it
#: One of them makes a directory a SavedModel.
GRAPHS = ("saved_model.pb", "saved_model.pbtxt", "saved_model.cpb")


def save_model(
    stock: Stock, model: Any, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any
) -> Any:
    """`saving_api.save_model`."""
    if not overwrite:
        _async.settle(filepath)  # whoever is asked shall see the file
    if _is_savedmodel_asked_for(filepath, zipped, kwargs.get("save_format")):
        _names.require("savedmodel")
        from hornbeam import _savedmodel

        kwargs.pop("save_format", None)
        return _savedmodel.save_model(model, filepath, overwrite, **kwargs)
    as_h5 = kwargs.get("save_format") in ("h5", "hdf5") and not str(filepath).endswith((".h5", ".hdf5", ".keras"))
    with _asked(kwargs, "include_optimizer"):
        if as_h5:
            return _save_as_h5(stock, model, filepath, overwrite, **kwargs)
        return stock(model, filepath, overwrite, zipped, **kwargs)


def _asked(kwargs: dict[str, Any], *keep: str) -> contextlib.AbstractContextManager[None]:
    """`_cast.asked`, which is imported only for who asks for something."""
    if kwargs.keys().isdisjoint(("include_optimizer", "dtype", "allow_overflow")):
        return contextlib.nullcontext()
    from hornbeam import _cast

    return _cast.asked(kwargs, *keep)


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
    _async.settle(filepath, loads=True)  # before stock Keras looks whether there is a file
    if _is_savedmodel(filepath):
        _names.require("savedmodel")
        from hornbeam import _savedmodel

        return _savedmodel.load_model(filepath, custom_objects, compile, safe_mode)
    if not str(filepath).endswith((".h5", ".hdf5")) and _is_hdf5(filepath):  # Keras 2 called it `.keras`, too
        return legacy_h5_format.load_model_from_hdf5(filepath, custom_objects, compile, safe_mode)
    return stock(filepath, custom_objects, compile, safe_mode)


def save_weights(
    stock: Stock, model: Any, filepath: Any, overwrite: bool = True, max_shard_size: float | None = None, **kwargs: Any
) -> Any:
    """`saving_api.save_weights`."""
    if not overwrite:
        _async.settle(filepath)
    with _asked(kwargs):
        if _is_safetensors(filepath):
            _names.require("safetensors")
            from hornbeam import _safetensors

            return _safetensors.save_weights(model, filepath, overwrite, max_shard_size, **kwargs)
        return stock(model, filepath, overwrite, max_shard_size, **kwargs)


def load_weights(stock: Stock, model: Any, filepath: Any, skip_mismatch: bool = False, **kwargs: Any) -> Any:
    """`saving_api.load_weights`."""
    _async.settle(filepath, loads=True)
    if _is_safetensors(filepath):
        _names.require("safetensors")
        from hornbeam import _safetensors

        return _safetensors.load_weights(model, filepath, skip_mismatch, **kwargs)
    if _is_legacy(filepath):
        reason = _names.unknown("legacy load")
        if reason is not None:
            return _keras.stock_only(reason, stock, model, filepath, skip_mismatch, **kwargs)
        from hornbeam import _legacy

        return _legacy.load_weights(stock, model, filepath, skip_mismatch, **kwargs)
    return stock(model, filepath, skip_mismatch, **kwargs)


def _is_savedmodel_asked_for(filepath: Any, zipped: bool | None, save_format: Any) -> bool:
    """Whether a save is to be a SavedModel: by `save_format`, or by a name without an extension."""
    if not isinstance(filepath, str | os.PathLike) or zipped is not None:
        return False
    text = os.fsdecode(filepath)
    if text.startswith("hf://") or file_utils.is_remote_path(text) or Path(text).name in ("", ".."):
        return False
    suffix = Path(text).suffix
    if save_format:  # in those names the extension decides, as in Keras
        return save_format in _SAVEDMODEL and suffix not in (".keras", ".h5", ".hdf5")
    return suffix == ""


def _is_savedmodel(filepath: Any) -> bool:
    """Whether a local SavedModel stands there, by its content. Keras' own directories go first."""
    if not isinstance(filepath, str | os.PathLike) or not os.path.isdir(filepath):
        return False
    names = set(os.listdir(filepath))
    return "config.json" not in names and not names.isdisjoint(GRAPHS)


def _is_safetensors(filepath: Any) -> bool:
    """Whether a path says that safetensors are meant."""
    return str(filepath).endswith((".safetensors", ".safetensors.index.json"))


def _is_legacy(filepath: Any) -> bool:
    """Whether a name is that of a legacy weights file."""
    text = str(filepath)
    return text.endswith((".h5", ".hdf5")) and not text.endswith(".weights.h5")


def _is_hdf5(filepath: Any) -> bool:
    """Whether the content of a local file is HDF5."""
    try:
        if not os.path.isfile(filepath):
            return False
        return _core.open(os.fspath(filepath), archive=False).is_hdf5()
    except (OSError, TypeError):
        return False
