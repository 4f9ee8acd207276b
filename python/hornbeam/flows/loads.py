"""The load flow: open, decode the config, build the model while the core reads, hand the tensors over, check the CRC.

Each public function stands in for the function of `saving_lib` of the same name; the first argument is the stock one.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.saving import saving_lib

from hornbeam import _core
from hornbeam.base import contents, counters, progress, reports, settings, writer
from hornbeam.base.file_objects import Stream, openable, path_of, plain, source
from hornbeam.base.reports import LoadReport
from hornbeam.errors import IncompleteLoadError, LimitError, UnsupportedError
from hornbeam.flows.asset_store import AssetStore
from hornbeam.flows.selections import Request, Selection, Structure
from hornbeam.flows.serving import Image, LoadStore
from hornbeam.flows.untrained import is_untrained
from hornbeam.seam import assignments, building, entry, keras2, missing_classes, patches, walking
from hornbeam.values import on_tensorflow

Stock = Callable[..., Any]
#: Bytes the reader may be ahead of a model whose variables have memory of their own already.
_READ_AHEAD = 32 << 20
_ALL = 1 << 62
_SAFETENSORS = (".safetensors", ".safetensors.index.json")
_LOADED = ("weights.h5", "weights.json", ".keras", *_SAFETENSORS)
#: Another format of weights; Keras 3.16 has it no more.
_NPZ: str | None = getattr(saving_lib, "_VARS_FNAME_NPZ", None)
_local = threading.local()


@contextlib.contextmanager
def requested(request: Request) -> Iterator[None]:
    """What this thread's next load does beyond what Keras' functions can say."""
    before = getattr(_local, "request", None)
    _local.request = request
    try:
        yield
    finally:
        _local.request = before


def take_request() -> Request:
    """The request for this load; those inside of it are others."""
    request = getattr(_local, "request", None)
    _local.request = None
    return request or Request()


def _hand_over(request: Request, reason: str, path: Any, stock: Stock, *args: Any) -> Any:
    if request != Request():
        raise UnsupportedError(f"Stock Keras must do this load ({reason}), and cannot load strictly or in part.")
    result = counters.hand_over(reason, stock, *args)
    reports.remember(LoadReport(path if path is None else os.fspath(path)))
    return result


def _read_ahead() -> int:
    """Without a limit where what is read becomes the variables' memory."""
    return _ALL if on_tensorflow.shares() else _READ_AHEAD


def load_model_from_fileobj(stock: Stock, fileobj: Any, custom_objects: Any, compile: bool, safe_mode: bool) -> Any:
    """`saving_lib._load_model_from_fileobj`."""
    request = take_request()
    place = source(fileobj)
    path = place if isinstance(place, str) else None
    arguments = (fileobj, custom_objects, compile, safe_mode)
    reason = entry.unsupported()
    if reason is not None:
        return _hand_over(request, reason, path, stock, *arguments)
    report = LoadReport(path)
    with contents.explained(path or fileobj, "keras"):
        file = _core.open(place, archive=True)
        _check_archive(file, path)
        sizes = {name: size for name, size, _ in file.members()}
        if saving_lib._CONFIG_FILENAME not in sizes:
            raise KeyError(f"There is no item named '{saving_lib._CONFIG_FILENAME}' in the archive")
    config = _read_member(file, saving_lib._CONFIG_FILENAME)
    weights_name = saving_lib._VARS_FNAME_H5
    if weights_name not in sizes:
        if _NPZ is not None and _NPZ in sizes:
            return _hand_over(request, "npz weights", path, stock, *arguments)
        raise ValueError(f"Expected a {weights_name}{'' if _NPZ is None else f' or {_NPZ}'} file.")
    _check_expansion(file, weights_name)
    has_assets = any(name.startswith(f"{saving_lib._ASSETS_DIRNAME}/") for name in sizes)

    def assets(stack: ExitStack) -> Any:
        if not has_assets:
            return None
        _check_extraction(file)
        store = AssetStore("r", lambda root: _extract(file, root))
        stack.callback(store.close)
        store.extract()  # before Keras' loop over layers could swallow an error
        return store

    weights = file.weights(engine=settings.current().engine)
    return _load_model(
        report, request, weights, weights_name, config, assets, custom_objects, compile=compile, safe_mode=safe_mode
    )


