"""Values of NumPy's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from hornbeam.base.deferred import Deferred, _copy_numpy


def _view_numpy(value: Any) -> np.ndarray | Deferred | None:
    if not isinstance(value, np.ndarray):
        return None

    def into(memory: np.ndarray) -> None:
        np.copyto(np.ndarray(value.shape, value.dtype, buffer=memory), value)

    return Deferred(lambda: _copy_numpy(value), value.dtype.name, value.shape, into)
