"""Loading Keras' legacy HDF5 format: whole models, and weights by their order or by the names of layers.

A load is planned from the index, and every count and shape compared, before a variable gets its value. Messages of
errors and warnings are those of `legacy_h5_format`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np
from absl import logging
from keras.src import layers
from keras.src.backend.common import global_state
from keras.src.legacy.saving import json_utils, legacy_h5_format, saving_options, saving_utils
from keras.src.models import Functional
from keras.src.saving import object_registration, serialization_lib

from hornbeam import _core
from hornbeam.base import contents, dtypes, progress, settings, writer
from hornbeam.base.file_objects import path_of
from hornbeam.base.reports import LoadReport
from hornbeam.flows import loads, parts
from hornbeam.flows.requests import LoadRequest
from hornbeam.flows.serving import Image, LoadStore
from hornbeam.flows.untrained import is_untrained
from hornbeam.formats.legacy_save import top_level_weights, unsupported
from hornbeam.seam import assignments, building, keras2, patches
from hornbeam.values import ownership

_OPTIMIZER = "optimizer_weights"
#: Names that `compile` understands without knowing a function of that name.
_METRIC_NAMES = ("accuracy", "acc", "crossentropy", "ce")


def load_model(request: LoadRequest) -> tuple[Any, LoadReport]:
    """Loads a whole model.

    Raises:
        NotOurs: Where stock Keras has to do it; nothing was touched.
    """
    filepath, compile = request.source, request.compile
    writer.wait_for(filepath, loads=True)
    reason = unsupported(filepath)
    if reason is not None:
        raise loads.not_ours(request, reason, filepath if isinstance(filepath, str) else None)
    text = str(filepath)
    report = LoadReport(path_of(filepath))
    weights = contents.open_weights(filepath, "h5")
    attributes = dict(weights.attributes)
    if "model_config" not in attributes:
        raise ValueError(
            f"No model config found in the file at {filepath}. It has weights and no architecture: build the model, "
            "and call `model.load_weights` with it."
        )
    known = {**(request.custom_objects or {}), **object_registration.GLOBAL_CUSTOM_OBJECTS}
    known.update(global_state.get_global_attribute("custom_objects_scope_dict", {}))
    with ExitStack() as stack:
        journal = stack.enter_context(assignments.journal(undoable=False))
        stack.enter_context(building.scope())
        file = _File(weights, text)
        stack.callback(file.store.close)
        image, verify = file.image, settings.current().verify
        first = {i for path, i in file.where.items() if compile or _is_no_slot(path)} - image.decoded
        image.read(None if verify else first, check=verify, read_ahead=loads.read_ahead_limit())
        stack.enter_context(progress.watch("load", report.path, lambda: image.nbytes, lambda: image.done))
        report.stage("open")
        config = _decode(attributes["model_config"], attributes.get("keras_version"), known)
        safe = serialization_lib.SafeModeScope(request.safe_mode)
        with saving_options.keras_option_scope(use_legacy_config=True), safe:
            model = _model_from_config(config, known)
            report.stage("build")
            steps = file.by_order("model_weights", model, skip_mismatch=False)
        if not verify:
            image.read(_numbers(steps) & image.decoded, check=False, read_ahead=loads.read_ahead_limit())
        file.assign(steps)
        if compile:
            with safe:
                _compile(model, attributes.get("training_config"), known, file)
        file.store.complete(drop_rest=True)
        untrained = _untrained(model, journal, file)
        report.stage("assign")
    report.initialised = [v.path for v in loads.variables(model) if id(v) not in journal.assigned]
    outside = () if model.compiled else (f"{_OPTIMIZER}/",)
    _fill_report(report, request, journal, file, model, outside=outside, untrained=untrained)
    return model, report


def _untrained(model: Any, journal: assignments.Journal, file: _File) -> AbstractSet[int]:
    """As in `flows.loads`."""
    variables = {id(v) for v in getattr(model.optimizer, "variables", ())} if model.compiled else set()
    if not variables or variables & journal.assigned.keys() or _OPTIMIZER not in file.groups:
        return set()
    found = [i for _, i in file.datasets(_OPTIMIZER)]

    def stored(_optimizer: Any, count: int) -> list[np.ndarray] | None:
        return [file.image.take(i) for i in found] if len(found) == count else None

    if not is_untrained(model.optimizer, stored, nested=False):
        return set()
    file.store.taken.update(file.image.datasets[i][0] for i in found)
    return variables


def load_weights(request: LoadRequest) -> LoadReport:
    """Loads weights: everything is read and checked before the model is touched.

    Raises:
        NotOurs: Where stock Keras has to do it; nothing was touched.
    """
    model, filepath, skip_mismatch = request.model, request.source, request.skip_mismatch
    writer.wait_for(filepath, loads=True)
    reason = unsupported(filepath)
    if reason is not None:
        raise loads.not_ours(request, reason, str(filepath))
    text = str(filepath)
    report = LoadReport(path_of(filepath))
    weights = contents.open_weights(filepath, "h5")
    with ExitStack() as stack:
        file = _File(weights, text)
        stack.callback(file.store.close)
        image = file.image
        inside = not any(name == "layer_names" for name, _ in weights.attributes) and "model_weights" in file.groups
        root = "model_weights" if inside else ""
        plan = file.by_name if request.by_name else file.by_order
        if request.name_map is not None:
            steps = file.by_map(root, model, request, skip_mismatch=skip_mismatch)
        else:
            steps = plan(root, model, skip_mismatch=skip_mismatch)
        steps = _part_of(steps, model, request)
        verify = settings.current().verify
        image.read(None if verify else _numbers(steps), check=verify, read_ahead=loads.ALL)
        stack.enter_context(progress.watch("load", text, lambda: image.nbytes, lambda: image.done))
        report.stage("open")
        file.store.complete(drop_rest=False)
        report.stage("read")
        stack.enter_context(patches.collector_rests())
        journal = stack.enter_context(assignments.journal(undoable=True))
        for step in steps:
            journal.visit(step.owner, step.group)
        file.assign(steps)
        report.stage("assign")
        _fill_report(report, request, journal, file, model, outside=(f"{_OPTIMIZER}/",))
    return report


def _is_no_slot(path: str) -> bool:
    return not path.startswith(f"{_OPTIMIZER}/")


@dataclasses.dataclass
class _Step:
    """What one layer gets.

    Attributes:
        owner: The layer, or the model.
        group: Its group in the file.
        values: `(variable, number of the dataset)`.
        whole: All its variables, also those that get nothing.
    """

    owner: Any
    group: str
    values: list[tuple[Any, int]]
    whole: list[Any]


def _numbers(steps: list[_Step]) -> set[int]:
    """The datasets that are assigned."""
    return {i for step in steps for _, i in step.values}


class _File:
    """A legacy file that is being read."""

    def __init__(self, weights: _core.Weights, name: str) -> None:
        self.image = Image(weights, name)
        self.store = LoadStore([self.image])
        self.groups = {path: dict(attributes) for path, attributes in weights.groups()}
        self.groups[""] = dict(weights.attributes)
        self.where = {path: i for i, (path, *_) in enumerate(self.image.datasets)}
        self.mismatched: list[tuple[str, str]] = []

    def shape(self, i: int) -> tuple[int, ...]:
        return tuple(self.image.datasets[i][2])

    def names(self, group: str, name: str) -> list[str]:
        """As `load_attributes_from_hdf5_group`."""
        attributes = self.groups[group]
        if name in attributes:
            return _strings(attributes[name], group, name)
        names, n = [], 0
        while f"{name}{n}" in attributes:
            names += _strings(attributes[f"{name}{n}"], group, f"{name}{n}")
            n += 1
        return names

    def group(self, parent: str, name: str) -> str:
        """As `safe_get_h5_group`."""
        path = _join(parent, name)
        if path in self.where:
            raise ValueError(f"Invalid H5 file, expected Group but found a dataset at '{path}'")
        if path not in self.groups:
            raise KeyError(name)
        return path

    def datasets(self, group: str) -> list[tuple[str, int]]:
        """`(name, number)` of what a group says that it holds."""
        found = []
        for name in self.names(group, "weight_names"):
            path = _join(group, name)
            if path in self.groups:
                raise ValueError(f"Invalid H5 file, expected Dataset, received a group at '{path}'")
            if path not in self.where:
                raise KeyError(name)
            found.append((name, self.where[path]))
        return found

    def by_order(self, root: str, model: Any, *, skip_mismatch: bool) -> list[_Step]:
        """As `load_weights_from_hdf5_group`: the layers that have weights, one after the other."""
        root = self.group("", root) if root else root
        layers = [(layer, weights) for layer in model.layers if (weights := legacy_h5_format._legacy_weights(layer))]
        named = [(name, self.group(root, name)) for name in self.names(root, "layer_names")]
        saved = [(name, group) for name, group in named if self.names(group, "weight_names")]
        if len(saved) != len(layers):
            raise ValueError(
                "Layer count mismatch when loading weights from file. "
                f"Model expected {len(layers)} layers, found {len(saved)} saved layers."
            )
        steps = []
        for k, ((name, group), (layer, variables)) in enumerate(zip(saved, layers, strict=True)):
            found = self.datasets(group)
            if len(found) != len(variables):
                raise ValueError(
                    f"Weight count mismatch for layer #{k} (named {layer.name} in "
                    f"the current model, {name} in the save file). "
                    f"Layer expects {len(variables)} weight(s). Received "
                    f"{len(found)} saved weight(s)"
                )
            label = f"layer #{k} (named {layer.name})"
            steps.append(self.step(layer, group, variables, found, label, skip_mismatch))
        place = _join(root, "top_level_model_weights")
        if place in self.groups:
            variables, found = top_level_weights(model), self.datasets(place)
            if len(found) != len(variables):
                raise ValueError(
                    "Weight count mismatch for top-level weights when loading "
                    "weights from file. "
                    f"Model expects {len(variables)} top-level weight(s). "
                    f"Received {len(found)} saved top-level weight(s)"
                )
            steps.append(self.step(model, place, variables, found, "top-level model", skip_mismatch))
        return steps

    def by_name(self, root: str, model: Any, *, skip_mismatch: bool) -> list[_Step]:
        """As `load_weights_from_hdf5_group_by_name`: layers of other names keep their values."""
        index: dict[str, list[Any]] = {}
        for layer in model.layers:
            if layer.name:
                index.setdefault(layer.name, []).append(layer)
        steps = []
        for k, name in enumerate(self.names(root, "layer_names")):
            group = self.group(root, name)
            found = self.datasets(group)
            for layer in index.get(name, []):
                variables = legacy_h5_format._legacy_weights(layer)
                if len(found) != len(variables):
                    count = f"Layer expects {len(variables)} weight(s). Received {len(found)} saved weight(s)"
                    if not skip_mismatch:
                        raise ValueError(f"Weight count mismatch for layer #{k} (named {layer.name}). {count}")
                    self.warn(
                        layer.name,
                        f"Skipping loading of weights for layer #{k} (named "
                        f"{layer.name}) due to mismatch in number of weights. {count}",
                    )
                    continue
                label = f"layer #{k} (named {layer.name})"
                steps.append(self.step(layer, group, variables, found, label, skip_mismatch))
        place = _join(root, "top_level_model_weights")
        if place in self.groups:
            variables = model._trainable_variables + model._non_trainable_variables
            found = self.datasets(place)
            if len(found) == len(variables):
                steps.append(self.step(model, place, variables, found, "top-level model", skip_mismatch))
            else:
                count = (
                    f"Model expects {len(variables)} top-level weight(s). "
                    f"Received {len(found)} saved top-level weight(s)"
                )
                if not skip_mismatch:
                    raise ValueError(f"Weight count mismatch for top-level weights of model. {count}")
                self.warn(
                    "model",
                    f"Skipping loading top-level weights for model due to mismatch in number of weights. {count}",
                )
        return steps

    def by_map(self, root: str, model: Any, request: LoadRequest, *, skip_mismatch: bool) -> list[_Step]:
        """Each dataset to the variable that `name_map` names."""
        known: dict[str, tuple[_Step, Any] | None] = {}
        steps = []
        for owner, group, variables in _owners(model):
            step = _Step(owner, _join(root, group), [], variables)
            steps.append(step)
            for variable in variables:
                for name in _names(model, group, variable):
                    same = known.get(name, (step, variable))
                    known[name] = same if same is not None and same[1] is variable else None
        name_map: Any = request.name_map
        rename = name_map if callable(name_map) else lambda name: name_map.get(name, name)
        sources: dict[int, str] = {}
        for path, i in self.where.items():
            if not _is_no_slot(path):
                continue
            name = path.removeprefix(f"{root}/") if root else path
            target = rename(name)
            if target is None or target not in known:
                continue
            entry = known[target]
            if entry is None:
                raise ValueError(f"Two variables of the model are called '{target}'.")
            step, variable = entry
            if id(variable) in sources:
                raise ValueError(f"Two tensors of the file go to '{target}': '{sources[id(variable)]}' and '{name}'.")
            sources[id(variable)] = name
            step.values += self.step(
                step.owner, step.group, [variable], [(name, i)], f"layer {step.owner.name} ", skip_mismatch
            ).values
        return [step for step in steps if step.values]

    def step(
        self,
        owner: Any,
        group: str,
        variables: list[Any],
        found: list[tuple[str, int]],
        label: str,
        skip_mismatch: bool,
    ) -> _Step:
        """As `_set_weights`, without setting them; names decide where they are exactly those of the variables."""
        numbers = dict(found)
        paths = [str(v.path) for v in variables]
        if len(numbers) == len(found) and set(paths) == numbers.keys():
            pairs = [(v, numbers[path]) for v, path in zip(variables, paths, strict=True)]
        else:  # Keras orders them by whether they are trainable, which may have changed
            pairs = [(v, i) for v, (_, i) in zip(variables, found, strict=True)]
        values = []
        for variable, i in pairs:
            expected, received = tuple(variable.shape), self.shape(i)
            if expected == received:
                values.append((variable, i))
                continue
            text = (
                f"for weight {variable.path}. "
                f"Weight expects shape {expected}. "
                "Received saved weight "
                f"with shape {received}"
            )
            if not skip_mismatch:
                raise ValueError(f"Shape mismatch in {label}{text}")
            self.warn(group, f"Skipping loading weights for {label}due to mismatch in shape {text}")
        return _Step(owner, group, values, variables)

    def warn(self, place: str, text: str) -> None:
        self.mismatched.append((place, text))
        warnings.warn(text, stacklevel=2)

    def assign(self, steps: Iterable[_Step]) -> None:
        for step in steps:
            for variable, i in step.values:
                self.assign_one(variable, i)
            if hasattr(step.owner, "finalize_state") and step.whole:
                step.owner.finalize_state()

    def assign_one(self, variable: Any, i: int) -> None:
        """Assigns a dataset; types that HDF5 has not are bytes in it, and what the variable says."""
        array = self.image.take(i)
        if array.dtype.kind == "V" and array.dtype.names is None:
            wanted = np.dtype(dtypes.extended_dtype(variable.dtype)) if _is_extended(variable.dtype) else None
            if wanted is None or wanted.itemsize != array.dtype.itemsize:
                path = self.image.datasets[i][0]
                raise ValueError(
                    f"'{path}' holds values of a type that HDF5 does not know ({array.dtype.itemsize} bytes each), and "
                    f"'{variable.path}' is of {variable.dtype}."
                )
            array = array.view(wanted)
        self.store.taken.add(self.image.datasets[i][0])
        variable.assign(ownership.give_away(array))


def _is_extended(dtype: str) -> bool:
    return dtype == "bfloat16" or dtype.startswith("float8")


def _join(parent: str, name: str) -> str:
    return f"{parent}/{name}" if parent else name


def _strings(value: Any, group: str, name: str) -> list[str]:
    rows = value[1] if isinstance(value, tuple) else value
    if not isinstance(rows, list):
        raise ValueError(f"Invalid H5 file, attribute '{name}' of '{group or '/'}' is no row of strings")
    return [row.decode("utf8") for row in rows]


def _owners(model: Any) -> list[tuple[Any, str, list[Any]]]:
    """What has weights, the name of its group, and the weights."""
    owners = [(layer, layer.name, legacy_h5_format._legacy_weights(layer)) for layer in model.layers]
    return [*owners, (model, "top_level_model_weights", top_level_weights(model))]


def _names(model: Any, group: str, variable: Any) -> list[str]:
    """What a pattern may call a variable: its path, with and without the model, and its name in a file."""
    path = str(variable.path)
    return list(dict.fromkeys([f"{group}/{path}", path.removeprefix(f"{model.name}/"), path]))


def _selected(names: list[str], request: LoadRequest) -> bool:
    return parts.selected(names, request.only, request.skip)


def _part_of(steps: list[_Step], model: Any, request: LoadRequest) -> list[_Step]:
    """What `only` and `skip` leave.

    Raises:
        ValueError: For a pattern that fits nothing.
    """
    names = {id(v): _names(model, group, v) for _, group, variables in _owners(model) for v in variables}
    parts.check(request, itertools.chain(*names.values()))
    if request.only is None and not request.skip and request.name_map is None:
        return steps
    steps_of_part = []
    for step in steps:
        values = [(v, i) for v, i in step.values if _selected(names.get(id(v), [str(v.path)]), request)]
        if values:
            steps_of_part.append(dataclasses.replace(step, values=values))
    return steps_of_part


def _fill_report(
    report: LoadReport,
    request: LoadRequest,
    journal: assignments.Journal,
    file: _File,
    model: Any,
    *,
    outside: tuple[str, ...],
    untrained: AbstractSet[int] = frozenset(),
) -> None:
    """Sorts everything into the lists of the report, and finishes it."""
    refused = tuple(f"{place}/" for place, _ in file.mismatched)
    for path in file.where:
        if path in file.store.taken:
            report.loaded.append(path)
        elif path.startswith(outside or "//"):
            report.skipped.append(path)
        elif path.startswith(refused or "//"):
            report.refused.append(path)
        else:
            (report.skipped if request.partial else report.unexpected).append(path)
    whole = model.weights if outside else loads.variables(model)
    variables = _asked_for(model, request) if request.partial else whole
    report.missing = [v.path for v in variables if id(v) not in {*journal.assigned, *untrained}]
    report.mismatched = file.mismatched
    report.unmatched = request.unmatched(name.removeprefix("model_weights/") for name in file.where)
    unfit = bool(report.missing) and request.name_map is not None and not file.mismatched
    loads.finish(report, request, journal, file.store, {}, unfit=unfit)


def _asked_for(model: Any, request: LoadRequest) -> list[Any]:
    return [
        v for _, group, variables in _owners(model) for v in variables if _selected(_names(model, group, v), request)
    ]


def _decode(text: Any, version: Any, known: dict[str, Any]) -> Any:
    """`json_utils.decode`, with the limits of the core; what Keras 2 calls differently is called as in Keras 3."""
    if not isinstance(text, str | bytes):
        raise ValueError("Invalid H5 file, a configuration is no string")
    config = _revive(_core.decode_json(text, trusted=False))
    return keras2.keras_config(config, known) if keras2.is_keras2(config, version) else config


def _revive(value: Any) -> Any:
    """Keras' hook, which sees the innermost objects first."""
    if isinstance(value, dict):
        return json_utils._decode_helper({key: _revive(item) for key, item in value.items()})
    if isinstance(value, list):
        return [_revive(item) for item in value]
    return value


