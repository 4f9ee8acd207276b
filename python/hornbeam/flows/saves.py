"""The save flow: walk the model, plan, write in a Rust thread while Python serialises the config, commit."""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from keras.src.saving import saving_lib

from hornbeam import _core
from hornbeam.base import counters, deferred, file_objects, locations, progress, settings, writer
from hornbeam.base.file_objects import Stream, path_of
from hornbeam.base.reports import SaveReport
from hornbeam.base.writer import Handle
from hornbeam.errors import HornbeamError, UnsupportedError
from hornbeam.flows import casts, marks
from hornbeam.flows.asset_store import AssetStore
from hornbeam.flows.recording import RecordStore
from hornbeam.flows.requests import SaveRequest
from hornbeam.seam import keras_names, patches, shortcuts, walking
from hornbeam.seam.operation import NotOurs
from hornbeam.values import tensors

Saved = SaveReport | Handle


def save_archive(request: SaveRequest) -> Saved:
    """Writes a `.keras` archive: to a path, memory or a file object.

    Returns:
        What was saved; of an asynchronous save, its handle.

    Raises:
        NotOurs: Where stock Keras has to do it; nothing was touched.
    """
    target = request.target
    path = request.path
    if path is not None:
        writer.wait_for(path)
    else:
        request.refuse_writer("a file object")
    _check(request, path)
    if path is not None and _is_stream(path):
        request.refuse_writer("what is not a file")
        with open(path, "wb") as file:
            return save_archive(dataclasses.replace(request, target=file))
    options = settings.current()
    with recorded(request, assets=True) as (store, assets):
        plan = _core.plan(**layout(store))
        if request.writer is not None:
            return _write_later(request.writer, plan, store, target, options, _members(request.model), assets)
        if path is not None:
            info = _write(request.model, plan, store, assets, path, base=0, options=options)
        elif type(target) is io.BytesIO:
            info = _write_memory(request.model, plan, store, assets, target, options)
        else:
            base = target.tell() if file_objects.is_seekable(target) else 0
            info = _write(request.model, plan, store, assets, target, base=base, options=options)
            _truncate(target, base + info["bytes"])
    return make_report(plan, store, info, path)


def _check(request: SaveRequest, place: str | None) -> None:
    reason = keras_names.unsupported(request.weights_format, place)
    if reason is not None:
        raise NotOurs(reason, request.beyond(), place)


def _is_stream(path: str) -> bool:
    """Whether something that is no file and no directory stands there: a pipe, a device."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def save_directory(request: SaveRequest) -> Saved:
    """Writes Keras' unzipped form; the directory appears, or is replaced, when it is complete.

    Raises:
        NotOurs: As `save_archive`.
    """
    request.refuse_writer("a directory")
    target = os.fspath(request.target)
    _check(request, target)
    options = settings.current()
    with recorded(request, assets=True) as (store, assets):
        plan = _core.plan(**layout(store))
        members = _members(request.model)  # before anything is written: the directory may be written in place
        names = [saving_lib._CONFIG_FILENAME, saving_lib._METADATA_FILENAME]
        names += [saving_lib._VARS_FNAME_H5, saving_lib._ASSETS_DIRNAME]
        with (
            _core.Directory(target, names, atomic=options.atomic, durable=options.durable) as directory,
            _errors_name_target(target, str(directory.path)),
        ):
            root = Path(directory.path)
            save = plan.start(
                str(root / saving_lib._VARS_FNAME_H5),
                buffers(store),
                archive=False,
                atomic=False,
                durable=options.durable,
            )
            info = _finish(save, plan, store, target)
            for name, data in members:
                _core.write_file(str(root / name), data, atomic=False, durable=options.durable)
            for name, path in assets.files():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, root / name)
            (root / saving_lib._ASSETS_DIRNAME).mkdir(exist_ok=True)
            if options.durable:
                _core.sync(root / saving_lib._ASSETS_DIRNAME)
            log_placed(None, directory.commit(), target)
    return make_report(plan, store, info, target)


@contextmanager
def _errors_name_target(target: str, temporary: str) -> Iterator[None]:
    """Errors name the files of a directory as the user will know them, not where they are made."""
    try:
        yield
    except (HornbeamError, OSError) as error:
        error.args = tuple(a.replace(temporary, target) if isinstance(a, str) else a for a in error.args)
        for name in ("path", "filename", "filename2"):
            place = getattr(error, name, None)
            if isinstance(place, str):
                setattr(error, name, place.replace(temporary, target))
        if isinstance(error, OSError) and isinstance(error.strerror, str):
            error.strerror = error.strerror.replace(temporary, target)
        raise


def save_weights(request: SaveRequest) -> Saved:
    """Writes one `.weights.h5`.

    Raises:
        NotOurs: As `save_archive`.
    """
    check_weights(request)
    marks.refuse_complete(request, [request.target])
    with recorded(request, assets=False) as (store, _):
        plan = _core.plan(**layout(store))
        if request.writer is not None:
            return _write_later(request.writer, plan, store, request.target, settings.current())
        info = write_image(plan, store, request.target)
    return make_report(plan, store, info, path_of(request.target))


def check_weights(request: SaveRequest) -> None:
    """Whether weights can be written by hornbeam; waits for what is being written to the same path.

    Raises:
        NotOurs: As `save_archive`.
    """
    text = str(request.target)
    writer.wait_for(text)
    reason = keras_names.unsupported("h5", text)
    if reason is not None:
        if isinstance(request.target, Stream):
            raise UnsupportedError(f"Stock Keras must do this save ({reason}), and writes weights to paths only.")
        place = text if request.max_shard_size is None else os.path.dirname(text) or "."  # shards: their directory
        raise NotOurs(reason, request.beyond(), place)


def _write_later(
    queue: writer.Reservation,
    plan: _core.Plan,
    store: RecordStore,
    path: str,
    options: settings.Options,
    members: list[tuple[str, bytes]] | None = None,
    assets: AssetStore | None = None,
) -> Handle:
    """Takes the values and opens the file now; the writer's thread does the rest."""
    path = locations.absolute(path)
    if not options.atomic or not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK):
        writer.wait_for(path)  # the old content is written over from now on
    values = queue.stage([d.memory for d in store.datasets.values()])
    save = plan.start(
        path,
        [tensors.as_buffer(v) for v in values],
        archive=members is not None,
        atomic=options.atomic,
        durable=options.durable,
        hold=True,
    )
    kept = assets.move() if assets is not None else AssetStore("w")
    files = [(name, Path(file)) for name, file in kept.files()]  # listed now: a file that vanishes later is an error
    for dataset in store.datasets.values():  # only the core holds the memory now, and frees it when it is written
        del dataset.memory

    def write() -> SaveReport:
        info = _with_progress(save, path, plan.nbytes, lambda: save.finish([*(members or []), *files]))
        log_placed(info["in_place"], info["lost"], path)
        return make_report(plan, store, info, path)

    def drop() -> None:
        save.cancel()
        kept.close()

    try:
        return queue.submit(path, write, drop, options)
    except BaseException:
        drop()
        raise


