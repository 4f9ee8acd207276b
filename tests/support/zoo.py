"""Small models of every kind Keras saves. Each entry gives `(model, inputs, targets)`; `targets` is None if it cannot
be trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

Entry = tuple[Any, Any, Any]
ZOO: dict[str, Callable[[], Entry]] = {}
AWKWARD: dict[
    str, Callable[[], Entry]
] = {}  # more of them, which the legacy format, say, cannot bring back as they were
TRAINABLE_BACKEND = keras.backend.backend() in ("tensorflow", "jax", "torch")


def entry(function: Callable[[], Entry]) -> Callable[[], Entry]:
    """Adds a model to the zoo under the function's name."""
    ZOO[function.__name__] = function
    return function


def awkward(function: Callable[[], Entry]) -> Callable[[], Entry]:
    """Adds a model to the awkward ones under the function's name."""
    AWKWARD[function.__name__] = function
    return function


def only(*backends: str) -> Callable[[Callable[[], Entry]], Callable[[], Entry]]:
    """Adds a model on some backends; the others cannot build it."""
    return entry if keras.backend.backend() in backends else lambda function: function


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def train(model: Any, x: Any, y: Any, optimizer: Any = "adam", loss: Any = "mse", **kwargs: Any) -> Entry:
    """Compiles and, where the backend can, trains for a step, so that every slot holds something."""
    if not TRAINABLE_BACKEND:
        return model, x, None
    model.compile(optimizer, loss, run_eagerly=keras.backend.backend() != "jax", **kwargs)
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    return model, x, y


def chain(*steps: Any, shape: tuple[int, ...] = (6,), dtype: str | None = None, name: str | None = None) -> Any:
    inputs = x = keras.Input(shape, dtype=dtype)
    for step in steps:
        x = step(x)
    return keras.Model(inputs, x, name=name)


@entry
def functional() -> Entry:
    model = chain(layers.Dense(5, activation="relu"), layers.Dropout(0.3, seed=1), layers.Dense(2))
    return train(model, floats(16, 6), floats(16, 2), metrics=["mae"])


@entry
def sequential() -> Entry:
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, activation="tanh"), layers.Dense(1)])
    return train(model, floats(16, 6), floats(16, 1), "rmsprop")


@entry
def not_compiled() -> Entry:
    return chain(layers.Dense(3)), floats(4, 6), None


@keras.saving.register_keras_serializable("zoo")
class Subclassed(keras.Model):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.zed = layers.Dense(4)
        self.alpha = layers.Dense(3)
        self._hidden = layers.Dense(3)
        self.blocks = [[layers.Dense(3)], (layers.Dense(3),), {"a": layers.LayerNormalization()}]

    def call(self, x: Any) -> Any:
        x = self._hidden(self.alpha(self.zed(x)))
        return self.blocks[2]["a"](self.blocks[1][0](self.blocks[0][0](x)))


@entry
def subclassed() -> Entry:
    model = Subclassed()
    model(floats(2, 6))
    return train(model, floats(16, 6), floats(16, 3))


@entry
def nested() -> Entry:
    inner = chain(layers.Dense(4), layers.BatchNormalization(), name="inner")
    outer = keras.Sequential([keras.Input((6,)), inner, layers.Dense(2)])
    return train(outer, floats(16, 6), floats(16, 2))


@entry
def shared_layers() -> Entry:
    dense = layers.Dense(6)
    inputs = keras.Input((6,))
    return train(keras.Model(inputs, dense(dense(inputs))), floats(16, 6), floats(16, 6))


@entry
def several_inputs_and_outputs() -> Entry:
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    joined = layers.Concatenate()([a, b])
    outputs = {"left": layers.Dense(1, name="left")(joined), "right": layers.Dense(2, name="right")(joined)}
    model = keras.Model([a, b], outputs)
    x, y = [floats(16, 3), floats(16, 4)], {"left": floats(16, 1), "right": floats(16, 2)}
    return train(model, x, y, loss={"left": "mse", "right": "mae"})


@entry
def recurrent() -> Entry:
    model = chain(
        layers.LSTM(5, return_sequences=True),
        layers.Bidirectional(layers.GRU(4, return_sequences=True)),
        layers.SimpleRNN(2),
        shape=(3, 6),
    )
    return train(model, floats(16, 3, 6), floats(16, 2))


