"""A result of `run.py` as Markdown tables: all of it in docs/performance.md, the ratios in README.md.

python benches/report.py                       the newest result
python benches/report.py RESULT.json --print   to the terminal instead
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
OPERATIONS = ("save", "load_model", "load_weights")
Row = dict[str, Any]


def summary(result: Row) -> str:
    """How many times as fast as stock Keras, and how much of what the machine can do: one table."""
    ceilings = {row["workload"]: row for row in result["ceilings"]}
    lines = []
    for workload in dict.fromkeys(row["workload"] for row in result["models"]):
        rows = {row["operation"]: row for row in result["models"] if row["workload"] == workload}
        ceiling = ceilings.get(workload)
        lines.append(
            [
                workload,
                megabytes(rows["save"]["file_bytes"]),
                *(_speedup(rows[operation], rows[operation]["ratio"]) for operation in OPERATIONS),
                *(f"{ceiling[key]:.0%}" if ceiling else "" for key in ("share", "read_share")),
            ]
        )
    legacy = {row["operation"]: row for row in result.get("formats") or []}
    if legacy:
        ratios = [
            _speedup(row, row["stock"]["best"] / row["hornbeam"]["best"])
            for row in (legacy[name] for name in OPERATIONS)
        ]
        lines.append(["ResNet50 + Adam, legacy `.h5`", megabytes(legacy["save"]["file_bytes"]), *ratios, "", ""])
    equal = all(row["equal"] for row in [*result["models"], *legacy.values()])
    machine, versions = result["machine"], result["versions"]
    head = [
        "Model",
        "File, MB",
        *(f"`{name}`" for name in OPERATIONS),
        "Write: share of `write`",
        "Read: share of `read`",
    ]
    return (
        f"{table(head, lines)}\n\n{versions['date']}, {machine['cores']} cores, Keras {versions['keras']}, TensorFlow "
        f"{versions.get('tensorflow', 'n/a')}, files in the page cache; values bit for bit equal: {check(equal)}."
    )


def _speedup(row: Row, ratio: float) -> str:
    return f"**{ratio:.1f}** ({seconds(row['stock']['best'])} s → {seconds(row['hornbeam']['best'])} s)"


def report(result: Row) -> str:
    """All of it."""
    parts = [_where(result)]
    if result["models"]:
        parts += [_models(result["models"])]
    if result.get("cold"):
        parts += [_cold(result["cold"][0])]
    if result["ceilings"]:
        parts += [_ceilings(result["ceilings"])]
    if result["peers"]:
        parts += [_peers(result["peers"])]
    if result.get("formats"):
        parts += [_formats(result["formats"])]
    return "\n\n".join(parts)


def _where(result: Row) -> str:
    m, v = result["machine"], result["versions"]
    return (
        f"`{result['command']}`, {v['date']}: {m['cpu']}, {m['cores']} cores, {m['ram_gib']:.0f} GiB of memory, "
        f"{m['kernel']}, {m['file_system']}. Keras {v['keras']}, TensorFlow {v.get('tensorflow', 'n/a')}, "
        f"h5py {v['h5py']} (HDF5 {v['hdf5']}), safetensors {v.get('safetensors', 'n/a')}, Python {v['python']}, "
        f"rustc {v['rustc']}, hornbeam {v['hornbeam']}.\n\n"
        f"{_turns(result['turns'])}: the first run in the process, and the best of {result['runs']} more. Files are in "
        "the page cache and nobody flushes."
    )


def _turns(turns: int) -> str:
    if turns == 1:
        return "Every number is from a fresh process a side, one after the other"
    return f"Every number is the median over {turns} fresh processes a side, interleaved"


def _models(rows: list[Row]) -> str:
    head = [
        "Model",
        "Operation",
        "File, MB",
        "Keras, s: first / best",
        "hornbeam, s: first / best",
        "Times as fast",
        "Extra memory, MB: Keras / hornbeam",
        "Bit for bit equal",
    ]
    lines = []
    for i, row in enumerate(rows):
        stock, ours = row["stock"], row["hornbeam"]
        repeated = i > 0 and rows[i - 1]["workload"] == row["workload"]
        lines.append(
            [
                "" if repeated else row["workload"],
                f"`{row['operation']}`",
                "" if repeated else megabytes(row["file_bytes"]),
                f"{seconds(stock['first'])} / {seconds(stock['best'])}",
                f"{seconds(ours['first'])} / {seconds(ours['best'])}",
                f"**{row['ratio']:.1f}**",
                f"{megabytes(stock['peak'])} / {megabytes(ours['peak'])}",
                check(row["equal"] and not row["handovers"]),
            ]
        )
    note = (
        "`save` is `save_model` to `.keras`, `load_weights` reads a `.keras` file into a built model. Both sides read "
        "the same file, written by Keras. Extra memory is the peak above what the model itself takes. Equal: every "
        "weight and optimizer slot of the model, or of the file, has the bytes of the original."
    )
    handed = sum(row["handovers"] for row in rows)
    engines = ", ".join(sorted({engine for row in rows for engine in row["engines"]}))
    return f"{table(head, lines, left=2)}\n\n{note} Engine: {engines}; handed over to Keras: {handed or 'nothing'}."


def _cold(row: Row) -> str:
    stock, ours = row["stock"], row["hornbeam"]
    first, second = (f"{seconds(stock[key])} and {seconds(ours[key])}" for key in ("first", "best"))
    return (
        "On JAX, where a process compiles a program for every shape that stock Keras initialises, "
        f"`{row['operation']}` of {row['workload']}, s: the first {first} "
        f"(**{stock['first'] / ours['first']:.0f}** times as fast), the second {second} ({row['ratio']:.1f}); "
        f"{'equal' if row['equal'] else '**NOT EQUAL**'}."
    )


def _ceilings(rows: list[Row]) -> str:
    head = ["GB/s", "hornbeam's write", "`write`, 256 KiB", "`write`, 1 MiB", "Share", "memcpy"]
    lines = [
        [
            row["workload"],
            *(f"{row[key]:.2f}" for key in ("emit", "write_256k", "write_1m")),
            f"**{row['share']:.0%}**",
            f"{row['memcpy']:.2f}",
        ]
        for row in rows
    ]
    read_head = ["GB/s", "hornbeam's read", "`read` into fresh memory", "Share", "`read` into one reused buffer"]
    reads = [
        [
            row["workload"],
            f"{row['fetch']:.2f}",
            f"{max(row['fresh_256k'], row['fresh_1m']):.2f}",
            f"**{row['read_share']:.0%}**",
            f"{max(row['read_256k'], row['read_1m']):.2f}",
        ]
        for row in rows
        if "fetch" in row
    ]
    below = (
        "\n\nThe same for reading (CRC and NumPy arrays included; fresh memory is in huge pages, one thread reads, "
        f"hornbeam's caller reads too while it waits):\n\n{table(read_head, reads)}"
    )
    return (
        "What the machine can do, and how much of it the write alone reaches (archive, CRC and rename included; the "
        f"ceiling is `fallocate` and plain `write` of the same memory to a new file):\n\n{table(head, lines)}"
    ) + (below if reads else "")


def _peers(rows: list[Row]) -> str:
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    found = {(row["workload"], row["peer"]): row for row in rows}
    head = ["Save / load, GB/s", *workloads, "Bit for bit equal"]
    lines = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        mine = [found.get((workload, peer)) for workload in workloads]
        rates = [f"{rate(row, 'save')} / {rate(row, 'load')}" if row else "n/a" for row in mine]
        lines.append([peer, *rates, check(all(row["equal"] for row in mine if row))])
    return (
        "Tensors without a model, in a `.weights.h5` file (safetensors: its own format; deflated: level 4, shuffled, "
        f"chunks of 1 MiB):\n\n{table(head, lines)}"
    )


def _formats(rows: list[Row]) -> str:
    head = ["Operation", "Keras, s: first / best", "hornbeam, s: first / best", "Times as fast", "Equal"]
    lines = []
    for row in rows:
        stock, ours = row["stock"], row["hornbeam"]
        times = [f"{seconds(side['first'])} / {seconds(side['best'])}" for side in (stock, ours)]
        lines.append([f"`{row['operation']}`", *times, f"**{stock['best'] / ours['best']:.1f}**", check(row["equal"])])
    return (
        f"ResNet50 + Adam as legacy HDF5 ({megabytes(rows[0]['file_bytes'])} MB; stock Keras does not give the "
        "optimizer its state back, hornbeam does), its architecture as JSON, and the codec of that text beside "
        f"CPython's (`python benches/bench_legacy.py`):\n\n{table(head, lines)}"
    )


def rate(row: Row, verb: str) -> str:
    """Gigabytes a second of the best run."""
    return f"{row['nbytes'] / row[verb]['best'] / 1e9:.2f}"


def seconds(value: float) -> str:
    """Three significant digits at most."""
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def megabytes(nbytes: float) -> str:
    """Whole megabytes; one digit more where there are few."""
    return f"{nbytes / 1e6:,.1f}" if nbytes < 1e6 else f"{nbytes / 1e6:,.0f}"


def check(right: bool) -> str:
    """A mark."""
    return "✓" if right else "**no**"


def table(head: list[str], lines: list[list[str]], *, left: int = 1) -> str:
    """A Markdown table whose first `left` columns are text."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


PLACES = {ROOT / "README.md": summary, ROOT / "docs" / "performance.md": report}


def main() -> int:
    """Rewrites README.md and docs/performance.md, or prints."""
    parser = argparse.ArgumentParser(description="Turn a benchmark result into tables.")
    parser.add_argument("result", type=Path, nargs="?", help="default: the newest in benches/results/")
    parser.add_argument("--print", action="store_true", help="print the tables and change no file")
    args = parser.parse_args()
    source = args.result or max((ROOT / "benches" / "results").glob("*.json"), default=None)
    if source is None:
        raise SystemExit("there is no result yet: run benches/run.py")
    result = json.loads(source.read_text(encoding="utf-8"))
    for path, make in PLACES.items():
        if args.print:
            sys.stdout.write(make(result) + "\n\n")
            continue
        before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise SystemExit(f"{path} lacks {BEGIN} and {END}")
        path.write_text(f"{before}{BEGIN}\n\n{make(result)}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
