"""What Keras 2 wrote and Keras 3 calls differently: the only place that says so.

Names are looked up in the tables below, never imported because a file says so, and only where Keras 3 does not have
what they stand for. Each entry is tested against a file that Keras 2 (`tf_keras`) wrote.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator
from typing import Any

import keras
from keras.src.saving import object_registration

from hornbeam.base.counters import logger

#: `(module, class)` in Keras 2 → in Keras 3. `tf_keras` says `keras.src`, or its own name, by its version.
_CLASSES = {
    ("engine.functional", "Functional"): ("keras.src.models.functional", "Functional"),
}
_ROOTS = ("keras.src.", "keras.", "tf_keras.src.")
#: Modules of the public interface, as `tf_keras` may call them.
_PUBLIC = "tf_keras."
_OPTIMIZERS = ("keras.optimizers", "keras.optimizers.experimental", "keras.optimizers.legacy")

#: Arguments of optimizers that mean nothing in Keras 3.
_OPTIMIZER_ARGUMENTS = ("is_legacy_optimizer", "jit_compile")

_ANY = object()
_KERNEL = dict.fromkeys(("kernel_initializer", "kernel_regularizer", "kernel_constraint"), _ANY)
#: Layer → argument that Keras 3 does not have → its value where it asks for nothing, or any: it never had a meaning,
#: or follows from the rest.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    name: arguments
    for names, arguments in (
        (("GRU", "LSTM", "RNN", "SimpleRNN"), {"time_major": False}),
        (("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"), {"time_major": False}),
        (("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), {"groups": 1}),
        (("DepthwiseConv1D", "DepthwiseConv2D"), {"groups": 1}),
        (("SeparableConv1D", "SeparableConv2D"), {"groups": 1, **_KERNEL}),
        (("SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D"), {"noise_shape": None, "trainable": _ANY}),
        (("Discretization",), {"trainable": _ANY}),
        (("RandomBrightness", "RandomContrast", "RandomCrop", "RandomFlip"), {"rng_type": _ANY}),
        (("RandomRotation", "RandomTranslation", "RandomZoom"), {"rng_type": _ANY}),
        (
            ("MultiHeadAttention",),
            {"query_shape": _ANY, "key_shape": _ANY, "value_shape": _ANY, "softmax_robust_masking": False},
        ),
    )
    for name in names
}

#: Optimizer → slot in Keras 2, new and `legacy` → attribute in Keras 3.
_ADAM = {"m": "_momentums", "v": "_velocities", "vhat": "_velocity_hats"}
_SLOTS: dict[str, dict[str, str]] = {
    "Adadelta": {
        "accumulated_grad": "_accumulated_grads",
        "accumulated_delta_var": "_accumulated_delta_vars",
        "accum_grad": "_accumulated_grads",
        "accum_var": "_accumulated_delta_vars",
    },
    "Adagrad": {"accumulator": "_accumulators"},
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adamax": {"m": "_m", "u": "_u", "v": "_u"},
    "Ftrl": {"accumulator": "_accumulators", "linear": "_linears"},
    "Nadam": {"m": "_momentums", "v": "_velocities"},
    "SGD": {"m": "momentums", "momentum": "momentums"},
    "RMSprop": {
        "velocity": "_velocities",
        "rms": "_velocities",
        "momentum": "_momentums",
        "average_gradient": "_average_gradients",
        "mg": "_average_gradients",
    },
}
#: Optimizer → the slots in the order of a `.keras` file: those of a group take turns.
_ORDER: dict[str, tuple[tuple[str, ...], ...]] = {
    "Adadelta": (("_accumulated_grads", "_accumulated_delta_vars"),),
    "Adagrad": (("_accumulators",),),
    "Adam": (("_momentums", "_velocities"), ("_velocity_hats",)),
    "AdamW": (("_momentums", "_velocities"), ("_velocity_hats",)),
    "Adamax": (("_m", "_u"),),
    "Ftrl": (("_accumulators", "_linears"),),
    "Nadam": (("_momentums", "_velocities"),),
    "RMSprop": (("_velocities",), ("_momentums",), ("_average_gradients",)),
    "SGD": (("momentums",),),
}

#: Modules that Keras 3 does not have; what is below them, too.
_MODULES = ("tf_keras", "keras.engine", "keras.src.engine", "keras.optimizers.legacy")
#: Argument that Keras 3 does not write → the module of Keras' own classes that have it in Keras 2.
_OLD_ARGUMENTS = {
    "batch_input_shape": "keras.layers",
    "time_major": "keras.layers",
    "is_legacy_optimizer": "keras.optimizers",
}
_VERSION = re.compile(r"\s*(\d+)\.")
Notes = dict[str, None]


def is_keras2(config: Any, version: Any = None) -> bool:
    """Whether Keras 2 (or 1) wrote a configuration.

    Args:
        config: As it was decoded.
        version: The version of Keras that the file says it was written by; where it says none, what `to_json` of Keras
            2 puts into the configuration. Without any, the objects tell: one of a module that Keras 3 does not have,
            or one of Keras' own with an argument that Keras 3 does not write. Names and values are never searched.
    """
    if version is None and isinstance(config, dict):
        version = config.get("keras_version")
    version = version.decode(errors="replace") if isinstance(version, bytes) else version
    major = _VERSION.match(version) if isinstance(version, str) else None
    return int(major[1]) < 3 if major is not None else _has_old_object(config)


def _has_old_object(config: Any) -> bool:
    todo = [config]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            module, inner = item.get("module"), item.get("config")
            if isinstance(item.get("class_name"), str) and isinstance(module, str):
                if any(module == old or module.startswith(f"{old}.") for old in _MODULES):
                    return True
                if isinstance(inner, dict) and any(module == _OLD_ARGUMENTS.get(key) for key in inner):
                    return True
            todo += item.values()
        elif isinstance(item, list):
            todo += item
    return False


def keras_config(config: Any, known: Iterable[str] = ()) -> Any:
    """A configuration of Keras 2 with the names and arguments of Keras 3; says so in the log.

    Args:
        config: As it was decoded, and `is_keras2`.
        known: Names of custom objects, whose configurations are theirs where no module says otherwise.
    """
    notes: Notes = {}
    migrated = _migrated(config, notes, frozenset(known))
    if notes:
        logger.info("A file of Keras 2 is read as Keras 3 has it: %s", "; ".join(notes))
    return migrated


def architecture(config: Any) -> Any:
    """What `to_json` of Keras 2 gave: it does not say where the class of the model is."""
    name = config.get("class_name") if isinstance(config, dict) and "module" not in config else None
    if name not in ("Functional", "Model", "Sequential"):
        return config
    module, name = ("keras", name) if name == "Sequential" else _CLASSES["engine.functional", "Functional"]
    return {**config, "module": module, "class_name": name, "registered_name": None}


def _migrated(config: Any, notes: Notes, known: frozenset[str]) -> Any:
    if isinstance(config, list):
        return [_migrated(item, notes, known) for item in config]
    if not isinstance(config, dict):
        return config
    migrated = {key: _migrated(value, notes, known) for key, value in config.items()}
    if migrated.get("class_name") == "__numpy__" and not isinstance(migrated["config"]["value"], list):
        return migrated["config"]["value"]  # Keras 3 does not look for it in the arguments of its own classes
    if "optimizer" in migrated and migrated.get("steps_per_execution", 1) is None:
        migrated["steps_per_execution"] = 1  # what `compile` stood for with it
    if isinstance(migrated.get("compile_config"), dict) and isinstance(migrated.get("config"), dict):
        _for_every_output(migrated["compile_config"], migrated["config"].get("output_layers"), notes)
    if all(isinstance(migrated.get(key), list | dict) for key in ("layers", "input_layers", "output_layers")):
        _graph(migrated, notes)
    if isinstance(migrated.get("layers"), list):
        _shapes(migrated["layers"], known)
    if isinstance(config.get("class_name"), str):
        _object(migrated, notes, known)
    return migrated


def _object(config: dict[str, Any], notes: Notes, known: frozenset[str]) -> None:
    """Mends the description of one object."""
    module, name = config.get("module"), config["class_name"]
    if isinstance(module, str):
        found = _class(module, name)
        if found is not None:
            notes[f"{module}.{name} as {found[0]}.{found[1]}"] = None
            config["module"], config["class_name"] = found
            if config.get("registered_name") == name:
                config["registered_name"] = found[1] if found[0] != "keras" else None
    elif "module" in config or name in known:
        return  # a custom class
    inner, module = config.get("config"), config.get("module")
    if not isinstance(inner, dict):
        return
    if module == "keras.losses":
        config.update(loss_config(config))
    elif isinstance(module, str) and _is_optimizer(module, name):
        config["config"] = _optimizer_arguments(inner, known)
    elif module is None or module.startswith("keras.layers"):
        _layer(config, name, inner, notes)
        for key in ("layer", "backward_layer", "cell"):
            _located(inner.get(key), "keras.layers", keras.layers, known)


def _shapes(layers: list[Any], known: frozenset[str]) -> None:
    """Where a model has its `InputLayer`, other layers need no shape; not all of Keras 3 take one."""
    described = [layer for layer in layers if isinstance(layer, dict) and isinstance(layer.get("config"), dict)]
    if any(layer.get("class_name") == "InputLayer" for layer in described):
        for layer in described:
            name = layer.get("class_name")
            if name != "InputLayer" and name not in known and "module" not in layer and _of_keras(name):
                layer["config"].pop("batch_input_shape", None)


def _of_keras(name: Any) -> bool:
    return isinstance(name, str) and isinstance(getattr(keras.layers, name, None), type)


def _located(config: Any, module: str, classes: Any, known: frozenset[str]) -> None:
    """Says where the class of an object in an object is, which 2.12 does not."""
    name = config.get("class_name") if isinstance(config, dict) and "module" not in config else None
    if isinstance(name, str) and name not in known and isinstance(getattr(classes, name, None), type):
        config["module"], config["registered_name"] = module, None


def _layer(config: dict[str, Any], name: str, inner: dict[str, Any], notes: Notes) -> None:
    if name != "InputLayer" and config.get("module") is not None:
        inner.pop("batch_input_shape", None)  # the model has an InputLayer of it, too
    for argument, neutral in _ARGUMENTS.get(name, {}).items():
        if argument in inner and (neutral is _ANY or inner[argument] == neutral):
            del inner[argument]
            notes[f"{name} without '{argument}'"] = None
    axis = inner.get("axis")
    if name == "BatchNormalization" and isinstance(axis, list) and len(axis) == 1:
        inner["axis"] = axis[0]
        notes["BatchNormalization over one axis"] = None
    built = config.get("build_config")
    if name == "MultiHeadAttention" and isinstance(built, dict) and "input_shape" in built:
        del config["build_config"]  # Keras 3 wants the shapes of all its inputs, and is told when it is called


def _class(module: str, name: str) -> tuple[str, str] | None:
    for root in _ROOTS:
        known = _CLASSES.get((module.removeprefix(root), name)) if module.startswith(root) else None
        if known is not None and not _exists(module):
            return known
    if module.startswith(_PUBLIC) and not module.startswith("tf_keras.src"):
        return f"keras.{module.removeprefix(_PUBLIC)}", name
    if module in _OPTIMIZERS[1:] and _is_optimizer(module, name):
        return _OPTIMIZERS[0], name
    return ("keras", name) if module == "tf_keras" else None


@functools.cache
def _exists(module: str) -> bool:
    """Whether Keras 3 has a module of our table."""
    if not module.startswith("keras."):
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _for_every_output(compiled: dict[str, Any], outputs: Any, notes: Notes) -> None:
    """A plain list of metrics was for each of several outputs; in Keras 3 it would be one for each."""
    if not (isinstance(outputs, list) and all(isinstance(output, list) for output in outputs)):
        return  # a single output
    for key in ("metrics", "weighted_metrics"):
        given = compiled.get(key)
        plain = isinstance(given, list) and all(
            isinstance(metric, str) or (isinstance(metric, dict) and "class_name" in metric) for metric in given
        )
        if given and plain:
            compiled[key] = [copy.deepcopy(given) for _ in outputs]
            notes[f"{key} for each of {len(outputs)} outputs"] = None


def _graph(config: dict[str, Any], notes: Notes) -> None:
    """The calls of layers in a Functional model.

    Keras 2 counts the calls of a model in a model from 1, Keras 3 from 0, but where the outputs are listed and the
    model is Functional. As every call is used somewhere, its least number tells where counting starts. Keras 2 also
    wrote tensors among the arguments as mere lists.
    """
    layers = {layer["name"]: layer for layer in config["layers"] if isinstance(layer, dict) and "name" in layer}
    nodes = [node for layer in layers.values() for node in layer.get("inbound_nodes") or []]
    if len(layers) != len(config["layers"]) or any(isinstance(node, dict) and "args" in node for node in nodes):
        return
    models = {name: layer["config"] for name, layer in layers.items() if "layers" in (layer.get("config") or {})}
    inside = list(_tensors_in(nodes, layers))
    outside = list(_tensors_in([config["input_layers"], config["output_layers"]], layers))
    first: dict[str, int] = {}
    for tensor in (*inside, *outside):
        first[tensor[0]] = min(tensor[1], first.get(tensor[0], tensor[1]))
    late = {name for name in models if first.get(name) == 1}
    for tensor in inside:
        tensor[1] -= tensor[0] in late
    for tensor in outside:
        tensor[1] -= tensor[0] in late and "input_layers" not in models[tensor[0]]
    if late:
        notes["calls of models in models counted from 0"] = None
    for key in ("input_layers", "output_layers"):
        if isinstance(config[key], list) and len(config[key]) == 1:  # also of a model that has just one
            (config[key],) = config[key]
    for layer in layers.values():
        layer["inbound_nodes"] = [_call(node, layers, notes) for node in layer.get("inbound_nodes") or []]


def _is_tensor(value: Any, layers: Any) -> bool:
    """Whether a list names the output of a layer: `[layer, call, number]`, and arguments with the first of a call."""
    if not (isinstance(value, list) and len(value) in (3, 4) and isinstance(value[0], str) and value[0] in layers):
        return False
    return type(value[1]) is int and type(value[2]) is int and (len(value) == 3 or isinstance(value[3], dict))


def _tensors_in(value: Any, layers: Any) -> Iterator[list[Any]]:
    if _is_tensor(value, layers):
        yield value
        value = value[3:]
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item, layers)


def _call(node: Any, layers: Any, notes: Notes) -> Any:
    """A call in the form of Keras 3, where Keras 3 does not read the old one."""
    old = isinstance(node, list) and all(_is_tensor(tensor, layers) for tensor in node)
    if old and not any(True for tensor in node for _ in _tensors_in(tensor[3:], layers)):
        return node
    notes["tensors among the arguments of calls"] = None
    arguments: dict[str, Any] = {}

    def first(value: Any) -> Any:
        is_constant = isinstance(value, list) and len(value) in (3, 4) and value[:2] == [_CONSTANT, -1]
        if is_constant or _is_tensor(value, layers):
            arguments.update(_revived(value[3], layers) if len(value) == 4 else {})
            return value[2] if is_constant else _keras_tensor(value)
        if isinstance(value, dict):
            return {key: first(item) for key, item in value.items()}
        return [first(item) for item in value] if isinstance(value, list) else value

    inputs = first(node)
    alone = isinstance(inputs, list) and len(inputs) == 1
    return {"args": [inputs[0] if alone else inputs], "kwargs": arguments}


_CONSTANT = "_CONSTANT_VALUE"


def _revived(value: Any, layers: Any) -> Any:
    if _is_tensor(value, layers):
        return _keras_tensor(value)
    if isinstance(value, dict):
        return {key: _revived(item, layers) for key, item in value.items()}
    return [_revived(item, layers) for item in value] if isinstance(value, list) else value


def _keras_tensor(tensor: list[Any]) -> dict[str, Any]:
    """Of a `KerasTensor` only its history counts: the real one takes its place."""
    config = {"shape": [], "dtype": "float32", "keras_history": tensor[:3]}
    return {"class_name": "__keras_tensor__", "config": config}


def _is_optimizer(module: str, name: str) -> bool:
    cls = getattr(keras.optimizers, name, None)
    return module in _OPTIMIZERS and isinstance(cls, type) and issubclass(cls, keras.optimizers.Optimizer)


def _optimizer_arguments(config: Any, known: frozenset[str] = frozenset()) -> Any:
    if not isinstance(config, dict):
        return config
    schedule, module = config.get("learning_rate"), f"{_OPTIMIZERS[0]}.schedules"
    _located(schedule, module, keras.optimizers.schedules, known)
    if isinstance(schedule, dict) and schedule.get("module") == module and isinstance(schedule.get("config"), dict):
        schedule["config"] = {k: v for k, v in schedule["config"].items() if k != "name" or v is not None}
    kept = {key: value for key, value in config.items() if key not in _OPTIMIZER_ARGUMENTS}
    if not kept.get("decay", True):  # Keras 3 warns that it is ignored
        del kept["decay"]
    return kept


def optimizer_places(optimizer: Any, count: int) -> list[Any] | None:
    """The optimizer's variables in the order in which a `.keras` file of Keras 2 has them: `iteration`, then the slots.

    The learning rate, which Keras 3 has among them, is in the configuration there.

    Args:
        optimizer: Of Keras 3; it is built.
        count: How many there are in the file.

    Returns:
        A variable for each in the file, `None` where Keras 3 has no such slot; `None` where the order is not known.
    """
    order = _ORDER.get(type(optimizer).__name__)
    weights = len(getattr(optimizer, "_trainable_variables", ()))
    if order is None or not _is_optimizer(_OPTIMIZERS[0], type(optimizer).__name__):
        return None
    for every in (False, True):  # Keras 2 keeps some slots also where they are not used
        places = [optimizer.iterations]
        for group in order:
            lists = [getattr(optimizer, name, None) or ([None] * weights if every else []) for name in group]
            places += [variable for turn in zip(*lists, strict=True) for variable in turn]
        if len(places) == count:
            return places
    return None


def place_optimizer(model: Any, store: Any) -> None:
    """Has the store of a `.keras` file of Keras 2 give the optimizer its state; Keras 3 expects another order.

    Args:
        model: As it was built from the configuration.
        store: Of its weights.
    """
    optimizer, group = getattr(model, "optimizer", None), "optimizer/vars"
    names = sorted(set(store.members.get(group, ())))
    if optimizer is None or not names or len(names) == len(optimizer.variables):
        return
    places = optimizer_places(optimizer, len(names))
    found = {i: store.where.get(f"{group}/{i}") for i in range(len(names))}
    if places is None or None in found.values():
        return
    if any(v is not None and tuple(v.shape) != store.shape(f"{group}/{i}") for i, v in enumerate(places)):
        return
    numbers = {id(variable): i for i, variable in enumerate(places) if variable is not None}
    for i in found:
        del store.where[f"{group}/{i}"]
    for k, variable in enumerate(optimizer.variables):
        if id(variable) in numbers:
            store.where[f"{group}/{k}"] = found[numbers[id(variable)]]
        else:
            store.own[f"{group}/{k}"] = variable
    store.members[group] = [str(k) for k in range(len(optimizer.variables))]
    logger.info("The state of '%s' in a file of Keras 2 is read in the order of that file", optimizer.name)


def optimizer_config(config: Any) -> Any:
    """An optimizer in a legacy file: Keras 2 called its own ones custom."""
    if not isinstance(config, dict) or not isinstance(config.get("class_name"), str):
        return config
    name = config["class_name"]
    if object_registration.get_registered_object(name) is not None:
        return config
    plain = name.removeprefix("Custom>")
    if not _is_optimizer("keras.optimizers", plain):
        return config
    if plain != name:
        logger.info("'%s' of Keras 2 is read as 'keras.optimizers.%s'", name, plain)
    return {**config, "class_name": plain, "config": _optimizer_arguments(config.get("config"))}


def loss_config(config: Any) -> Any:
    """A loss of a class: Keras 2 wrote its function beside it, and `auto` for the usual reduction."""
    inner, name = config.get("config"), config.get("class_name")
    if not isinstance(inner, dict) or not isinstance(getattr(keras.losses, str(name), None), type):
        return config
    kept = {key: value for key, value in inner.items() if key != "fn"}
    if kept.get("reduction") == "auto":
        kept["reduction"] = "sum_over_batch_size"
    return {**config, "config": kept}


def wrapped_function(config: Any) -> str | None:
    """The name of the function that Keras 2 wrapped in a metric or loss, where the file has no more of it."""
    inner = config.get("config")
    if config.get("class_name") not in ("MeanMetricWrapper", "LossFunctionWrapper") or not isinstance(inner, dict):
        return None
    return inner["fn"] if isinstance(inner.get("fn"), str) else None


def slots(optimizer: Any, found: list[tuple[str, int]]) -> list[tuple[Any, int]] | None:
    """The optimizer's variables and the datasets of a legacy file that hold them.

    Keras 2 names variables `Adam/m/dense/kernel:0`, and its older optimizers `Adam/dense/kernel/m:0`; each slot lists
    them in the order of the model.

    Args:
        optimizer: Of Keras 3.
        found: `(name, number of the dataset)`.

    Returns:
        `(variable, number)`; `None` where the names do not tell.
    """
    names = [name for name, _ in found]
    if not names or not all(name.endswith(":0") for name in names):
        paths = {str(v.path): v for v in optimizer.variables}
        if len(paths) == len(optimizer.variables) and paths.keys() == set(names):
            return [(paths[name], i) for name, i in found]
        return None
    table = _SLOTS.get(type(optimizer).__name__, {})
    pairs: list[tuple[Any, int]] = []
    lists: dict[str, list[int]] = {}
    for name, i in found:
        parts = name.removesuffix(":0").split("/")
        if parts[-1] in ("iter", "iteration"):
            pairs.append((optimizer.iterations, i))
        elif parts[-1] in ("learning_rate", "current_learning_rate"):
            rate = getattr(optimizer, "_learning_rate", None)
            pairs += [(rate, i)] if isinstance(rate, keras.Variable) else []
        else:
            slot = parts[1] if len(parts) > 2 and parts[1] in table else parts[-1]
            if slot not in table:
                return None
            lists.setdefault(slot, []).append(i)
    for slot, numbers in lists.items():
        variables = getattr(optimizer, table[slot], None)
        if not variables:
            continue  # Keras 2 keeps a momentum also where it is 0
        if len(variables) != len(numbers):
            return None
        pairs += zip(variables, numbers, strict=True)
    return pairs
