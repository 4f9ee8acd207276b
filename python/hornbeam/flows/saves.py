"""The save flow: walk the model, plan, write in a Rust thread while Python serialises the config, commit.

Each public function here stands in for the function of `saving_lib` of the same name; the first argument is the stock
one, for what hornbeam does not handle.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from keras.src.saving import saving_lib

from hornbeam import _core
from hornbeam.base import counters, deferred, durability, file_objects, locations, progress, reports, settings, writer
from hornbeam.base.file_objects import Stream, path_of, plain
from hornbeam.errors import HornbeamError, UnsupportedError
from hornbeam.flows import casts
from hornbeam.flows.asset_store import AssetStore
from hornbeam.flows.recording import RecordStore
from hornbeam.seam import entry, patches, shortcuts, walking
from hornbeam.values import tensors as tensors_

Stock = Callable[..., Any]
_written = threading.local()


@contextmanager
def checksum() -> Iterator[Callable[[], int | None]]:
    """What it yields tells the CRC-32 of the weights that this thread wrote inside; `None` if stock Keras did."""
    _written.crc = None
    yield lambda: _written.crc


class _PathTarget(io.IOBase):
    """Stands for a local path where stock Keras would pass an open file, so that it is not opened."""

    def __init__(self, path: str) -> None:
        self.path = path


class _FileTarget(io.IOBase):
    """Stands for a file object, which need not be an `io.IOBase` for us."""

    def __init__(self, file: Any) -> None:
        self.file = file


def save_model(stock: Stock, model: Any, filepath: Any, weights_format: str = "h5", zipped: bool = True) -> Any:
    """`saving_lib.save_model`: local archives are replaced atomically; its checks and messages are Keras' own."""
    filepath = plain(filepath)
    if file_objects.is_file_object(filepath):
        file_objects.check(filepath, "write")
        return stock(model, _FileTarget(filepath), weights_format, zipped)
    writer.settle(filepath)
    if isinstance(filepath, io.IOBase) or not zipped or not str(filepath).endswith(".keras"):
        return stock(model, filepath, weights_format, zipped)
    remote = str(filepath).startswith("hf://") or saving_lib.file_utils.is_remote_path(str(filepath))
    if remote or _is_stream(str(filepath)):
        writer.refuse("what is not a local file")
        durability.tell(str(filepath))
        return stock(model, filepath, weights_format, zipped)  # opens a file object and comes back with it
    return stock(model, _PathTarget(str(filepath)), weights_format, zipped)


