"""The published benchmark: stock Keras and hornbeam, each measurement in a fresh process, interleaved.

    python benches/run.py                  everything, about an hour; the result goes to benches/results/
    python benches/run.py --quick          small models, once: does it run, is everything equal?
    python benches/report.py               the result as the tables of README.md and docs/performance.md

A process builds its model, runs the operation once ("first") and three times more ("best" is their minimum). Before
each run, memory is freed and warmed; page caches are warm, nothing is flushed (no side asks for it). Both sides read
the same file, written by stock Keras; both must give the same values bit for bit. "Cold" is the first run on JAX, which
compiles a program for every shape that is initialised.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import measure
import peers
from measure import KIB, MIB

Result = dict[str, Any]
OPERATIONS = ("save", "load_model", "load_weights")
SIDES = ("stock", "hornbeam")
#: Layers, units and copies of the models whose write is compared with the ceiling.
BIG = {"16 x Dense(4096)": (16, 4096, 1), "8 x Dense(4096) + Adam": (8, 4096, 3)}
QUICK_BIG = {"4 x Dense(2048)": (4, 2048, 1)}
#: The model whose first load on JAX is measured.
COLD, QUICK_COLD = "EfficientNetB7 + Adam", "two layers + Adam"
#: The parts of a result.
PARTS = ("models", "cold", "peers", "ceilings")


# --- in a process of its own -----------------------------------------------------------------------------------------


def prepare(task: Result) -> Result:
    """Has stock Keras write the file that is read; notes what is in it."""
    import keras

    model = _build(task)
    keras.saving.save_model(model, task["file"])
    values = measure.variables(model)
    return {
        "state": measure.model_digest(model),
        "content": measure.file_digest(Path(task["file"])),
        "tensors": len(values),
        "nbytes": _nbytes(values),
        "file_bytes": Path(task["file"]).stat().st_size,
    }


def operate(task: Result) -> Result:
    """Runs operations on one side: what they took, and whether the values are right."""
    import keras

    saving: Any = keras.saving
    if task["side"] == "hornbeam":
        import hornbeam
        from hornbeam import saving
    out: Result = {operation: _OPERATE[operation](saving, task) for operation in task["operations"]}
    if task["side"] == "hornbeam":
        stats = hornbeam.stats()
        out["engines"], out["handovers"] = dict(stats.engines), sum(stats.handovers.values())
    elif any(name.split(".")[0] == "hornbeam" for name in sys.modules):
        raise RuntimeError("the stock side has imported hornbeam")
    return out


def _save(saving: Any, task: Result) -> Result:
    model, target = _build(task), Path(task["target"])
    out = _repeat(task, lambda: saving.save_model(model, target), before=lambda: target.unlink(missing_ok=True))
    out["equal"] = measure.file_digest(target) == task["content"] and measure.model_digest(model) == task["state"]
    target.unlink()
    return out


def _load_model(saving: Any, task: Result) -> Result:
    models: list[Any] = []
    out = _repeat(task, lambda: models.append(saving.load_model(task["file"])), before=models.clear, above_result=True)
    out["equal"] = measure.model_digest(models[0]) == task["state"]
    return out


def _load_weights(saving: Any, task: Result) -> Result:
    import numpy as np

    model = _build(task)

    def clear() -> None:
        for variable in measure.variables(model):
            variable.assign(np.zeros(variable.shape, variable.dtype))

    out = _repeat(task, lambda: saving.load_weights(model, task["file"]), before=clear)
    out["equal"] = measure.model_digest(model) == task["state"]
    return out


_OPERATE: dict[str, Callable[[Any, Result], Result]] = {
    "save": _save,
    "load_model": _load_model,
    "load_weights": _load_weights,
}


def _repeat(task: Result, work: Callable[[], Any], *, before: Callable[[], Any], above_result: bool = False) -> Result:
    seconds, peaks = [], []
    for _ in range(1 + task["runs"]):
        before()
        measure.settle(2 * task["nbytes"])
        _, taken, peak = measure.timed(work, above_result=above_result)
        seconds.append(taken)
        peaks.append(peak)
    return {"first": seconds[0], "best": min(seconds[1:]), "peak": median(peaks)}


def _build(task: Result) -> Any:
    import keras

    import workloads

    keras.utils.set_random_seed(0)
    return {**workloads.MODELS, **workloads.QUICK}[task["workload"]]()


def _nbytes(values: list[Any]) -> int:
    import numpy as np

    return sum(int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in values)


def peer(task: Result) -> Result:
    """One peer, one set of tensors."""
    full, small = {**peers.WEIGHTS, **peers.COMPRESSED_WEIGHTS}[task["workload"]]
    group = peers.PEERS if task["workload"] in peers.WEIGHTS else peers.COMPRESSED_PEERS
    tensors, which = (small if task["quick"] else full)(), group[task["peer"]]
    target = Path(task["target"])
    task["nbytes"] = nbytes = sum(a.nbytes for a in tensors.values())
    save = _repeat(task, lambda: which.save(target, tensors), before=lambda: target.unlink(missing_ok=True))
    loaded: list[peers.Tensors] = []
    load = _repeat(task, lambda: loaded.append(which.load(target)), before=loaded.clear, above_result=True)
    target.unlink()
    return {"save": save, "load": load, "nbytes": nbytes, "equal": peers.same(tensors, loaded[0])}


def ceilings(task: Result) -> Result:
    """The writer of the core beside plain system calls, with the same memory, in turns; GB/s, medians."""
    folder = Path(task["folder"])
    tensors = peers.dense_tensors(*task["shape"])
    arrays = list(tensors.values())
    nbytes = sum(a.nbytes for a in arrays)
    target, plain = folder / "emit.keras", folder / "plain"

    def emit() -> float:
        start = time.perf_counter()
        peers.save_hornbeam("direct", target, tensors, archive=True)
        return time.perf_counter() - start

    writes: dict[str, Callable[[], float]] = {
        "write_256k": partial(measure.write_blocks, plain, arrays, 256 * KIB),
        "emit": emit,
        "write_1m": partial(measure.write_blocks, plain, arrays, MIB),
    }

    def fetch() -> float:
        measure.settle(2 * nbytes)  # what it takes is warm, as far as memory of a virtual machine can be
        start = time.perf_counter()
        loaded = peers.load_hornbeam("direct", target, archive=True)
        taken = time.perf_counter() - start
        del loaded  # to give the memory back is nobody's read
        return taken

    def fresh(block: int) -> float:
        measure.settle(2 * nbytes)
        return measure.read_blocks(target, block, fresh=True)

    reads: dict[str, Callable[[], float]] = {
        "read_256k": partial(measure.read_blocks, target, 256 * KIB),
        "read_1m": partial(measure.read_blocks, target, MIB),
        "fetch": fetch,
        "fresh_256k": partial(fresh, 256 * KIB),
        "fresh_1m": partial(fresh, MIB),
    }
    seconds: dict[str, list[float]] = {name: [] for name in [*writes, *reads]}
    for turn in range(task["rounds"] + 1):  # the first warms up
        target.unlink(missing_ok=True)
        measure.settle(2 * nbytes)
        order, behind = [*writes.items()], [*reads.items()]
        if turn % 2:
            behind.reverse()
        for name, run in [*order[turn % 3 :], *order[: turn % 3], *behind]:
            taken = run()
            if turn:
                seconds[name].append(taken)
    target.unlink()
    rates = {name: nbytes / median(taken) / 1e9 for name, taken in seconds.items()}
    half = min(nbytes, 512 * MIB)
    share = rates["emit"] / max(rates["write_256k"], rates["write_1m"])
    read_share = rates["fetch"] / max(rates["fresh_256k"], rates["fresh_1m"])
    memcpy = half / measure.copy_memory(half) / 1e9
    return {**rates, "memcpy": memcpy, "share": share, "read_share": read_share, "nbytes": nbytes}


CHILDREN: dict[str, Callable[[Result], Result]] = {
    "prepare": prepare,
    "operate": operate,
    "peer": peer,
    "ceilings": ceilings,
}


# --- in the main process ---------------------------------------------------------------------------------------------


def child(what: str, task: Result) -> Result:
    """Runs a function of `CHILDREN` in a fresh process."""
    command = [sys.executable, __file__, "--child", what, json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"failed: {shlex.join(command)}")
    return json.loads(done.stdout.splitlines()[-1])


def there_and_back(sides: tuple[str, ...], turns: int) -> list[str]:
    """A B B A …, so that a machine that slows down or speeds up treats all alike."""
    return [side for turn in range(turns) for side in (sides if turn % 2 == 0 else sides[::-1])]


def bench_model(workload: str, operations: list[str], args: argparse.Namespace, folder: Path) -> list[Result]:
    """All operations on one model: a row each."""
    file = folder / "model.keras"
    prepared = child("prepare", {"workload": workload, "file": str(file)})
    task = {**prepared, "workload": workload, "file": str(file), "target": str(folder / "saved.keras")}
    rows = []
    # A quick run does everything in one process; what is published is one operation per process.
    for group in [operations] if args.quick else [[operation] for operation in operations]:
        sides: dict[str, list[Result]] = {side: [] for side in SIDES}
        for side in there_and_back(SIDES, args.turns):
            found = child("operate", {**task, "side": side, "operations": group, "runs": args.runs})
            sides[side].append(found)
        for operation in group:
            rows.append(_row(workload, operation, prepared, sides))
            _say(rows[-1])
    file.unlink()
    return rows


def _row(workload: str, operation: str, prepared: Result, sides: dict[str, list[Result]]) -> Result:
    row: Result = {"workload": workload, "operation": operation}
    row |= {key: prepared[key] for key in ("tensors", "nbytes", "file_bytes")}
    for side, found in sides.items():
        row[side] = measure.middle([f[operation] for f in found])
        row[side]["turns"] = [[f[operation][key] for key in ("first", "best", "peak")] for f in found]
    row["engines"] = sorted({engine for f in sides["hornbeam"] for engine in f["engines"]})
    row["handovers"] = sum(f["handovers"] for f in sides["hornbeam"])
    row["equal"] = all(f[operation]["equal"] for found in sides.values() for f in found)
    row["ratio"] = row["stock"]["best"] / row["hornbeam"]["best"]
    return row


def bench_cold(args: argparse.Namespace, folder: Path) -> list[Result]:
    """The first load of a process on JAX, and one more: a row."""
    with mock.patch.dict(os.environ, KERAS_BACKEND="jax"):
        once = argparse.Namespace(quick=args.quick, turns=args.turns, runs=1)
        return bench_model(QUICK_COLD if args.quick else COLD, ["load_model"], once, folder)


def bench_peers(workload: str, args: argparse.Namespace, folder: Path) -> list[Result]:
    """Every peer on one set of tensors: a row each."""
    group = peers.PEERS if workload in peers.WEIGHTS else peers.COMPRESSED_PEERS
    found: dict[str, list[Result]] = {name: [] for name in group}
    task = {"workload": workload, "target": str(folder / "weights"), "quick": args.quick, "runs": args.runs}
    for name in there_and_back(tuple(group), args.turns):
        found[name].append(child("peer", {**task, "peer": name}))
    rows = []
    for name, turns in found.items():
        row: Result = {"workload": workload, "peer": name, "nbytes": turns[0]["nbytes"]}
        row |= {verb: measure.middle([turn[verb] for turn in turns]) for verb in ("save", "load")}
        row["equal"] = all(turn["equal"] for turn in turns)
        rows.append(row)
        say(f"{workload}: {name}: save {_rate(row, 'save')}, load {_rate(row, 'load')} GB/s, {_equal(row)}")
    return rows


def bench_ceilings(args: argparse.Namespace, folder: Path) -> list[Result]:
    """The write alone against the ceilings: a row for each model of few large tensors."""
    rows = []
    for workload, shape in (QUICK_BIG if args.quick else BIG).items():
        task = {"shape": shape, "folder": str(folder), "rounds": 3 if args.quick else 9}
        row = {"workload": workload, **measure.middle([child("ceilings", task) for _ in range(args.turns)])}
        rows.append(row)
        say(
            f"{workload}: write alone {row['emit']:.2f} GB/s, {row['share']:.0%} of the ceiling; "
            f"read with CRC {row['fetch']:.2f}, {row['read_share']:.0%} of a read into fresh memory"
        )
    return rows


def _rate(row: Result, verb: str) -> str:
    return f"{row['nbytes'] / row[verb]['best'] / 1e9:.2f}"


def _equal(row: Result) -> str:
    return "equal" if row["equal"] else "NOT EQUAL"


def _say(row: Result) -> None:
    stock, ours = row["stock"], row["hornbeam"]
    say(
        f"{row['workload']}: {row['operation']}: {stock['first']:.2f} / {stock['best']:.3f} s, "
        f"hornbeam {ours['first']:.2f} / {ours['best']:.3f} s, {row['ratio']:.1f} times; "
        f"memory {stock['peak'] / 1e6:.0f} and {ours['peak'] / 1e6:.0f} MB; {_equal(row)}"
        + (f"; {row['handovers']} HANDED OVER" if row["handovers"] else "")
    )


def say(text: str) -> None:
    """To the terminal, at once."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    import workloads

    parser = argparse.ArgumentParser(description="Measure hornbeam beside stock Keras and other formats.")
    parser.add_argument("--quick", action="store_true", help="small models, one turn, under a minute")
    parser.add_argument("--turns", type=int, default=3, help="processes per side and operation")
    parser.add_argument("--runs", type=int, default=3, help="runs per process after the first")
    parser.add_argument("--only", default="", help="only workloads whose name has this in it")
    parser.add_argument("--operation", choices=OPERATIONS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--skip", choices=PARTS, action="append", default=[])
    parser.add_argument("--dir", type=Path, help="where to write files (default: below the current directory)")
    parser.add_argument("--append", action="store_true", help="keep the rows of earlier runs in the result")
    parser.add_argument("--out", type=Path, help="the result (default: benches/results/<date>.json; none if --quick)")
    args = parser.parse_args()
    args.models = [name for name in (workloads.QUICK if args.quick else workloads.MODELS) if args.only in name]
    if args.quick:
        args.turns, args.runs = 1, 1
    return args


def main() -> int:
    """Measures, and saves what was found after every step; 1 if anything was not equal or handed over."""
    args = arguments()
    measure.compile_package()
    result: Result = {
        "command": shlex.join(["python", "benches/run.py", *sys.argv[1:]]),
        "turns": args.turns,
        "runs": args.runs,
        "versions": measure.versions(),
        **{part: [] for part in PARTS},
    }
    default = None if args.quick else measure.ROOT / "benches" / "results" / f"{result['versions']['date']}.json"
    out: Path | None = args.out or default
    if args.append and out is not None and out.exists():
        earlier = json.loads(out.read_text())
        result |= {key: earlier[key] for key in (*PARTS, "formats") if key in earlier}
        result["command"] = earlier["command"]

    def keep(key: str, rows: list[Result]) -> None:
        measured = {row["workload"] for row in rows}
        result[key] = [row for row in result[key] if row["workload"] not in measured] + rows
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(rounded(result), indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="hornbeam-bench-", dir=args.dir or Path.cwd()) as name:
        folder = Path(name)
        result["machine"] = measure.machine(folder)
        if "ceilings" not in args.skip:
            keep("ceilings", bench_ceilings(args, folder))
        if "peers" not in args.skip:
            for workload in (*peers.WEIGHTS, *peers.COMPRESSED_WEIGHTS):
                if args.only in workload:
                    keep("peers", bench_peers(workload, args, folder))
        if "models" not in args.skip:
            for workload in args.models:
                keep("models", bench_model(workload, args.operation or list(OPERATIONS), args, folder))
        if "cold" not in args.skip:
            keep("cold", bench_cold(args, folder))
    rows = result["models"] + result["cold"] + result["peers"]
    wrong = [row for row in rows if not row["equal"] or row.get("handovers")]
    say(f"{len(rows)} rows, {len(wrong)} wrong" + (f", saved to {out}" if out else ""))
    return 1 if wrong else 0


def rounded(item: Any) -> Any:
    """Floats with four significant digits: more would be noise."""
    if isinstance(item, dict):
        return {key: rounded(value) for key, value in item.items()}
    if isinstance(item, list):
        return [rounded(value) for value in item]
    return float(f"{item:.4g}") if isinstance(item, float) else item


if __name__ == "__main__":
    measure.quiet()
    if sys.argv[1:2] == ["--child"]:
        gc.collect()
        with contextlib.redirect_stdout(sys.stderr):
            answer = CHILDREN[sys.argv[2]](json.loads(sys.argv[3]))
        sys.stdout.write("\n" + json.dumps(answer) + "\n")
    else:
        sys.exit(main())
