"""`keras.saving`, name by name: the functions that touch files go through hornbeam, the rest is Keras' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from typing import IO, TYPE_CHECKING, Any

import keras
import keras.saving as _stock
from keras.src.saving import saving_api

from hornbeam.base import writer
from hornbeam.base.file_objects import is_file_object, plain
from hornbeam.base.progress import Progress
from hornbeam.base.reports import LoadReport, SaveReport, last_report, last_save_report, remember
from hornbeam.base.settings import options
from hornbeam.base.writer import Handle
from hornbeam.errors import UnsupportedError
from hornbeam.seam import keras_names
from hornbeam.seam.entry import scope

if TYPE_CHECKING:
    from hornbeam.flows.selections import NameMap

__all__ = ["load_model", "load_weights", "save_model", "save_weights"]
#: What can be loaded strictly and in part.
_IN_PART = (".keras", ".h5", ".hdf5", ".weights.json", ".safetensors", ".safetensors.index.json")
#: The request of a load as stock Keras does it.
_WHOLE: dict[str, Any] = {"strict": False, "only": None, "skip": (), "name_map": None, "by_name": False}
Progressed = Callable[[Progress], Any] | bool | None


def save_model(
    model: keras.Model,
    filepath: str | bytes | PathLike[str] | IO[bytes],
    overwrite: bool = True,
    zipped: bool | None = None,
    *,
    include_optimizer: bool = True,
    dtype: str | None = None,
    allow_overflow: bool = False,
    compression: str | int | None = None,
    shuffle: bool | None = None,
    chunk_bytes: int | None = None,
    progress: Progressed = None,
    asynchronous: bool = False,
    latest_wins: bool = False,
    **kwargs: Any,
) -> Handle | None:
    """Saves a model: as a `.keras` archive, a directory (`zipped=False`), a SavedModel, or in the legacy HDF5 format.

    The old file or directory stays as it was until the new one is complete.

    Args:
        model: The model.
        filepath: Where to, a path or a binary file object (`docs/formats.md`). Ends in `.keras`, or in `.h5` or `.hdf5`
            for the legacy format, which `save_format="h5"` writes under any other name, too. Without an extension, or
            with `save_format="tf"`, it is a SavedModel.
        overwrite: Replace an existing file without asking.
        zipped: Archive (the default) or directory.
        include_optimizer: Save the optimizer's state.
        dtype: `"float16"` or `"bfloat16"`: what weights in wider floating-point types are saved as. The state of
            optimizers, and layers with quantised weights, stay what they are. `hornbeam.last_save_report()` says what
            that cost.
        allow_overflow: Let values that `dtype` cannot hold become infinite, instead of raising.
        compression: As in `hornbeam.options`, like the next three: `"gzip"`, or a level from 0 to 9.
        shuffle: Transpose the bytes of the elements before they are compressed.
        chunk_bytes: Bytes of a chunk, at most.
        progress: `True`, `False`, or called with a `Progress` while it lasts.
        asynchronous: Return when the values are safe from what training does next; a thread writes them. One save is
            written and one may wait, a third blocks. What goes wrong later is raised by the next asynchronous save, by
            `hornbeam.wait()` or by the handle.
        latest_wins: Instead of blocking, take the place of the waiting save if that one has `latest_wins` too.
        **kwargs: As `keras.saving.save_model`.

    Returns:
        `None`, as Keras; `hornbeam.last_save_report()` says what was saved and what a cast cost. Of an asynchronous
        save, its handle.

    Raises:
        ValueError: For a wrong extension, unknown arguments, or what a file cannot hold.
        OSError: When the target cannot be written.
    """
    how = options(compression=compression, shuffle=shuffle, chunk_bytes=chunk_bytes, progress=progress)
    place: Any = plain(filepath)
    if asynchronous and str(place).endswith((".h5", ".hdf5")):
        raise UnsupportedError(f"Legacy HDF5 files are not written asynchronously. Received: {place}")
    kwargs = {**kwargs, **_smaller(include_optimizer, dtype, allow_overflow)}
    before = last_save_report()
    with scope(), how, writer.asked(asynchronous, latest_wins) as request:
        saving_api.save_model(model, place, overwrite=overwrite, zipped=zipped, **kwargs)
    return _outcome(place, before, request)


def load_model(
    filepath: str | bytes | PathLike[str] | IO[bytes],
    custom_objects: dict[str, Any] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
    *,
    strict: bool = False,
    progress: Progressed = None,
) -> keras.Model:
    """Loads a model saved by `save_model` or by stock Keras.

    Args:
        filepath: The file or directory, or a binary file object, which is read from its beginning.
        custom_objects: Names of custom classes and functions, and what they stand for.
        compile: Compile the model as it was when saved.
        safe_mode: Refuse to run code that the file holds.
        strict: Raise unless every variable, optimizer state included, gets its value from the file, and everything in
            the file is used. `hornbeam.last_report()` says what a load did.
        progress: `True`, `False`, or called with a `Progress` while it lasts.

    Returns:
        The model, with its optimizer's state if it was compiled.

    Raises:
        ValueError: For what is no Keras model file, or does not match it.
        zipfile.BadZipFile: For a damaged archive.
    """
    place: Any = plain(filepath)
    before = last_report()
    with scope(), options(progress=progress), _requested(strict=strict):
        model = saving_api.load_model(place, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode)
    if last_report() is before:  # a format that is stock Keras' own
        if strict:
            raise UnsupportedError(f"Only stock Keras loads this format, and does not say what. Received: {place}")
        remember(LoadReport(_path(place)))
    return model


def save_weights(
    model: keras.Model,
    filepath: str | bytes | PathLike[str] | IO[bytes],
    overwrite: bool = True,
    max_shard_size: float | None = None,
    *,
    include_optimizer: bool = True,
    dtype: str | None = None,
    allow_overflow: bool = False,
    compression: str | int | None = None,
    shuffle: bool | None = None,
    chunk_bytes: int | None = None,
    progress: Progressed = None,
    asynchronous: bool = False,
    latest_wins: bool = False,
    **kwargs: Any,
) -> Handle | None:
    """Saves the weights of a model, and its optimizer's state, to `.weights.h5` or `.safetensors`.

    Args:
        model: The model; it must be built.
        filepath: A path or a binary file object. Ends in `.weights.h5` or `.safetensors`; for shards, in
            `.weights.json`, `.safetensors` or `.safetensors.index.json`.
        overwrite: Replace an existing file without asking.
        max_shard_size: Size of a shard in GB (1024³ bytes), before compression; without it there are no shards.
        include_optimizer: Save the optimizer's state.
        dtype: `"float16"` or `"bfloat16"`: what weights in wider floating-point types are saved as. The state of
            optimizers, and layers with quantised weights, stay what they are. `hornbeam.last_save_report()` says what
            that cost.
        allow_overflow: Let values that `dtype` cannot hold become infinite, instead of raising.
        compression: As in `hornbeam.options`, like the next three: `"gzip"`, or a level from 0 to 9.
        shuffle: Transpose the bytes of the elements before they are compressed.
        chunk_bytes: Bytes of a chunk, at most.
        progress: `True`, `False`, or called with a `Progress` while it lasts.
        asynchronous: Return when the values are safe from what training does next; a thread writes them. One save is
            written and one may wait, a third blocks. What goes wrong later is raised by the next asynchronous save, by
            `hornbeam.wait()` or by the handle.
        latest_wins: Instead of blocking, take the place of the waiting save if that one has `latest_wins` too.
        **kwargs: As `keras.saving.save_weights`.

    Returns:
        `None`, as Keras; `hornbeam.last_save_report()` says what was saved and what a cast cost. Of an asynchronous
        save, its handle.

    Raises:
        ValueError: For a wrong extension or a model that is not built.
        OSError: When the target cannot be written.
    """
    how = options(compression=compression, shuffle=shuffle, chunk_bytes=chunk_bytes, progress=progress)
    place: Any = plain(filepath)
    kwargs = {**kwargs, **_smaller(include_optimizer, dtype, allow_overflow)}
    before = last_save_report()
    with scope(), how, writer.asked(asynchronous, latest_wins) as request:
        saving_api.save_weights(model, place, overwrite=overwrite, max_shard_size=max_shard_size, **kwargs)
    return _outcome(place, before, request)


def load_weights(
    model: keras.Model,
    filepath: str | bytes | PathLike[str] | IO[bytes],
    skip_mismatch: bool = False,
    *,
    strict: bool = False,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] = (),
    name_map: NameMap | None = None,
    by_name: bool | None = None,
    progress: Progressed = None,
    **kwargs: Any,
) -> LoadReport:
    """Loads weights from a `.weights.h5`, `.weights.json`, `.safetensors`, `.keras` or legacy `.h5` file.

    The file is read and its checksum compared before the model is touched; whatever fails, the model stays bit for bit
    what it was.

    Names in the model are those of Keras (`variable.path`: `encoder/kernel`) or those of the file
    (`layers/dense/vars/0`, in legacy files `encoder/encoder/kernel`); patterns are those of `fnmatch`, and the name of
    a group stands for all in it.

    Args:
        model: The model; it must be built.
        filepath: The file, or a binary file object, which is read from its beginning.
        skip_mismatch: Warn about layers that do not fit, instead of raising.
        strict: Raise unless the load is complete, optimizer state included.
        only: Patterns of the variables to load; the others keep their values.
        skip: Patterns of the variables that keep their values.
        name_map: Name in the file → name in the model, as a mapping (other names stay as they are) or a function that
            returns `None` for what is left out.
        by_name: Match layers by their names instead of their places; what is not in the file keeps its value.
        progress: `True`, `False`, or called with a `Progress` while it lasts.
        **kwargs: As `keras.saving.load_weights`.

    Returns:
        What was loaded, and what was not.

    Raises:
        ValueError: When the file does not fit the model: one error with every difference.
        OSError: For a damaged weights file.
        zipfile.BadZipFile: For a damaged archive.
    """
    request: dict[str, Any] = {
        "strict": strict,
        "only": None if only is None else _patterns(only),
        "skip": _patterns(skip),
        "name_map": name_map,
        "by_name": bool(by_name),
    }
    place: Any = plain(filepath)
    if not is_file_object(place) and not str(place).endswith(_IN_PART):
        if request != _WHOLE:
            raise UnsupportedError(f"Files of this kind cannot be loaded strictly or in part. Received: {place}")
        kwargs["by_name"] = by_name
    with scope(), options(progress=progress), _requested(**request):
        before = last_report()
        saving_api.load_weights(model, place, skip_mismatch=skip_mismatch, **kwargs)
        report = last_report()
    if report is None or report is before:
        report = LoadReport(_path(place))
        remember(report)
    return report


def _requested(**request: Any) -> AbstractContextManager[None]:
    """What this thread's next load does beyond Keras', by the fields of `_select.Request`."""
    if keras_names.unknown("load") is None:
        from hornbeam.flows import loads, selections

        return loads.requested(selections.Request(**request))
    if request != {name: _WHOLE[name] for name in request}:
        keras_names.require("load")
    return nullcontext()


def _smaller(include_optimizer: bool, dtype: str | None, allow_overflow: bool) -> dict[str, Any]:
    """What goes to Keras' functions only where it is not what they do anyway."""
    usual = {"include_optimizer": True, "dtype": None, "allow_overflow": False}
    given = {"include_optimizer": include_optimizer, "dtype": dtype, "allow_overflow": allow_overflow}
    return {name: value for name, value in given.items() if value != usual[name]}


def _outcome(filepath: Any, before: SaveReport | None, request: writer.Request | None) -> Handle | None:
    if request is not None and request.handle is not None:  # else nobody wanted the file to be replaced
        return request.handle
    if last_save_report() is before:  # stock Keras' work, or none: no older report is the last one
        remember(SaveReport(_path(filepath)))
    return None


def _path(filepath: Any) -> str | None:
    """What a report calls it."""
    return filepath if isinstance(filepath, str) else None


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)


def __dir__() -> list[str]:
    return sorted({*dir(_stock), *__all__})