@entry
def convolutional() -> Entry:
    model = chain(
        layers.Conv2D(4, 3),
        layers.BatchNormalization(),
        layers.DepthwiseConv2D(2),
        layers.SeparableConv2D(3, 2),
        layers.GlobalAveragePooling2D(),
        shape=(8, 8, 3),
    )
    return train(model, floats(8, 8, 8, 3), floats(8, 3))


@entry
def attention() -> Entry:
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(20, 8)(tokens)
    x = layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x)
    x = layers.LayerNormalization()(x + layers.Dense(8, activation="gelu")(x))
    model = keras.Model(tokens, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))
    x = np.random.default_rng(0).integers(0, 20, (16, 5)).astype("int32")
    return train(model, x, floats(16, 2))


@entry
def embedding_with_sparse_updates() -> Entry:
    model = chain(layers.Embedding(600, 8), layers.Flatten(), layers.Dense(1), shape=(4,), dtype="int32")
    x = np.random.default_rng(0).integers(0, 50, (16, 4)).astype("int32")
    return train(model, x, floats(16, 1), keras.optimizers.SGD(0.1))


@entry
def wrappers() -> Entry:
    steps = [layers.TimeDistributed(layers.Dense(3)), layers.SpectralNormalization(layers.Dense(2)), layers.Flatten()]
    return train(chain(*steps, shape=(4, 6)), floats(8, 4, 6), floats(8, 8))


@entry
def mixed_precision() -> Entry:
    steps = [
        layers.Dense(8, dtype="mixed_float16"),
        layers.Dense(2, dtype="mixed_bfloat16"),
        layers.Activation("linear", dtype="float32"),
    ]
    inner = keras.optimizers.SGD(0.01, momentum=0.9)
    return train(chain(*steps), floats(16, 6), floats(16, 2), keras.optimizers.LossScaleOptimizer(inner))


@entry
def bfloat16() -> Entry:
    return train(
        chain(layers.Dense(1400, dtype="bfloat16"), layers.Dense(2, dtype="float16")), floats(8, 6), floats(8, 2)
    )


@entry
def float64() -> Entry:
    return train(chain(layers.Dense(4, dtype="float64")), floats(8, 6), floats(8, 4))


@entry
def frozen_parts() -> Entry:
    model = chain(layers.Dense(4), layers.Dense(3))
    model.layers[1].trainable = False
    return train(model, floats(8, 6), floats(8, 3))


@only("tensorflow", "jax", "torch")
def int8() -> Entry:
    model = chain(layers.Dense(16), layers.Dense(8))
    model.quantize("int8")
    return model, floats(4, 6), None


@only("tensorflow", "jax", "torch")
def int4() -> Entry:
    model = chain(layers.Dense(16), layers.EinsumDense("ab,bc->ac", 8))
    model.quantize("int4")
    return model, floats(4, 6), None


@only("tensorflow", "jax")
def float8() -> Entry:
    model = chain(layers.Dense(16), layers.Dense(16))
    model.quantize("float8")
    return model, floats(16, 6), None


@entry
def lora() -> Entry:
    model = chain(layers.Dense(8), layers.Dense(4))
    model.layers[1].enable_lora(2)
    model.layers[1].lora_kernel_b.assign(floats(2, 8))
    return train(model, floats(8, 6), floats(8, 4))


@keras.saving.register_keras_serializable("zoo")
class OddVariables(layers.Layer):
    """Scalars, empty tensors, booleans, integers, small floats and complex numbers."""

    def build(self, shape: Any) -> None:
        def add(name: str, shape: tuple[int, ...], dtype: str) -> Any:
            return self.add_weight(name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False)

        self.scalar = add("scalar", (), "float32")
        self.empty = add("empty", (0, 3), "float32")
        self.boolean = add("boolean", (3,), "bool")
        names = ("int8", "int16", "int32", "uint8", "float16", "bfloat16")
        self.numbers = [add(n, (2, 2), n) for n in names]
        self.complex = add("complex", (2,), "complex64")
        self.late = self.add_weight(name="w", shape=(shape[-1],), initializer="ones")

    def fill(self) -> None:
        self.scalar.assign(0.5)
        self.boolean.assign([True, False, True])
        for i, variable in enumerate(self.numbers):
            variable.assign([[i, i + 1], [100, 7]])
        self.complex.assign(np.array([0.5 - 2j, 3j], "complex64"))

    def call(self, x: Any) -> Any:
        return x * self.late