def _is_stream(path: str) -> bool:
    """Whether something that is no file and no directory stands there: a pipe, a device."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def save_model_to_fileobj(stock: Stock, model: Any, fileobj: Any, weights_format: str = "h5") -> Any:
    """`saving_lib._save_model_to_fileobj`: to a path, memory or a file object."""
    if isinstance(fileobj, _FileTarget):
        fileobj = fileobj.file
    if not isinstance(fileobj, _PathTarget):
        writer.refuse("a file object")
    request = writer.claim()
    reason = entry.unsupported(weights_format)
    if reason is not None:
        _check_synchronous(request, reason)
        if isinstance(fileobj, _PathTarget):
            return _hand_over(reason, fileobj.path, _stock_to_path, stock, model, fileobj.path, weights_format)
        return _hand_over(reason, None, stock, model, fileobj, weights_format)
    options = settings.current()
    with _recorded(model, assets=True) as (store, assets):
        plan = _plan(store)
        if request is not None:
            _defer(request, plan, store, fileobj.path, options, _members(model), assets)
            return None
        target: Any = fileobj
        if isinstance(fileobj, _PathTarget):
            target = fileobj.path
            info = _write(model, plan, store, assets, target, base=0, options=options)
        elif type(fileobj) is io.BytesIO:
            info = _write_memory(model, plan, store, assets, fileobj, options)
        else:
            base = fileobj.tell() if file_objects.is_seekable(fileobj) else 0
            info = _write(model, plan, store, assets, fileobj, base=base, options=options)
            _cut(fileobj, base + info["bytes"])
    _count_save(plan, store, info["bytes"], target if isinstance(target, str) else None)
    return None


def _hand_over(reason: str, path: Any, stock: Stock, *args: Any) -> Any:
    if settings.current().compression is not None:
        raise UnsupportedError(f"Stock Keras must do this save ({reason}), and does not compress.")
    casts.refuse(f"Stock Keras must do this save ({reason})")
    with durability.directories(path, durable=settings.current().durable):
        result = counters.hand_over(reason, stock, *args)
    durability.sync_handed_over(path)
    return result


def _stock_to_path(stock: Stock, model: Any, path: str, weights_format: str) -> Any:
    with open(path, "wb") as file:
        return stock(model, file, weights_format)


def save_model_to_dir(stock: Stock, model: Any, dirpath: Any, weights_format: str = "h5") -> Any:
    """`saving_lib._save_model_to_dir`: the directory appears, or is replaced, when it is complete."""
    writer.refuse("a directory")
    reason = entry.unsupported(weights_format, dirpath)
    if reason is not None:
        return _hand_over(reason, dirpath, stock, model, dirpath, weights_format)
    options = settings.current()
    with _recorded(model, assets=True) as (store, assets):
        plan = _plan(store)
        members = _members(model)  # before anything is written: the directory may have to be written in place
        names = [saving_lib._CONFIG_FILENAME, saving_lib._METADATA_FILENAME]
        names += [saving_lib._VARS_FNAME_H5, saving_lib._ASSETS_DIRNAME]
        target = os.fspath(dirpath)
        with (
            _core.Directory(target, names, atomic=options.atomic, durable=options.durable) as directory,
            _naming(target, str(directory.path)),
        ):
            root = Path(directory.path)
            save = plan.start(
                str(root / saving_lib._VARS_FNAME_H5),
                _buffers(store),
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
                durability.sync(root / saving_lib._ASSETS_DIRNAME)
            log_placed(None, directory.commit(), target)
    _count_save(plan, store, info["bytes"], os.fspath(dirpath))
    return None


@contextmanager
def _naming(target: str, temporary: str) -> Iterator[None]:
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


def save_weights_only(
    stock: Stock,
    model: Any,
    filepath: Any,
    max_shard_size: float | None = None,
    objects_to_skip: Any = None,
) -> Any:
    """`saving_lib.save_weights_only`: one `.weights.h5`, or shards with an index."""
    filepath = plain(filepath)
    text = str(filepath)
    suffix = ".weights.h5" if max_shard_size is None else ("weights.h5", "weights.json")
    if not model.built or not text.endswith(suffix):
        return stock(model, filepath, max_shard_size, objects_to_skip)  # raises
    writer.settle(text)
    if max_shard_size is not None:
        writer.refuse("shards")
    request = writer.claim()
    reason = entry.unsupported("h5", text)
    if reason is not None:
        _check_synchronous(request, reason)
        if isinstance(filepath, Stream):
            raise UnsupportedError(f"Stock Keras must do this save ({reason}), and writes weights to paths only.")
        place = text if max_shard_size is None else os.path.dirname(text) or "."  # shards are many files
        return _hand_over(reason, place, stock, model, filepath, max_shard_size, objects_to_skip)
    options = settings.current()
    skipped = {id(o) for o in objects_to_skip or ()}
    with _recorded(model, assets=False, visited=skipped) as (store, _):
        if max_shard_size is not None:
            from hornbeam.formats.shards import save_shards

            save_shards(store, text, float(max_shard_size), options)
            return None
        plan = _plan(store)
        if request is not None:
            _defer(request, plan, store, text, options)
            return None
        info = write_image(plan, store, filepath)
    _count_save(plan, store, info["bytes"], path_of(filepath))
    return None


def _check_synchronous(request: writer.Request | None, reason: str) -> None:
    if request is not None:
        raise UnsupportedError(f"Stock Keras must do this save ({reason}), and does not save asynchronously.")


def _defer(
    request: writer.Request,
    plan: _core.Plan,
    store: RecordStore,
    path: str,
    options: settings.Options,
    members: list[tuple[str, bytes]] | None = None,
    assets: AssetStore | None = None,
) -> None:
    """Takes the values and opens the file now; the writer's thread does the rest."""
    path = locations.absolute(path)
    if not options.atomic or not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK):
        writer.settle(path)  # the old content is written over from now on
    values = request.stage([d.memory for d in store.datasets.values()])
    save = plan.start(
        path,
        [tensors_.as_buffer(v) for v in values],
        archive=members is not None,
        atomic=options.atomic,
        durable=options.durable,
        hold=True,
    )
    kept = assets.move() if assets is not None else AssetStore("w")
    files = [(name, Path(file)) for name, file in kept.files()]  # now: one that is gone later is an error
    for dataset in store.datasets.values():  # the core holds the memory, and lets it go first
        del dataset.memory

    def write() -> int:
        info = _finishing(save, path, plan.nbytes, lambda: save.finish([*(members or []), *files]))
        _written.crc = info["crc"]
        log_placed(info["in_place"], info["lost"], path)
        _count_save(plan, store, info["bytes"], path)
        return info["bytes"]

    def drop() -> None:
        save.cancel()
        kept.close()

    try:
        request.submit(path, write, drop, options)
    except BaseException:
        drop()
        raise


