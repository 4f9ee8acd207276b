"""`keras.saving`, name by name: the functions that touch files go through hornbeam, the rest is Keras' own."""

from __future__ import annotations

from os import PathLike
from typing import Any

import keras
import keras.saving as _stock

from hornbeam._keras import scope

__all__ = ["load_model", "load_weights", "save_model", "save_weights"]


def save_model(
    model: keras.Model,
    filepath: str | PathLike[str],
    overwrite: bool = True,
    zipped: bool | None = None,
    **kwargs: Any,
) -> None:
    """Saves a model as a `.keras` archive or, with `zipped=False`, as a directory.

    The old file or directory stays as it was until the new one is complete.

    Args:
        model: The model.
        filepath: Where to; ends in `.keras`.
        overwrite: Replace an existing file without asking.
        zipped: Archive (the default) or directory.
        **kwargs: As `keras.saving.save_model`.

    Raises:
        ValueError: For a wrong extension, unknown arguments, or what a file cannot hold.
        OSError: When the target cannot be written.
    """
    with scope():
        _stock.save_model(model, filepath, overwrite=overwrite, zipped=zipped, **kwargs)


def load_model(
    filepath: str | PathLike[str],
    custom_objects: dict[str, Any] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
) -> keras.Model:
    """Loads a model saved by `save_model` or by stock Keras.

    Args:
        filepath: The file or directory.
        custom_objects: Names of custom classes and functions, and what they stand for.
        compile: Compile the model as it was when saved.
        safe_mode: Refuse to run code that the file holds.

    Returns:
        The model, with its optimizer's state if it was compiled.

    Raises:
        ValueError: For what is no Keras model file, or does not match it.
        zipfile.BadZipFile: For a damaged archive.
    """
    with scope():
        return _stock.load_model(filepath, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode)


def save_weights(
    model: keras.Model,
    filepath: str | PathLike[str],
    overwrite: bool = True,
    max_shard_size: float | None = None,
    **kwargs: Any,
) -> None:
    """Saves the weights of a model, and its optimizer's state, to `.weights.h5`.

    Args:
        model: The model; it must be built.
        filepath: Ends in `.weights.h5`, or `.weights.json` for shards.
        overwrite: Replace an existing file without asking.
        max_shard_size: Size of a shard in GB (1024³ bytes); without it there are no shards.
        **kwargs: As `keras.saving.save_weights`.

    Raises:
        ValueError: For a wrong extension or a model that is not built.
        OSError: When the target cannot be written.
    """
    with scope():
        _stock.save_weights(model, filepath, overwrite=overwrite, max_shard_size=max_shard_size, **kwargs)


def load_weights(model: keras.Model, filepath: str | PathLike[str], skip_mismatch: bool = False, **kwargs: Any) -> None:
    """Loads weights from a `.weights.h5`, `.weights.json`, `.keras` or legacy `.h5` file.

    The file is read and its checksum compared before the model is touched.

    Args:
        model: The model; it must be built.
        filepath: The file.
        skip_mismatch: Warn about layers that do not fit, instead of raising.
        **kwargs: As `keras.saving.load_weights`.

    Raises:
        ValueError: When the file does not fit the model.
        OSError: For a damaged weights file.
        zipfile.BadZipFile: For a damaged archive.
    """
    with scope():
        _stock.load_weights(model, filepath, skip_mismatch=skip_mismatch, **kwargs)


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)


def __dir__() -> list[str]:
    return sorted({*dir(_stock), *__all__})
