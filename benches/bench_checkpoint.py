"""Checkpoints inside a training loop: what each costs the loop.

python benches/bench_checkpoint.py                          all, some twelve minutes on two idle cores
python benches/bench_checkpoint.py --only Dense --append    one workload; the rows of the others stay
python benches/bench_checkpoint.py --ways orbax --append    one way of saving (`pip install orbax-checkpoint`)
python benches/bench_checkpoint.py --table                  only the tables, from the results there are

Every combination of workload and way of saving runs in a process of its own, on TensorFlow: some steps without saves,
then steps with a save after every few. Reported are the stall (what the callback's end of an epoch takes), how much
slower the steps between the saves are than those without, the time lost over the whole run (the last save's completion
included), and the peak of memory above that of training alone. Files are in the page cache unless it says durable.

Rows go to `benches/results/checkpoint/results.json` as they come, the tables between the marks of docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results" / "checkpoint" / "results.json"
BEGIN, END = "<!-- checkpoints:begin -->", "<!-- checkpoints:end -->"
WAYS = {  # and what the tables call them
    "stock": "stock `ModelCheckpoint`",
    "hornbeam": "hornbeam, `durable=False`",
    "hornbeam durable": "hornbeam",
    "hornbeam async": "hornbeam, `asynchronous=True, durable=False`",
    "hornbeam async durable": "hornbeam, `asynchronous=True`",
    "tf async": "`tf.train.CheckpointManager`, `enable_async`, of the variables",
    "orbax": "Keras' `OrbaxCheckpoint`, `save_on_background=True`",
}
#: Steps between two saves, and saves.
WORKLOADS = {"8 x Dense(4096) + Adam": (6, 3), "Embedding(400,000, 512), SGD": (12, 3), "EfficientNetB7 + Adam": (3, 3)}


def build(workload: str, small: bool) -> tuple[Any, Any, Any]:
    """A compiled model and one batch; `small` is for a look at whether it runs."""
    import keras
    import numpy as np
    from keras import layers

    rng = np.random.default_rng(0)
    if workload.startswith("8 x Dense"):
        size = 64 if small else 4096
        inputs = x = keras.Input((size,))
        for _ in range(8):
            x = layers.Dense(size, activation="relu")(x)
        model = keras.Model(inputs, x)
        model.compile("adam", "mse")
        return model, rng.random((16, size), "float32"), rng.random((16, size), "float32")
    if workload.startswith("Embedding"):
        rows = 400 if small else 400_000
        inputs = keras.Input((64,), dtype="int32")
        x = layers.GlobalAveragePooling1D()(layers.Embedding(rows, 512)(inputs))
        model = keras.Model(inputs, layers.Dense(1)(layers.Dense(1024, activation="relu")(x)))
        model.compile("sgd", "mse")
        return model, rng.integers(0, rows, (256, 64)), rng.random((256, 1), "float32")
    make = keras.applications.MobileNetV3Small if small else keras.applications.EfficientNetB7
    model = make(weights=None, input_shape=(96, 96, 3), classes=10)
    model.compile("adam", "categorical_crossentropy")
    return model, rng.random((4, 96, 96, 3), "float32"), np.eye(10, dtype="float32")[:4]


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


def measure(workload: str, way: str, root: Path, small: bool) -> dict[str, Any]:
    every, saves = WORKLOADS[workload]
    model, x, y = build(workload, small)

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


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown, one table for each workload."""
    parts = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = sorted((r for r in rows if r["workload"] == workload), key=lambda r: list(WAYS).index(r["way"]))
        stock = next((r["stall"] for r in mine if r["way"] == "stock"), None)
        every, saves = WORKLOADS[workload]
        lines = [
            f"| {workload}, {max(r['bytes'] for r in mine) / 1e9:.1f} GB; {saves} saves, {every} steps of "
            f"{min(r['step'] for r in mine):.2f} s after each | Stall, s | % of stock | Steps slower by "
            "| Lost per save, s | Extra memory, MB |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for r in mine:
            share = "" if stock is None else f"{100 * r['stall'] / stock:.1f}"
            lines.append(
                f"| {WAYS[r['way']]} | {r['stall']:.3f} | {share} | {100 * r['slowdown']:.0f} % | {r['lost']:.2f} "
                f"| {r['memory']:,.0f} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def publish(found: dict[str, Any]) -> None:
    """Puts the tables between the marks of docs/performance.md."""
    page = ROOT / "docs" / "performance.md"
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} lacks {BEGIN} and {END}")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = f"{found['date']}, {found['cores']} cores: {versions}. One run each."
    page.write_text(f"{before}{BEGIN}\n\n{where}\n\n{tables(found['rows'])}\n\n{END}{after}", encoding="utf-8")


def surroundings() -> dict[str, Any]:
    """What the numbers depend on."""
    names = ["keras", "tensorflow", "tensorflow-cpu", "orbax-checkpoint", "hornbeam"]
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "cores": os.cpu_count(), "versions": versions}


def run(workload: str, way: str, directory: str, small: bool) -> dict[str, Any] | None:
    """One row, from a process of its own; `None` if it failed."""
    with tempfile.TemporaryDirectory(prefix="hornbeam-bench-", dir=directory) as root:
        (Path(root) / "run").mkdir()
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, __file__, "--child", workload, way, root, *(["--small"] if small else [])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{workload}, {way}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), file=sys.stderr)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="workloads whose name has this in it")
    parser.add_argument("--ways", default=",".join(WAYS), help="ways of saving, with commas")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where to write checkpoints")
    parser.add_argument("--append", action="store_true", help="keep the rows that are not measured again")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--small", action="store_true", help="small models, to see whether it runs; nothing is kept")
    arguments = parser.parse_args()
    if arguments.child:
        workload, way, root = arguments.child
        print(json.dumps(measure(workload, way, Path(root), arguments.small)))
        return
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    if arguments.table:
        publish(known)
        return
    rows = known["rows"] if arguments.append and not arguments.small else []
    for workload in (name for name in WORKLOADS if arguments.only in name):
        for way in arguments.ways.split(","):
            if way == "orbax" and importlib.util.find_spec("orbax") is None:
                print("orbax-checkpoint is not installed", file=sys.stderr)
                continue
            row = run(workload, way, arguments.dir, arguments.small)
            if row is None:
                continue
            rows = [r for r in rows if (r["workload"], r["way"]) != (workload, way)] + [row]
            if not arguments.small:
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                RESULTS.write_text(json.dumps({**surroundings(), "rows": rows}, indent=1) + "\n")
    print(tables(rows))
    if not arguments.small:
        publish({**surroundings(), "rows": rows})


if __name__ == "__main__":
    main()
