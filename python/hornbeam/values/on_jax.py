"""Values of JAX' arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from hornbeam.base.deferred import Deferred, fetch_rows


def view(value: Any) -> np.ndarray | Deferred | None:
    """Host memory of a value; `None` where Keras has to convert it."""
    import jax

    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return None
    if not value.is_fully_addressable:  # every process has a copy of it
        value = value.addressable_data(0)
    if all(device.platform == "cpu" for device in value.devices()):
        return np.asarray(value) if len(value.devices()) == 1 else None
    return _fetch_jax(value)


def _fetch_jax(value: Any) -> Deferred:
    """An array that is on a device."""
    import jax

    cpu = jax.devices("cpu")[0]  # np.asarray would keep the host copy alive with the device array
    into = functools.partial(
        fetch_rows, lambda rows: np.asarray(jax.device_put(value[rows], cpu)), value.dtype.name, value.shape
    )
    return Deferred(lambda: np.array(jax.device_put(value, cpu)), value.dtype.name, value.shape, into)


def stack() -> Callable[..., Any]:
    """`jax.numpy.stack`."""
    import jax.numpy as jnp

    return jnp.stack


def processes() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    import jax

    return jax.process_index(), jax.process_count()
