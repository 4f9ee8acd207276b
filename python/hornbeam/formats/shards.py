"""Sharded weights: `<name>.weights.json` says which `<name>_00000.weights.h5` holds which group."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

from keras.src.saving import saving_lib
from keras.src.utils import dtype_utils

from hornbeam import _core
from hornbeam.base import contents, counters, progress, settings
from hornbeam.base.model_file import open_shards
from hornbeam.base.reports import SaveReport
from hornbeam.flows import marks, saves
from hornbeam.flows.recording import RecordStore
from hornbeam.flows.requests import SaveRequest


def _index_path(text: str, *, saving: bool) -> Path:
    """The path of the index; another suffix is renamed with Keras' warning."""
    path = Path(text)
    if path.suffix != ".json":
        new = path.with_suffix(".json")
        warnings.warn(
            f"{'Saving' if saving else 'Loading'} sharded weights requires `*.json` as the extension. "
            f"The original path: {path!s} will be renamed to {new!s}.",
            stacklevel=2,
        )
        path = new
    return path


def save_weights(request: SaveRequest) -> SaveReport:
    """Writes the weights in shards of at most `max_shard_size` GB (1024³ bytes) and their index.

    Every shard is complete before the first takes its place; the old index goes first and the new one comes last, so
    that an interrupted replacement is refused instead of mixing two saves.

    Raises:
        NotOurs: Where stock Keras has to do it; nothing was touched.
        ValueError: When a single value exceeds the size.
    """
    assert request.max_shard_size is not None
    request.refuse_writer("shards")
    saves.check_weights(request)
    path = _index_path(str(request.target), saving=True)
    with saves.recorded(request, assets=False) as (store, _):
        shards, weight_map, total = _split(store, path, request.max_shard_size * 1024**3)
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=4)
        planned = [(str(path.with_name(name)), shard, _core.plan(**saves.layout(shard))) for name, shard in shards]
        marks.refuse_complete(request, [path, *(name for name, *_ in planned)])
        return write(planned, path, index.encode(), store.report)


def write(
    planned: list[tuple[str, RecordStore, _core.Plan]],
    path: Path,
    index: bytes,
    report: SaveReport,
) -> SaveReport:
    """Writes planned shards, then the index at `path`, as `save_weights` promises."""
    options = settings.current()
    running: list[tuple[_core.Save, int]] = []
    nbytes = sum(plan.nbytes for *_, plan in planned)
    with progress.watch("save", str(path), nbytes, lambda: sum(save.written for save, _ in running)):
        for name, shard, plan in planned:
            save = plan.start(
                name,
                saves.buffers(shard),
                archive=False,
                atomic=options.atomic,
                durable=options.durable,
            )
            running.append((save, 0))
            info = save.finish([], saves.puller(shard), commit=False)
            running[-1] = save, info["bytes"]
            shard.report = report
            shard.note_casts(info["casts"])
    saved = [save for save, _ in running]
    placed = _core.commit_indexed(saved, path, index, atomic=options.atomic, durable=options.durable)
    for name, how in zip([*(name for name, *_ in planned), str(path)], placed, strict=True):
        saves.log_placed(*how, name)
    total, tensors = sum(nbytes for _, nbytes in running), sum(len(shard.datasets) for _, shard, _ in planned)
    report.path, report.engine, report.tensors, report.bytes = str(path), planned[0][2].engine, tensors, total
    for i, ((_, shard, plan), (_, nbytes)) in enumerate(zip(planned, running, strict=True)):
        counters.count(engine=plan.engine, saves=int(i == 0), bytes_written=nbytes, tensors_written=len(shard.datasets))
    return report


def _split(store: RecordStore, path: Path, limit: float) -> tuple[list[tuple[str, RecordStore]], dict[str, Any], float]:
    """Distributes the values as Keras' `ShardedH5IOStore` does: in order, a new shard when the next does not fit."""
    base = path.stem.replace(".weights", "")
    shards: list[tuple[str, RecordStore]] = []

    def new_shard() -> RecordStore:
        shards.append((f"{base}_{len(shards):05}.weights.h5", RecordStore()))
        if "" in store.groups:  # what the root says, each says
            shards[-1][1].groups[""] = store.groups[""]
        return shards[-1][1]

    current, size, total = new_shard(), 0.0, 0.0
    weight_map: dict[str, Any] = {}
    for kind, place in store.order:
        if kind == "group":
            current.groups[place] = store.groups[place]
            continue
        if place not in store.datasets:
            continue  # deleted again
        dataset = store.datasets[place]
        nbytes = math.prod(dataset.shape) * dtype_utils.dtype_size(dataset.name) / 8
        total += nbytes
        group, _, key = place.rpartition("/")
        if nbytes > limit:
            raise ValueError(
                f"The size of {key} is {saving_lib.readable_memory_size(nbytes)} which exceeds the maximum "
                f"shard size {saving_lib.readable_memory_size(limit)}. You can increase the `max_shard_size` "
                "parameter to accommodate the size."
            )
        size += nbytes
        if size > limit:
            current, size = new_shard(), nbytes
        current.datasets[place] = dataset
        name = shards[-1][0]
        known = weight_map.get(f"/{group}")
        if known is None:
            weight_map[f"/{group}"] = name
        else:  # a list from the second value on, also in one shard
            names = [known] if isinstance(known, str) else known
            weight_map[f"/{group}"] = names if name in names else [*names, name]
    return shards, weight_map, total


def open_weights(place: Any) -> list[tuple[str, _core.Weights]]:
    """Opens every shard that the index names.

    Raises:
        ValueError: When the index is malformed or names a file elsewhere.
        FileNotFoundError: When a shard is missing.
    """
    with contents.explained(place, "shards"):
        return open_shards(_index_path(str(place), saving=False), "h5")