def _model_from_config(config: Any, known: dict[str, Any]) -> Any:
    """`saving_utils.model_from_config`; a registered class is found also where the file has its bare name."""
    extra: dict[str, Any] = {}
    if isinstance(config, dict):
        extra = {key: config.get(key) for key in ("registered_name", "build_config")}
        name = config.get("class_name")
        if isinstance(name, str) and name not in known and not hasattr(keras.layers, name):
            found = known.get(extra["registered_name"]) if isinstance(extra["registered_name"], str) else None
            registered = {id(o): o for o in known.values() if isinstance(o, type) and o.__name__ == name}
            if found is None and len(registered) == 1:
                (found,) = registered.values()
            if isinstance(found, type) and issubclass(found, keras.Model):
                known = {**known, name: found}
    with _classes_only():
        model = saving_utils.model_from_config(config, custom_objects=known)
    if isinstance(extra.get("build_config"), dict) and not model.built:
        model.build_from_config(serialization_lib.deserialize_keras_object(extra["build_config"]))
        model.built = True
    return model


@contextmanager
def _classes_only() -> Iterator[None]:
    """A text in a configuration (`score_mode="dot"`) is no function of `keras.layers`, where Keras finds classes."""
    objects = vars(saving_utils.MODULE_OBJECTS)  # of this thread
    before = objects.pop("ALL_OBJECTS", None)
    classes = {name: found for name, found in vars(layers).items() if isinstance(found, type)}
    objects["ALL_OBJECTS"] = {**classes, "Functional": Functional, "Model": keras.Model, "Sequential": keras.Sequential}
    try:
        yield
    finally:
        del objects["ALL_OBJECTS"]
        if before is not None:
            objects["ALL_OBJECTS"] = before