@contextmanager
def _recorded(model: Any, *, assets: bool, visited: set[int] | None = None) -> Iterator[tuple[RecordStore, AssetStore]]:
    """Keras' walk over the model, with what it stored; assets live until the end of the block.

    The garbage collector rests meanwhile: serialising makes many objects, and none of them is garbage.
    """
    smaller = casts.take_request()
    store, asset_store = RecordStore(), AssetStore("w")
    with patches.collector_rests():
        try:
            with walking.fast_walk():
                saving_lib._save_state(
                    model,
                    weights_store=store,
                    assets_store=asset_store if assets else None,
                    inner_path="",
                    visited_saveables=visited if visited is not None else set(),
                )
            store.report = casts.narrow(store, model, smaller)
            yield store, asset_store
        finally:
            asset_store.close()


def _plan(store: RecordStore) -> _core.Plan:
    groups = list(store.groups.items())
    datasets = [(path, d.dtype, d.shape, d.tag) for path, d in store.datasets.items()]
    options = settings.current()
    return _core.plan(
        groups,
        datasets,
        engine=options.engine,
        compression=options.compression,
        shuffle=options.shuffle,
        chunk_bytes=options.chunk_bytes,
    )


def _buffers(store: RecordStore) -> list[np.ndarray | None]:
    return [
        None if isinstance(d.memory, deferred.Deferred) else tensors_.as_buffer(d.memory)
        for d in store.datasets.values()
    ]


def _puller(store: RecordStore) -> Callable[[int], np.ndarray]:
    """Gives the memory of the values that were not lent at the start."""
    datasets = list(store.datasets.values())
    return lambda i: tensors_.as_buffer(datasets[i].array())


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


def _finishing(save: _core.Save, path: str | None, nbytes: int, work: Callable[[], Any]) -> Any:
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
    # Where the old content is written over, nothing may be until the config is known to be fine.
    early = None if isinstance(target, str) and options.atomic else _members(model)
    save = plan.start(
        target,
        _buffers(store),
        archive=True,
        base=base,
        atomic=options.atomic,
        durable=options.durable,
    )
    path = target if isinstance(target, str) else None

    def work() -> dict[str, Any]:
        members: list[tuple[str, Any]] = [*(early or _members(model))]
        members += [(name, Path(path)) for name, path in assets.files()]
        return save.finish(members, _puller(store))

    info: dict[str, Any] = _finishing(save, path, plan.nbytes, work)
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
        save = plan.start(text, _buffers(store), archive=False, atomic=options.atomic, durable=options.durable)
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
        info = _finish(plan.start(file, _buffers(store), archive=False), plan, store, None)
    except BaseException:
        if before is not None:
            _restore(file, before)
        raise
    _cut(file, info["bytes"])
    return info


def _cut(file: Any, end: int) -> None:
    """Puts a file object at the end of what was written, and drops what was behind it before."""
    if not file_objects.is_seekable(file):
        return
    try:
        file.seek(0, io.SEEK_END)
        more = file.tell() > end
    except (OSError, ValueError):  # it only goes forward, like those that compress: nothing is behind
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
    info = _finishing(save, path, plan.nbytes, lambda: save.finish([], _puller(store)))
    _written.crc = info["crc"]
    return info


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


def _count_save(plan: _core.Plan, store: RecordStore, nbytes: int, path: str | None) -> None:
    report_save(store.report, path, plan.engine, len(store.datasets), nbytes)
    counters.count(engine=plan.engine, saves=1, bytes_written=nbytes, tensors_written=len(store.datasets))


def report_save(report: reports.SaveReport, path: str | None, engine: str, tensors: int, nbytes: int) -> None:
    """Completes the report of a save and makes it the last one."""
    report.path, report.engine, report.tensors, report.bytes = path, engine, tensors, nbytes
    reports.remember(report)
