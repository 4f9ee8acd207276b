"""Optimizers that were saved before they were built: nothing of them is lost, though the loaded ones have more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from hornbeam.base.counters import logger


def is_untrained(
    optimizer: Any, stored: Callable[[Any, int], Sequence[np.ndarray] | None], *, nested: bool = True
) -> bool:
    """Whether a file holds of an optimizer what it has before it is built, and not yet another value.

    Keras builds the optimizer of a model that it loads; one that was compiled and not trained had no slots to save, and
    the new slots are what its own would have been. An optimizer that had made a step has counted it.

    Args:
        optimizer: As it was loaded, with the settings that it was saved with.
        stored: What the file has of it, or of one inside it, in order, if that is so many values.
        nested: Whether the file has those inside it by themselves; their values are among the outer one's anyway.
    """
    try:
        fresh = type(optimizer).from_config(optimizer.get_config())
    except Exception as error:  # somebody's own class: nobody knows what it has
        logger.debug("cannot make another %s to compare with: %s", type(optimizer).__name__, error)
        return False
    pairs = [(optimizer, fresh)]
    for loaded, new in pairs:
        values = stored(loaded, len(new.variables))
        if new.built or values is None or not all(map(_equal, values, new.variables)):
            return False
        inside = [n for n, item in vars(new).items() if nested and isinstance(item, keras.optimizers.Optimizer)]
        pairs += [(getattr(loaded, name), getattr(new, name)) for name in inside]
    return True


def _equal(value: np.ndarray, variable: Any) -> bool:
    expected = np.asarray(keras.ops.convert_to_numpy(variable))
    return value.shape == expected.shape and bool(np.all(value == expected))
