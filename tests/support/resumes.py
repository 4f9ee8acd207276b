"""Trainings that are killed and started again until they end, each beside one that is not.

`python -m support.resumes SCENARIO KILLS SEED` prints, as JSON, what the two ended with. Each attempt is a forked
child, so that the backend is imported once. A child kills itself with SIGKILL at one of its ticks: around every batch,
epoch, and write of a file of a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
warnings.filterwarnings("ignore", message=".*fork.*")

import keras
import numpy as np
from keras import layers

from hornbeam import _core
from hornbeam.callbacks import BackupAndRestore, ModelCheckpoint
from hornbeam.checkpoint import CheckpointManager
from hornbeam.data import resumable
from hornbeam.training import statefile
from support.helpers import values

BACKEND = keras.backend.backend()
TICKS = {"left": -1, "seen": 0}


def tick(*_: Any) -> None:
    TICKS["seen"] += 1
    TICKS["left"] -= 1
    if TICKS["left"] == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def ticking(function: Callable[..., Any]) -> Callable[..., Any]:
    def around(*args: Any, **kwargs: Any) -> Any:
        tick()
        result = function(*args, **kwargs)
        tick()
        return result

    return around


class Ticks(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        tick()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        tick()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        tick()

    def on_train_end(self, logs: Any = None) -> None:
        tick()


def arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(44, 4)).astype("float32")
    return x, (x @ rng.normal(size=(4, 2))).astype("float32")


class Rows(keras.utils.PyDataset):
    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = arrays()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        rows = slice(8 * i, 8 * i + 8)
        noise = np.random.normal(size=self.x[rows].shape)  # random, by the state of the process
        return self.x[rows] + noise.astype("float32"), self.y[rows]


def pipeline(repeat: bool = False) -> Any:
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices(arrays()).shuffle(16, seed=5)
    data = data.map(lambda x, y: (x * 1.5, y), num_parallel_calls=2)
    return (data.repeat() if repeat else data).batch(8).prefetch(2)


def build(optimizer: Any = None, **compiled: Any) -> Any:
    keras.utils.set_random_seed(1)  # before every start, as a script has it
    inputs = keras.Input((4,))
    x = layers.Dropout(0.3)(layers.Dense(16, activation="relu")(inputs))
    model = keras.Model(inputs, layers.Dense(2, dtype="float32")(layers.BatchNormalization()(x)))
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse", metrics=["mae"], **compiled)
    return model


def fit(root: Path, model: Any, data: Any, *, others: Any = (), backup: Any = None, **kwargs: Any) -> Any:
    options = {"epochs": 4, "verbose": 0, "shuffle": len(data) == 2, **kwargs}
    saver = BackupAndRestore(root / "backup", **(backup or {}))
    model.fit(*data, callbacks=[Ticks(), saver, *others], **options)
    return model


def plateau() -> list[Any]:
    return [
        keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=0, min_delta=0.05),
        keras.callbacks.EarlyStopping(monitor="val_loss", patience=3, restore_best_weights=True),
    ]


def case_arrays(root: Path) -> Any:
    return fit(root, build(), arrays(), backup={"seed": 7}, batch_size=8, others=plateau(), validation_split=0.2)


def case_unshuffled(root: Path) -> Any:
    return fit(root, build(), arrays(), batch_size=8, shuffle=False)


def case_batchwise(root: Path) -> Any:
    return fit(root, build(), arrays(), backup={"seed": 7}, batch_size=8, shuffle="batch", steps_per_epoch=6)


def case_whole_steps(root: Path) -> Any:
    """The random state alone tells the order, and Keras makes an epoch's iterator early."""
    seed = 7 if BACKEND == "tensorflow" else None
    return fit(root, build(), arrays(), backup={"seed": seed}, batch_size=8, steps_per_epoch=6)


def case_pydataset(root: Path) -> Any:
    return fit(root, build(), [Rows()], backup={"seed": 7})


def case_tfdata(root: Path) -> Any:
    return fit(root, build(), [pipeline()])


def case_tfdata_endless(root: Path) -> Any:
    return fit(root, build(), [pipeline(repeat=True)], steps_per_epoch=4)


def case_steps_arrays(root: Path) -> Any:
    data = resumable(arrays(), batch_size=8, shuffle=True, seed=2)
    warm = [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.8)]
    return fit(root, build(), [data], backup={"save_freq": 2}, others=warm + plateau(), validation_data=arrays())


