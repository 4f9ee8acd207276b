"""Values ↔ host memory, per backend: what is shared, copied, adopted, held.

A value is *shared* where its memory cannot change while it is held (TensorFlow and JAX tensors on the CPU), *deferred*
where it can or has to be fetched from a device (torch, NumPy, accelerators): then it is copied when its turn comes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from hornbeam.base.deferred import Deferred
from hornbeam.base.dtypes import dtype_name
from hornbeam.values import on_jax, on_numpy, on_tensorflow, on_torch
from hornbeam.values.backend import backend_name


def view(value: Any) -> np.ndarray | Deferred:
    """Host memory of a variable, tensor or array.

    Returns:
        An array that nobody else can change (shared, or copied now), or a `Deferred`.
    """
    import keras

    deferrable = isinstance(value, keras.Variable)
    viewer = _VIEWERS.get(backend_name())
    found = viewer(value.value if deferrable else value) if viewer is not None else None
    if found is None or (isinstance(found, Deferred) and not deferrable):
        return _copy(value)  # not `value.value`: NumPy cannot convert that of a distributed scalar variable
    return found


def on_host(tensor: Any) -> np.ndarray:
    """The value of a variable, tensor or array, in host memory that nobody else can change."""
    found = view(tensor)
    return found if isinstance(found, np.ndarray) else found.array()


def is_addressable(value: Any) -> bool:
    """Whether this process can read all of a value: with several of JAX's, an array may be spread over them."""
    array = value._value if hasattr(value, "_value") else value
    return bool(getattr(array, "is_fully_addressable", True) or getattr(array, "is_fully_replicated", False))


def _copy(value: Any) -> np.ndarray:
    """As stock Keras converts it; the result shares no memory."""
    import keras

    return keras.ops.convert_to_numpy(value)


_VIEWERS: dict[str, Callable[[Any], np.ndarray | Deferred | None]] = {
    "tensorflow": on_tensorflow.view,
    "jax": on_jax.view,
    "torch": on_torch.view,
    "numpy": on_numpy.view,
}


def as_buffer(array: np.ndarray) -> np.ndarray:
    """The array in a form that the buffer protocol can lend: contiguous, of a dtype that it knows."""
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    array = array.reshape(-1)  # the buffer of a scalar has no shape
    return array if dtype_name(array.dtype)[0] != "V" else array.view(np.uint8)


@functools.cache
def keras_dtype(dtype: np.dtype) -> str:
    """Keras' name of a dtype.

    Raises:
        ValueError: For strings and objects, as stock Keras raises it when it stores them.
    """
    import keras

    return keras.backend.standardize_dtype(dtype)