def load_model_from_dir(stock: Stock, dirpath: Any, custom_objects: Any, compile: bool, safe_mode: bool) -> Any:
    """`saving_lib._load_model_from_dir`."""
    request = take_request()
    root = Path(os.fspath(dirpath))
    weights_path = root / saving_lib._VARS_FNAME_H5
    arguments = (dirpath, custom_objects, compile, safe_mode)
    reason = entry.unsupported(path=dirpath)
    if reason is None and _NPZ is not None and (root / _NPZ).exists() and not weights_path.exists():
        reason = "npz weights"
    if reason is not None:
        return _hand_over(request, reason, dirpath, stock, *arguments)
    if not root.is_dir() or not weights_path.exists():
        return stock(*arguments)  # raises
    report = LoadReport(str(root))
    config = (root / saving_lib._CONFIG_FILENAME).read_bytes()

    def assets(stack: ExitStack) -> Any:
        if not (root / saving_lib._ASSETS_DIRNAME).is_dir():
            return None
        store = saving_lib.DiskIOStore(str(root / saving_lib._ASSETS_DIRNAME), mode="r")
        stack.callback(store.close)
        return store

    with contents.explained(weights_path, "h5"):
        weights = _core.open(str(weights_path), archive=False).weights(engine=settings.current().engine)
    return _load_model(
        report,
        request,
        weights,
        str(weights_path),
        config,
        assets,
        custom_objects,
        compile=compile,
        safe_mode=safe_mode,
    )


def _load_model(
    report: LoadReport,
    request: Request,
    weights: _core.Weights,
    weights_name: str,
    config: bytes,
    assets: Callable[[ExitStack], Any],
    custom_objects: Any,
    *,
    compile: bool,
    safe_mode: bool,
) -> Any:
    with ExitStack() as stack:
        # Without an optimizer its slots are not even read, unless the checksum of everything is asked for.
        verify = settings.current().verify
        image = Image(weights, weights_name)
        # What takes far more memory than the file has bytes waits until the model says that it has a place for it.
        first = None if verify else {i for i, (path, *_) in enumerate(image.datasets) if compile or not _is_slot(path)}
        first = first if first is None else first - image.decoded
        image.read(first, check=compile or verify, read_ahead=_read_ahead())
        journal = stack.enter_context(assignments.journal(undoable=False))
        stack.enter_context(building.scope(variables=len(image.datasets)))
        store = LoadStore([image])
        stack.callback(store.close)
        stack.enter_context(progress.watch("load", report.path, lambda: image.nbytes, lambda: image.done))
        report.stage("open")
        model = _from_config(config, custom_objects, compile, safe_mode)
        report.stage("build")
        keras2.place_optimizer(model, store, config)
        if image.decoded and not verify:
            plan(model, store)
            image.read(store.fitting.get(image, set()) & image.decoded, check=False, read_ahead=_read_ahead())
        found = assets(stack)
        if isinstance(found, AssetStore):
            found.old_path = store.old_path
        errors = _load_state(model, store, found)
        untrained = _untrained(model, journal, store)
        report.stage("assign")
    report.initialised = [v.path for v in _variables(model) if id(v) not in journal.assigned]
    _settle(report, request, journal, store, model, errors, untrained=untrained)
    return model


def _untrained(model: Any, journal: assignments.Journal, store: LoadStore) -> set[int]:
    """Variables, by id, of an optimizer that was saved before it was built; it takes what is stored of it."""
    optimizer = getattr(model, "optimizer", None)
    variables = {id(v) for v in getattr(optimizer, "variables", ())}
    if not variables - journal.assigned.keys() or variables & journal.assigned.keys():
        return set()
    taken: list[str] = []

    def stored(inner: Any, count: int) -> list[np.ndarray] | None:
        paths = [f"{journal.places.get(id(inner), '')}/vars/{i}" for i in range(count)]
        if not all(path in store.where for path in paths) or len(store.members[paths[0].rpartition("/")[0]]) != count:
            return None
        taken.extend(paths)
        return [image.take(i) for image, i in map(store.where.__getitem__, paths)]

    if not is_untrained(optimizer, stored):
        return set()
    store.taken.update(taken)
    return variables


