"""Weights as safetensors: `x.safetensors`, or shards and `x.safetensors.index.json`, as Hugging Face lays them out.

A tensor's name is the path of its variable; what is no variable has the path that it has in `.weights.h5`. Which path
each name stands for there is in the metadata, so that a file also fits a model whose automatic names differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
from keras.src.saving import saving_lib
from keras.src.utils import io_utils

from hornbeam import _core
from hornbeam.base import contents, settings, writer
from hornbeam.base.file_objects import Stream, path_of
from hornbeam.base.model_file import open_shards, read_index
from hornbeam.base.reports import LoadReport, SaveReport
from hornbeam.errors import InvalidError, UnsupportedError, WeightsFileError
from hornbeam.flows import loads, marks, saves
from hornbeam.flows.recording import Attributes, RecordStore
from hornbeam.flows.requests import LoadRequest, SaveRequest
from hornbeam.flows.selections import Structure
from hornbeam.formats.shards import write
from hornbeam.seam import entry, targets

_SUFFIX = ".safetensors"
_INDEX = f"{_SUFFIX}.index.json"
#: Entry of the metadata: path in `.weights.h5` → name, as JSON.
_PATHS = "keras_paths"


def save_weights(request: SaveRequest, *, overwrite: bool = True) -> SaveReport | None:
    """Saves the weights and the optimizer's state, as `.weights.h5` does.

    With `max_shard_size`, which counts the bytes of the tensors, what fits into one shard, at a path that ends in
    `.safetensors`, is one file without an index.

    Args:
        request: What is asked for.
        overwrite: Replace what exists, shards and index included, without asking.

    Returns:
        What was saved; `None` where the user keeps the old files.

    Raises:
        ValueError: For a model that is not built, and when two variables have one name.
    """
    text, size = str(request.target), request.max_shard_size
    if not request.model.built:
        entry.original(targets.SAVING_LIB, "save_weights_only")(request.model, text)  # raises
    if text.endswith(_INDEX) and size is None:
        raise ValueError(
            f"The filename must end in `{_SUFFIX}`, or `max_shard_size` be specified. Received: filepath={text}"
        )
    _check_local(text)
    request.refuse_writer("safetensors")
    writer.wait_for(text)
    if settings.current().compression is not None:
        raise UnsupportedError(f"safetensors files are not compressed. Received: {text}")
    with saves.recorded(request, assets=False) as (store, _):
        named = _name(store)
        shards = _split(named, None if size is None else size * 1024**3)
        places = None if len(shards) == 1 and text.endswith(_SUFFIX) else _Places(text, len(shards))
        single = [] if isinstance(request.target, Stream) else [Path(text)]
        replaced = single if places is None else places.replaced()
        # One file is loaded instead of the shards that an index beside it names.
        hides = replaced is single and not os.path.exists(text)
        hidden = [f"{text.removesuffix(_SUFFIX)}{_INDEX}"] if hides else []
        marks.refuse_complete(request, [*replaced, *hidden] if replaced else [request.target])
        there = ", ".join(str(path) for path in replaced if path.exists())
        if there and not overwrite and not io_utils.ask_to_proceed_with_overwrite(there):
            return None
        return _save_one(named, request.target) if places is None else _save_shards(shards, places)


def _check_local(text: str) -> None:
    if saving_lib.file_utils.is_remote_path(text):
        raise UnsupportedError(f"safetensors files are saved and loaded at local paths only. Received: {text}")


class _Named(RecordStore):
    """What goes into one file, by the names that the tensors have there."""

    def __init__(self, report: SaveReport, groups: dict[str, Attributes]) -> None:
        super().__init__()
        self.report = report
        self.groups = groups  # the root's attributes become metadata
        self.paths: dict[str, str] = {}  # path in `.weights.h5` → name

    @property
    def nbytes(self) -> int:
        return sum(d.nbytes for d in self.datasets.values())

    def plan(self) -> _core.Plan:
        metadata = [("format", "keras"), ("keras_version", keras.__version__), (_PATHS, json.dumps(self.paths))]
        metadata += self.groups.get("", [])
        rows = [(name, d.dtype, d.shape, [("dtype", d.name)]) for name, d in self.datasets.items()]
        return _core.plan([("__metadata__", metadata)], rows, engine="safetensors", casts=self.casts())


def _name(store: RecordStore) -> _Named:
    """Gives everything its name.

    Raises:
        InvalidError: When two variables have the same.
    """
    named = _Named(store.report, store.groups)
    named.paths = _names({path: dataset.variable for path, dataset in store.datasets.items()}, store)
    first: dict[str, str] = {}
    for path, name in named.paths.items():
        dataset = store.datasets[path]
        if name not in named.datasets:
            named.datasets[name] = dataset
            first[name] = path
        elif dataset.variable is None or dataset.variable is not named.datasets[name].variable:
            raise InvalidError(
                f"Two variables of the model are called '{name}', and in a safetensors file names are all there is: "
                f"those that `.weights.h5` calls '{first[name]}' and '{path}'. Give the layers names of their own, or "
                "save to `.weights.h5`."
            )
    return named


def _names(values: Mapping[str, Any], store: RecordStore) -> dict[str, str]:
    """Path in `.weights.h5` → name: a variable's own path; some optimizers call several of theirs the same."""
    names = {path: getattr(value, "path", path) for path, value in values.items()}
    variables: dict[str, set[int]] = {}
    for path, name in names.items():
        variables.setdefault(name, set()).add(id(values[path]))
    return {
        path: path if store.is_optimizer(path) and len(variables[name]) > 1 else name for path, name in names.items()
    }


