"""Values of TensorFlow's tensors and variables."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from hornbeam.base.deferred import Deferred, fetch_rows
from hornbeam.base.trials import Tried
from hornbeam.values.backend import backend_name


def view(value: Any) -> np.ndarray | Deferred | None:
    """Host memory of a value; `None` where Keras has to convert it."""
    import tensorflow as tf

    if _is_resource_variable(value.__class__):
        if "CPU" not in (value.device or "CPU"):
            return _fetch_tensorflow(value)
        # A variable that saw sparse updates is copied on every read from then on, unless this is called first; its next
        # sparse update copies it once instead, if the view is still held. Small ones are copied sooner than that.
        if (value.shape.num_elements() or _COPIED) * value.dtype.size > _COPIED:
            tf.raw_ops.DisableCopyOnRead(resource=value.handle)
        return np.asarray(tf.raw_ops.ReadVariableOp(resource=value.handle, dtype=value.dtype))
    if type(value).__name__ == "EagerTensor" and tf.is_tensor(value) and "CPU" in value.device:
        return np.asarray(value)
    return None


@functools.cache
def _is_resource_variable(cls: type) -> bool:
    """Asked once for a class, since TensorFlow's answer takes longer than reading the variable."""
    from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

    return issubclass(cls, BaseResourceVariable)  # slots made by `fit` are of another class than `tf.Variable(...)`


#: Bytes up to which reading a TensorFlow variable may copy it.
_COPIED = 64 << 10


def _fetch_tensorflow(value: Any) -> Deferred:
    """A variable that is on a device."""
    into = functools.partial(fetch_rows, lambda rows: value[rows].numpy(), value.dtype.name, value.shape)
    return Deferred(value.numpy, value.dtype.name, value.shape, into)


def native_shape(shape: tuple[int, ...]) -> Any:
    """The shape as the backend's tensors say it, in errors too."""
    if backend_name() == "torch":
        import torch

        return torch.Size(shape)
    return shape


def share(array: np.ndarray) -> Any | None:
    """A TensorFlow tensor over the array's own memory; `None` where that is not safe.

    TensorFlow copies it before the first update in place, and at once if it is not aligned. The array must not change
    any more. `tf.convert_to_tensor` does the same with a copy of the array.
    """
    if not shares():
        return None
    context, eager_tensor = _eager()
    return eager_tensor(array, context().device_name, None)


@functools.cache
def _eager() -> tuple[Any, Any]:
    from tensorflow.python.eager import context
    from tensorflow.python.framework.ops import EagerTensor

    return context.context, EagerTensor


def adopt(variable: Any, array: np.ndarray) -> bool:
    """Makes the array the memory of a live TensorFlow variable; `False` where it has to be assigned.

    The array has the variable's dtype and shape, and was given away.
    """
    value = variable._value
    tensor = share(array)
    if tensor is None:
        return False
    import tensorflow as tf
    from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

    if not isinstance(value, BaseResourceVariable) or not tf.executing_eagerly():
        return False
    tf.raw_ops.AssignVariableOp(resource=value.handle, value=tensor)
    return True


def shares() -> bool:
    """Whether `share` works here."""
    return backend_name() == "tensorflow" and _shares()


def _try_share() -> bool:
    """Values arrive, and updates leave the source alone."""
    import tensorflow as tf
    from tensorflow.python.eager import context
    from tensorflow.python.framework.ops import EagerTensor

    context.ensure_initialized()
    block = np.zeros(256, np.uint8)
    start = -block.ctypes.data % 64
    array = block[start : start + 64].view(np.float32)
    array[:] = np.arange(16)
    variable = tf.Variable(EagerTensor(array, context.context().device_name, None))
    variable.assign_add(tf.ones(16))
    right = np.array_equal(variable.numpy(), np.arange(16) + 1)
    return bool(right and np.array_equal(array, np.arange(16)))


_shares = Tried("handing memory over without a copy", _try_share)