def case_steps_pydataset(root: Path) -> Any:
    return fit(root, build(), [resumable(Rows(), shuffle=True, seed=4)], backup={"save_freq": 1})


def case_steps_tfdata(root: Path) -> Any:
    return fit(root, build(), [resumable(pipeline())], backup={"save_freq": 2})


def case_steps_tfdata_unknown(root: Path) -> Any:
    """Nobody knows which batch is the last: a backup may be of it, and have nothing left but the epoch's end."""
    data = resumable(pipeline().filter(lambda x, y: True))
    return fit(root, build(), [data], backup={"save_freq": 1}, others=plateau(), validation_data=arrays())


def case_best(root: Path) -> Any:
    """The best model is that of a training that was not killed."""
    best = ModelCheckpoint(root / "best.keras", save_best_only=True, asynchronous=True, save_weights_only=False)
    kept = ModelCheckpoint(root / "{epoch}.weights.h5", save_weights_only=True, keep_last=2)
    options = {"batch_size": 8, "validation_split": 0.3, "epochs": 6}
    model = fit(root, build(keras.optimizers.Adam(0.3)), arrays(), backup={"seed": 7}, others=[best, kept], **options)
    scores = json.loads((root / ".best.keras.checkpoints.json").read_text())["best"]["score"]
    state = hashlib.sha256(repr(values(keras.models.load_model(root / "best.keras"))).encode()).hexdigest()
    (root / f"{scores} {best.best} {state}").touch()  # what is left is compared
    return model


def case_steps_tfdata_endless(root: Path) -> Any:
    return fit(root, build(), [resumable(pipeline(repeat=True))], backup={"save_freq": 3}, steps_per_epoch=5)


def case_mixed(root: Path) -> Any:
    keras.config.set_dtype_policy("mixed_float16")
    return fit(root, build(), arrays(), backup={"seed": 7}, batch_size=8)


def case_ema(root: Path) -> Any:
    optimizer = keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=5)
    swap = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]
    return fit(root, build(optimizer), arrays(), backup={"seed": 7}, batch_size=8, others=swap)


def case_together(root: Path) -> Any:
    """What the short campaign has no time for one by one."""
    keras.config.set_dtype_policy("mixed_float16")
    optimizer = keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=5)
    swap = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]
    model = build(optimizer, run_eagerly=BACKEND == "tensorflow")
    return fit(root, model, [Rows()], backup={"seed": 7}, others=swap, epochs=3)


def case_schedule(root: Path) -> Any:
    rate = keras.optimizers.schedules.CosineDecay(0.05, 20)
    optimizer = keras.optimizers.SGD(rate, momentum=0.9, gradient_accumulation_steps=4)
    data = resumable(arrays(), batch_size=8)
    return fit(root, build(optimizer), [data], backup={"save_freq": 3, "double_checkpoint": True})


def case_eager(root: Path) -> Any:
    return fit(root, build(run_eagerly=True), arrays(), backup={"seed": 7}, batch_size=8)


def case_jit(root: Path) -> Any:
    model = build(jit_compile=True)
    assert model.jit_compile is True  # Keras may only warn
    return fit(root, model, arrays(), backup={"seed": 7}, batch_size=8)


def case_early(root: Path) -> Any:
    stop = [keras.callbacks.EarlyStopping(monitor="loss", min_delta=10, patience=1, restore_best_weights=True)]
    return fit(root, build(), arrays(), backup={"seed": 7}, batch_size=8, others=stop, epochs=9)


def case_mirrored(root: Path) -> Any:
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = build()
    return fit(root, model, arrays(), backup={"seed": 7}, batch_size=8)


def case_loop(root: Path) -> Any:
    model = build()
    data = resumable(arrays(), batch_size=12, shuffle=True, seed=2)
    for rows in (12, 8):  # before `restore`: TensorFlow rounds by the order in which it traced the shapes
        model.train_on_batch(*(array[:rows] for array in arrays()))
    noise = keras.random.SeedGenerator(3)
    with CheckpointManager(root / "ckpt", keep_last=2) as ckpt:
        step = ckpt.restore(model, extra={"data": data, "noise": noise})
        while data.epoch < 4:
            for x, y in data:
                x = x + np.asarray(keras.ops.convert_to_numpy(keras.random.normal(x.shape, seed=noise)))
                x = x + np.random.normal(size=x.shape) * random.random()
                loss = model.train_on_batch(x.astype("float32"), y)
                tick()
                if step % 3 == 0:
                    ckpt.save(step, model, metrics={"loss": float(loss[0])}, extra={"data": data, "noise": noise})
                step += 1
    return model


