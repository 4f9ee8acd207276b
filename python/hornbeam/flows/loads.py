"""The load flow: open, decode the config, build the model while the core reads, hand tensors over, check the CRC."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.saving import saving_lib

from hornbeam import _core
from hornbeam.base import contents, counters, progress, settings
from hornbeam.base.file_objects import Stream, openable, path_of, source
from hornbeam.base.reports import LoadReport
from hornbeam.errors import IncompleteLoadError, LimitError, UnsupportedError
from hornbeam.flows import marks
from hornbeam.flows.asset_store import AssetStore
from hornbeam.flows.requests import LoadRequest
from hornbeam.flows.selections import Names, Selection, Structure
from hornbeam.flows.serving import Image, LoadStore
from hornbeam.flows.untrained import is_untrained
from hornbeam.seam import assignments, building, keras2, keras_names, missing_classes, patches, walking
from hornbeam.seam.operation import NotOurs
from hornbeam.values import on_tensorflow

OpenWeights = Callable[[Any], list[tuple[str, _core.Weights]]]
NamesOf = Callable[..., Names]
#: Bytes the reader may be ahead of a model whose variables have memory of their own already.
_READ_AHEAD = 32 << 20
#: No limit on reading ahead.
ALL = 1 << 62
#: Another format of weights; removed in Keras 3.16.
_NPZ: str | None = getattr(saving_lib, "_VARS_FNAME_NPZ", None)


def not_ours(request: LoadRequest, reason: str | None, path: str | None = None) -> NotOurs:
    """What to raise where stock Keras has to do a load."""
    return NotOurs(reason, request.beyond(), path, saves=False)


def read_ahead_limit() -> int:
    """Bytes; unlimited where the memory that is read becomes the variables'."""
    return ALL if on_tensorflow.shares() else _READ_AHEAD


def load_archive(request: LoadRequest) -> tuple[Any, LoadReport]:
    """Loads a model from a `.keras` archive: a path or a binary file object.

    Raises:
        NotOurs: Where stock Keras has to do it; nothing was touched.
    """
    place = source(request.source)
    path = place if isinstance(place, str) else None
    reason = keras_names.unsupported()
    if reason is not None:
        raise not_ours(request, reason, path)
    report = LoadReport(path)
    with contents.explained(path or request.source, "keras"):
        file = _core.open(place, archive=True)
        _check_archive(file, path)
        sizes = {name: size for name, size, _ in file.members()}
        if saving_lib._CONFIG_FILENAME not in sizes:
            raise KeyError(f"There is no item named '{saving_lib._CONFIG_FILENAME}' in the archive")
    config = _read_member(file, saving_lib._CONFIG_FILENAME)
    metadata = _read_member(file, saving_lib._METADATA_FILENAME) if saving_lib._METADATA_FILENAME in sizes else b""
    weights_name = saving_lib._VARS_FNAME_H5
    if weights_name not in sizes:
        if _NPZ is not None and _NPZ in sizes:
            raise not_ours(request, "npz weights", path)
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
    return _load_model(report, request, weights, weights_name, config, _version(metadata), assets)


def load_directory(request: LoadRequest) -> tuple[Any, LoadReport]:
    """Loads a model from Keras' unzipped form.

    Raises:
        NotOurs: Where stock Keras has to do it, or refuses it; nothing was touched.
    """
    root = Path(os.fspath(request.source))
    weights_path = root / saving_lib._VARS_FNAME_H5
    reason = keras_names.unsupported(path=root)
    if reason is None and _NPZ is not None and (root / _NPZ).exists() and not weights_path.exists():
        reason = "npz weights"
    if reason is not None or not root.is_dir() or not weights_path.exists():
        raise not_ours(request, reason, str(root))
    report = LoadReport(str(root))
    config = (root / saving_lib._CONFIG_FILENAME).read_bytes()
    metadata = root / saving_lib._METADATA_FILENAME
    version = _version(metadata.read_bytes() if metadata.exists() else b"")

    def assets(stack: ExitStack) -> Any:
        if not (root / saving_lib._ASSETS_DIRNAME).is_dir():
            return None
        store = saving_lib.DiskIOStore(str(root / saving_lib._ASSETS_DIRNAME), mode="r")
        stack.callback(store.close)
        return store

    weights = contents.open_weights(str(weights_path), "h5")
    return _load_model(report, request, weights, str(weights_path), config, version, assets)


def _version(metadata: bytes) -> Any:
    """Which Keras wrote a file, as far as its metadata say so; stock Keras does not read them."""
    try:
        found = _core.decode_json(metadata, trusted=False)
    except ValueError:
        return None
    return found.get("keras_version") if isinstance(found, dict) else None