def _compile(model: Any, text: Any, known: dict[str, Any], file: _File) -> None:
    """Compiles as when it was saved, and gives the optimizer its state."""
    if text is None:
        logging.warning(
            "No training configuration found in the save file, so the model was *not* compiled. Compile it manually."
        )
        return
    config = _decode(text, file.groups[""].get("keras_version"), known)
    with object_registration.CustomObjectScope(known):
        arguments = {
            "optimizer": _optimizer(config["optimizer_config"]),
            "loss": _deserialize_each(keras.losses, config.get("loss")),
            "metrics": _deserialize_each(keras.metrics, config.get("metrics")),
            "weighted_metrics": _deserialize_each(keras.metrics, config.get("weighted_metrics")),
            "loss_weights": config["loss_weights"],
        }
    if type(model).compile is keras.Model.compile:
        how = ("run_eagerly", "steps_per_execution", "jit_compile")
        arguments.update({name: config[name] for name in how if config.get(name) is not None})
    model.compile(**arguments)
    saving_utils.try_build_compiled_arguments(model)
    if model.built:
        model.optimizer.build(model.trainable_variables)
    if _OPTIMIZER in file.groups:
        _load_optimizer(model.optimizer, file)


def _deserialize_each(module: Any, config: Any) -> Any:
    return saving_utils._deserialize_nested_config(functools.partial(_deserialize_one, module), config)


