"""The models every benchmark uses. Seeds are fixed, so that peers write the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def resnet50() -> Any:
    """ResNet50 + Adam: 161 layers with weights, 0.3 GB."""
    import keras

    return compiled(keras.applications.ResNet50(weights=None))


def efficientnet_b7() -> Any:
    """EfficientNetB7 + Adam: 2,464 datasets, 0.8 GB."""
    import keras

    return compiled(keras.applications.EfficientNetB7(weights=None))


def dense16() -> Any:
    """16 x Dense(4096), not compiled: few large tensors, 1.07 GB."""
    return dense(16, 4096)


def dense8_adam() -> Any:
    """8 x Dense(4096) + Adam: 1.6 GB."""
    return compiled(dense(8, 4096))


def dense1000_adam() -> Any:
    """1,000 x Dense(64) + Adam: many layers, few bytes. Stock Keras needs a higher recursion limit for it."""
    sys.setrecursionlimit(20_000)
    return compiled(dense(1000, 64))


def two_layers() -> Any:
    """Two small layers + Adam: what is fixed cost."""
    import keras

    layers = keras.layers
    return compiled(keras.Sequential([keras.Input((32,)), layers.Dense(16), layers.Dense(1)]))


MODELS: dict[str, Callable[[], Any]] = {
    "ResNet50 + Adam": resnet50,
    "EfficientNetB7 + Adam": efficientnet_b7,
    "16 x Dense(4096)": dense16,
    "8 x Dense(4096) + Adam": dense8_adam,
    "1,000-layer Dense + Adam": dense1000_adam,
    "two layers + Adam": two_layers,
}

#: Small enough for a check that everything runs.
QUICK: dict[str, Callable[[], Any]] = {
    "two layers + Adam": two_layers,
    "4 x Dense(1024) + Adam": lambda: compiled(dense(4, 1024)),
}


def dense(count: int, units: int) -> Any:
    """A chain of equal Dense layers."""
    import keras

    inputs = x = keras.Input((units,))
    for _ in range(count):
        x = keras.layers.Dense(units)(x)
    return keras.Model(inputs, x)


def compiled(model: Any) -> Any:
    """With Adam, its slots built and every float filled with random numbers."""
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    for variable in [*model.variables, *model.optimizer.variables]:
        if len(variable.shape) and "float" in variable.dtype:
            variable.assign(np.abs(rng.standard_normal(variable.shape, dtype=np.float32)) * 0.02)
    return model


def state(model: Any) -> list[tuple[str, str, bytes]]:
    """Path, dtype and bytes of every variable and optimizer slot."""
    import keras

    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    arrays = [(v.path, np.asarray(keras.ops.convert_to_numpy(v))) for v in variables]
    return [(path, str(a.dtype), a.tobytes()) for path, a in arrays]