def _load_model(
    report: LoadReport,
    request: LoadRequest,
    weights: _core.Weights,
    weights_name: str,
    config: bytes,
    version: Any,
    assets: Callable[[ExitStack], Any],
) -> tuple[Any, LoadReport]:
    with ExitStack() as stack:
        # Without an optimizer its slots are not even read, unless the checksum of everything is asked for.
        verify = settings.current().verify
        image = Image(weights, weights_name)
        # Highly compressed datasets are read later, and only those that the model has a place for.
        first = (
            None
            if verify
            else {i for i, (path, *_) in enumerate(image.datasets) if request.compile or not _is_slot(path)}
        )
        first = first if first is None else first - image.decoded
        image.read(first, check=request.compile or verify, read_ahead=read_ahead_limit())
        journal = stack.enter_context(assignments.journal(undoable=False))
        stack.enter_context(building.scope(variables=len(image.datasets)))
        store = LoadStore([image])
        stack.callback(store.close)
        stack.enter_context(progress.watch("load", report.path, lambda: image.nbytes, lambda: image.done))
        report.stage("open")
        model, of_keras2 = _from_config(config, version, request)
        report.stage("build")
        if of_keras2:
            keras2.place_optimizer(model, store)
        if image.decoded and not verify:
            plan(model, store)
            image.read(store.fitting.get(image, set()) & image.decoded, check=False, read_ahead=read_ahead_limit())
        found = assets(stack)
        if isinstance(found, AssetStore):
            found.old_path = store.old_path
        errors = _load_state(model, store, found)
        store.complete(drop_rest=True)
        untrained = _untrained(model, journal, store)
        report.stage("assign")
    report.initialised = [v.path for v in variables(model) if id(v) not in journal.assigned]
    _fill_report(report, request, journal, store, model, errors, untrained=untrained)
    return model, report


def _untrained(model: Any, journal: assignments.Journal, store: LoadStore) -> set[int]:
    """Variables, by id, of an optimizer that was saved before it was built; it takes what is stored of it."""
    optimizer = getattr(model, "optimizer", None)
    slots = {id(v) for v in getattr(optimizer, "variables", ())}
    if not slots - journal.assigned.keys() or slots & journal.assigned.keys():
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
    return slots


def open_image(place: Any) -> list[tuple[str, _core.Weights]]:
    """The image of a weights file, of an archive, or of one in a file object."""
    text, name = str(place), saving_lib._VARS_FNAME_H5
    if not text.endswith(".keras"):
        return [(text, contents.open_weights(place, "h5"))]
    with contents.explained(place, "keras"):
        file = _core.open(openable(place), archive=True)
        if all(name != member for member, *_ in file.members()):
            raise KeyError(f"There is no item named '{name}' in the archive")
        _check_archive(file, text)
        _check_expansion(file, name)
        return [(text, file.weights(engine=settings.current().engine))]


def load_weights(
    request: LoadRequest, open_weights: OpenWeights = open_image, names_of: NamesOf | None = None
) -> LoadReport:
    """Loads weights into a model: everything is read and checked before the model is touched.

    Whatever fails, the model is bit for bit what it was.

    Args:
        request: What is asked for.
        open_weights: Opens the images, with a name for each.
        names_of: Says what the names in the file stand for, where they are no paths in the model.

    Raises:
        NotOurs: Where stock Keras has to do it; nothing was touched.
    """
    model, text = request.model, str(request.source)
    reason = keras_names.unsupported(path=text)
    if reason is not None:
        if isinstance(request.source, Stream):
            raise UnsupportedError(f"Stock Keras must do this load ({reason}), and reads weights from paths only.")
        raise not_ours(request, reason, text)
    report = LoadReport(path_of(request.source))
    opened = open_weights(request.source)
    visited = {id(o) for o in request.objects_to_skip or ()}
    selection = None
    report.partial = marks.is_part(opened)
    if request.partial or names_of is not None or report.partial:
        shapes = {path: tuple(shape) for _, weights in opened for path, _, shape, _ in weights.datasets()}
        # If a group is in several shards, the first one has its attributes.
        groups = {
            path: attributes for _, weights in reversed(opened) for path, attributes in weights.groups() if attributes
        }
        structure = Structure(model, visited)
        some = request.partial or report.partial
        choice = structure.choose(request, part=report.partial) if some else None
        names = None if names_of is None else names_of(opened, structure, shapes, by_name=request.by_name)
        selection = Selection(request, structure, shapes, groups, names, choice, part=report.partial)
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
        if len(images) > 1:  # a single image is checked by `fetch`
            _core.check_expansion([(image.weights, each) for image, each in zip(images, wanted, strict=True)])
        for image, each in zip(images, wanted, strict=True):
            whole = selection is None or len(each) == len(image.datasets)
            image.read(each, check=whole, read_ahead=ALL)
        total = sum(image.nbytes for image in images)
        watch = progress.watch("load", report.path, total, lambda: sum(image.done for image in images))
        stack.enter_context(watch)
        report.stage("open")
        store.complete(drop_rest=False)
        report.stage("read")
        stack.enter_context(patches.collector_rests())
        journal = stack.enter_context(assignments.journal(undoable=True, part=selection))
        errors = _load_state(model, store, None, skip_mismatch=request.skip_mismatch, visited=visited)
        if selection is not None:
            errors |= _assign_directly(store, selection, journal)
        store.complete(drop_rest=True)
        report.stage("assign")
        _fill_report(report, request, journal, store, model, errors, selection)
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


