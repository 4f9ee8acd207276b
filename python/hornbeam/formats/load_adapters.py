"""What stands in for the functions of Keras' that load: their arguments become a request.

The names say which module a function belongs to: `saving_api`, `saving_lib` or `legacy_h5_format`.
"""

from __future__ import annotations

from typing import Any

from hornbeam.base import file_objects, reports
from hornbeam.base.file_objects import path_to_str
from hornbeam.base.reports import LoadReport
from hornbeam.flows import loads
from hornbeam.flows.requests import LoadRequest
from hornbeam.formats import load_formats, operations
from hornbeam.formats.operations import load_request
from hornbeam.seam import entry, targets
from hornbeam.seam.operation import NotOurs

_MORE = ("strict", "only", "skip", "name_map")


def api_load_model(
    filepath: Any,
    custom_objects: Any = None,
    compile: bool = True,
    safe_mode: bool = True,
    *,
    strict: bool = False,
    progress: Any = None,
) -> Any:
    """`saving_api.load_model`."""
    request = LoadRequest(
        path_to_str(filepath), strict=strict, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode
    )
    with operations.with_progress(progress):
        model, report = load_formats.load_model(request)
    reports.remember(report)
    return model


def api_load_weights(
    model: Any,
    filepath: Any,
    skip_mismatch: bool = False,
    objects_to_skip: Any = None,
    by_name: bool | None = None,
    *,
    progress: Any = None,
    **kwargs: Any,
) -> LoadReport:
    """`saving_api.load_weights`, and so `model.load_weights`."""
    place, more = path_to_str(filepath), {name: kwargs.pop(name) for name in _MORE if name in kwargs}
    if kwargs:
        raise NotOurs(None)
    if by_name is not None:
        place = load_formats.weights_source(place) if file_objects.is_file_object(place) else place
        if str(place).endswith((".weights.h5", ".weights.json", ".keras")) and not more:
            entry.original(targets.SAVING_API, "load_weights")(model, place, by_name=by_name)  # raises
    request = load_request(
        model,
        place,
        skip_mismatch=skip_mismatch,
        objects_to_skip=objects_to_skip,
        by_name=bool(by_name),
        **more,
    )
    with operations.with_progress(progress):
        report = load_formats.load_weights(request)
    reports.remember(report)
    return report


def lib_load_model_from_fileobj(fileobj: Any, custom_objects: Any, compile: bool, safe_mode: bool) -> Any:
    """`saving_lib._load_model_from_fileobj`."""
    request = LoadRequest(fileobj, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode)
    model, report = loads.load_archive(request)
    reports.remember(report)
    return model


def lib_load_model_from_dir(dirpath: Any, custom_objects: Any, compile: bool, safe_mode: bool) -> Any:
    """`saving_lib._load_model_from_dir`."""
    request = LoadRequest(dirpath, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode)
    model, report = loads.load_directory(request)
    reports.remember(report)
    return model


def lib_load_weights_only(model: Any, filepath: Any, skip_mismatch: bool = False, objects_to_skip: Any = None) -> None:
    """`saving_lib.load_weights_only`."""
    place = path_to_str(filepath)
    if not str(place).endswith(("weights.h5", "weights.json", ".keras")):
        raise NotOurs(None)
    request = LoadRequest(place, model, skip_mismatch=skip_mismatch, objects_to_skip=objects_to_skip)
    reports.remember(load_formats.load_weights(request))


def h5_load_model_from_hdf5(
    filepath: Any, custom_objects: Any = None, compile: bool = True, safe_mode: bool = True
) -> Any:
    """`legacy_h5_format.load_model_from_hdf5`."""
    from hornbeam.formats import legacy_load

    request = LoadRequest(path_to_str(filepath), custom_objects=custom_objects, compile=compile, safe_mode=safe_mode)
    model, report = legacy_load.load_model(request)
    reports.remember(report)
    return model
