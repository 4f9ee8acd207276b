"""What Keras 2 wrote and Keras 3 calls differently: the only place that says so.

Names are looked up in the tables below, never imported because a file says so, and only where Keras 3 does not have
what they stand for. Each entry is tested against a file that Keras 2 (`tf_keras`) wrote.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import keras
from keras.src.saving import object_registration

from hornbeam._state import logger

#: `(module, class)` in Keras 2 → in Keras 3. `tf_keras` says `keras.src`, or its own name, by its version.
_CLASSES = {
    ("engine.functional", "Functional"): ("keras.src.models.functional", "Functional"),
}
_ROOTS = ("keras.src.", "keras.", "tf_keras.src.")
#: Modules of the public interface, as `tf_keras` may call them.
_PUBLIC = "tf_keras."

#: Arguments of optimizers that mean nothing in Keras 3.
_OPTIMIZER_ARGUMENTS = ("is_legacy_optimizer", "jit_compile")

#: Optimizer → slot in Keras 2, new and `legacy` → attribute in Keras 3.
_ADAM = {"m": "_momentums", "v": "_velocities", "vhat": "_velocity_hats"}
_SLOTS: dict[str, dict[str, str]] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
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


#: What the text of every configuration has that needs a change.
_MARKS = (
    b"keras.src.engine.",
    b"keras.engine.",
    b"tf_keras",
    b"is_legacy_optimizer",
    b"batch_input_shape",
    b"time_major",
)


def keras_config(text: bytes, config: Any) -> Any:
    """The configuration of a `.keras` file, with the names of Keras 3 for those that only Keras 2 knows.

    Args:
        text: As it is in the file.
        config: As it was decoded.
    """
    return _migrated(config) if any(mark in text for mark in _MARKS) else config


def _migrated(config: Any) -> Any:
    if isinstance(config, list):
        return [_migrated(item) for item in config]
    if not isinstance(config, dict):
        return config
    migrated = {key: _migrated(value) for key, value in config.items()}
    if "optimizer" in migrated and migrated.get("steps_per_execution", 1) is None:
        migrated["steps_per_execution"] = 1  # what `compile` stood for with it
    module, name = config.get("module"), config.get("class_name")
    if isinstance(module, str) and isinstance(name, str):
        found = _class(module, name)
        if found is not None:
            logger.info("'%s.%s' of Keras 2 is read as '%s.%s'", module, name, *found)
            migrated["module"], migrated["class_name"] = found
            if migrated.get("registered_name") == name:
                migrated["registered_name"] = found[1] if found[0] != "keras" else None
        inner = migrated.get("config")
        if module == "keras.losses":
            migrated = loss_config(migrated)
        if isinstance(inner, dict) and migrated["class_name"] != "InputLayer" and module.startswith("keras.layers"):
            inner.pop("batch_input_shape", None)  # the model has an InputLayer of it, too
            inner.pop("time_major", None)
            axis = inner.get("axis")
            if migrated["class_name"] == "BatchNormalization" and isinstance(axis, list) and len(axis) == 1:
                inner["axis"] = axis[0]
        if _is_optimizer(migrated["module"], migrated["class_name"]):
            migrated["config"] = _optimizer_arguments(migrated.get("config"))
    return migrated


def _class(module: str, name: str) -> tuple[str, str] | None:
    for root in _ROOTS:
        known = _CLASSES.get((module.removeprefix(root), name)) if module.startswith(root) else None
        if known is not None and not _exists(module):
            return known
    if module.startswith(_PUBLIC) and not module.startswith("tf_keras.src"):
        return f"keras.{module.removeprefix(_PUBLIC)}", name
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


def _is_optimizer(module: str, name: str) -> bool:
    cls = getattr(keras.optimizers, name, None)
    return module == "keras.optimizers" and isinstance(cls, type) and issubclass(cls, keras.optimizers.Optimizer)


def _optimizer_arguments(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    kept = {key: value for key, value in config.items() if key not in _OPTIMIZER_ARGUMENTS}
    if not kept.get("decay", True):  # Keras 3 warns that it is ignored
        del kept["decay"]
    return kept


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
    inner = config.get("config")
    if not isinstance(inner, dict) or inner.get("reduction") != "auto":
        return config
    kept = {key: value for key, value in inner.items() if key != "fn"}
    return {**config, "config": {**kept, "reduction": "sum_over_batch_size"}}


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
