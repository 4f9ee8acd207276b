"""Writes the files of Keras 2 in `keras2/`: run with `tf_keras` installed, `python make_keras2.py`.

Everything is small and deterministic. `expected.json` has, for every file, what the model answers, and what it answers
after one more step of training without shuffling.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras as keras
from tf_keras import layers

HERE = Path(__file__).parent / "keras2"


def inputs(*shape: int) -> np.ndarray:
    return np.linspace(-1, 1, int(np.prod(shape)), dtype="float32").reshape(shape)


def sequential() -> Any:
    return keras.Sequential(
        [
            layers.Conv2D(3, 2, activation="relu", input_shape=(4, 4, 2)),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.0),
            layers.Dense(2, kernel_initializer="he_normal", name="out"),
        ]
    )


def functional() -> Any:
    x = inputs_ = keras.Input((6,), name="features")
    left, right = layers.Dense(4, activation="tanh", name="left")(x), layers.Dense(4, name="right")(x)
    x = layers.Concatenate()([left, layers.Add()([left, right])])
    return keras.Model(inputs_, layers.Dense(2, name="out")(layers.Dense(3, name="inside")(x)), name="outer")


def recurrent() -> Any:
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=True)(tokens)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.TimeDistributed(layers.Dense(3))(x)
    return keras.Model(tokens, layers.GRU(2)(x))


@keras.saving.register_keras_serializable("golden")
class Subclassed(keras.Model):
    def __init__(self, units: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.first = layers.Dense(units, activation="relu")
        self.second = layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.second(self.first(x))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


MODELS = {
    "sequential": (sequential, (8, 4, 4, 2), "rmsprop"),
    "functional": (functional, (8, 6), keras.optimizers.Adam(0.05)),
    "recurrent": (recurrent, (8, 5), keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)),
    "subclassed": (Subclassed, (8, 6), keras.optimizers.Adam(0.02)),
}


def main() -> None:
    HERE.mkdir(exist_ok=True)
    expected: dict[str, Any] = {"tf_keras": keras.__version__}
    for name, (make, shape, optimizer) in MODELS.items():
        keras.utils.set_random_seed(len(name))
        model = make()
        x = np.arange(np.prod(shape), dtype="int32").reshape(shape) % 7 if name == "recurrent" else inputs(*shape)
        y = inputs(8, 2)
        model.compile(optimizer, "mse" if name != "functional" else keras.losses.Huber(), metrics=["mae"])
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        model.save(HERE / f"{name}.keras")
        if name in ("sequential", "functional"):
            model.save(HERE / f"{name}.h5")
        if name == "functional":
            model.save_weights(HERE / f"{name}_weights.h5")
        answers = model.predict(x, verbose=0).tolist()
        optimizer_names = [[v.name, list(v.shape)] for v in model.optimizer.variables]
        model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
        expected[name] = {
            "shape": shape,
            "answers": answers,
            "trained": model.predict(x, verbose=0).tolist(),
            "optimizer": optimizer_names,
        }
    keras.utils.set_random_seed(1)
    model = functional()
    model.compile(keras.optimizers.legacy.Adam(0.05), "mse")
    x, y = inputs(8, 6), inputs(8, 2)
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    model.save(HERE / "old_optimizer.h5")
    answers = model.predict(x, verbose=0).tolist()
    model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
    trained = model.predict(x, verbose=0).tolist()
    expected["old_optimizer"] = {"shape": (8, 6), "answers": answers, "trained": trained}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=None) + "\n")


if __name__ == "__main__":
    main()
