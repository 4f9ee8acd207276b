"""Which format a save is about: what its path or file object and the arguments stand for.

What handles a format is imported when one of its files comes: a first save of a small model is mostly imports.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

from absl import logging
from keras.src.utils import file_utils, io_utils

from hornbeam.base import file_objects, writer
from hornbeam.base.file_objects import Stream
from hornbeam.base.reports import SaveReport
from hornbeam.base.writer import Handle
from hornbeam.errors import UnsupportedError
from hornbeam.flows import saves
from hornbeam.flows.requests import SaveRequest
from hornbeam.seam import keras_names
from hornbeam.seam.operation import NotOurs

Saved = SaveReport | Handle | None
_HDF5 = (".h5", ".hdf5")
_SAVEDMODEL = ("tf", "tensorflow")  # what Keras 2 called it


def save_model(
    request: SaveRequest, *, overwrite: bool = True, zipped: bool | None = None, save_format: Any = None
) -> Saved:
    """Saves a model in the format that its target and the arguments ask for.

    Returns:
        What was saved; of an asynchronous save, its handle; `None` where the user keeps the old file.

    Raises:
        NotOurs: Where stock Keras has to do it, or refuses it; nothing was touched.
    """
    target = request.target
    if file_objects.is_file_object(target):
        return _save_model_to(request, zipped, save_format)
    if not overwrite:
        writer.wait_for(target)  # the question about overwriting must see the finished file
    if _wants_savedmodel(target, zipped, save_format):
        keras_names.require("savedmodel")
        from hornbeam.formats import savedmodel

        return savedmodel.save_model(request, overwrite=overwrite)
    text = str(target)
    if save_format and not text.endswith((*_HDF5, ".keras")):
        if save_format not in ("h5", "hdf5"):
            raise NotOurs(None)
        return _save_h5(request, overwrite=overwrite)  # under exactly that name, as in Keras 2
    remote = text.startswith("hf://") or file_utils.is_remote_path(text)
    if remote:
        request.refuse_writer("what is not a local file")
        raise NotOurs("remote path", request.beyond(), text)
    zipped = True if zipped is None else bool(zipped)
    if text.endswith(_HDF5) and zipped:
        _warn_of_format(text, save_format)
        if not overwrite and os.path.exists(text) and not io_utils.ask_to_proceed_with_overwrite(text):
            return None
        return _save_h5(request, overwrite=True)
    if zipped != text.endswith(".keras"):
        raise NotOurs(None)
    _warn_of_format(text, save_format)
    if not overwrite and os.path.exists(text) and not io_utils.ask_to_proceed_with_overwrite(text):
        return None
    warn_unbuilt(request.model)
    return saves.save_archive(request) if zipped else saves.save_directory(request)


def _warn_of_format(text: str, save_format: Any) -> None:
    """What Keras says."""
    if save_format:
        logging.warning(
            "The `save_format` argument is deprecated in Keras 3. We recommend removing this argument as it can be "
            f"inferred from the file path. Received: save_format={save_format}"
        )
    if text.endswith(_HDF5):
        logging.warning(
            "You are saving your model as an HDF5 file via `model.save()` or `keras.saving.save_model(model)`. This "
            "file format is considered legacy. We recommend using instead the native Keras format, e.g. "
            "`model.save('my_model.keras')` or `keras.saving.save_model(model, 'my_model.keras')`. "
        )


def warn_unbuilt(model: Any) -> None:
    """What Keras says of a model that has no weights yet."""
    if not model.built:
        warnings.warn(
            "You are saving a model that has not yet been built. It might not contain any weights yet. Consider "
            "building the model first by calling it on some data.",
            stacklevel=2,
        )


def _save_h5(request: SaveRequest, *, overwrite: bool) -> SaveReport | None:
    reason = keras_names.unknown("legacy save")
    if reason is not None:
        raise NotOurs(reason, request.beyond(), request.path)
    from hornbeam.formats import legacy_save

    return legacy_save.save_model(request, overwrite=overwrite)


def _save_model_to(request: SaveRequest, zipped: bool | None, save_format: Any) -> Saved:
    """To a file object: as legacy HDF5 if its name or `save_format` says so, otherwise as a `.keras` archive."""
    file = request.target
    file_objects.check(file, "write")
    if zipped is False or save_format in _SAVEDMODEL:
        raise UnsupportedError(f"A model is saved to a file object as one file, not as a directory. Received: {file!r}")
    if save_format not in (None, False, "h5", "hdf5", "keras"):
        raise ValueError(f"`save_format` is 'keras' or 'h5' for a file object. Received: save_format={save_format!r}")
    if save_format in ("h5", "hdf5") or (not save_format and file_objects.name(file).endswith(_HDF5)):
        return _save_h5(dataclasses.replace(request, target=Stream(file, ".h5")), overwrite=True)
    warn_unbuilt(request.model)
    return saves.save_archive(request)


def save_weights(request: SaveRequest, *, overwrite: bool = True) -> Saved:
    """Saves weights in the format that the target asks for.

    Returns:
        As `save_model`.

    Raises:
        NotOurs: Where stock Keras has to do it, or refuses it; nothing was touched.
    """
    if file_objects.is_file_object(request.target):
        request = _weights_target(request)
    elif not overwrite:
        writer.wait_for(request.target)
    if request.partial:
        keras_names.require("partial save")
    text, shards = str(request.target), request.max_shard_size is not None
    if text.endswith((".safetensors", ".safetensors.index.json")):
        keras_names.require("safetensors")
        from hornbeam.formats import safetensors

        return safetensors.save_weights(request, overwrite=overwrite)
    if not request.model.built or not text.endswith(("weights.h5", "weights.json") if shards else ".weights.h5"):
        raise NotOurs(None)
    if not overwrite and os.path.exists(text) and not io_utils.ask_to_proceed_with_overwrite(text):
        return None
    if shards:
        from hornbeam.formats import shards as sharded

        return sharded.save_weights(request)
    return saves.save_weights(request)


def _weights_target(request: SaveRequest) -> SaveRequest:
    """A file object as what its name says; `.weights.h5` if that says nothing."""
    file = request.target
    file_objects.check(file, "write")
    request.refuse_writer("a file object")
    if request.max_shard_size is not None:
        raise UnsupportedError(f"Shards are several files, and need a path. Received: filepath={file!r}")
    name = file_objects.name(file)
    if name.endswith((".keras", ".hdf5", ".json")) or (name.endswith(".h5") and not name.endswith(".weights.h5")):
        raise ValueError(f"The filename must end in `.weights.h5`. Received: filepath={file!r}")
    suffix = ".safetensors" if name.endswith(".safetensors") else ".weights.h5"
    return dataclasses.replace(request, target=Stream(file, suffix))


def _wants_savedmodel(filepath: Any, zipped: bool | None, save_format: Any) -> bool:
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
