"""The random state of a process: Python's, NumPy's, Keras' and the backend's, taken, given back, or set from a seed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random import seed_generator

#: The name that Keras keeps its own generator under; Keras 3.12 has no constant for it.
_GLOBAL: str = getattr(seed_generator, "GLOBAL_SEED_GENERATOR", "global_seed_generator")


def capture() -> dict[str, Any]:
    """The state of every generator that gives random numbers without being asked for one by name."""
    generator = global_state.get_global_attribute(_GLOBAL)
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "keras": None if generator is None else np.array(keras.ops.convert_to_numpy(generator.state)),
        "backend": (keras.backend.backend(), _capture_backend()),
    }


def restore(state: dict[str, Any]) -> None:
    """Gives the generators the state that `capture` took; another backend's is left alone."""
    if state["keras"] is not None:
        # First: a new one draws its seed from Python's generator.
        seed_generator.global_seed_generator().state.assign(state["keras"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    name, backend = state["backend"]
    if name == keras.backend.backend() and backend is not None:
        _restore_backend(backend)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What is drawn inside is drawn again afterwards."""
    state = capture()
    yield
    restore(state)


def reseed(seed: int, epoch: int) -> None:
    """Makes whatever is random in an epoch a function of `seed` and the epoch's number."""
    generator = global_state.get_global_attribute(_GLOBAL)
    keras.utils.set_random_seed(derive(seed, epoch))
    if generator is not None:  # Keras drops it, but traced functions hold on to it
        generator.state.assign(np.array([derive(seed, epoch) & 0x7FFFFFFF, 0]))
        global_state.set_global_attribute(_GLOBAL, generator)


def derive(*numbers: int) -> int:
    """A seed of 32 bits, unrelated to that of any other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _capture_backend() -> dict[str, Any] | None:
    if keras.backend.backend() == "tensorflow":
        from tensorflow.python.eager import context
        from tensorflow.python.ops import stateful_random_ops

        generator = getattr(stateful_random_ops, "global_generator", None)
        draws = getattr(context.context(), "_rng", None)  # of the seeds of eager operations, under a global seed
        return {
            "generator": None if generator is None else (generator.algorithm, generator.state.numpy()),
            "seed": context.global_seed(),
            "draws": None if draws is None else draws.getstate(),
        }
    if keras.backend.backend() == "torch":
        import torch

        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state().numpy(), "cuda": [state.numpy() for state in devices]}
    return None


def _restore_backend(state: dict[str, Any]) -> None:
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.eager import context

        if state["seed"] is not None and context.global_seed() != state["seed"]:
            tf.random.set_seed(state["seed"])
        if state["draws"] is not None and hasattr(context.context(), "_rng"):
            context.context()._rng.setstate(state["draws"])
        if state["generator"] is not None:
            algorithm, value = state["generator"]
            tf.random.set_global_generator(tf.random.Generator.from_state(value, alg=algorithm))
    elif keras.backend.backend() == "torch":
        import torch

        torch.set_rng_state(torch.from_numpy(state["cpu"].copy()))
        if state["cuda"]:
            torch.cuda.set_rng_state_all([torch.from_numpy(device.copy()) for device in state["cuda"]])
