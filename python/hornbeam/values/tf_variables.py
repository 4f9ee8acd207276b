"""TensorFlow's variables, put together directly: with one kernel for all of a shape.

TensorFlow compiles one for every name. This needs its private functions, so that it is tried before it is used.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import keras

from hornbeam.values import on_tensorflow


def module() -> Any:
    """`tensorflow`."""
    import tensorflow as tf

    return tf


def tracked_classes() -> list[type]:
    """What TensorFlow's trackers track."""
    import tensorflow as tf
    from tensorflow.python.trackable.data_structures import NoDependency

    return [tf.__internal__.tracking.Trackable, NoDependency]


def samples() -> list[Any]:
    """Tensors of every kind, and what is near to one."""
    import tensorflow as tf

    return [[tf.constant(1)], tf.constant(1), tf.Variable(1), tf.TensorSpec((2,)), tf.ragged.constant([[1]])]


@functools.cache
def _private() -> Any:
    """TensorFlow's private modules."""
    from tensorflow.python.eager import context
    from tensorflow.python.framework import ops
    from tensorflow.python.ops import gen_resource_variable_ops as generated
    from tensorflow.python.ops import handle_data_util, resource_variable_ops

    return context, ops, generated, handle_data_util, resource_variable_ops


def build(
    variable: Any, value: Any, name_scope: str, key: str | None, *, trainable: bool, known: dict[Any, Any]
) -> Any:
    """The TensorFlow variable that `tf.Variable(value, ...)` would make for a Keras variable.

    Args:
        variable: The Keras variable.
        value: An eager tensor of its dtype.
        name_scope: Where it would have been made.
        key: Its unique id, if that was promised.
        trainable: Whether it is.
        known: Shape and dtype → what TensorFlow notes of a handle; filled here.
    """
    context, ops, generated, handle_data_util, resource_variable_ops = _private()

    # As ResourceVariable._init_from_args in eager mode.
    name = f"{name_scope}/{variable.name}" if name_scope else variable.name
    shape, dtype = value.shape, value.dtype
    shared = context.anonymous_name()
    handle = generated.var_handle_op(shape=shape, dtype=dtype, shared_name=shared, debug_name="hornbeam", container="")
    data = known.get((shape, dtype))
    if data is None:
        data = known[shape, dtype] = handle_data_util.create_handle_data(shape, dtype)
    handle._handle_data = data
    generated.assign_variable_op(handle, value)
    made = resource_variable_ops.ResourceVariable.__new__(resource_variable_ops.ResourceVariable)
    handle._parent_trackable = weakref.ref(made)
    handle._name = f"{name}:0"
    handle._unique_id = key or f"{name}_{ops.uid()}"
    made._in_graph_mode = False
    resource_variable_ops.BaseResourceVariable.__init__(
        made,
        trainable=trainable,
        shape=shape,
        dtype=dtype,
        handle=handle,
        synchronization=variable._map_synchronization(variable.synchronization),
        aggregation=variable._map_aggregation(variable.aggregation),
        name=name,
        unique_id=handle._unique_id,
        handle_name=name,
        in_graph_mode=False,
    )
    return made


def try_build() -> bool:
    """Whether what is put together equals the real thing, attribute by attribute, and is updated alike."""
    if not on_tensorflow.shares():
        return False
    import tensorflow as tf

    def describe(made: Any) -> Any:
        made.assign_add([[1.0, 2.0]])
        handle = made.handle
        odd = {"_handle", "_unique_id", "_handle_name", "_graph_key"}
        return (
            {key: str(value) for key, value in vars(made).items() if key not in odd},
            (type(made), made.name, made.dtype, made.shape, made.device, made.trainable, made.numpy().tolist()),
            (handle.dtype, handle.shape, handle.device, handle._name, handle._parent_trackable() is made),
            (handle._handle_data, made._graph_key, made._unique_id.rpartition("_")[0], made._handle_name),
            tf.function(lambda: made + 1.0, autograph=False)().numpy().tolist(),
        )

    variable = keras.Variable([[1.0, 2.0]], name="hornbeam_tries")
    real = describe(variable._value)
    value = tf.constant([[1.0, 2.0]])
    with tf.init_scope():
        return bool(describe(build(variable, value, "", None, trainable=True, known={})) == real)
