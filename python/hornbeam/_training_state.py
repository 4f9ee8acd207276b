"""What of a training no weights file of Keras holds: seed generators, metrics, random state, objects of the user's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from hornbeam import _random, _tensors
from hornbeam.errors import CheckpointError

Values = list[tuple[str, np.ndarray]]


def capture(model: Any) -> dict[str, Any]:
    """Seed generators and other state of the layers, and the random state of the process, as of now."""
    return {"variables": values(_outside_files(model)), "random": _random.capture()}


def values(variables: Iterable[Any]) -> Values:
    """Path and value of each variable; nothing that happens later changes them."""
    found = []
    for variable in variables:
        value = _tensors.view(variable)
        found.append((variable.path, value if isinstance(value, np.ndarray) else value.array()))
    return found


def check(model: Any, state: dict[str, Any], where: str) -> None:
    """Refuses a state that is not of this model, before anything is changed."""
    _match(_outside_files(model), state["variables"], where)


def apply(model: Any, state: dict[str, Any], where: str) -> None:
    """Gives the model what `capture` took; random state comes last of all, by `_random.restore(state["random"])`."""
    assign(_outside_files(model), state["variables"], where)


def assign(variables: Iterable[Any], state: Values, where: str) -> None:
    """Gives the variables, in order, their values.

    Raises:
        CheckpointError: For other shapes or numbers of variables; none is changed then.
    """
    for variable, value in _match(list(variables), state, where):
        variable.assign(value)


def _match(variables: list[Any], state: Values, where: str) -> list[tuple[Any, np.ndarray]]:
    here = [tuple(variable.shape) for variable in variables]
    there = [value.shape for _, value in state]
    if here != there:
        raise CheckpointError(
            f"'{where}' is of another model. Expected the variables "
            f"{[(v.path, tuple(v.shape)) for v in variables]}, found {[(path, v.shape) for path, v in state]}."
        )
    return [(variable, value) for variable, (_, value) in zip(variables, state, strict=True)]


def _outside_files(model: Any) -> list[Any]:
    """Variables that Keras does not save as they are: seed generators, above all.

    A layer with LoRA saves its kernel with the product of the low-rank factors added, and loads factors of zero.
    """
    layers = model._flatten_layers() if hasattr(model, "_flatten_layers") else ()
    merged = {id(v) for layer in layers if getattr(layer, "lora_enabled", False) for v in layer.variables}
    saved = {id(variable) for variable in model.weights} - merged
    return [variable for variable in model.variables if id(variable) not in saved]


def state_of(item: Any) -> Any:
    """What a checkpoint holds for something of the user's: an object's state, or the thing itself."""
    if callable(getattr(item, "get_state", None)):
        return item.get_state()
    if isinstance(item, Mapping | np.ndarray) or keras.ops.is_tensor(item):
        return item
    if hasattr(item, "variables"):  # optimizers, metrics, layers
        return values(item.variables)
    if isinstance(item, keras.random.SeedGenerator):
        return values([item.state])
    return item


def check_given(item: Any, state: Any, where: str) -> None:
    """Refuses a state that `give_state` cannot give to the object, before anything is changed.

    An object with `set_state` is asked if it has `check_state`, too; otherwise what it thinks of it shows only then.

    Raises:
        CheckpointError: The state is of another object, or nothing can be given to this one.
    """
    if callable(getattr(item, "set_state", None)):
        if callable(getattr(item, "check_state", None)):
            item.check_state(state)
        return
    variables = _variables_of(item)
    if variables is None:
        raise CheckpointError(
            f"Nothing can take the state of '{where}': expected an object with `set_state` or `variables`, "
            f"found {type(item).__name__!r}. Without an object it is in `extra` of the manager afterwards."
        )
    if not (isinstance(state, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in state)):
        raise CheckpointError(f"'{where}' is of another object. Expected variables, found {type(state).__name__!r}.")
    _match(variables, state, where)


def _variables_of(item: Any) -> list[Any] | None:
    if isinstance(item, keras.random.SeedGenerator):
        return [item.state]
    return list(item.variables) if hasattr(item, "variables") and not isinstance(item, Mapping) else None


def give_state(item: Any, state: Any, where: str) -> None:
    """Gives an object of the user's the state that was taken of it, and that `check_given` let pass."""
    if callable(getattr(item, "set_state", None)):
        item.set_state(state)
    else:
        assign(_variables_of(item) or [], state, where)
