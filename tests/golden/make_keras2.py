"""Writes the golden files of one version of Keras 2 into `keras2.tar.xz`: `python make_keras2.py [keras | tf_keras]`.

Each version runs in an environment of its own: `tensorflow-cpu==2.12.*` with `keras==2.12.*`, and so on to 2.15;
`tf_keras` with the TensorFlow of its version. For every model there are a `.keras` and an `.h5` file, and an `.npz`
with the inputs `x`, the outputs `y`, the outputs `z` after one more step of training, the weights `w` and the
optimizer's variables `o`, whose names are in `names`. `objects.json` has configurations of nearly every class, as
`.keras` and as `.h5` files have them. All versions are in one archive, since they hardly differ; what it has stays as
it is.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
import tarfile
import tempfile

import numpy as np

PACKAGE = sys.argv[1] if len(sys.argv) > 1 else "keras"
keras = importlib.import_module("tensorflow").keras if PACKAGE == "keras" else importlib.import_module(PACKAGE)
layers = keras.layers
VERSION = importlib.import_module(PACKAGE).__version__
TARGET = pathlib.Path(__file__).parent / "keras2.tar.xz"


def floats(*shape):
    return np.linspace(-1, 1, int(np.prod(shape)), dtype="float32").reshape(shape)


def sequential():
    return keras.Sequential(
        [
            layers.Conv2D(3, 2, activation="relu", input_shape=(4, 4, 2)),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.0),
            layers.Dense(2, kernel_initializer="he_normal", name="out"),
        ]
    ), [floats(8, 4, 4, 2)]


def functional():
    """Two inputs, two outputs, a layer that is used twice."""
    first, second = keras.Input((6,), name="first"), keras.Input((6,), name="second")
    shared = layers.Dense(4, activation="tanh", name="shared")
    left, right = shared(first), shared(second)
    x = layers.Concatenate(name="both")([left, layers.Add(name="sum")([left, right])])
    out = layers.Dense(2, kernel_regularizer="l2", name="out")(x)
    side = layers.Dense(2, activation="softplus", kernel_constraint=keras.constraints.MaxNorm(3.0), name="side")(right)
    return keras.Model([first, second], [out, side], name="golden"), [floats(8, 6), floats(8, 6)[::-1] * 0.5]


def nested():
    """Models in a model: one that is used twice, one with two outputs, sequential ones, one inside another."""
    inside = keras.Input((4,), name="inside")
    deep = keras.Sequential([layers.Dense(3, input_shape=(4,), name="deep_dense")], name="deep")
    twice = keras.Model(inside, layers.Dense(4, activation="tanh", name="twice_dense")(inside), name="twice")
    a = keras.Input((4,), name="a")
    b = layers.Dense(3, name="two_dense")(a)
    two = keras.Model(a, [b, layers.Add(name="two_sum")([b, deep(a)])], name="two")
    tower = keras.Sequential([layers.Dense(3, activation="relu"), layers.Dense(2)], name="tower")
    x = keras.Input((4,), name="x")
    p, q = two(twice(twice(x)))
    joined = layers.Concatenate(name="joined")([tower(p), q])
    head = keras.Sequential([layers.Dense(2, input_shape=(5,), name="head_dense")], name="head")
    return keras.Model(x, [head(joined), twice(x)], name="outer"), [floats(8, 4)]


def attention():
    """Tensors as keyword arguments, a mask that is passed on, a dictionary of inputs."""
    tokens, features = keras.Input((5,), dtype="int32", name="tokens"), keras.Input((3,), name="features")
    x = layers.Embedding(7, 4, mask_zero=True, name="embed")(tokens)
    x = layers.MultiHeadAttention(2, 2, name="attention")(x, value=x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    x = layers.Dense(2, name="out")(layers.Concatenate(name="joined")([x, features]))
    model = keras.Model({"tokens": tokens, "features": features}, x, name="attention_model")
    return model, {"tokens": np.arange(40, dtype="int32").reshape(8, 5) % 7, "features": floats(8, 3)}


def recurrent():
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=True)(tokens)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.TimeDistributed(layers.Dense(3))(x)
    return keras.Model(tokens, layers.GRU(2)(x)), [np.arange(40, dtype="int32").reshape(8, 5) % 7]


def broad():
    """A layer of every kind that is left, with arguments that Keras 3 calls differently."""
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Rescaling(0.5, name="rescale")(x)
    x = layers.ZeroPadding2D(1)(x)
    x = layers.SeparableConv2D(4, 3)(x)
    x = layers.LeakyReLU(alpha=0.2)(x)
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.PReLU(shared_axes=[1, 2])(x)
    x = layers.UpSampling2D(2)(layers.MaxPooling2D(2)(x))
    x = layers.Conv2DTranspose(2, 2, strides=2)(x)
    x = layers.BatchNormalization(axis=-1, fused=False)(x)
    x = layers.AveragePooling2D(2)(x)
    x = layers.GaussianNoise(0.0)(layers.SpatialDropout2D(0.0)(x))
    x = layers.Cropping2D(1)(x)
    x = layers.ReLU(max_value=6.0)(x)
    x = layers.Permute((2, 1, 3))(x)
    x = layers.Reshape((6, 12))(x)
    x = layers.Conv1D(3, 2, padding="causal")(x)
    x = layers.Softmax()(layers.ELU()(x))
    x = layers.GlobalMaxPooling1D()(x)
    x = layers.Multiply()([x, layers.Activation("swish")(x)])
    return keras.Model(inputs, layers.Dense(2, activation="gelu")(x), name="broad"), [floats(8, 8, 8, 3)]


@keras.utils.register_keras_serializable("golden")
class Subclassed(keras.Model):
    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = layers.Dense(units, activation="relu")
        self.blocks = [layers.Dense(units) for _ in range(2)]
        self.second = layers.Dense(2)

    def call(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.second(x)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def subclassed():
    return Subclassed(), [floats(8, 6)]


def small():
    return keras.Sequential([layers.Dense(2, input_shape=(3,), name="only")]), [floats(8, 3)]


@keras.saving.register_keras_serializable("golden")
class Labelled(layers.Layer):
    """Has an asset."""

    text = ""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        super().build(shape)

    def call(self, x):
        return x * self.scale

    def save_assets(self, path):
        (pathlib.Path(path) / "text").write_text(self.text)

    def load_assets(self, path):
        self.text = (pathlib.Path(path) / "text").read_text()

    _save_assets, _load_assets = save_assets, load_assets  # as 2.12 calls them


def assets():
    """Layers with an asset, one of Keras' own, one in a model in the model."""
    numbers, words = keras.Input((4,), name="numbers"), keras.Input((2,), dtype="string", name="words")
    lookup, label, deep = layers.StringLookup(name="lookup"), Labelled(name="label"), Labelled(name="deep")
    lookup.adapt(["b", "b", "a"])
    label.text, deep.text = f"of {PACKAGE} {VERSION}", f"deep, of {PACKAGE} {VERSION}"
    inner = keras.Sequential([keras.Input((3,)), deep], name="inner")
    known = layers.Flatten()(layers.Embedding(3, 2, name="embed")(lookup(words)))
    x = layers.Concatenate()([inner(layers.Dense(3, name="dense")(label(numbers))), known])
    texts = np.array([["a", "b"], ["b", "c"]] * 4)
    return keras.Model([numbers, words], layers.Dense(2, name="out")(x), name="labelled"), [floats(8, 4), texts]