def load_weights_only(
    stock: Stock, model: Any, filepath: Any, skip_mismatch: bool = False, objects_to_skip: Any = None
) -> Any:
    """`saving_lib.load_weights_only`: everything is read and checked before the model is touched.

    Whatever fails, the model is bit for bit what it was.
    """
    filepath = plain(filepath)
    writer.settle(filepath, loads=True)
    request = take_request()
    text = str(filepath)
    if not model.built or not text.endswith(_LOADED):
        return stock(model, filepath, skip_mismatch, objects_to_skip)  # raises
    reason = entry.unsupported(path=text)
    if reason is not None:
        if isinstance(filepath, Stream):
            raise UnsupportedError(f"Stock Keras must do this load ({reason}), and reads weights from paths only.")
        return _hand_over(request, reason, text, stock, model, filepath, skip_mismatch, objects_to_skip)
    report = LoadReport(path_of(filepath))
    with contents.explained(filepath, *_kinds(text)):
        opened = _open_weights(filepath)
    visited = {id(o) for o in objects_to_skip or ()}
    selection = None
    named = text.endswith(_SAFETENSORS)
    if request.partial or named:
        shapes = {path: tuple(shape) for _, weights in opened for path, _, shape, _ in weights.datasets()}
        # A group in several shards has its attributes in the first.
        groups = {
            path: attributes for _, weights in reversed(opened) for path, attributes in weights.groups() if attributes
        }
        structure, names = Structure(model, visited), None
        if named:
            from hornbeam.formats import safetensors

            names = safetensors.Names(opened, structure, shapes, by_name=request.by_name)
        selection = Selection(request, structure, shapes, groups, names)
    with ExitStack() as stack:
        images = [Image(weights, name) for name, weights in opened]
        if selection is None:
            store = LoadStore(images)
        else:
            own = {path: v for path, v in selection.structure.values.items() if path not in selection.source}
            store = LoadStore(images, selection.source, own)
        stack.callback(store.close)
        stack.enter_context(walking.fast_walk())
        plan(model, store, visited, selection)
        everything = settings.current().verify
        wanted = [range(len(i.datasets)) if everything else sorted(store.fitting.get(i, ())) for i in images]
        if len(images) > 1:  # of one the core judges what it is asked for
            _core.check_expansion([(image.weights, each) for image, each in zip(images, wanted, strict=True)])
        for image, each in zip(images, wanted, strict=True):
            whole = selection is None or len(each) == len(image.datasets)
            image.read(each, check=whole, read_ahead=_ALL)
        total = sum(image.nbytes for image in images)
        watch = progress.watch("load", report.path, total, lambda: sum(image.done for image in images))
        stack.enter_context(watch)
        report.stage("open")
        store.complete(drop_rest=False)
        report.stage("read")
        stack.enter_context(patches.collector_rests())
        journal = stack.enter_context(assignments.journal(undoable=True, part=selection))
        errors = _load_state(model, store, None, skip_mismatch=skip_mismatch, visited=visited)
        report.stage("assign")
        left_out = list(objects_to_skip or ())
        _settle(
            report, request, journal, store, model, errors, selection, left_out=left_out, skip_mismatch=skip_mismatch
        )
    return report


def plan(model: Any, store: LoadStore, visited: set[int] | None = None, selection: Selection | None = None) -> None:
    """Notes which datasets the model has a place for, by their shapes, before anything is read."""
    if selection is not None:
        for path in selection.source:
            store.plan_entry(path, tuple(getattr(selection.structure.values[path], "shape", ())))
        return

    def visit(saveable: Any, path: str) -> None:
        if isinstance(saveable, keras.Layer):  # as `Layer.load_own_variables`
            store.plan(path, saveable._trainable_variables + saveable._non_trainable_variables)
        else:
            store.plan(path, getattr(saveable, "variables", ()))

    assignments.walk(model, store, visited or set(), visit)


def _is_slot(path: str) -> bool:
    return path.startswith("optimizer/")


def _kinds(text: str) -> tuple[str, ...]:
    """What a weights file of that name holds."""
    kinds = {".keras": "keras", ".json": "shards", ".safetensors": "safetensors"}
    return (next((kind for suffix, kind in kinds.items() if text.endswith(suffix)), "h5"),)


def _open_weights(place: Any) -> list[tuple[str, _core.Weights]]:
    """The image, or the shards, of a weights file; also of one in a file object."""
    text, engine = str(place), settings.current().engine
    if text.endswith("weights.json"):
        from hornbeam.formats.shards import open_shards

        shards = []
        for name, file in open_shards(text):
            with contents.explained(os.path.join(os.path.dirname(text), name), "h5"):
                shards.append((name, file.weights(engine=engine)))
        return shards
    if text.endswith(_SAFETENSORS):
        from hornbeam.formats.safetensors import open_weights

        return open_weights(place)
    file = _core.open(openable(place), archive=text.endswith(".keras"))
    if text.endswith(".keras"):
        name = saving_lib._VARS_FNAME_H5
        if all(name != member for member, *_ in file.members()):
            raise KeyError(f"There is no item named '{name}' in the archive")
        _check_archive(file, text)
        _check_expansion(file, name)
    return [(text, file.weights(engine=engine))]


