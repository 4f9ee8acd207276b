"""Keeps the value of a variable, to give it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hornbeam.values.backend import backend_name


def hold(variable: Any) -> Callable[[], None]:
    """Keeps the value of a Keras variable; what it returns gives it back, bit for bit.

    Only torch needs a copy: elsewhere an assignment gives the variable other memory.
    """
    value: Any = variable._value
    if backend_name() == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

        if isinstance(value, BaseResourceVariable):
            tf.raw_ops.DisableCopyOnRead(resource=value.handle)
            held: Any = tf.raw_ops.ReadVariableOp(resource=value.handle, dtype=value.dtype)
            return lambda: tf.raw_ops.AssignVariableOp(resource=value.handle, value=held)
        held = tf.identity(value)  # distributed
        return lambda: variable._direct_assign(held)
    if backend_name() == "torch":
        held = value.detach().clone()
        return lambda: variable._direct_assign(held)

    def restore() -> None:
        variable._value = value

    return restore


def hold_raw(value: Any) -> Callable[[], None] | None:
    """As `hold`, for a `tf.Variable` or a torch tensor that no Keras variable is around; `None` for anything else."""
    if backend_name() == "tensorflow":
        import tensorflow as tf

        if isinstance(value, tf.Variable):
            held = tf.identity(value)
            return lambda: value.assign(held)
    if backend_name() == "torch":
        import torch

        if isinstance(value, torch.Tensor):
            copy = value.detach().clone()

            def restore() -> None:
                with torch.no_grad():
                    value.copy_(copy)

            return restore
    return None