@contextmanager
def recorded(request: SaveRequest, *, assets: bool) -> Iterator[tuple[RecordStore, AssetStore]]:
    """Keras' walk over the model, with what it stored; assets live until the end of the block.

    The garbage collector rests meanwhile: serialising makes many objects, and none of them is garbage.
    """
    store, asset_store = RecordStore(), AssetStore("w")
    with patches.collector_rests():
        try:
            with walking.fast_walk():
                saving_lib._save_state(
                    request.model,
                    weights_store=store,
                    assets_store=asset_store if assets else None,
                    inner_path="",
                    visited_saveables={id(o) for o in request.objects_to_skip or ()},
                )
            store.report = casts.narrow(store, request)
            yield store, asset_store
        finally:
            asset_store.close()


def layout(store: RecordStore) -> dict[str, Any]:
    """What the core plans from: what was recorded, and how the options want it written."""
    options = settings.current()
    return {
        "groups": list(store.groups.items()),
        "datasets": [(path, d.dtype, d.shape, d.tag) for path, d in store.datasets.items()],
        "engine": options.engine,
        "compression": options.compression,
        "shuffle": options.shuffle,
        "chunk_bytes": options.chunk_bytes,
        "casts": store.casts(),
    }


def buffers(store: RecordStore) -> list[np.ndarray | None]:
    """The memory that the core writes from; `None` for values that it asks for when their turn comes."""
    return [
        None if isinstance(d.memory, deferred.Deferred) else tensors.as_buffer(d.memory)
        for d in store.datasets.values()
    ]


def puller(store: RecordStore) -> Callable[[int], np.ndarray]:
    """Gives the memory of the deferred values, which the writer asks for later."""
    datasets = list(store.datasets.values())
    return lambda i: tensors.as_buffer(datasets[i].array())


def _members(model: Any) -> list[tuple[str, bytes]]:
    """The JSON members, in the order Keras writes them."""
    try:
        with saving_lib.ObjectSharingScope(), shortcuts.describing(model):
            config = _core.encode_json(saving_lib.serialize_keras_object(model))
    except Exception as error:
        from hornbeam.seam.culprits import culprit, explain

        explain(error, lambda: culprit(model))
        raise
    metadata = {
        "keras_version": saving_lib.keras_version,
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
    }
    return [
        (saving_lib._METADATA_FILENAME, json.dumps(metadata).encode()),
        (saving_lib._CONFIG_FILENAME, config),
    ]


