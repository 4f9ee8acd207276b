"""What of a training no weights file of Keras holds: seed generators, metrics, random state, objects of the user's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from hornbeam.errors import CheckpointError
from hornbeam.flows.selections import Structure
from hornbeam.training import matching
from hornbeam.values import randomness, tensors

Values = list[tuple[str, np.ndarray]]


def capture(model: Any) -> dict[str, Any]:
    """Seed generators and other state of the layers, and the random state of the process, as of now."""
    outside = _outside_files(model)
    stored = {"variables": values(outside, matching.names_of(model, outside)), "random": randomness.capture()}
    return stored | {"trained": matching.names_of(model, _trained(model))}


def _trained(model: Any) -> list[Any]:
    """The variables that the optimizer has slots for, or will have, in its order."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return []
    return list(optimizer._trainable_variables if optimizer.built else model.trainable_variables)


def values(variables: Iterable[Any], names: Sequence[str] | None = None) -> Values:
    """Name, or path, and value of each variable; nothing that happens later changes them."""
    variables = list(variables)
    names = names or [v.path for v in variables]
    return [(name, tensors.on_host(variable)) for name, variable in zip(names, variables, strict=True)]


def prepare(model: Any, state: dict[str, Any], where: str) -> Callable[[], None]:
    """Compares what `capture` took with a model, before anything is changed; what is returned gives it to the model.

    Random state comes last of all, by `randomness.restore(state["random"])`.

    Raises:
        CheckpointError: The state is not of this model.
    """
    pairs = _match(_outside_files(model), state["variables"], where, model)
    ours, theirs = matching.names_of(model, _trained(model)), state.get("trained")  # slots are stored in this order
    if ours and theirs and _moved(ours, theirs, matching.automatic_names(model)):
        raise CheckpointError(
            f"The optimizer's state in '{where}' is that of other variables, or of the same in another order: "
            f"{matching.differences(ours, theirs)}. Build the model as when it was saved."
        )
    return functools.partial(_assign, pairs)


def _moved(ours: Sequence[str], theirs: Sequence[str], automatic: Iterable[str]) -> bool:
    """Whether a name is in another place than it was, which no counting of Keras' explains.

    What was only given another name is taken by its place, as Keras does.
    """
    if matching.match(ours, theirs, automatic) == list(range(len(ours))):
        return False
    there = {name: i for i, name in enumerate(theirs)}
    return any(there.get(name, i) != i for i, name in enumerate(ours))


def check_places(model: Any, stored: Mapping[str, str], where: str) -> None:
    """Refuses weights that a file has under the names of other layers than the model has in their places.

    Layers are stored by the place that they have in the model. Where one was given another name, that is all there is
    to go by; a name that is in another place now says that the weights would go to the wrong layer.

    Args:
        model: The model.
        stored: Group in the file → name of its layer.
        where: The file.

    Raises:
        CheckpointError: Then.
    """
    named = ((g, dict(attributes).get("name")) for g, attributes in Structure(model, set()).groups.items())
    ours = {group: name for group, name in named if name is not None}
    both = [group for group in ours if group in stored and not group.startswith("optimizer/")]
    automatic = matching.automatic_names(model)
    for inside in dict.fromkeys(_container(group) for group in both):
        groups = [group for group in both if _container(group) == inside]
        here, there = [ours[g] for g in groups], [stored[g] for g in groups]
        if _moved(here, there, automatic):
            differ = [f"{g}: {o!r}, found {t!r}" for g, o, t in zip(groups, here, there, strict=True) if o != t]
            raise CheckpointError(
                f"'{where}' is of a model whose layers are in another order. Expected {'; '.join(differ)}. Build the "
                "model as when it was saved, or load the weights by name: `load_weights(…, by_name=True)`."
            )


def _container(group: str) -> str:
    return group.removesuffix("/vars").rpartition("/")[0]


def assign(variables: Iterable[Any], state: Values, where: str, *roots: Any) -> None:
    """Gives the variables their values, by name where names say which is which.

    Args:
        variables: The variables.
        state: Names and values.
        where: What errors call the state.
        *roots: The model or object that has the variables; then others that these may be named after.

    Raises:
        CheckpointError: For other names, shapes or numbers of variables; none is changed then.
    """
    _assign(_match(list(variables), state, where, *roots))


def _assign(pairs: Iterable[tuple[Any, np.ndarray]]) -> None:
    for variable, value in pairs:
        variable.assign(value)


def _match(variables: list[Any], state: Values, where: str, *roots: Any) -> list[tuple[Any, np.ndarray]]:
    ours, theirs = matching.names_of(next(iter(roots), None), variables), [name for name, _ in state]
    automatic = matching.automatic_names(*roots)
    places = matching.match(ours, theirs, automatic)
    if places is None:  # by Keras' paths, as states of older versions, and of what is no layer, have them
        places = matching.match([v.path for v in variables], theirs, automatic)
    if places is None:
        raise CheckpointError(
            f"'{where}' is of another model: {matching.differences(ours, theirs)}. Expected the variables "
            f"{[(n, tuple(v.shape)) for n, v in zip(ours, variables, strict=True)]}, found "
            f"{[(name, value.shape) for name, value in state]}."
        )
    pairs = [(variable, state[place][1]) for variable, place in zip(variables, places, strict=True)]
    wrong = [
        f"{name} {tuple(variable.shape)}, found {value.shape}"
        for name, (variable, value) in zip(ours, pairs, strict=True)
        if tuple(variable.shape) != value.shape
    ]
    if wrong:
        raise CheckpointError(f"'{where}' is of another model. Expected {'; '.join(wrong)}.")
    return pairs


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
        return values(item.variables, matching.names_of(item, item.variables))
    if isinstance(item, keras.random.SeedGenerator):
        return values([item.state])
    return item


def prepare_given(item: Any, state: Any, where: str, model: Any) -> Callable[[], None]:
    """Compares a state that `state_of` took with an object, before anything is changed; what is returned gives it.

    An object with `set_state` is asked if it has `check_state`, too; otherwise what it thinks of it shows only then.

    Raises:
        CheckpointError: The state is of another object, or nothing can be given to this one.
    """
    if callable(getattr(item, "set_state", None)):
        if callable(getattr(item, "check_state", None)):
            item.check_state(state)
        return functools.partial(item.set_state, state)
    if isinstance(item, keras.random.SeedGenerator):
        variables = [item.state]
    elif hasattr(item, "variables") and not isinstance(item, Mapping):
        variables = list(item.variables)
    else:
        raise CheckpointError(
            f"Nothing can take the state of '{where}': expected an object with `set_state` or `variables`, "
            f"found {type(item).__name__!r}. Without an object it is in `extra` of the manager afterwards."
        )
    if not (isinstance(state, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in state)):
        raise CheckpointError(f"'{where}' is of another object. Expected variables, found {type(state).__name__!r}.")
    return functools.partial(_assign, _match(variables, state, where, item, model))
