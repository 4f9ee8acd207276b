"""Saves and loads, for who has a request: hornbeam's way, or stock Keras' where hornbeam leaves it to that."""

from __future__ import annotations

from functools import partial
from typing import Any

from keras.src.saving import saving_api

from hornbeam.base.reports import LoadReport, SaveReport
from hornbeam.base.writer import Handle
from hornbeam.flows.requests import LoadRequest, SaveRequest
from hornbeam.seam import entry

_SAVES = "hornbeam.formats.save_formats"
LOADS = "hornbeam.formats.load_formats"


def save_model(
    request: SaveRequest, *, overwrite: bool = True, zipped: bool | None = None, save_format: Any = None
) -> SaveReport | Handle | None:
    """Saves a model.

    Returns:
        What was saved; of an asynchronous save, its handle; `None` where the user keeps the old file.

    Raises:
        UnsupportedError: Where more was asked for than stock Keras does, which would have to do it.
    """
    more = {} if save_format is None else {"save_format": save_format}
    more |= {} if request.include_optimizer else {"include_optimizer": False}
    stock = partial(_stock_save, saving_api.save_model, request, overwrite=overwrite, zipped=zipped, **more)
    how = {"overwrite": overwrite, "zipped": zipped, "save_format": save_format}
    return entry.run("save", f"{_SAVES}:save_model", stock, request, beyond=request.beyond(), **how)


def save_weights(request: SaveRequest, *, overwrite: bool = True) -> SaveReport | Handle | None:
    """Saves weights; see `save_model`."""
    more = {} if request.objects_to_skip is None else {"objects_to_skip": request.objects_to_skip}
    shards = request.max_shard_size
    stock = partial(_stock_save, saving_api.save_weights, request, overwrite=overwrite, max_shard_size=shards, **more)
    beyond = request.beyond()
    return entry.run("save", f"{_SAVES}:save_weights", stock, request, overwrite=overwrite, beyond=beyond)


def _stock_save(function: Any, request: SaveRequest, **kwargs: Any) -> SaveReport:
    function(request.model, request.target, **kwargs)
    return SaveReport(request.path)


def stock_load(request: LoadRequest) -> tuple[Any, LoadReport]:
    """What stock Keras loads, and a report that says so."""
    model = saving_api.load_model(
        request.source,
        custom_objects=request.custom_objects,
        compile=request.compile,
        safe_mode=request.safe_mode,
    )
    return model, LoadReport(request.path)


def load_weights(request: LoadRequest) -> LoadReport:
    """Loads weights; see `save_model`."""
    stock = partial(_stock_load_weights, request)
    return entry.run("load", f"{LOADS}:load_weights", stock, request, beyond=request.beyond())


def _stock_load_weights(request: LoadRequest) -> LoadReport:
    skipped = {} if request.objects_to_skip is None else {"objects_to_skip": request.objects_to_skip}
    saving_api.load_weights(request.model, request.source, skip_mismatch=request.skip_mismatch, **skipped)
    return LoadReport(request.path)
