"""Whose memory an array is: given away to a variable, or still the reader's."""

from __future__ import annotations

import weakref

import numpy as np

_given: dict[int, weakref.ref[np.ndarray]] = {}


def give_away(array: np.ndarray) -> np.ndarray:
    """Marks an array that nobody but Keras' own code will ever hold, so that its memory may be shared."""
    key = id(array)
    _given[key] = weakref.ref(array, lambda _: _given.pop(key, None))
    return array


def is_given_away(array: np.ndarray) -> bool:
    """Whether `give_away` marked this very array."""
    reference = _given.get(id(array))
    return reference is not None and reference() is array
