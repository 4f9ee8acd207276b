"""`keras.saving`, name by name: the functions that touch files go through hornbeam, the rest is Keras' own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Unpack, overload

import keras
import keras.saving as _stock
from keras.src.saving import saving_api

from hornbeam.base.file_objects import path_to_str
from hornbeam.base.reports import LoadReport, remember
from hornbeam.base.writer import Handle
from hornbeam.flows.requests import LoadRequest, NameMap
from hornbeam.formats import operations
from hornbeam.formats.operations import Progressed, SaveModelArguments, SaveWeightsArguments, Target
from hornbeam.seam import entry

__all__ = ["load_model", "load_weights", "save_model", "save_weights"]


@overload
def save_model(
    model: keras.Model,
    filepath: Target,
    overwrite: bool = True,
    zipped: bool | None = None,
    *,
    asynchronous: Literal[True],
    **kwargs: Unpack[SaveModelArguments],
) -> Handle: ...
@overload
def save_model(
    model: keras.Model,
    filepath: Target,
    overwrite: bool = True,
    zipped: bool | None = None,
    *,
    asynchronous: Literal[False] = False,
    **kwargs: Unpack[SaveModelArguments],
) -> None: ...
@overload
def save_model(
    model: keras.Model,
    filepath: Target,
    overwrite: bool = True,
    zipped: bool | None = None,
    *,
    asynchronous: bool,
    **kwargs: Unpack[SaveModelArguments],
) -> Handle | None: ...
def save_model(
    model: keras.Model,
    filepath: Target,
    overwrite: bool = True,
    zipped: bool | None = None,
    *,
    include_optimizer: bool = True,
    dtype: str | None = None,
    allow_overflow: bool = False,
    compression: str | int | None = None,
    progress: Progressed = None,
    asynchronous: bool = False,
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
            optimizers, and layers with quantised weights, stay what they are. `hornbeam.last_report("save")` says what
            that cost.
        allow_overflow: Let values that `dtype` cannot hold become infinite, instead of raising.
        compression: As in `hornbeam.options`: `"gzip"`, or a level from 0 to 9.
        progress: `True`, `False`, or called with a `Progress` while it lasts.
        asynchronous: Return when the values are safe from what training does next; a thread writes them. One save is
            written and one may wait, a third blocks. What goes wrong later is raised by the next asynchronous save, by
            `hornbeam.wait()` or by the handle.
        **kwargs: As `keras.saving.save_model`.

    Returns:
        `None`, as Keras; `hornbeam.last_report("save")` says what was saved and what a cast cost. Of an asynchronous
        save, its handle.

    Raises:
        ValueError: For a wrong extension, unknown arguments, or what a file cannot hold.
        OSError: When the target cannot be written.
    """
    save_format = kwargs.pop("save_format", None)
    operations.refuse_part(filepath, kwargs)
    if kwargs:
        saving_api.save_model(model, filepath, **kwargs)  # raises
    with operations.save_request(
        model,
        filepath,
        compression=compression,
        progress=progress,
        asynchronous=asynchronous,
        include_optimizer=include_optimizer,
        dtype=dtype,
        allow_overflow=allow_overflow,
    ) as request:
        saved = operations.save_model(request, overwrite=overwrite, zipped=zipped, save_format=save_format)
        return operations.handle_or_none(saved, request)


