"""Checkpoints inside a training loop: what each costs the loop. `python benches/bench_checkpoint.py [--only …]`.

Every combination of workload and way of saving runs in a process of its own, on TensorFlow: some steps without saves,
then steps with a save after every few. Reported are the stall (what the callback's end of an epoch takes), how much
slower the steps between the saves are than those without, the time lost over the whole run (the last save's completion
included), and the peak of memory above that of training alone. Files are in the page cache unless it says durable.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS = ["stock", "hornbeam", "hornbeam durable", "hornbeam async", "hornbeam async durable", "tf async", "orbax"]
WORKLOADS = {"8 x Dense(4096) + Adam": (6, 3), "Embedding(400,000, 512), SGD": (12, 3), "EfficientNetB7 + Adam": (4, 3)}


def build(workload: str) -> tuple[Any, Any, Any]:
    """A compiled model and one batch."""
    import keras
    import numpy as np
    from keras import layers

    rng = np.random.default_rng(0)
    if workload.startswith("8 x Dense"):
        inputs = x = keras.Input((4096,))
        for _ in range(8):
            x = layers.Dense(4096, activation="relu")(x)
        model = keras.Model(inputs, x)
        model.compile("adam", "mse")
        return model, rng.random((16, 4096), "float32"), rng.random((16, 4096), "float32")
    if workload.startswith("Embedding"):
        inputs = keras.Input((64,), dtype="int32")
        x = layers.GlobalAveragePooling1D()(layers.Embedding(400_000, 512)(inputs))
        model = keras.Model(inputs, layers.Dense(1)(layers.Dense(1024, activation="relu")(x)))
        model.compile("sgd", "mse")
        return model, rng.integers(0, 400_000, (256, 64)), rng.random((256, 1), "float32")
    model = keras.applications.EfficientNetB7(weights=None, input_shape=(128, 128, 3), classes=10)
    model.compile("adam", "categorical_crossentropy")
    return model, rng.random((4, 128, 128, 3), "float32"), np.eye(10, dtype="float32")[:4]


def saver(way: str, model: Any, root: Path) -> tuple[Callable[[int], None], Callable[[], None]]:
    """What saves after an epoch, and what waits for the end."""
    import keras

    if way == "tf async":
        import tensorflow as tf

        # Of the variables: of a compiled model, with its `tf.function`, the asynchronous save fails.
        values = [v.value for v in [*model.variables, *model.optimizer.variables]]
        manager = tf.train.CheckpointManager(tf.train.Checkpoint(values=values), str(root / "tf"), max_to_keep=1)
        how = tf.train.CheckpointOptions(enable_async=True)
        return lambda i: manager.save(i, options=how), manager._checkpoint.sync
    if way == "orbax":
        callback = keras.callbacks.OrbaxCheckpoint(
            directory=str(root / "orbax"), max_to_keep=1, save_on_background=True
        )
    elif way == "stock":
        callback = keras.callbacks.ModelCheckpoint(root / "m.keras")
    else:
        from hornbeam.callbacks import ModelCheckpoint

        how = {"asynchronous": "async" in way, "durable": "durable" in way, "remember": False}
        callback = ModelCheckpoint(root / "m.keras", **how)
    callback.set_model(model)
    callback.on_train_begin()

    def save(i: int) -> None:
        callback.on_epoch_begin(i)
        callback.on_epoch_end(i, {"loss": 1.0})

    return save, callback.on_train_end


class Peak(threading.Thread):
    """The most memory that is resident while it lasts."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.stop = 0, threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.005):
            self.most = max(self.most, resident())


def resident() -> int:
    """Bytes of this process's memory that are resident and its own."""
    fields = Path("/proc/self/status").read_text().split("\n")
    return sum(int(line.split()[1]) * 1024 for line in fields if line.startswith("RssAnon"))


def measure(workload: str, way: str, root: Path) -> dict[str, Any]:
    every, saves = WORKLOADS[workload]
    model, x, y = build(workload)

    def step() -> float:
        since = time.perf_counter()
        model.train_on_batch(x, y)
        return time.perf_counter() - since

    for _ in range(3):
        step()
    save, wait = saver(way, model, root / "run")
    save(0)  # imports, first copies
    wait()
    alone = Peak()
    alone.start()
    baseline = [step() for _ in range(2 * every)]
    alone.stop.set()
    alone.join()
    os.sync()
    peak = Peak()
    peak.start()
    stalls, steps = [], []
    since = time.perf_counter()
    for i in range(saves):
        before = time.perf_counter()
        save(i + 1)
        stalls.append(time.perf_counter() - before)
        steps += [step() for _ in range(every)]
    wait()
    total = time.perf_counter() - since
    peak.stop.set()
    peak.join()
    usual = statistics.median(baseline)
    size = sum(f.stat().st_size for f in (root / "run").rglob("*") if f.is_file())
    return {
        "workload": workload,
        "way": way,
        "stall": statistics.median(stalls),
        "stalls": stalls,
        "step": usual,
        "slowdown": statistics.mean(steps) / usual - 1,
        "lost": (total - every * saves * usual) / saves,
        "memory": (peak.most - alone.most) / 1e6,
        "bytes": size,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| Workload | Saved by | Stall, s | % of stock | Steps slower by | Lost per save, s | Extra memory, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    stock = {r["workload"]: r["stall"] for r in rows if r["way"] == "stock"}
    for r in rows:
        share = f"{100 * r['stall'] / stock[r['workload']]:.1f}" if r["workload"] in stock else "n/a"
        lines.append(
            f"| {r['workload']} (step {r['step']:.2f} s) | {r['way']} | {r['stall']:.3f} | {share} | "
            f"{100 * r['slowdown']:.0f} % | {r['lost']:.2f} | {r['memory']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="workloads whose name has this in it")
    parser.add_argument("--ways", default=",".join(WAYS), help="ways of saving, with commas")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where to write")
    arguments = parser.parse_args()
    if arguments.child:
        workload, way, root = arguments.child
        print(json.dumps(measure(workload, way, Path(root))))
        return
    rows = []
    for workload in (name for name in WORKLOADS if arguments.only in name):
        for way in arguments.ways.split(","):
            root = tempfile.mkdtemp(prefix="hornbeam-bench-", dir=arguments.dir)
            (Path(root) / "run").mkdir()
            environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
            command = [sys.executable, __file__, "--child", workload, way, root]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            shutil.rmtree(root)
            if done.returncode:
                print(f"{workload}, {way}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
