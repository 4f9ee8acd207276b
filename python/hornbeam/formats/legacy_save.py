"""Saving Keras' legacy HDF5 format: the attributes, groups and datasets of `legacy_h5_format`, in one pass.

The configuration is what Keras' own serialiser makes of the model, but for what Keras could not read back: classes of
its own that the format's names do not lead to (operations, layers of `keras.applications`) are described as in
`.keras`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras.src import layers as _layers
from keras.src.legacy.saving import json_utils, legacy_h5_format, saving_options, saving_utils
from keras.src.legacy.saving import serialization as legacy_serialization
from keras.src.saving import object_registration, saving_lib, serialization_lib
from keras.src.utils import io_utils

from hornbeam import _core
from hornbeam.base import settings, writer
from hornbeam.base.file_objects import Stream, path_of
from hornbeam.base.reports import SaveReport
from hornbeam.errors import UnsupportedError
from hornbeam.flows import casts, saves
from hornbeam.flows.recording import Dataset, RecordStore
from hornbeam.flows.requests import SaveRequest
from hornbeam.seam import patches
from hornbeam.seam.operation import NotOurs, changed, running
from hornbeam.values import tensors

#: Bytes that a row of strings may take in an object header; Keras counts the strings, HDF5 16 bytes for each.
_HEADER = legacy_h5_format.HDF5_OBJECT_HEADER_LIMIT


def unsupported(filepath: Any) -> str | None:
    """Why stock Keras must do it, if it must."""
    if isinstance(filepath, Stream):
        return None
    if not isinstance(filepath, str | os.PathLike):
        return "an open HDF5 file"
    if saving_lib.file_utils.is_remote_path(str(filepath)):
        return "remote path"
    return None


def save_model(request: SaveRequest, *, overwrite: bool = True) -> SaveReport | None:
    """Writes a whole model; the old file stays until the new one is complete.

    Returns:
        What was saved; `None` where the user keeps the old file.

    Raises:
        NotOurs: Where stock Keras has to do it; nothing was touched.
    """
    filepath, model = request.target, request.model
    request.refuse_writer("the legacy HDF5 format")
    writer.wait_for(filepath)
    if request.dtype == "bfloat16":
        raise UnsupportedError(
            f"Legacy HDF5 files have no bfloat16: save as float16, or to a `.keras` file. Received: {filepath}"
        )
    reason = unsupported(filepath)
    if reason is not None:
        beyond = dataclasses.replace(request, include_optimizer=True).beyond()  # that, stock Keras does as well
        raise NotOurs(reason, beyond, filepath if isinstance(filepath, str) else None)
    text = str(filepath)
    if not overwrite and os.path.isfile(text) and not io_utils.ask_to_proceed_with_overwrite(text):
        return None
    options = settings.current()
    with patches.collector_rests():
        file = record(model, request.include_optimizer)
        file.store.report = casts.narrow(file.store, request)
        if not request.include_optimizer and getattr(model, "optimizer", None) is not None:
            file.store.report.left_out = [f"optimizer_weights/{v.path}" for v in model.optimizer.variables]
        plan = _core.plan(
            list(file.groups.items()),
            [(path, d.dtype, d.shape, []) for path, d in file.store.datasets.items()],
            engine=options.engine,
            compression=options.compression,
            shuffle=options.shuffle,
            chunk_bytes=options.chunk_bytes,
            casts=file.store.casts(),
        )
        if not isinstance(filepath, Stream):
            _core.make_directories(os.path.dirname(text) or ".", durable=options.durable)
        info = saves.write_image(plan, file.store, filepath)
    return saves.make_report(plan, file.store, info, path_of(filepath))


class Recorded:
    """What a legacy file will hold.

    Attributes:
        groups: Every group, with its attributes; the root is `""`.
        store: The datasets.
    """

    def __init__(self) -> None:
        self.groups: dict[str, list[tuple[str, _core._Value]]] = {"": []}
        self.store = RecordStore()

    def group(self, path: str) -> None:
        """Adds an empty group."""
        if path in self.groups:
            raise ValueError(f"Unable to create group (name already exists): {path}")
        self.groups[path] = []

    def row(self, path: str, name: str, strings: list[bytes]) -> None:
        """An attribute of many strings; one that is too long is split as Keras splits it."""
        holder = _Holder()
        legacy_h5_format.save_attributes_to_hdf5_group(holder, name, strings)
        if len(holder.attrs) == 1 and 16 * len(strings) > _HEADER:  # where h5py fails
            parts = np.array_split(np.asarray(strings), 16 * len(strings) // _HEADER + 1)
            holder.attrs = {f"{name}{i}": part for i, part in enumerate(parts)}
        for key, value in holder.attrs.items():
            fixed = isinstance(value, np.ndarray)
            self.groups[path].append((key, (value.dtype.itemsize, value.tolist()) if fixed else list(value)))

    def variables(self, path: str, variables: list[Any]) -> None:
        """A group of variables, under their own names."""
        names: dict[str, Any] = {}
        for variable in variables:
            name, n = str(variable.path), 0
            while name in names:  # h5py fails; a name is only a name
                n += 1
                name = f"{variable.path}_{n}"
            names[name] = variable
        self.row(path, "weight_names", [name.encode() for name in names])
        for name, variable in names.items():
            place = f"{path}/{name}"
            if place in self.store.datasets:
                raise ValueError(f"Unable to create dataset (name already exists): {place}")
            self.store.note(place, Dataset(tensors.view(variable), variable))


class _Holder:
    """What Keras' code sets attributes on."""

    def __init__(self) -> None:
        self.attrs: dict[str, Any] = {}