OPTIMIZERS = keras.optimizers
LEGACY = OPTIMIZERS.legacy
MODELS = {
    "sequential": (sequential, lambda: "rmsprop", "mse"),
    "functional": (functional, lambda: OPTIMIZERS.Adam(0.05), [keras.losses.Huber(), "mse"]),
    "nested": (nested, lambda: OPTIMIZERS.Adam(0.05), "mse"),
    "attention": (attention, lambda: OPTIMIZERS.Adam(0.05), "mse"),
    "recurrent": (recurrent, lambda: OPTIMIZERS.SGD(0.1, momentum=0.9, nesterov=True), "mse"),
    "broad": (broad, lambda: OPTIMIZERS.Adam(0.05), "mse"),
    "subclassed": (subclassed, lambda: OPTIMIZERS.Adam(0.02), "mse"),
    "assets": (assets, lambda: OPTIMIZERS.SGD(0.1, momentum=0.9), "mse"),
    "schedule": (small, lambda: OPTIMIZERS.Adam(OPTIMIZERS.schedules.ExponentialDecay(0.1, 2, 0.5)), "mse"),
    "amsgrad": (small, lambda: OPTIMIZERS.Adam(0.05, amsgrad=True), "mse"),
    "adamw": (small, lambda: OPTIMIZERS.AdamW(0.05, weight_decay=0.1), "mse"),
    "nadam": (small, lambda: OPTIMIZERS.Nadam(0.05), "mse"),
    "sgd": (small, lambda: OPTIMIZERS.SGD(0.05), "mse"),
    "rmsprop": (small, lambda: OPTIMIZERS.RMSprop(0.05, momentum=0.5, centered=True), "mse"),
    "adagrad": (small, lambda: OPTIMIZERS.Adagrad(0.5), "mse"),
    "adadelta": (small, lambda: OPTIMIZERS.Adadelta(0.5), "mse"),
    "adamax": (small, lambda: OPTIMIZERS.Adamax(0.05), "mse"),
    "ftrl": (small, lambda: OPTIMIZERS.Ftrl(0.05), "mse"),
    "old_adam": (small, lambda: LEGACY.Adam(0.05, amsgrad=True), "mse"),
    "old_nadam": (small, lambda: LEGACY.Nadam(0.05), "mse"),
    "old_sgd": (small, lambda: LEGACY.SGD(0.05, momentum=0.9), "mse"),
    "old_rmsprop": (small, lambda: LEGACY.RMSprop(0.05, momentum=0.5, centered=True), "mse"),
    "old_adagrad": (small, lambda: LEGACY.Adagrad(0.5), "mse"),
    "old_adadelta": (small, lambda: LEGACY.Adadelta(0.5), "mse"),
    "old_adamax": (small, lambda: LEGACY.Adamax(0.05), "mse"),
    "old_ftrl": (small, lambda: LEGACY.Ftrl(0.05), "mse"),
}


