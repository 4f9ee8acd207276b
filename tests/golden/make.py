"""Writes the golden files of one version of Keras, here: `KERAS_BACKEND=numpy python make.py`; 3.0 needs `jax`.

Each version runs in an environment of its own that has nothing but `keras==VERSION`, `numpy<2`, `jax[cpu]<0.5` and
`packaging`. For every model there are a `.keras` and a `.weights.h5` file, and an `.npz` with an input, the output that
Keras computed for it, every weight, and every variable of the optimizer; all in one `.zip`, since HDF5 is mostly zeros.
Models that the `.zip` has stay as they are.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
import zipfile

import keras
import numpy as np
from keras import layers

HERE = pathlib.Path(__file__).parent


@keras.saving.register_keras_serializable("golden")
class Scale(layers.Layer):
    """A layer of somebody's own, with a layer in it and an argument."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.inner = layers.Dense(units, use_bias=False)

    def build(self, shape):
        self.factor = self.add_weight(name="factor", shape=(self.units,), initializer="ones")
        self.inner.build(shape)
        self.built = True

    def call(self, x):
        return self.inner(x) * self.factor

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("golden")
def swish2(x):
    return x * keras.ops.sigmoid(2.0 * x)


@keras.saving.register_keras_serializable("golden")
class Blocks(keras.Model):
    """A subclassed model with layers in lists."""

    def __init__(self, widths, **kwargs):
        super().__init__(**kwargs)
        self.widths = widths
        self.blocks = [layers.Dense(w, activation="tanh") for w in widths]
        self.norm = layers.LayerNormalization()

    def build(self, shape):
        for block, width in zip(self.blocks, self.widths, strict=True):
            block.build(shape)
            shape = (*shape[:-1], width)
        self.norm.build(shape)
        self.built = True

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def get_config(self):
        return {**super().get_config(), "widths": self.widths}


@keras.saving.register_keras_serializable("golden")
class Labelled(layers.Layer):
    """Has an asset."""

    text = ""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return x * self.scale

    def save_assets(self, path):
        (pathlib.Path(path) / "text").write_text(self.text)

    def load_assets(self, path):
        self.text = (pathlib.Path(path) / "text").read_text()


def functional():
    inputs = keras.Input((5,), name="x")
    x = layers.Dense(4, activation="relu", name="dense")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    side = Scale(4, name="scale")(inputs)
    x = layers.Add(name="add")([x, side])
    x = layers.Dropout(0.5, seed=3, name="drop")(x)
    outputs = layers.Dense(2, activation=swish2, kernel_regularizer=keras.regularizers.L2(0.01), name="head")(x)
    model = keras.Model(inputs, outputs, name="golden")
    model.compile(keras.optimizers.Adam(0.002), "mse", metrics=["mae"])
    return model, (3, 5)


def convolutional():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, padding="same", activation="relu", name="conv"),
            layers.DepthwiseConv2D(3, name="depthwise"),
            layers.MaxPooling2D(2, name="pool"),
            layers.Flatten(name="flat"),
            layers.Dense(2, activation="softmax", name="head"),
        ],
        name="golden_conv",
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "categorical_crossentropy")
    return model, (2, 6, 6, 2)


def recurrent():
    inputs = keras.Input((4,), dtype="int32", name="tokens")
    x = layers.Embedding(7, 3, name="embed")(inputs)
    x = layers.LSTM(3, return_sequences=True, name="lstm")(x)
    x = layers.Bidirectional(layers.GRU(2), name="both")(x)
    model = keras.Model(inputs, layers.Dense(1, name="head")(x), name="golden_rnn")
    model.compile(keras.optimizers.RMSprop(0.01), "mse")
    return model, (2, 4)


def subclassed():
    model = Blocks([4, 3], name="golden_blocks")
    model.build((None, 5))
    model.compile(keras.optimizers.AdamW(0.01), "mse")
    return model, (3, 5)


def assets():
    """Two layers with an asset, one of them in a model in the model."""
    inner = keras.Sequential([keras.Input((4,)), Labelled(name="deep")], name="inner")
    inner.layers[-1].text = f"deep, of {keras.__version__}"
    label = Labelled(name="label")
    label.text = f"of {keras.__version__}"
    inputs = keras.Input((5,), name="x")
    model = keras.Model(inputs, inner(layers.Dense(4, name="dense")(label(inputs))), name="golden_assets")
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model, (3, 5)


def main():
    random = np.random.default_rng(2024)
    archive = zipfile.ZipFile(HERE / f"keras-{keras.__version__}.zip", "a", zipfile.ZIP_DEFLATED, compresslevel=9)
    with archive, tempfile.TemporaryDirectory() as directory:
        for make in (functional, convolutional, recurrent, subclassed, assets):
            if f"{make.__name__}.npz" in archive.namelist():
                continue
            model, shape = make()
            for weight in model.weights:
                low, high = (0.1, 0.9) if "variance" in weight.name else (-1.0, 1.0)
                value = random.uniform(low, high, weight.shape).astype("float32")
                weight.assign(value if "float" in str(weight.dtype) else np.zeros(weight.shape, "uint32"))
            model.optimizer.build(model.trainable_variables)
            for variable in model.optimizer.variables:
                if variable.name not in ("iteration", "learning_rate"):
                    variable.assign(random.uniform(0, 0.1, variable.shape).astype("float32"))
            model.optimizer.iterations.assign(7)
            x = random.uniform(-1, 1, shape).astype("float32")
            if make is recurrent:
                x = random.integers(0, 7, shape).astype("int32")
            arrays = {"x": x, "y": np.asarray(model.predict(x, verbose=0))}
            arrays.update({f"w{i}": np.asarray(v) for i, v in enumerate(model.weights)})
            arrays.update({f"o{i}": np.asarray(v) for i, v in enumerate(model.optimizer.variables)})
            root = pathlib.Path(directory) / make.__name__
            model.save(f"{root}.keras")
            model.save_weights(f"{root}.weights.h5")
            np.savez(f"{root}.npz", **arrays)
        for path in sorted(pathlib.Path(directory).iterdir()):
            archive.write(path, path.name)
    print(archive.filename, pathlib.Path(archive.filename).stat().st_size, file=sys.stderr)


if __name__ == "__main__":
    main()
