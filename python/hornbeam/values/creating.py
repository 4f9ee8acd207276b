"""Variables whose creation waits for the value that a file has for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from hornbeam.values.backend import backend_name


class Creation:
    """Where a variable would have been created, so that it can be created there later."""

    __slots__ = ("key", "name_scope", "trainable")

    def __init__(self, name_scope: str | None, key: str | None, trainable: bool) -> None:
        self.name_scope = name_scope
        self.key = key
        self.trainable = trainable  # a frozen layer freezes its variables after it has made them


_keys = itertools.count()


def note_creation(variable: Any) -> Creation | None:
    """Notes what TensorFlow takes from the surroundings; `None` where it cannot be restored later."""
    if backend_name() != "tensorflow":
        return Creation(None, None, variable.trainable)
    import tensorflow as tf

    graph = tf.compat.v1.get_default_graph()
    if (
        not tf.executing_eagerly()
        or tf.distribute.has_strategy()
        or graph._variable_creator_stack  # private; empty but inside tf.variable_creator_scope
        or _device_scope()
    ):
        return None
    return Creation(tf.get_current_name_scope(), f"{variable._name}_hornbeam_{next(_keys)}", variable.trainable)


def is_eager() -> bool:
    """Whether TensorFlow runs operations at once, as it does outside of functions and graphs."""
    import tensorflow as tf

    return bool(tf.executing_eagerly())


def _device_scope() -> str:
    from tensorflow.python.eager import context

    return context.context().device_name or ""


def create(creation: Creation, variable: Any, make: Callable[[], None]) -> None:
    """Runs `make` as where `creation` was noted; afterwards the variable has the key promised then."""
    now, variable._trainable = variable._trainable, creation.trainable
    try:
        _create(creation, variable, make)
    finally:
        variable._trainable = now


def _create(creation: Creation, variable: Any, make: Callable[[], None]) -> None:
    if backend_name() == "jax":
        import jax

        with jax.ensure_compile_time_eval():
            make()
        return
    if creation.name_scope is None:
        make()
        return
    import tensorflow as tf

    if tf.executing_eagerly() and tf.get_current_name_scope() == creation.name_scope:
        make()
    else:
        with tf.init_scope(), tf.name_scope(creation.name_scope + "/" if creation.name_scope else ""):
            make()
    made = variable.__dict__["_value"]
    made._unique_id = made.handle._unique_id = creation.key
