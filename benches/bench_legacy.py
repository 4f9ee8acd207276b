"""Legacy HDF5 and JSON beside stock Keras: ResNet50 with Adam, saved, loaded, its weights loaded; its architecture;
the JSON codec alone, of that architecture, beside CPython's.

    python benches/bench_legacy.py [--quick] [--turns 3]   the result goes to benches/results/, beside that of run.py

Each measurement is a process of its own, the sides in turns; "first" is the first run in it, "best" the least of three
more. Both sides read the file that stock Keras wrote. Stock Keras does not give the optimizer its state back, hornbeam
does; what is compared is the weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import measure

OPERATIONS = ("save", "load_model", "load_weights", "to_json", "model_from_json", "json.dumps", "json.loads")


def build(quick: bool) -> Any:
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    if quick:
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(64), keras.layers.Dense(10)])
    else:
        model = keras.applications.ResNet50(weights=None)
    model.compile(keras.optimizers.Adam(), keras.losses.CategoricalCrossentropy())
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    for variable in model.optimizer.variables[2:]:
        variable.assign(rng.random(variable.shape, np.float32))
    return model


def weights(model: Any) -> list[bytes]:
    return [v.numpy().tobytes() for v in model.weights]


def operate(task: dict[str, Any]) -> dict[str, Any]:
    """One operation on one side, in this process."""
    import keras

    model, target = build(task["quick"]), Path(task["target"])
    dumps, loads = json.dumps, json.loads
    if task["side"] == "hornbeam":
        import hornbeam
        from hornbeam import _core

        hornbeam.install()
        dumps, loads = lambda config: _core.encode_json(config).decode(), _core.decode_json
    expected = weights(model)
    text = model.to_json()
    config = json.loads(text)
    works: dict[str, Callable[[], Any]] = {
        "save": lambda: model.save(target),
        "load_model": lambda: keras.models.load_model(task["file"]),
        "load_weights": lambda: model.load_weights(task["file"]),
        "to_json": model.to_json,
        "model_from_json": lambda: keras.models.model_from_json(text),
        "json.dumps": lambda: dumps(config),
        "json.loads": lambda: loads(text),
    }
    operation, result = task["operation"], None
    seconds = []
    for _ in range(1 + task["runs"]):
        result = None
        measure.settle(6 * sum(map(len, expected)))
        if operation == "save":
            target.unlink(missing_ok=True)
        elif operation == "load_weights":
            for variable in model.weights:
                variable.assign(variable * 0)
        result, taken, _ = measure.timed(works[operation])
        seconds.append(taken)
    if operation == "save":
        if task["side"] == "hornbeam":
            hornbeam.uninstall()
        result = keras.models.load_model(target)
        target.unlink()
    if operation == "json.loads":
        equal = result == config
    elif "json" in operation:
        equal = json.loads(result if isinstance(result, str) else result.to_json()) == config
    else:
        equal = weights(model if operation == "load_weights" else result) == expected
    return {"first": seconds[0], "best": min(seconds[1:]), "equal": equal}


def child(task: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Prints a row for each operation; 1 if anything was not equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, once")
    parser.add_argument("--turns", type=int, default=3, help="processes per side and operation")
    parser.add_argument("--dir", type=Path, help="where to write files")
    parser.add_argument("--out", type=Path, help="the result (default: benches/results/<date>.json; none if --quick)")
    args = parser.parse_args()
    turns, runs = (1, 1) if args.quick else (args.turns, 3)
    versions = measure.versions()
    default = None if args.quick else measure.ROOT / "benches" / "results" / f"{versions['date']}.json"
    out = args.out or default
    rows = []
    with tempfile.TemporaryDirectory(prefix="hornbeam-bench-", dir=args.dir or Path.cwd()) as folder:
        file = Path(folder) / "model.h5"
        build(args.quick).save(file)
        size = file.stat().st_size
        print(f"ResNet50 + Adam, legacy HDF5, {size / 1e6:.0f} MB")
        for operation in OPERATIONS:
            task = {"file": str(file), "target": f"{folder}/saved.h5", "operation": operation, "quick": args.quick}
            found: dict[str, list[dict[str, Any]]] = {"stock": [], "hornbeam": []}
            for turn in range(turns):
                for side in list(found)[:: 1 if turn % 2 == 0 else -1]:
                    found[side].append(child({**task, "side": side, "runs": runs}))
            stock, ours = ({k: median(f[k] for f in found[side]) for k in ("first", "best")} for side in found)
            equal = all(f["equal"] for side in found.values() for f in side)
            rows.append({"operation": operation, "file_bytes": size, "stock": stock, "hornbeam": ours, "equal": equal})
            both = (f"{row['first']:.2f} / {row['best']:.3f}" for row in (stock, ours))
            times = stock["best"] / ours["best"]
            print(f"| `{operation}` | {' | '.join(both)} | **{times:.1f}** | {'equal' if equal else 'NOT EQUAL'} |")
    if out is not None:
        empty: dict[str, list[Any]] = {"models": [], "peers": [], "ceilings": []}
        how = {"command": "python benches/bench_legacy.py", "turns": turns, "runs": runs, "versions": versions}
        before = (
            json.loads(out.read_text()) if out.exists() else {**how, "machine": measure.machine(out.parent), **empty}
        )
        out.write_text(json.dumps({**before, "formats": rows}, indent=1) + "\n")
    return int(not all(row["equal"] for row in rows))


if __name__ == "__main__":
    measure.quiet()
    if sys.argv[1:2] == ["--child"]:
        answer = operate(json.loads(sys.argv[2]))
        sys.stdout.write("\n" + json.dumps(answer) + "\n")
    else:
        sys.exit(main())