def record(model: Any, include_optimizer: bool) -> Recorded:
    """Notes all that `save_model_to_hdf5` writes, in its order; copies no tensor that can be shared."""
    file = Recorded()
    with saving_options.keras_option_scope(use_legacy_config=True), _readable():
        metadata = saving_utils.model_metadata(model, include_optimizer=False)
        metadata["model_config"].update(_beyond_names(model))
        if include_optimizer and getattr(model, "optimizer", False) and model.compiled:
            metadata["training_config"] = _training_config(model)
    for key, value in metadata.items():
        file.groups[""].append((key, _encode(value) if isinstance(value, dict | list | tuple) else value))
    root = "model_weights"
    file.group(root)
    file.row(root, "layer_names", [layer.name.encode() for layer in model.layers])
    file.groups[root] += [("backend", keras.backend.backend().encode()), ("keras_version", _version())]
    for layer in sorted(model.layers, key=lambda layer: layer.name):
        file.group(f"{root}/{layer.name}")
        file.variables(f"{root}/{layer.name}", legacy_h5_format._legacy_weights(layer))
    file.group(f"{root}/top_level_model_weights")
    file.variables(f"{root}/top_level_model_weights", top_level_weights(model))
    optimizer = getattr(model, "optimizer", None)
    if include_optimizer and optimizer is not None and optimizer.variables:
        file.group("optimizer_weights")
        file.variables("optimizer_weights", optimizer.variables)
    return file


def top_level_weights(model: Any) -> list[Any]:
    """The model's own variables that are among its weights."""
    known = {id(v) for v in model.weights}
    return [v for v in model._trainable_variables + model._non_trainable_variables if id(v) in known]


def _version() -> bytes:
    return str(keras.__version__).encode()


def _encode(config: Any) -> bytes:
    try:
        return _core.encode_json(config)
    except TypeError:  # holds what only Keras' hook knows how to write
        return json.dumps(config, default=json_utils.get_json_type).encode()


def _training_config(model: Any) -> dict[str, Any]:
    """As in `saving_utils.model_metadata`, which takes the optimizer out of the live model's configuration."""
    config = {name: value for name, value in model._compile_config.config.items() if name != "optimizer"}
    serialized: dict[str, Any] = saving_utils._serialize_nested_config(config)
    serialized["optimizer_config"] = {
        "class_name": object_registration.get_registered_name(model.optimizer.__class__),
        "config": model.optimizer.get_config(),
    }
    return serialized


def _beyond_names(model: Any) -> dict[str, Any]:
    """What it takes to build a model of somebody else's class; Keras does not look at it."""
    extra = {}
    registered = object_registration.get_registered_name(type(model))
    if registered in object_registration.GLOBAL_CUSTOM_OBJECTS:
        extra["registered_name"] = registered
    if not isinstance(model, keras.Sequential) and model._obj_type() != "Functional":
        build_config = model.get_build_config()
        if build_config is not None:
            extra["build_config"] = serialization_lib.serialize_dict(build_config)
    return extra


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """This thread's legacy serialiser describes fully what the format's names do not lead to."""
    with _serialize_patch(legacy_serialization, "serialize_keras_object"), changed(describes=True):
        yield


def _serialize(original: Callable[..., Any]) -> Callable[..., Any]:
    """`legacy_serialization.serialize_keras_object`, which calls itself through its module."""

    def serialize(instance: Any) -> Any:
        if running().describes and isinstance(instance, keras.Operation) and not _has_name(type(instance)):
            return serialization_lib.serialize_keras_object(instance)
        return original(instance)

    return serialize


_serialize_patch = patches.Patch(_serialize)


def _has_name(cls: type) -> bool:
    """Whether Keras finds the class again by its name; of other people's classes, that is for them to see to."""
    if not cls.__module__.startswith("keras.") or cls.__name__ in ("Functional", "Model", "Sequential"):
        return True
    return getattr(_layers, cls.__name__, None) is cls
