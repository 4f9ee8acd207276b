"""Which format a save or load is about, where stock Keras would refuse it: the functions of `saving_api`.

Each function here stands in for the function of `saving_api` of the same name; the first argument is the stock one.
What handles a format is imported when one of its files comes: a first load of a small model is mostly imports.
"""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras.src.legacy.saving import legacy_h5_format
from keras.src.saving import saving_lib
from keras.src.utils import file_utils

from hornbeam import _core
from hornbeam.base import contents, file_objects, settings, writer
from hornbeam.base.file_objects import Stream, plain
from hornbeam.base.savedmodel_parts import GRAPHS
from hornbeam.errors import ConfigError, UnsupportedError
from hornbeam.seam import entry, keras_names

Stock = Callable[..., Any]


#: What Keras takes by these names as weights.
_WEIGHTS = (".keras", ".h5", ".hdf5", ".weights.json")


_ALLOWED = ("objects_to_skip", "by_name")


_SAVEDMODEL = ("tf", "tensorflow")  # what Keras 2 called it


def save_model(
    stock: Stock, model: Any, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any
) -> Any:
    """`saving_api.save_model`."""
    filepath = plain(filepath)
    if file_objects.is_file_object(filepath):
        return _save_model_to(stock, model, filepath, zipped, **kwargs)
    if not overwrite:
        writer.settle(filepath)  # whoever is asked shall see the file
    if _is_savedmodel_asked_for(filepath, zipped, kwargs.get("save_format")):
        keras_names.require("savedmodel")
        from hornbeam.formats import savedmodel

        kwargs.pop("save_format", None)
        return savedmodel.save_model(model, filepath, overwrite, **kwargs)
    as_h5 = kwargs.get("save_format") in ("h5", "hdf5") and not str(filepath).endswith((".h5", ".hdf5", ".keras"))
    with _asked(kwargs, "include_optimizer"):
        if as_h5:
            return _save_as_h5(stock, model, filepath, overwrite, **kwargs)
        return stock(model, filepath, overwrite, zipped, **kwargs)


def _asked(kwargs: dict[str, Any], *keep: str) -> contextlib.AbstractContextManager[None]:
    """`_cast.asked`, which is imported only for who asks for something."""
    if kwargs.keys().isdisjoint(("include_optimizer", "dtype", "allow_overflow")):
        return contextlib.nullcontext()
    from hornbeam.flows import casts

    return casts.asked(kwargs, *keep)


def _save_as_h5(stock: Stock, model: Any, filepath: Any, overwrite: bool, **kwargs: Any) -> Any:
    """Under exactly that name, as in Keras 2."""
    include_optimizer = kwargs.pop("include_optimizer", True)
    if set(kwargs) != {"save_format"}:
        return stock(model, filepath, overwrite, None, **kwargs)  # raises
    return legacy_h5_format.save_model_to_hdf5(model, filepath, overwrite, include_optimizer)


def _save_model_to(stock: Stock, model: Any, file: Any, zipped: bool | None, **kwargs: Any) -> Any:
    """To a file object: as legacy HDF5 if its name or `save_format` says so, otherwise as a `.keras` archive."""
    from hornbeam.flows import casts

    file_objects.check(file, "write")
    save_format = kwargs.pop("save_format", None)
    if zipped is False or save_format in _SAVEDMODEL:
        raise UnsupportedError(f"A model is saved to a file object as one file, not as a directory. Received: {file!r}")
    if save_format not in (None, False, "h5", "hdf5", "keras"):
        raise ValueError(f"`save_format` is 'keras' or 'h5' for a file object. Received: save_format={save_format!r}")
    as_h5 = save_format in ("h5", "hdf5") or (not save_format and file_objects.name(file).endswith((".h5", ".hdf5")))
    with casts.asked(kwargs, "include_optimizer"):
        include_optimizer = kwargs.pop("include_optimizer", True)
        if kwargs:
            return stock(model, f"{Stream(file, '.keras')}", True, None, **kwargs)  # raises
        if as_h5:
            return legacy_h5_format.save_model_to_hdf5(model, Stream(file, ".h5"), True, include_optimizer)
        return saving_lib.save_model(model, file)


def load_model(
    stock: Stock, filepath: Any, custom_objects: Any = None, compile: bool = True, safe_mode: bool = True
) -> Any:
    """`saving_api.load_model`."""
    filepath = plain(filepath)
    if file_objects.is_file_object(filepath):
        return _load_model_from(filepath, custom_objects, compile, safe_mode)
    writer.settle(filepath, loads=True)  # before stock Keras looks whether there is a file
    if _is_savedmodel(filepath):
        keras_names.require("savedmodel")
        from hornbeam.formats import savedmodel

        return savedmodel.load_model(filepath, custom_objects, compile, safe_mode)
    if not str(filepath).endswith((".h5", ".hdf5")):
        hdf5 = contents.is_hdf5(filepath)
        _check_content(filepath, hdf5=hdf5)
        if hdf5:  # Keras 2 called it `.keras`, too
            return legacy_h5_format.load_model_from_hdf5(filepath, custom_objects, compile, safe_mode)
    return stock(filepath, custom_objects, compile, safe_mode)


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
    found = contents.look(filepath)
    if found is not None and not (hdf5 and found.kind == "h5"):
        what = "no `.keras` archive" if archive else "not a file that Keras loads as a model"
        error = ConfigError(f"'{filepath}' is {what}. {found}")
        error.path, error.found = filepath, found.what
        raise error