def _from_config(config: bytes, custom_objects: Any, compile: bool, safe_mode: bool) -> Any:
    """`saving_lib._model_from_config` through the Rust codec."""

    def decoded() -> Any:
        found = keras2.keras_config(config, _core.decode_json(config, trusted=False))
        if not compile:
            found["compile_config"] = None
        return found

    with saving_lib.ObjectSharingScope(), missing_classes.explained(decoded, custom_objects):
        return saving_lib.deserialize_keras_object(decoded(), custom_objects, safe_mode=safe_mode)


def _load_state(
    model: Any,
    store: LoadStore,
    assets: Any,
    *,
    skip_mismatch: bool = False,
    visited: set[int] | None = None,
) -> dict[int, Any]:
    """Keras' walk over the model; what could not be loaded, and why, by id."""
    errors: dict[int, Any] = {}
    with walking.fast_walk():
        saving_lib._load_state(
            model,
            weights_store=store,
            assets_store=assets,
            inner_path="",
            skip_mismatch=skip_mismatch,
            visited_saveables=visited if visited is not None else set(),
            failed_saveables=set(),
            error_msgs=errors,
        )
    store.complete(drop_rest=True)
    return errors


def _variables(model: Any) -> list[Any]:
    """What a complete load gives values to. Metrics and optimizers can be pickled too; they have no `weights`."""
    optimizer = getattr(model, "optimizer", None)
    weights = getattr(model, "weights", None)
    own = getattr(model, "variables", ()) if weights is None else weights
    return [*own, *(optimizer.variables if optimizer is not None else ())]


def _settle(
    report: LoadReport,
    request: Request,
    journal: assignments.Journal,
    store: LoadStore,
    model: Any,
    errors: dict[int, Any],
    selection: Selection | None = None,
    *,
    left_out: Sequence[Any] = (),
    untrained: AbstractSet[int] = frozenset(),
    skip_mismatch: bool = False,
) -> None:
    """Fills the report, counts, and raises if the load is not what it had to be."""
    names = [path for image in store.images for path, *_ in image.datasets]
    has_optimizer = getattr(model, "optimizer", None) is not None
    failed = tuple(_start(f"{journal.places.get(key, '')}/vars/") for key in errors)
    outside = tuple(_start(f"{journal.places[id(o)]}/") for o in left_out if id(o) in journal.places)
    if not has_optimizer:
        outside += ("optimizer/",)
    for name in names:
        place = name if selection is None else selection.place(name)
        if place.startswith(failed):
            report.refused.append(name)
        elif name in store.taken:
            report.loaded.append(name)
        elif request.partial or place.startswith(outside):
            report.skipped.append(name)
        else:
            report.unexpected.append(name)
    if selection is None:
        known = {*journal.assigned, *untrained, *(id(v) for o in left_out for v in getattr(o, "variables", ()))}
        report.missing = [v.path for v in _variables(model) if id(v) not in known]
    else:
        report.missing = [selection.structure.names(path)[-1] for path in selection.missing]
    report.mismatched = [(journal.places.get(key) or "model", _text(e)) for key, (_, e) in errors.items()]
    report.unmatched = request.unmatched(names)
    report.cast = journal.cast
    report.bytes = sum(image.bytes for image in store.images)
    crcs = {image.crc for image in store.images}
    report.crc = crcs.pop() if len(crcs) == 1 else "partial"
    report.engine = store.images[0].weights.engine if store.images else "direct"
    unfit = bool(errors) or (selection is not None and bool(set(selection.missing) - selection.lenient))
    if (unfit and not skip_mismatch) or (request.strict and not report.complete):
        message = _keras_message(errors) if errors else "The load is not complete."
        raised = IncompleteLoadError(f"{message}\n\n{_differences(report, store, errors, selection)}")
        raised.path, raised.report = report.path, report
        raise raised
    if errors:
        saving_lib._raise_loading_failure(errors, warn_only=True)
    if request.partial:
        report.warn_of_nothing()
    for image in store.images:
        counters.count(engine=image.weights.engine)
    counters.count(loads=1, bytes_read=report.bytes, tensors_read=sum(image.tensors for image in store.images))
    reports.remember(report)