#: Arguments of layers that need some.
ARGUMENTS = {
    **dict.fromkeys(
        ["Dense", "GRU", "GRUCell", "LSTM", "LSTMCell", "SimpleRNN", "SimpleRNNCell", "RepeatVector"], (2,)
    ),
    **dict.fromkeys([f"{name}{n}D" for name in ("Conv", "SeparableConv", "ConvLSTM") for n in (1, 2, 3)], (2, 2)),
    **dict.fromkeys([f"Conv{n}DTranspose" for n in (1, 2, 3)], (2, 2)),
    **dict.fromkeys(["DepthwiseConv1D", "DepthwiseConv2D", "CategoryEncoding", "HashedCrossing", "Hashing"], (2,)),
    **dict.fromkeys(["CenterCrop", "Embedding", "MultiHeadAttention", "RandomCrop", "Resizing"], (2, 2)),
    **dict.fromkeys([f"SpatialDropout{n}D" for n in (1, 2, 3)], (0.5,)),
    **dict.fromkeys(["AlphaDropout", "Dropout", "GaussianDropout", "GaussianNoise", "Rescaling"], (0.5,)),
    **dict.fromkeys(["RandomBrightness", "RandomContrast", "RandomRotation", "RandomZoom"], (0.5,)),
    "RandomTranslation": [0.5, 0.5],
    "Activation": ["relu"],
    "Discretization": [[0.0, 1.0]],
    "Dot": [1],
    "EinsumDense": ["ab,bc->ac", [3]],
    "Permute": [[2, 1]],
    "Reshape": [[2, 1]],
    "Bidirectional": [layers.LSTM(2)],
    "TimeDistributed": [layers.Dense(2)],
    "RNN": [layers.LSTMCell(2)],
    "SpectralNormalization": [layers.Dense(2)],
}


