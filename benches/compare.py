"""Another checkout of hornbeam beside this one, in one run, each measurement in a fresh process.

    python benches/compare.py ../old                            every model and operation of `run.py`
    python benches/compare.py ../old --only ResNet50 --turns 4

The other checkout must be built in place: `make setup` there. A ratio is the old median by the new one: above 1 is
faster now. Processes alternate (old new new old …), so that a machine that changes its speed treats both alike.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from statistics import median
from unittest import mock

import run
import workloads


def measure(tree: Path, task: run.Result) -> run.Result:
    """One operation in a fresh process that imports hornbeam from `tree`."""
    with mock.patch.dict(os.environ, PYTHONPATH=str(tree / "python")):
        return run.child("operate", {**task, "side": "hornbeam"})


def compare(workload: str, trees: dict[str, Path], turns: int, runs: int, folder: Path) -> None:
    """Prints a line for each operation on one model."""
    file = folder / "model.keras"
    prepared = run.child("prepare", {"workload": workload, "file": str(file)})
    task = {**prepared, "workload": workload, "file": str(file), "target": str(folder / "saved.keras"), "runs": runs}
    for operation in run.OPERATIONS:
        found: dict[str, list[run.Result]] = {name: [] for name in trees}
        for name in run.there_and_back(tuple(trees), turns):
            found[name].append(measure(trees[name], {**task, "operations": [operation]})[operation])
        if not all(one["equal"] for results in found.values() for one in results):
            raise SystemExit(f"{workload}: {operation}: values differ")
        middle = {
            (name, key): median(one[key] for one in results)
            for name, results in found.items()
            for key in ("first", "best", "peak")
        }
        old, new = trees
        print(
            f"{workload}: {operation}: first {middle[old, 'first']:.3f} -> {middle[new, 'first']:.3f} s "
            f"({middle[old, 'first'] / middle[new, 'first']:.2f}), "
            f"best {middle[old, 'best']:.4f} -> {middle[new, 'best']:.4f} s "
            f"({middle[old, 'best'] / middle[new, 'best']:.2f}), "
            f"memory {middle[old, 'peak'] / 1e6:.1f} -> {middle[new, 'peak'] / 1e6:.1f} MB",
            flush=True,
        )
    file.unlink()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the other checkout, built in place")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--turns", type=int, default=4, help="processes a side for each operation")
    parser.add_argument("--runs", type=int, default=5, help="warm runs in each process")
    args = parser.parse_args()
    trees = {"old": args.old.resolve(), "new": Path(__file__).resolve().parents[1]}
    with tempfile.TemporaryDirectory() as folder:
        for workload in workloads.MODELS:
            if args.only in workload:
                compare(workload, trees, args.turns, args.runs, Path(folder))


if __name__ == "__main__":
    main()