def load_model(
    filepath: Target,
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
            the file is used. `hornbeam.last_report("load")` says what a load did.
        progress: `True`, `False`, or called with a `Progress` while it lasts.

    Returns:
        The model, with its optimizer's state if it was compiled.

    Raises:
        ValueError: For what is no Keras model file, or does not match it.
        zipfile.BadZipFile: For a damaged archive.
    """
    request = LoadRequest(
        path_to_str(filepath), strict=strict, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode
    )
    with operations.with_progress(progress):
        stock, beyond = partial(operations.stock_load, request), request.beyond()
        model, report = entry.run("load", f"{operations.LOADS}:load_model", stock, request, beyond=beyond)
    remember(report)
    return model


@overload
def save_weights(
    model: keras.Model,
    filepath: Target,
    overwrite: bool = True,
    max_shard_size: float | None = None,
    *,
    asynchronous: Literal[True],
    **kwargs: Unpack[SaveWeightsArguments],
) -> Handle: ...
@overload
def save_weights(
    model: keras.Model,
    filepath: Target,
    overwrite: bool = True,
    max_shard_size: float | None = None,
    *,
    asynchronous: Literal[False] = False,
    **kwargs: Unpack[SaveWeightsArguments],
) -> None: ...
@overload
def save_weights(
    model: keras.Model,
    filepath: Target,
    overwrite: bool = True,
    max_shard_size: float | None = None,
    *,
    asynchronous: bool,
    **kwargs: Unpack[SaveWeightsArguments],
) -> Handle | None: ...
def save_weights(
    model: keras.Model,
    filepath: Target,
    overwrite: bool = True,
    max_shard_size: float | None = None,
    *,
    include_optimizer: bool = True,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] = (),
    replace_complete: bool = False,
    dtype: str | None = None,
    allow_overflow: bool = False,
    compression: str | int | None = None,
    progress: Progressed = None,
    asynchronous: bool = False,
    **kwargs: Any,
) -> Handle | None:
    """Saves the weights of a model, and its optimizer's state, to `.weights.h5` or `.safetensors`; or a part of them.

    Args:
        model: The model; it must be built.
        filepath: A path or a binary file object. Ends in `.weights.h5` or `.safetensors`; for shards, in
            `.weights.json`, `.safetensors` or `.safetensors.index.json`.
        overwrite: Replace an existing file without asking.
        max_shard_size: Size of a shard in GB (1024³ bytes), before compression; without it there are no shards.
        include_optimizer: Save the optimizer's state.
        only: Patterns, as of `load_weights`, of the variables to save. The file says that it holds a part. The
            optimizer's state is left out of it, unless a pattern names it: `"optimizer"`, `"adam/*"`.
        skip: Patterns of the variables to leave out.
        replace_complete: Let a part take the place of a file that is not known to hold one.
        dtype: `"float16"` or `"bfloat16"`: what weights in wider floating-point types are saved as. The state of
            optimizers, and layers with quantised weights, stay what they are. `hornbeam.last_report("save")` says what
            that cost.
        allow_overflow: Let values that `dtype` cannot hold become infinite, instead of raising.
        compression: As in `hornbeam.options`: `"gzip"`, or a level from 0 to 9.
        progress: `True`, `False`, or called with a `Progress` while it lasts.
        asynchronous: Return when the values are safe from what training does next; a thread writes them. One save is
            written and one may wait, a third blocks. What goes wrong later is raised by the next asynchronous save, by
            `hornbeam.wait()` or by the handle.
        **kwargs: As `keras.saving.save_weights`.

    Returns:
        `None`, as Keras; `hornbeam.last_report("save")` says what was saved and what a cast cost. Of an asynchronous
        save, its handle.

    Raises:
        ValueError: For a wrong extension, a model that is not built, a pattern that fits nothing, or a part that would
            replace a complete file.
        OSError: When the target cannot be written.
    """
    skipped = kwargs.pop("objects_to_skip", None)
    if kwargs:
        saving_api.save_weights(model, filepath, **kwargs)  # raises
    with operations.save_request(
        model,
        filepath,
        compression=compression,
        progress=progress,
        asynchronous=asynchronous,
        include_optimizer=include_optimizer,
        dtype=dtype,
        allow_overflow=allow_overflow,
        max_shard_size=max_shard_size,
        objects_to_skip=skipped,
        only=only,
        skip=skip,
        replace_complete=replace_complete,
    ) as request:
        return operations.handle_or_none(operations.save_weights(request, overwrite=overwrite), request)


def load_weights(
    model: keras.Model,
    filepath: Target,
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
    skipped = kwargs.pop("objects_to_skip", None)
    if kwargs:
        saving_api.load_weights(model, filepath, skip_mismatch, **kwargs)  # raises
    request = operations.load_request(
        model,
        filepath,
        strict=strict,
        only=only,
        skip=skip,
        name_map=name_map,
        by_name=bool(by_name),
        skip_mismatch=skip_mismatch,
        objects_to_skip=skipped,
    )
    with operations.with_progress(progress):
        report = operations.load_weights(request)
    remember(report)
    return report


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)


def __dir__() -> list[str]:
    return sorted({*dir(_stock), *__all__})