def _deserialize_one(module: Any, config: Any) -> Any:
    """A loss or metric. A name stays a name, as `compile` was given it, unless it is that of a custom object."""
    if isinstance(config, str):
        custom = object_registration.get_registered_object(config)
        if custom is not None:
            return custom
        if config not in _METRIC_NAMES:
            module.get(config)  # raises for what nobody knows
        return config
    wrapped = keras2.wrapped_function(config)
    if wrapped is not None:
        return _deserialize_one(module, wrapped)
    found = module.deserialize(keras2.loss_config(config))
    if isinstance(found, str):  # no class of Keras 3
        return module.get(config["config"]["name"])
    return found


def _optimizer(config: Any) -> Any:
    config = keras2.optimizer_config(config)
    name = config["class_name"]
    cls: Any = getattr(keras.optimizers, name, None) if isinstance(name, str) else None
    of_keras = isinstance(cls, type) and issubclass(cls, keras.optimizers.Optimizer)
    if of_keras and object_registration.get_registered_object(name) is None:
        return cls.from_config(config["config"])  # Keras' own table of names lacks some of its classes
    return keras.optimizers.deserialize(config)


def _load_optimizer(optimizer: Any, file: _File) -> None:
    """The optimizer's variables, in their order; by name where the names are exactly theirs."""
    found = file.datasets(_OPTIMIZER)
    variables = list(optimizer.variables)
    pairs = keras2.slots(optimizer, found)
    if pairs is None and len(found) == len(variables):
        pairs = [(v, i) for v, (_, i) in zip(variables, found, strict=True)]
    if pairs is None or any(tuple(v.shape) != file.shape(i) for v, i in pairs):
        logging.warning(
            "Error in loading the saved optimizer "
            "state. As a result, your model is "
            "starting with a freshly initialized "
            "optimizer."
        )
        return
    for variable, i in pairs:
        file.assign_one(variable, i)