def _split(named: _Named, limit: float | None) -> list[_Named]:
    """Distributes the tensors: in order, a new shard when the next does not fit."""
    if limit is None:
        return [named]
    shards: list[_Named] = []
    size = 0.0
    where: dict[str, _Named] = {}
    for name, dataset in named.datasets.items():
        if dataset.nbytes > limit:
            raise ValueError(
                f"The size of {name} is {saving_lib.readable_memory_size(dataset.nbytes)} which exceeds the maximum "
                f"shard size {saving_lib.readable_memory_size(limit)}. You can increase the `max_shard_size` "
                "parameter to accommodate the size."
            )
        size += dataset.nbytes
        if not shards or size > limit:
            shards.append(_Named(named.report, named.groups))
            size = dataset.nbytes
        shards[-1].datasets[name] = dataset
        where[name] = shards[-1]
    for path, name in named.paths.items():
        where[name].paths[path] = name
    return shards or [named]


def _save_one(named: _Named, place: str | Stream) -> SaveReport:
    plan = named.plan()
    info = saves.write_image(plan, named, place)
    return saves.make_report(plan, named, info, path_of(place))


class _Places:
    """Where shards and their index go, and what has to go for them.

    Attributes:
        index: The index.
        shards: The shards, in order.
        stale: What no index names any more, and the single file if that is what was asked for: it would be taken for
            this save. Who names the index keeps a file of that name, which may be anything.
    """

    def __init__(self, text: str, count: int) -> None:
        base = Path(text.removesuffix(_INDEX).removesuffix(_SUFFIX))
        self.index = base.with_name(f"{base.name}{_INDEX}")
        self.shards = [base.with_name(f"{base.name}-{i:05}-of-{count:05}{_SUFFIX}") for i in range(1, count + 1)]
        single = base.with_name(f"{base.name}{_SUFFIX}")
        old = [self.index.with_name(name) for name in _old_shards(self.index, base.name)]
        self.stale = [path for path in old if path not in self.shards]
        if not text.endswith(_INDEX):
            self.stale.append(single)
        elif single.exists():
            warnings.warn(
                f"'{single}' is left as it is; programs that look for one file before an index will take it for these "
                "weights. Remove it, or save under another name.",
                stacklevel=2,
            )

    def replaced(self) -> list[Path]:
        """What is written over or removed, where it exists."""
        return [self.index, *self.shards, *self.stale]


def _save_shards(shards: list[_Named], places: _Places) -> SaveReport:
    """Every shard is complete before the first takes its place; the old index goes first, the new one comes last."""
    named = list(zip(places.shards, shards, strict=True))
    weight_map = {tensor: path.name for path, shard in named for tensor in shard.datasets}
    total = sum(shard.nbytes for shard in shards)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    files = [(str(path), shard, shard.plan()) for path, shard in named]
    report = write(files, places.index, index.encode(), shards[0].report)
    for path in places.stale:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    return report


def _old_shards(index_path: Path, base: str) -> list[str]:
    """The shards of an older save to the same place."""
    try:
        _, names = read_index(index_path)
    except (OSError, ValueError):
        return []
    return [name for name in names if name.startswith(f"{base}-") and name.endswith(_SUFFIX)]


def load_weights(request: LoadRequest) -> LoadReport:
    """Loads weights; everything is read before the model is touched. An index stands in for a file that is not there.

    Raises:
        ValueError: When the file does not fit the model.
        OSError: For a damaged file.
    """
    _check_local(str(request.source))
    if not request.model.built:
        entry.original(targets.SAVING_LIB, "load_weights_only")(request.model, str(request.source))  # raises
    return loads.load_weights(request, open_weights, Names)