def _has_steps(path: str) -> bool:
    return any(name.isdigit() for name in os.listdir(path))


def _load_model_from(file: Any, custom_objects: Any, compile: bool, safe_mode: bool) -> Any:
    """From a file object, whose content says what it is."""
    file = _readable(file)
    if contents.is_hdf5(file):
        stream = Stream(file, ".h5")
        return legacy_h5_format.load_model_from_hdf5(stream, custom_objects, compile, safe_mode)
    found = None if contents.head(file).startswith(b"PK") or zipfile.is_zipfile(file) else contents.look(file)
    if found is not None and found.kind != "keras":
        raise ConfigError(f"The file object holds no model that Keras loads. {found}")
    return saving_lib._load_model_from_fileobj(file, custom_objects, compile, safe_mode)


def _readable(file: Any) -> Any:
    """The file object, or its content where it can be read only once."""
    file_objects.check(file, "read")
    return file if file_objects.is_seekable(file) else io.BytesIO(file.read())


def save_weights(
    stock: Stock, model: Any, filepath: Any, overwrite: bool = True, max_shard_size: float | None = None, **kwargs: Any
) -> Any:
    """`saving_api.save_weights`."""
    filepath = plain(filepath)
    if file_objects.is_file_object(filepath):
        filepath = _weights_target(filepath, max_shard_size)
    elif not overwrite:
        writer.settle(filepath)
    with _asked(kwargs):
        if _is_safetensors(filepath):
            keras_names.require("safetensors")
            from hornbeam.formats import safetensors

            return safetensors.save_weights(model, filepath, overwrite, max_shard_size, **kwargs)
        if isinstance(filepath, Stream) and not (set(kwargs) - {"objects_to_skip"}):
            return saving_lib.save_weights_only(model, filepath, **kwargs)
        return stock(model, filepath, overwrite, max_shard_size, **kwargs)


def _weights_target(file: Any, max_shard_size: float | None) -> Stream:
    """A file object as what its name says; `.weights.h5` if that says nothing."""
    file_objects.check(file, "write")
    writer.refuse("a file object")
    if max_shard_size is not None:
        raise UnsupportedError(f"Shards are several files, and need a path. Received: filepath={file!r}")
    name = file_objects.name(file)
    if name.endswith(".safetensors"):
        return Stream(file, ".safetensors")
    if name.endswith((".keras", ".hdf5", ".json")) or (name.endswith(".h5") and not name.endswith(".weights.h5")):
        raise ValueError(f"The filename must end in `.weights.h5`. Received: filepath={file!r}")
    return Stream(file, ".weights.h5")


def load_weights(stock: Stock, model: Any, filepath: Any, skip_mismatch: bool = False, **kwargs: Any) -> Any:
    """`saving_api.load_weights`."""
    filepath = plain(filepath)
    if file_objects.is_file_object(filepath):
        filepath = _weights_source(filepath)
    writer.settle(filepath, loads=True)
    if _is_safetensors(filepath):
        keras_names.require("safetensors")
        from hornbeam.formats import safetensors

        return safetensors.load_weights(model, filepath, skip_mismatch, **kwargs)
    if _is_legacy(filepath):
        reason = keras_names.unknown("legacy load")
        if reason is not None:
            return entry.stock_only(reason, stock, model, filepath, skip_mismatch, **kwargs)
        from hornbeam.formats import legacy_load

        return legacy_load.load_weights(stock, model, filepath, skip_mismatch, **kwargs)
    if isinstance(filepath, Stream) and kwargs.get("by_name") is None and not (set(kwargs) - {*_ALLOWED}):
        skipped = kwargs.get("objects_to_skip")
        if filepath.suffix != ".keras" or skipped is None:
            return saving_lib.load_weights_only(model, filepath, skip_mismatch, skipped)
    if isinstance(filepath, str) and os.path.isfile(filepath) and not filepath.endswith(_WEIGHTS):
        with contents.explained(filepath):
            return stock(model, filepath, skip_mismatch, **kwargs)
    return stock(model, filepath, skip_mismatch, **kwargs)


def _weights_source(file: Any) -> Stream:
    """A file object as what its content is."""
    file = _readable(file)
    if contents.head(file).startswith(b"PK"):
        return Stream(file, ".keras")
    if contents.is_hdf5(file):
        with contents.explained(file, "h5"):
            opened = _core.open(file_objects.source(file), archive=False).weights(engine=settings.current().engine)
        legacy = any(name == "layer_names" for name, _ in opened.attributes)
        legacy = legacy or any(name == "model_weights" for name, _ in opened.groups())
        return Stream(file, ".h5" if legacy else ".weights.h5")
    found = contents.look(file)
    if found is not None and found.kind == "safetensors":
        return Stream(file, ".safetensors")
    if found is not None and found.kind == "shards":
        raise UnsupportedError("An index of shards names other files: pass its path instead of a file object.")
    raise ConfigError(f"The file object holds no weights that are known here. {found or ''}".rstrip())


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