@entry
def odd_variables() -> Entry:
    model = chain(OddVariables(), layers.Dense(2))
    model.layers[1].fill()
    return train(model, floats(8, 6), floats(8, 2))


@keras.saving.register_keras_serializable("zoo")
class CustomState(layers.Layer):
    """Stores plain arrays, one of them refilled between two keys, and reads its own values back."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tables = [np.zeros((2, 3), "float32"), np.zeros(4, "complex64"), np.zeros((), "int64")]

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(name="w", shape=(shape[-1],), initializer="ones")

    def call(self, x: Any) -> Any:
        return x * self.w

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        scratch = np.empty((2, 3), "float32")
        scratch[:] = self.tables[0]
        store["table"] = scratch
        scratch[:] = -1.0
        store["other"] = scratch
        store["complex"] = self.tables[1]
        store["number"] = self.tables[2]
        store["python"] = 7
        store["dropped"] = np.ones(2)
        del store["dropped"]
        assert "dropped" not in store
        assert "table" in store
        assert np.array_equal(store["table"], self.tables[0])
        assert list(store.keys()) == ["0", "complex", "number", "other", "python", "table"]

    def load_own_variables(self, store: Any) -> None:
        self.w.assign(store["0"])
        changed = store["table"]
        changed += 1.0  # must not show in the next read
        self.tables = [store["table"], store["complex"], store["number"]]
        assert store["other"].min() == store["other"].max() == -1.0
        assert int(store["python"]) == 7
        assert len(store) == 6
        assert np.array_equal(store["table"], self.tables[0])  # may be read twice


@entry
def custom_state() -> Entry:
    model = chain(CustomState(), layers.Dense(2))
    model.layers[1].tables = [floats(2, 3), np.arange(4).astype("complex64") * 1j, np.array(2**40)]
    return train(model, floats(8, 6), floats(8, 2))


@entry
def unicode_and_long_names() -> Entry:
    model = chain(layers.Dense(3, name="größe-данные-层"), layers.Dense(2, name="n" * 300), name="модель")
    return train(model, floats(8, 6), floats(8, 2))


@entry
def many_layers() -> Entry:
    return train(chain(*[layers.Dense(3) for _ in range(70)]), floats(8, 6), floats(8, 3))


@entry
def learning_rate_schedule_and_ema() -> Entry:
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    optimizer = keras.optimizers.AdamW(schedule, use_ema=True, weight_decay=0.1)
    return train(chain(layers.Dense(4)), floats(16, 6), floats(16, 4), optimizer)


@entry
def gradient_accumulation() -> Entry:
    optimizer = keras.optimizers.Adam(gradient_accumulation_steps=2)
    return train(chain(layers.Dense(4)), floats(16, 6), floats(16, 4), optimizer)


@entry
def adapted_preprocessing() -> Entry:
    norm = layers.Normalization()
    norm.adapt(floats(20, 6))
    return train(chain(norm, layers.Dense(2)), floats(8, 6), floats(8, 2))


@only("tensorflow")
def preprocessing_with_assets() -> Entry:
    text = layers.TextVectorization(max_tokens=20, output_mode="multi_hot")
    text.adapt(["a b c größe", "b c d"])
    strings = layers.StringLookup(vocabulary=["x", "y"], output_mode="multi_hot")
    numbers = layers.IntegerLookup(vocabulary=[3, 5], output_mode="multi_hot")
    bins = layers.Discretization(num_bins=3, epsilon=0.1)
    bins.adapt(floats(20, 1))
    a = keras.Input((1,), dtype="string")
    b = keras.Input((1,), dtype="string")
    c = keras.Input((1,), dtype="int64")
    d = keras.Input((1,))
    joined = layers.Concatenate()([layers.Flatten()(text(a)), strings(b), numbers(c), layers.Flatten()(bins(d))])
    model = keras.Model([a, b, c, d], layers.Dense(2)(joined))
    import tensorflow as tf

    x = [tf.constant([["a größe"], ["c"]]), tf.constant([["x"], ["z"]]), np.array([[3], [4]]), floats(2, 1)]
    return model, x, None


@keras.saving.register_keras_serializable("zoo")
class CustomAssets(layers.Layer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.text = ""

    def call(self, x: Any) -> Any:
        return x

    def save_assets(self, path: str) -> None:
        import os

        os.makedirs(os.path.join(path, "deep"))
        for name in ("ünïcode.txt", "deep/empty.bin", "text"):
            with open(os.path.join(path, name), "w", encoding="utf-8") as file:
                file.write(self.text if name == "text" else "")

    def load_assets(self, path: str) -> None:
        import os

        with open(os.path.join(path, "text"), encoding="utf-8") as file:
            self.text = file.read()
        assert os.path.exists(os.path.join(path, "ünïcode.txt"))
        assert os.path.exists(os.path.join(path, "deep", "empty.bin"))


@entry
def custom_assets() -> Entry:
    model = chain(CustomAssets(), layers.Dense(2))
    model.layers[1].text = "größe\n" * 1000
    return model, floats(4, 6), None


OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"momentum": 0.1, "centered": True},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adadelta": {},
    "Adagrad": {},
    "Adamax": {},
    "Adafactor": {},
    "Nadam": {},
    "Ftrl": {},
    "Lion": {},
    "Lamb": {},
    "Muon": {},
    "ScheduleFreeAdamW": {},
}
if TRAINABLE_BACKEND:
    for _name, _arguments in OPTIMIZERS.items():
        if _name == "Muon" and keras.__version__.startswith("3.12."):
            continue  # fails in `fit` on TensorFlow there, without hornbeam
        if hasattr(keras.optimizers, _name):

            def _with_optimizer(name: str = _name, arguments: Any = _arguments) -> Entry:
                optimizer = getattr(keras.optimizers, name)(**arguments)
                return train(chain(layers.Dense(5), layers.Dense(3)), floats(16, 6), floats(16, 3), optimizer)

            ZOO[f"optimizer_{_name}"] = _with_optimizer


@keras.saving.register_keras_serializable("zoo")
class TiedHead(layers.Layer):
    """Uses the table of another layer for its kernel: both layers have the variable, and this one has the other."""

    def __init__(self, embedding: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embedding = embedding

    def build(self, shape: Any) -> None:
        self.kernel = self.embedding.embeddings

    def call(self, x: Any) -> Any:
        return keras.ops.matmul(x, keras.ops.transpose(self.kernel))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "embedding": keras.saving.serialize_keras_object(self.embedding)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**{**config, "embedding": keras.saving.deserialize_keras_object(config["embedding"])})


@awkward
def tied_weights() -> Entry:
    embedding = layers.Embedding(20, 8)
    model = chain(embedding, layers.Dense(8), TiedHead(embedding), shape=(4,), dtype="int32")
    x = np.random.default_rng(0).integers(0, 20, (16, 4)).astype("int32")
    return train(model, x, floats(16, 4, 20))


@keras.saving.register_keras_serializable("zoo")
class Counting(keras.initializers.Initializer):
    """Gives the number of times that it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        self.calls += 1
        return keras.ops.full(shape, self.calls, dtype)


@keras.saving.register_keras_serializable("zoo")
class Initialised(layers.Layer):
    """Has initialisers with state, the second of which serves training, too; files have every other weight."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator(5)
        self.initializers = [Counting(), keras.initializers.RandomNormal(seed=self.generator)]

    def build(self, shape: Any) -> None:
        self.added = [self.add_weight(shape=(shape[-1],), initializer=i) for i in self.initializers for _ in range(2)]

    def call(self, x: Any, training: bool = False) -> Any:
        for weight in self.added:
            x = x * weight
        return x + self.initializers[1]((x.shape[-1],), dtype=x.dtype) if training else x

    def save_own_variables(self, store: Any) -> None:
        store["0"], store["2"] = self.added[0], self.added[2]

    def load_own_variables(self, store: Any) -> None:
        for key in ("0", "2"):
            self.added[int(key)].assign(store[key])


@awkward
def initialisers_with_state() -> Entry:
    seeded = keras.initializers.GlorotUniform(seed=keras.random.SeedGenerator(7))
    model = chain(Initialised(), layers.Dense(5, kernel_initializer=seeded), layers.Dense(3, kernel_initializer=seeded))
    return train(model, floats(16, 6), floats(16, 3))
