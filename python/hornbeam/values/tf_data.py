"""The position of a `tf.data` iterator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def from_generator(begin: Callable[[], Iterator[Any]], signature: Any) -> Any:
    """A dataset that calls `begin` for each iterator, and prepares one batch ahead.

    There is nothing to tune in it, and the thread that would tune keeps who drops an iterator waiting, up to a minute.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return tf.data.Dataset.from_generator(begin, output_signature=signature).prefetch(1).with_options(options)


def seed_variable() -> Any:
    """A number that a pipeline of the host reads whenever it draws an order."""
    import tensorflow as tf

    with tf.device("CPU:0"):
        return tf.Variable(0, dtype=tf.int64, trainable=False)


def shuffle(value: Any, seed: Any) -> Any:
    """Shuffles the elements of a tensor of numbers by a seed; its first element is part of the seed."""
    import tensorflow as tf

    both = tf.stack([seed, tf.cast(value[0], tf.int64)])
    return tf.random.experimental.stateless_shuffle(value, seed=both)


def random_module() -> Any:
    """`tf.random`, where Keras looks for `shuffle`."""
    import tensorflow as tf

    return tf.random


def unseeded(dataset: Any) -> str | None:
    """Why a `tf.data.Dataset` gives other data after a restart, as far as can be seen."""
    import tensorflow as tf

    if dataset.options().deterministic is False:
        return "it may give its elements in any order (its options say `deterministic = False`)"
    seen, queue = set(), [dataset]
    while queue:
        inner = queue.pop()
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        seeds = (getattr(inner, "_seed", None), getattr(inner, "_seed2", None))
        if all(seed is not None and int(seed) == 0 for seed in seeds):
            return "it shuffles without a seed; pass `seed=` to `shuffle`"
        if getattr(inner, "_deterministic", None) == "false":
            return "it may give its elements in any order (`deterministic=False`)"
        queue.extend(inner._inputs() if hasattr(inner, "_inputs") else [])
    try:
        save_iterator(iter(dataset))
    except tf.errors.OpError as error:
        return f"{type(error).__name__}: {error.message}"
    except AttributeError:
        return f"a {type(dataset).__name__} does not give away its iterators"
    return None


def save_iterator(iterator: Any) -> bytes:
    """The position of a `tf.data` iterator, shuffle buffers included; refused where operations are stateful."""
    import tensorflow as tf

    resource = iterator._iterator_resource
    state = tf.raw_ops.SerializeIterator(resource_handle=resource, external_state_policy=2)  # 2 is FAIL
    return bytes(tf.io.serialize_tensor(state).numpy())


def load_iterator(iterator: Any, state: bytes) -> None:
    """Moves a `tf.data` iterator to a position that `save_iterator` told."""
    import tensorflow as tf

    parsed = tf.io.parse_tensor(state, tf.variant)
    tf.raw_ops.DeserializeIterator(resource_handle=iterator._iterator_resource, serialized=parsed)