def _start(path: str) -> str:
    return path.lstrip("/")  # the model itself is at no path


def _text(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _keras_message(errors: dict[int, Any]) -> str:
    """What Keras says."""
    try:
        saving_lib._raise_loading_failure(errors)
    except ValueError as error:
        return str(error)
    raise AssertionError("Keras did not raise")


def _differences(report: LoadReport, store: LoadStore, errors: dict[int, Any], selection: Selection | None) -> str:
    """Every difference between file and model, with what in the file is nearest."""
    files = [path for image in store.images for path, *_ in image.datasets]
    groups = sorted({path.rpartition("/vars/")[0] for path in files})
    lines = [f"Differences between '{report.path or 'the file'}' and the model:"]
    for place, why in report.mismatched:
        near = [] if place in groups else difflib.get_close_matches(place, groups, n=3)
        reason = why.splitlines()[0].partition(" Target variable: ")[0]
        lines.append(f"  {place}: {reason}{f' Nearest in the file: {near}' if near else ''}")
    if selection is not None:
        for path, name in selection.source.items():
            wanted, found = tuple(getattr(selection.structure.values[path], "shape", ())), store.shape(path)
            if wanted != found and wanted == found[::-1]:
                lines.append(f"  {name}: {found} in the file is the transpose of {wanted}; transpose it there")
    # What belongs to an object that is listed already follows from it.
    listed = {v.path for saveable, _ in errors.values() for v in getattr(saveable, "variables", ())}
    starts = tuple(f"{place}/vars/" for place, _ in report.mismatched)
    lines += [f"  {name}: not in the file" for name in report.missing if name not in listed]
    lines += [f"  {name}: in `name_map`, but not in the file" for name in report.unmatched]
    lines += [
        f"  {name}: in the file, but not in the model"
        for name in report.unexpected
        if not name.startswith(starts or "/")
    ]
    return "\n".join(lines)


def _read_member(file: _core.File, name: str) -> bytes:
    _check_expansion(file, name)
    return file.read(name)


def _check_expansion(file: _core.File, name: str) -> None:
    file.check_expansion(name, *_limits())


def _limits() -> tuple[int, int]:
    """Bytes from which a member of an archive may not stand for so many times what it stores, and these times.

    Keras 3.13 and 3.14 have no such limits; those of the others hold there, too.
    """
    floor = getattr(saving_lib, "_ZIP_MEMBER_BOMB_FLOOR_BYTES", 1 << 32)
    return floor, getattr(saving_lib, "_ZIP_MEMBER_MAX_EXPANSION", 100)


def _check_archive(file: _core.File, path: str | None) -> None:
    """`saving_lib._reject_zip_archive_bomb` of Keras 3.16: all members together that expand suspiciously.

    Raises:
        LimitError: As Keras' `ValueError`.
    """
    floor = getattr(saving_lib, "_ZIP_CUMULATIVE_BOMB_FLOOR_BYTES", None)
    expanding = [m for m in file.members() if m[1] > _limits()[1] * m[2]]
    declared = sum(size for _, size, _ in expanding)
    if floor is None or declared <= floor:
        return
    stored = sum(size for _, _, size in expanding)
    size = saving_lib.readable_memory_size
    error = LimitError(
        f"Not allowed: compressed archive members declare {size(declared)} but only {size(stored)} are stored on disk; "
        "refusing to load a potential decompression bomb. If you trust the file, store its members without compression."
    )
    error.path, error.expected, error.found = path, f"at most {size(floor)}", size(declared)
    raise error


def _check_extraction(file: _core.File) -> None:
    floor, most = _limits()
    floor = getattr(saving_lib, "_ZIP_EXTRACT_BOMB_FLOOR_BYTES", floor)
    for name in (*(name for name, *_ in file.members()), None):  # each of them, and all together
        file.check_expansion(name, floor, most)


def _extract(file: _core.File, root: str) -> None:
    """Writes the asset members below `root`; a name that would leave it is skipped with a warning, as in Keras."""
    start = f"{saving_lib._ASSETS_DIRNAME}/"
    base = Path(root).resolve()
    for name, *_ in file.members():
        if not name.startswith(start) or name.endswith("/"):
            continue
        path = (base / name[len(start) :]).resolve()
        if "\\" in name or not path.is_relative_to(base):
            counters.logger.warning("skipped an asset that points outside the archive: %r", name)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_read_member(file, name))
