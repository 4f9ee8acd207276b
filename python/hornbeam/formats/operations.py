"""Saves and loads, for who has a request: hornbeam's way, or stock Keras' where hornbeam leaves it to that."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os import PathLike
from typing import IO, Any, TypedDict

from keras.src.saving import saving_api

from hornbeam.base.file_objects import path_to_str
from hornbeam.base.progress import Progress
from hornbeam.base.reports import LoadReport, SaveReport, remember
from hornbeam.base.settings import options
from hornbeam.base.writer import Handle, Reservation, cancelled, reserve
from hornbeam.errors import UnsupportedError
from hornbeam.flows.requests import LoadRequest, SaveRequest
from hornbeam.seam import entry

_SAVES = "hornbeam.formats.save_formats"
LOADS = "hornbeam.formats.load_formats"
Target = str | bytes | PathLike[str] | IO[bytes]
Progressed = Callable[[Progress], Any] | bool | None


class SaveArguments(TypedDict, total=False):
    """What hornbeam's saves take beside Keras' arguments and `asynchronous`; `hornbeam.saving` says what it means."""

    include_optimizer: bool
    dtype: str | None
    allow_overflow: bool
    compression: str | int | None
    progress: Progressed


class SaveModelArguments(SaveArguments, total=False):
    """Those of whole models, with what Keras has in its `**kwargs`."""

    save_format: str | None


class SaveWeightsArguments(SaveArguments, total=False):
    """Those of weights, with what Keras has in its `**kwargs`."""

    only: str | Sequence[str] | None
    skip: str | Sequence[str]
    replace_complete: bool
    objects_to_skip: Sequence[Any] | None


@contextlib.contextmanager
def save_request(
    model: Any,
    filepath: Any,
    *,
    compression: str | int | None = None,
    progress: Any = None,
    asynchronous: bool = False,
    writer: Reservation | None = None,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] = (),
    **fields: Any,
) -> Iterator[SaveRequest]:
    """The request for a save inside, with the options that its arguments stand for.

    Args:
        model: What is saved.
        filepath: Where to.
        compression: As in `hornbeam.options`.
        progress: The same.
        asynchronous: Whether a thread is to write it.
        writer: A place in the queue that somebody has taken for it.
        only: Patterns of what is saved, or one; `None` for everything.
        skip: Patterns of what is not.
        **fields: Fields of the request.

    Raises:
        TypeError: For what is no field.
        ValueError: For a value that a field cannot have.
    """
    with _options(compression=compression, progress=progress), contextlib.ExitStack() as stack:
        # A mistake is raised before anybody waits.
        chosen = None if only is None else _patterns(only)
        request = SaveRequest(model, path_to_str(filepath), only=chosen, skip=_patterns(skip), **fields)
        queue = writer or stack.enter_context(reserve(asynchronous))
        yield dataclasses.replace(request, writer=queue)


def refuse_part(filepath: Any, given: dict[str, Any]) -> None:
    """Raises where a part of a whole model is asked for.

    Raises:
        UnsupportedError: Then.
    """
    if not given.keys().isdisjoint(("only", "skip", "replace_complete")):
        raise UnsupportedError(
            f"A model is saved whole. Save a part of its weights with `hornbeam.saving.save_weights(model, path, "
            f"only=…)`, to `.weights.h5` or `.safetensors`. Received: {filepath!r}"
        )


def _options(**given: Any) -> contextlib.AbstractContextManager[Any]:
    given = {name: value for name, value in given.items() if value is not None}
    return options(**given) if given else contextlib.nullcontext()


def with_progress(progress: Any) -> contextlib.AbstractContextManager[Any]:
    """The option `progress`, where it is given."""
    return _options(progress=progress)


def handle_or_none(saved: SaveReport | Handle | None, request: SaveRequest) -> Handle | None:
    """What a caller is given: the handle of an asynchronous save; the report of another is the last one from now on."""
    if isinstance(saved, Handle):
        return saved
    if request.writer is not None:
        return cancelled(str(request.target))
    if saved is not None:
        remember(saved)
    return None


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


def load_request(
    model: Any,
    filepath: Any,
    *,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] = (),
    **fields: Any,
) -> LoadRequest:
    """The request for a load of weights; one pattern stands for a list of one."""
    chosen = None if only is None else _patterns(only)
    return LoadRequest(path_to_str(filepath), model, only=chosen, skip=_patterns(skip), **fields)


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


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