def _from_config(config: bytes, version: Any, request: LoadRequest) -> tuple[Any, bool]:
    """`saving_lib._model_from_config` through the Rust codec, and whether Keras 2 wrote the configuration."""
    decoded = _core.decode_json(config, trusted=False)
    of_keras2 = keras2.is_keras2(decoded, version)

    def prepared(found: Any) -> Any:
        found = keras2.keras_config(found) if of_keras2 else found
        if not request.compile:
            found["compile_config"] = None
        return found

    def again() -> Any:
        return prepared(_core.decode_json(config, trusted=False))

    with saving_lib.ObjectSharingScope(), missing_classes.explained(again, request.custom_objects):
        found = prepared(decoded)
        model = saving_lib.deserialize_keras_object(found, request.custom_objects, safe_mode=request.safe_mode)
    return model, of_keras2


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
    return errors


def _assign_directly(store: LoadStore, selection: Selection, journal: assignments.Journal) -> dict[int, Any]:
    """Gives variables what no code of their objects asks for; what does not fit, as of `_load_state`."""
    errors: dict[int, Any] = {}
    for path, owner in selection.direct.items():
        value = store.value(path)
        try:
            selection.structure.values[path].assign(value)
        except ValueError as error:
            errors[id(owner)] = owner, error
    return errors


def variables(model: Any) -> list[Any]:
    """What a complete load gives values to. Metrics and optimizers can be pickled too; they have no `weights`."""
    optimizer = getattr(model, "optimizer", None)
    weights = getattr(model, "weights", None)
    own = getattr(model, "variables", ()) if weights is None else weights
    return [*own, *(optimizer.variables if optimizer is not None else ())]


def _fill_report(
    report: LoadReport,
    request: LoadRequest,
    journal: assignments.Journal,
    store: LoadStore,
    model: Any,
    errors: dict[int, Any],
    selection: Selection | None = None,
    *,
    untrained: AbstractSet[int] = frozenset(),
) -> None:
    """Sorts everything into the lists of the report, and finishes it."""
    left_out = request.objects_to_skip or ()
    names = [path for image in store.images for path, *_ in image.datasets]
    has_optimizer = getattr(model, "optimizer", None) is not None
    failed = tuple(f"{journal.places.get(key, '')}/vars/".lstrip("/") for key in errors)  # the model is at no path
    outside = tuple(f"{journal.places[id(o)]}/".lstrip("/") for o in left_out if id(o) in journal.places)
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
        report.missing = [v.path for v in variables(model) if id(v) not in known]
    else:
        report.missing = [selection.structure.names(path)[-1] for path in selection.missing]
    report.mismatched = [(journal.places.get(key) or "model", _text(e)) for key, (_, e) in errors.items()]
    unfit = bool(errors) or (selection is not None and bool(set(selection.missing) - selection.may_be_missing))
    report.unmatched = request.unmatched(names)
    finish(report, request, journal, store, errors, selection, unfit=unfit and not request.skip_mismatch)


def finish(
    report: LoadReport,
    request: LoadRequest,
    journal: assignments.Journal,
    store: LoadStore,
    errors: dict[int, Any],
    selection: Selection | None = None,
    *,
    unfit: bool,
) -> None:
    """Completes a report whose lists are filled, and counts the load.

    Raises:
        IncompleteLoadError: If the load is `unfit`, or has to be complete and is not.
    """
    report.cast = journal.cast
    report.bytes = sum(image.bytes for image in store.images)
    crcs = {image.crc for image in store.images}
    report.crc = crcs.pop() if len(crcs) == 1 else "partial"
    report.engine = store.images[0].weights.engine if store.images else "direct"
    if unfit or (request.strict and not report.complete):
        message = _keras_message(errors) if errors else "The load is not complete."
        raised = IncompleteLoadError(f"{message}\n\n{_differences(report, store, errors, selection)}")
        raised.path, raised.report = report.path, report
        raise raised
    if errors:
        saving_lib._raise_loading_failure(errors, warn_only=True)
    if request.partial or report.partial:
        report.warn_if_nothing_fits()
    for image in store.images:
        counters.count(engine=image.weights.engine)
    counters.count(loads=1, bytes_read=report.bytes, tensors_read=sum(image.tensors for image in store.images))


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
    # Variables of objects that are listed above are not listed again.
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