def objects():
    """Configurations, in the new form and in that of HDF5 files; classes that want more arguments are left out."""
    found = {}
    for kind in ("layers", "losses", "metrics", "initializers", "regularizers", "constraints"):
        module = getattr(keras, kind)
        for name in sorted(vars(module)):
            cls = getattr(module, name)
            if not isinstance(cls, type) or cls.__name__ != name or "Lookup" in name:
                continue
            try:
                made = cls(*ARGUMENTS.get(name, []))
                forms = [module.serialize(made, use_legacy_format=legacy) for legacy in (False, True)]
                json.dumps(forms)
            except (TypeError, ValueError, NotImplementedError):
                continue
            found[f"{kind}/{name}"] = forms
    return found


def arrays(**parts):
    found = {}
    for key, values in parts.items():
        names = values if isinstance(values, dict) else {str(i): value for i, value in enumerate(values)}
        found.update({f"{key}/{name}": np.asarray(value) for name, value in names.items()})
    return found


def outputs(model, x):
    found = model.predict(x, verbose=0)
    return found if isinstance(found, list) else [found]


def write(directory):
    """A file of every kind for every model."""
    # 2.12 writes HDF5 under the name `.keras`, unless it is asked for version 3 of the format.
    explicit = VERSION.startswith("2.12.")
    how = {"save_format": "keras_v3"} if explicit else {}
    for name, (make, optimizer, loss) in MODELS.items():
        if (directory / f"{name}.npz").exists():
            continue
        keras.backend.clear_session()
        keras.utils.set_random_seed(len(name))
        model, given = make()
        x = given if isinstance(given, dict) or len(given) > 1 else given[0]
        y = [floats(*out.shape) for out in outputs(model, x)]
        y = y if len(y) > 1 else y[0]
        model.compile(optimizer(), loss, metrics=["mae"])
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        root = directory / name
        model.save(f"{root}.keras", **how)
        if name not in ("subclassed", "assets"):
            model.save(f"{root}.h5")
        if explicit and name == "functional":
            model.save(f"{root}_hdf5.keras")
        if name in ("functional", "nested", "subclassed"):
            model.save_weights(f"{root}_weights.h5")
        if name in ("functional", "nested"):
            root.with_suffix(".json").write_text(model.to_json())
        variables = model.optimizer.variables
        variables = variables() if callable(variables) else variables
        weights = [w for w in model.get_weights() if w.dtype != object]  # that are tables of texts
        state = {"w": weights, "o": [v.numpy() for v in variables], "y": outputs(model, x)}
        state["names"] = [np.array([v.name for v in variables], "S")]
        model.train_on_batch(x, y)
        np.savez(f"{root}.npz", **arrays(x=given, z=outputs(model, x), **state))


def main():
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        if TARGET.exists():
            with tarfile.open(TARGET) as archive:
                archive.extractall(root, filter="data")
        era = root / f"{PACKAGE}-{VERSION}"
        era.mkdir(exist_ok=True)
        write(era)
        if not (era / "objects.json").exists():
            (era / "objects.json").write_text(json.dumps(objects()))
        with tarfile.open(TARGET, "w:xz", preset=9) as archive:
            for path in sorted(root.rglob("*.*")):
                if path.is_file():
                    archive.add(path, path.relative_to(root), filter=plain)
    print(TARGET, TARGET.stat().st_size, file=sys.stderr)


def plain(member):
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