def open_weights(place: str | Stream) -> list[tuple[str, _core.Weights]]:
    """The file, or the shards that the index names.

    Raises:
        WeightsFileError: When a tensor that the index names is not there.
    """
    text = str(place)
    index = Path(f"{text.removesuffix(_SUFFIX)}{_INDEX}" if text.endswith(_SUFFIX) else text)
    alone = isinstance(place, Stream) or os.path.exists(text) or not index.exists()
    if text.endswith(_SUFFIX) and alone:
        return [(text, contents.open_weights(place, "safetensors"))]
    with contents.explained(place, "shards" if text.endswith(".json") else "safetensors"):
        return open_shards(index, "safetensors")


class Names:
    """What the names in a file stand for: the model's variables by their paths.

    Where those are not what the model has (automatic names count on: `dense_1`), the places in the model that the
    metadata gives, if all are there: never half by the one and half by the other. The same for the optimizer's state,
    whatever the optimizer itself is called.

    Attributes:
        targets: Name → paths in the model.
    """

    def __init__(
        self,
        opened: list[tuple[str, _core.Weights]],
        structure: Structure,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        by_name: bool,
    ) -> None:
        there = _paths(opened)
        self._places = {name: path for path, name in there.items()}
        in_model = _names(structure.values, structure)
        weights = {path: name for path, name in in_model.items() if not structure.is_optimizer(path)}
        slots = {path: name for path, name in in_model.items() if structure.is_optimizer(path)}
        in_file = {path for path in there if structure.is_optimizer(path)}
        if marks.is_part(opened):  # what the file has is all there is to fit
            names = shapes.keys() - {there[path] for path in in_file}
            slots = {path: name for path, name in slots.items() if path in in_file}
            fits, placed = names <= set(weights.values()), there.keys() - in_file <= weights.keys()
        else:
            fits, placed = shapes.keys() >= set(weights.values()), there.keys() >= weights.keys()
        if slots and in_file and in_file != slots.keys():
            warnings.warn("Skipping the optimizer's state: the file has other variables for it.", stacklevel=2)
            slots = {}
        by_place = not by_name and not fits and placed
        if not by_name and placed and fits:
            _warn_of_counts(weights, there)
        if by_place:
            weights = {path: there[path] for path in weights if path in there}
            same = all(shapes.get(there.get(path, "")) == tuple(structure.values[path].shape) for path in slots)
            slots = {path: there[path] for path in slots} if same else {}
        elif not shapes.keys() >= set(slots.values()):
            same = all(_slot(there.get(path, "")) == _slot(name) for path, name in slots.items())
            slots = {path: there[path] for path in slots} if same else {}
        targets: dict[str, list[str]] = {}
        for path, name in (*weights.items(), *slots.items()):
            targets.setdefault(name, []).append(path)
        self.targets: Mapping[str, list[str]] = targets

    def place(self, name: str) -> str:
        """Where the file says that a name belongs; its name, if it does not."""
        return self._places.get(name, name)


def _warn_of_counts(in_model: Mapping[str, str], in_file: Mapping[str, str]) -> None:
    """Warns where names fit, but differ by their counts (`dense`, `dense_1`) from those of the same places."""
    differ = [path for path, name in in_model.items() if in_file.get(path, name) != name]
    found = next((p for p in differ if _without_numbers(in_model[p]) == _without_numbers(in_file[p])), None)
    if found is not None:
        warnings.warn(
            f"Names and places disagree: what was saved as '{in_file[found]}' is '{in_model[found]}' in the model. The "
            "weights are loaded by name. If the names are automatic, build the model as when it was saved (after "
            "`keras.utils.clear_session()`), or give the layers names of their own.",
            stacklevel=2,
        )


def _without_numbers(name: str) -> str:
    return re.sub(r"_\d+(?=/|$)", "", name)


def _slot(name: str) -> str:
    """The name without the optimizer's."""
    return name.partition("/")[2]


def _paths(opened: list[tuple[str, _core.Weights]]) -> dict[str, str]:
    """Path in `.weights.h5` → name, as the metadata has it; empty for files of other programs."""
    found: dict[str, str] = {}
    for name, weights in opened:
        text = dict(weights.attributes).get(_PATHS)
        paths = _core.decode_json(text, trusted=False) if isinstance(text, str) else {}
        if not isinstance(paths, dict) or not all(isinstance(value, str) for value in paths.values()):
            raise WeightsFileError(f"'{name}': its metadata '{_PATHS}' maps no paths to names")
        found.update(paths)
    return found