def case_example(root: Path) -> Any:
    """The example of docs/checkpointing.md, as it stands there."""
    text = (Path(__file__).parents[2] / "docs" / "checkpointing.md").read_text()
    (code,) = [part.split("```")[0] for part in text.split("```python\n") if part.startswith("from hornbeam")]
    model = build()
    model.train_on_batch = ticking(model.train_on_batch)
    x, y = (np.resize(array, (64, array.shape[1])) for array in arrays())  # all batches of one shape: see the docs
    os.chdir(root)
    exec(code, {"model": model, "x": x, "y": y})
    return model


def case_async(root: Path) -> Any:
    data = resumable(arrays(), batch_size=8, shuffle=True, seed=2)
    return fit(root, build(), [data], backup={"save_freq": 1, "asynchronous": True})


def case_tape(root: Path) -> Any:
    import tensorflow as tf

    model, optimizer = build(), keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    data = resumable(pipeline())

    @tf.function
    def train(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables))
        return loss

    extra = {"data": data, "optimizer": optimizer}
    with CheckpointManager(root / "ckpt", keep_last=1) as ckpt:
        step = ckpt.restore(model, extra=extra)
        while data.epoch < 4:
            for x, y in data:
                train(x, y)
                tick()
                if step % 2 == 0:
                    ckpt.save(step, model, extra=extra)
                step += 1
    model.compile(optimizer, "mse")
    return model


def digest(model: Any) -> str:
    """Of every variable, slot and metric, the random state, and one step more of training."""
    drawn = [random.random(), np.random.random(), np.asarray(keras.ops.convert_to_numpy(keras.random.normal((2,))))]
    before = values(model)
    if BACKEND == "jax":  # Keras leaves an average and its variable with one buffer, which a step cannot donate twice
        for variable in [*model.variables, *model.optimizer.variables]:
            variable.assign(keras.ops.copy(variable.value))
    model.train_on_batch(arrays()[0][:8], arrays()[1][:8])
    return hashlib.sha256(repr([drawn, before, values(model)]).encode()).hexdigest()


def attempt(case: str, root: Path, kill: int) -> dict[str, Any] | None:
    """Runs a training in a child; `None` if it killed itself."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(receive)
            prepare(case)
            TICKS["left"] = kill
            model = globals()[f"case_{case}"](root)
            TICKS["left"] = -1
            left = sorted(p.name for p in root.iterdir())
            os.write(send, json.dumps({"digest": digest(model), "ticks": TICKS["seen"], "left": left}).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(send)
    with open(receive, "rb") as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status != 0:
        sys.exit(f"{case}: the child ended with {status}")
    return json.loads(text)


def prepare(case: str) -> None:
    statefile.write = ticking(statefile.write)
    _core.write_file = ticking(_core.write_file)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        if case == "mirrored":
            cpu = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        if case != "jit":  # with it Keras compiles nothing (`model_supports_jit`), and XLA on CPUs needs no such mode
            tf.config.experimental.enable_op_determinism()
    elif BACKEND == "torch":
        import torch

        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)


def main(case: str, kills: int, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{case} {seed}")
    with tempfile.TemporaryDirectory() as root:
        reference = attempt(case, Path(root), -1)
        assert reference is not None
    done = 0
    found = []
    while done < kills:
        with tempfile.TemporaryDirectory() as root:
            # The first kill of each training is in another part of it; so the last moments have their turn, too.
            kill = 1 + int(rng.uniform(done, done + 1) / kills * reference["ticks"])
            while (result := attempt(case, Path(root), kill)) is None:
                done += 1
                kill = rng.randrange(1, reference["ticks"] + 1) if done < kills else -1
            found.append(result)
    return {"reference": reference, "found": found, "kills": done}


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        print(json.dumps({"case": name, **main(name, int(sys.argv[2]), int(sys.argv[3]))}), flush=True)