def _with_progress(
    save: _core.Save, path: str | None, nbytes: int, work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Runs `work` while the writer writes; stops the writer if it fails, or is interrupted anywhere."""
    try:
        with progress.watch("save", path, nbytes, lambda: save.written):
            return work()
    except BaseException:
        save.cancel()
        raise


def _write(
    model: Any,
    plan: _core.Plan,
    store: RecordStore,
    assets: AssetStore,
    target: Any,
    *,
    base: int,
    options: settings.Options,
) -> dict[str, Any]:
    # Where the old content is written over, the config is made first: it may raise.
    early = None if isinstance(target, str) and options.atomic else _members(model)
    save = plan.start(
        target,
        buffers(store),
        archive=True,
        base=base,
        atomic=options.atomic,
        durable=options.durable,
    )
    path = target if isinstance(target, str) else None

    def work() -> dict[str, Any]:
        members: list[tuple[str, Any]] = [*(early or _members(model))]
        members += [(name, Path(file)) for name, file in assets.files()]
        return save.finish(members, puller(store))

    info = _with_progress(save, path, plan.nbytes, work)
    if isinstance(target, str):
        log_placed(info["in_place"], info["lost"], target)
    return info


def write_image(plan: _core.Plan, store: RecordStore, place: Any) -> dict[str, Any]:
    """Writes a bare weights image to a path or a `Stream`.

    Raises:
        UnsupportedError: For a file object that is not at its beginning: the formats have no place for what is before.
    """
    options = settings.current()
    if not isinstance(place, Stream):
        text = str(place)
        save = plan.start(text, buffers(store), archive=False, atomic=options.atomic, durable=options.durable)
        info = _finish(save, plan, store, text)
        log_placed(info["in_place"], info["lost"], text)
        return info
    file = place.file
    if file_objects.is_seekable(file) and file.tell() != 0:
        raise UnsupportedError(
            f"A `{place.suffix}` file begins where the file object does, and it is at byte {file.tell()}. "
            "Call `seek(0)` first, or save to another one."
        )
    before = file.getvalue() if type(file) is io.BytesIO else None
    try:
        info = _finish(plan.start(file, buffers(store), archive=False), plan, store, None)
    except BaseException:
        if before is not None:
            _restore(file, before)
        raise
    _truncate(file, info["bytes"])
    return info


def _truncate(file: Any, end: int) -> None:
    """Puts a file object at the end of what was written, and drops what was behind it before."""
    if not file_objects.is_seekable(file):
        return
    try:
        file.seek(0, io.SEEK_END)
        more = file.tell() > end
    except (OSError, ValueError):  # like compressing files, it only moves forward: nothing can be behind
        return
    file.seek(end)
    if more:
        try:
            file.truncate()
        except (AttributeError, io.UnsupportedOperation) as error:
            raise UnsupportedError(
                f"What was in {file!r} before is longer than what was saved, and cannot be cut: save to an empty one."
            ) from error


def _restore(file: io.BytesIO, content: bytes) -> None:
    file.seek(0)
    file.truncate()
    file.write(content)
    file.seek(0)


def _finish(save: _core.Save, plan: _core.Plan, store: RecordStore, path: str | None) -> dict[str, Any]:
    """Waits for a bare weights image."""
    return _with_progress(save, path, plan.nbytes, lambda: save.finish([], puller(store)))


def _write_memory(
    model: Any,
    plan: _core.Plan,
    store: RecordStore,
    assets: AssetStore,
    file: io.BytesIO,
    options: settings.Options,
) -> dict[str, Any]:
    """To a BytesIO: grown once and filled in place, if the size is known; what follows the weights is appended."""
    base = file.tell()
    before = file.getvalue() if base < file.seek(0, io.SEEK_END) else None  # what a failed save must leave
    length = plan.weights_end(True)
    try:
        file.seek(base)
        if length is None:
            info = _write(model, plan, store, assets, file, base=base, options=options)
            file.seek(base + info["bytes"])
        else:
            end = base + length
            file.seek(end - 1)
            file.write(b"\0")
            with file.getbuffer() as memory, memory[base:end] as target:
                info = _write(model, plan, store, assets, target, base=base, options=options)
            file.seek(end)
            file.write(info["tail"])
    except BaseException:
        file.seek(base)
        file.truncate()
        if before is not None:
            file.write(before[base:])
            file.seek(base)
        raise
    file.truncate()
    return info


def log_placed(in_place: str | None, lost: str | None, path: str) -> None:
    """Warns when old content was not safe meanwhile, unless that was asked for, and of what the new file lacks."""
    if in_place not in (None, "atomic=False", "the target is empty"):
        counters.logger.warning("wrote over '%s' instead of replacing it: %s", path, in_place)
    if lost is not None:
        counters.logger.warning("'%s' was replaced, but %s could not be kept", path, lost)


def make_report(plan: _core.Plan, store: RecordStore, info: dict[str, Any], path: str | None) -> SaveReport:
    """Counts a save, and says what it was."""
    counters.count(engine=plan.engine, saves=1, bytes_written=info["bytes"], tensors_written=len(store.datasets))
    store.note_casts(info["casts"])
    report = store.report
    report.path, report.engine, report.tensors = path, plan.engine, len(store.datasets)
    report.bytes, report.crc = info["bytes"], info.get("crc")
    return report
