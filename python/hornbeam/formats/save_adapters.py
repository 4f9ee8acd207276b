"""What stands in for the functions of Keras' that save: their arguments become a request.

The names say which module a function belongs to: `saving_api`, `saving_lib` or `legacy_h5_format`. Those of
`saving_api` take hornbeam's arguments beside Keras', which so reach them through `model.save`.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from keras.src.utils import file_utils

from hornbeam.base import file_objects, reports
from hornbeam.base.file_objects import path_to_str
from hornbeam.base.reports import SaveReport
from hornbeam.base.writer import Handle
from hornbeam.flows import saves
from hornbeam.flows.requests import SaveRequest
from hornbeam.formats import operations, save_formats
from hornbeam.seam import entry, operation, targets
from hornbeam.seam.operation import NotOurs


def api_save_model(
    model: Any, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any
) -> Handle | None:
    """`saving_api.save_model`, and so `model.save`."""
    save_format = kwargs.pop("save_format", None)
    with _requested(model, filepath, kwargs) as request:
        saved = save_formats.save_model(request, overwrite=overwrite, zipped=zipped, save_format=save_format)
        return operations.handle_or_none(saved, request)


def api_save_weights(
    model: Any, filepath: Any, overwrite: bool = True, max_shard_size: float | None = None, **kwargs: Any
) -> Handle | None:
    """`saving_api.save_weights`, and so `model.save_weights`."""
    skipped = kwargs.pop("objects_to_skip", None)
    with _requested(model, filepath, kwargs, max_shard_size=max_shard_size, objects_to_skip=skipped) as request:
        return operations.handle_or_none(save_formats.save_weights(request, overwrite=overwrite), request)


def _requested(
    model: Any, filepath: Any, kwargs: dict[str, Any], **fields: Any
) -> contextlib.AbstractContextManager[SaveRequest]:
    weights = "max_shard_size" in fields
    if not weights:
        operations.refuse_part(filepath, kwargs)
    known = (operations.SaveWeightsArguments if weights else operations.SaveArguments).__optional_keys__
    unknown = {name: value for name, value in kwargs.items() if name not in known and name != "asynchronous"}
    if unknown:  # Keras says so, and of nothing else
        name = "save_weights" if weights else "save_model"
        with operation.changed(stock=True):
            entry.original(targets.SAVING_API, name)(model, filepath, **unknown)
    return operations.save_request(model, filepath, writer=operation.claim(model, filepath), **kwargs, **fields)


def model_save_weights(
    self: Any, filepath: Any, overwrite: bool = True, max_shard_size: float | None = None, **kwargs: Any
) -> Handle | None:
    """`Model.save_weights`, which takes Keras' arguments only."""
    return api_save_weights(self, filepath, overwrite, max_shard_size, **kwargs)


def lib_save_model(model: Any, filepath: Any, weights_format: str = "h5", zipped: bool = True) -> None:
    """`saving_lib.save_model`."""
    place = path_to_str(filepath)
    if file_objects.is_file_object(place):
        file_objects.check(place, "write")
        zipped = True
    else:
        text = str(place)
        if zipped != text.endswith(".keras"):
            raise NotOurs(None)
        if text.startswith("hf://") or file_utils.is_remote_path(text):
            raise NotOurs("remote path", path=text)
    save_formats.warn_unbuilt(model)
    request = SaveRequest(model, place, weights_format)
    _remember(saves.save_archive(request) if zipped else saves.save_directory(request))


def lib_save_model_to_fileobj(model: Any, fileobj: Any, weights_format: str = "h5") -> None:
    """`saving_lib._save_model_to_fileobj`."""
    _remember(saves.save_archive(SaveRequest(model, fileobj, weights_format)))


def lib_save_model_to_dir(model: Any, dirpath: Any, weights_format: str = "h5") -> None:
    """`saving_lib._save_model_to_dir`."""
    _remember(saves.save_directory(SaveRequest(model, os.fspath(dirpath), weights_format)))


def lib_save_weights_only(
    model: Any, filepath: Any, max_shard_size: float | None = None, objects_to_skip: Any = None
) -> None:
    """`saving_lib.save_weights_only`."""
    text = str(filepath)
    if text.endswith(".safetensors"):
        raise NotOurs(None)
    request = SaveRequest(model, path_to_str(filepath), max_shard_size=max_shard_size, objects_to_skip=objects_to_skip)
    _remember(save_formats.save_weights(request))


def h5_save_model_to_hdf5(model: Any, filepath: Any, overwrite: bool = True, include_optimizer: bool = True) -> None:
    """`legacy_h5_format.save_model_to_hdf5`."""
    from hornbeam.formats import legacy_save

    request = SaveRequest(model, path_to_str(filepath), include_optimizer=include_optimizer)
    report = legacy_save.save_model(request, overwrite=overwrite)
    if report is not None:
        reports.remember(report)


def _remember(saved: save_formats.Saved) -> None:
    if isinstance(saved, SaveReport):
        reports.remember(saved)
