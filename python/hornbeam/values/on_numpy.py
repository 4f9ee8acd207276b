"""Values of NumPy's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from hornbeam.base.deferred import Deferred, copied


def view(value: Any) -> np.ndarray | Deferred | None:
    """Host memory of a value; `None` where Keras has to convert it."""
    if not isinstance(value, np.ndarray):
        return None

    def into(memory: np.ndarray) -> None:
        np.copyto(np.ndarray(value.shape, value.dtype, buffer=memory), value)

    return Deferred(lambda: copied(value), value.dtype.name, value.shape, into)
