"""Which format a load is about: what a path, or the content of a file, stands for.

What handles a format is imported when one of its files comes: a first load of a small model is mostly imports.
"""

from __future__ import annotations

import dataclasses
import io
import os
import zipfile
from typing import Any

from keras.src.utils import file_utils

from hornbeam.base import contents, file_objects, writer
from hornbeam.base.file_objects import Stream
from hornbeam.base.reports import LoadReport
from hornbeam.base.savedmodel_parts import GRAPHS
from hornbeam.errors import ConfigError, UnsupportedError
from hornbeam.flows import loads
from hornbeam.flows.requests import LoadRequest
from hornbeam.seam import entry, keras_names, targets

_HDF5 = (".h5", ".hdf5")
_SAFETENSORS = (".safetensors", ".safetensors.index.json")
#: What Keras takes by these names as weights.
_WEIGHTS = (".keras", *_HDF5, ".weights.json")


def load_model(request: LoadRequest) -> tuple[Any, LoadReport]:
    """Loads a model, whatever format its source is in.

    Raises:
        NotOurs: Where stock Keras has to do it, or refuses it.
    """
    place = request.source
    if file_objects.is_file_object(place):
        return _load_model_from(request)
    writer.wait_for(place, loads=True)
    if _is_savedmodel(place):
        keras_names.require("savedmodel")
        from hornbeam.formats import savedmodel

        return savedmodel.load_model(request)
    text = str(place)
    if text.endswith(_HDF5):
        return _load_h5(request)
    hdf5 = contents.kind(place) == "h5"
    _check_content(place, hdf5=hdf5)
    if hdf5:  # Keras 2 called it `.keras`, too
        return _load_h5(request)
    if text.startswith("hf://") or file_utils.is_remote_path(text):
        raise loads.not_ours(request, "remote path", text)
    archive = text.endswith(".keras")
    if archive and zipfile.is_zipfile(text):
        return loads.load_archive(request)
    if os.path.isdir(text) and not archive:
        if os.path.exists(os.path.join(text, "config.json")):
            return loads.load_directory(request)
        raise loads.not_ours(request, "a checkpoint of Orbax", text)
    raise loads.not_ours(request, None)


def _load_h5(request: LoadRequest) -> tuple[Any, LoadReport]:
    reason = keras_names.unknown("legacy load")
    if reason is not None:
        raise loads.not_ours(request, reason, request.source if isinstance(request.source, str) else None)
    from hornbeam.formats import legacy_load

    return legacy_load.load_model(request)


def _check_content(filepath: Any, *, hdf5: bool) -> None:
    """Refuses what stands at a local path and is no model, where stock Keras would say that no file is there.

    Raises:
        ValueError: As stock Keras.
    """
    if not isinstance(filepath, str) or not os.path.exists(filepath):
        return
    archive = filepath.endswith(".keras")
    if os.path.isdir(filepath):
        if not archive or os.path.exists(os.path.join(filepath, "config.json")) or _has_steps(filepath):
            return  # a directory of Keras', or a checkpoint of Orbax
    elif archive and os.path.isfile(filepath) and zipfile.is_zipfile(filepath):  # a pipe would be waited for
        return
    found = contents.identify(filepath)
    if found is not None and not (hdf5 and found.kind == "h5"):
        what = "no `.keras` archive" if archive else "not a file that Keras loads as a model"
        error = ConfigError(f"'{filepath}' is {what}. {found}")
        error.path, error.found = filepath, found.what
        raise error


def _has_steps(path: str) -> bool:
    return any(name.isdigit() for name in os.listdir(path))


def _load_model_from(request: LoadRequest) -> tuple[Any, LoadReport]:
    """From a file object, whose content says what it is."""
    file = readable(request.source)
    kind = contents.kind(file)
    if kind == "h5":
        return _load_h5(dataclasses.replace(request, source=Stream(file, ".h5")))
    found = None if kind == "keras" or zipfile.is_zipfile(file) else contents.identify(file)
    if found is not None and found.kind != "keras":
        raise ConfigError(f"The file object holds no model that Keras loads. {found}")
    return loads.load_archive(dataclasses.replace(request, source=file))


def readable(file: Any) -> Any:
    """The file object, or its content where it can be read only once."""
    file_objects.check(file, "read")
    return file if file_objects.is_seekable(file) else io.BytesIO(file.read())


def load_weights(request: LoadRequest) -> LoadReport:
    """Loads weights from whatever format the source is in.

    Raises:
        NotOurs: Where stock Keras has to do it, or refuses it.
    """
    if file_objects.is_file_object(request.source):
        request = dataclasses.replace(request, source=weights_source(request.source))
    place, text = request.source, str(request.source)
    writer.wait_for(place, loads=True)
    if text.endswith(_SAFETENSORS):
        keras_names.require("safetensors")
        from hornbeam.formats import safetensors

        return safetensors.load_weights(request)
    if text.endswith(_HDF5) and not text.endswith(".weights.h5"):
        reason = keras_names.unknown("legacy load")
        if reason is not None or request.objects_to_skip is not None:  # that, Keras refuses
            raise loads.not_ours(request, reason, text)
        from hornbeam.formats import legacy_load

        return legacy_load.load_weights(request)
    if request.objects_to_skip is not None and text.endswith(".keras"):
        skipped = request.objects_to_skip
        entry.original(targets.SAVING_API, "load_weights")(request.model, place, objects_to_skip=skipped)  # raises
    if text.endswith("weights.json") and request.model.built:
        from hornbeam.formats import shards

        return loads.load_weights(request, shards.open_weights)
    if text.endswith(("weights.h5", ".keras")) and request.model.built:
        return loads.load_weights(request)
    if isinstance(place, str) and os.path.isfile(place) and not text.endswith(_WEIGHTS):
        with contents.explained(place):
            entry.original(targets.SAVING_API, "load_weights")(request.model, place)  # raises
    if text.endswith(_WEIGHTS) or not os.path.isdir(text):
        raise loads.not_ours(request, None)
    raise loads.not_ours(request, "a checkpoint of Orbax", text)


def weights_source(file: Any) -> Stream:
    """A file object as what its content is."""
    file = readable(file)
    kind = contents.kind(file)
    if kind == "keras":
        return Stream(file, ".keras")
    if kind == "h5":
        opened = contents.open_weights(Stream(file, ".h5"), "h5")
        legacy = any(name == "layer_names" for name, _ in opened.attributes)
        legacy = legacy or any(name == "model_weights" for name, _ in opened.groups())
        return Stream(file, ".h5" if legacy else ".weights.h5")
    found = contents.identify(file)
    if found is not None and found.kind == "safetensors":
        return Stream(file, ".safetensors")
    if found is not None and found.kind == "shards":
        raise UnsupportedError("An index of shards names other files: pass its path instead of a file object.")
    raise ConfigError(f"The file object holds no weights that are known here. {found or ''}".rstrip())


def _is_savedmodel(filepath: Any) -> bool:
    """Whether a local SavedModel stands there, by its content. Keras' own directories go first."""
    if not isinstance(filepath, str | os.PathLike) or not os.path.isdir(filepath):
        return False
    names = set(os.listdir(filepath))
    return "config.json" not in names and not names.isdisjoint(GRAPHS)
