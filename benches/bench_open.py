"""Opening a file of many tensors and looking at one, or at all, beside h5py and safetensors. Small where disabled.

The target: 10,000 tensors in 30 ms at most, from a sparse file of 4 GB in the page cache. In files of h5py metadata and
values alternate, so that the kernel is asked 12,000 times: that takes as long again.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors

import hornbeam
from hornbeam import _core

TARGET_SECONDS = 0.030


class Sparse:
    """A file object whose zeros take no room on the disk."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def write(self, data: bytes) -> int:
        if data.strip(b"\0"):
            return self.file.write(data)
        self.file.seek(len(data), 1)
        return len(data)

    def close(self) -> None:
        self.file.truncate(self.file.tell())
        self.file.close()


def ours(path: Path, names: list[str], elements: int) -> None:
    values = np.zeros(elements, np.float32)
    groups = [(f"layers/layer_{i}/vars", [("name", f"layer_{i}")]) for i in range(len(names) // 2)]
    target = Sparse(path)
    plan = _core.plan(groups, [(name, "float32", [elements], []) for name in names])
    plan.start(target, [values] * len(names), archive=False).finish([])
    target.close()


def by_h5py(path: Path, names: list[str], elements: int) -> None:
    with h5py.File(path, "w") as file:
        for name in names:
            group, _, key = name.rpartition("/")
            creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple((elements,))
            h5py.h5d.create(file.require_group(group).id, key.encode(), h5py.h5t.IEEE_F32LE, space, creation)
            file[group].attrs["name"] = group.split("/")[1]


def by_safetensors(path: Path, names: list[str], elements: int) -> None:
    size = elements * 4
    row = {"dtype": "F32", "shape": [elements]}
    header = json.dumps({n: {**row, "data_offsets": [i * size, i * size + size]} for i, n in enumerate(names)}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + len(names) * size)


WRITERS = {"ours.weights.h5": ours, "h5py.weights.h5": by_h5py, "m.safetensors": by_safetensors}


@pytest.fixture(scope="module")
def names(request: Any) -> list[str]:
    count = 10_000 if measuring(request.config) else 40
    return [f"layers/layer_{i // 2}/vars/{i % 2}" for i in range(count)]


@pytest.fixture(scope="module")
def files(names: list[str], tmp_path_factory: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("open")
    elements = 100_000 if len(names) > 40 else 10
    for name, write in WRITERS.items():
        write(root / name, names, elements)
    return {name: root / name for name in WRITERS}


def measuring(config: Any) -> bool:
    return bool(config.getoption("benchmark_enable") or not config.getoption("benchmark_disable"))


def hornbeam_open(path: Path) -> int:
    with hornbeam.open(path) as file:
        return len(file)


def hornbeam_all(path: Path) -> int:
    with hornbeam.open(path) as file:
        return len([(t.name, t.shape, t.dtype) for t in file.tensors.values()])


def h5py_all(path: Path) -> int:
    found = []
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.append((name, item.shape, item.dtype)) if isinstance(item, h5py.Dataset) else None
        )
    return len(found)


def safetensors_open(path: Path) -> int:
    with safetensors.safe_open(path, "np") as file:
        return len(file.keys())


def safetensors_all(path: Path) -> int:
    with safetensors.safe_open(path, "np") as file:
        slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118
        return len([(name, s.get_shape(), s.get_dtype()) for name, s in slices])


CASES: dict[str, tuple[str, Callable[[Path], int], int]] = {
    "hornbeam, own file": ("ours.weights.h5", hornbeam_open, 20),
    "hornbeam, own file, all shapes": ("ours.weights.h5", hornbeam_all, 20),
    "hornbeam, h5py's file": ("h5py.weights.h5", hornbeam_open, 20),
    "hornbeam, h5py's file, all shapes": ("h5py.weights.h5", hornbeam_all, 20),
    "h5py, own file, all shapes": ("ours.weights.h5", h5py_all, 2),
    "h5py, h5py's file, all shapes": ("h5py.weights.h5", h5py_all, 2),
    "hornbeam, safetensors": ("m.safetensors", hornbeam_open, 20),
    "hornbeam, safetensors, all shapes": ("m.safetensors", hornbeam_all, 20),
    "safe_open": ("m.safetensors", safetensors_open, 20),
    "safe_open, all shapes": ("m.safetensors", safetensors_all, 20),
}


@pytest.mark.parametrize("case", CASES)
def test_open(benchmark: Any, files: dict[str, Path], names: list[str], case: str) -> None:
    name, run, rounds = CASES[case]
    assert benchmark.pedantic(run, args=(files[name],), rounds=rounds, warmup_rounds=1) == len(names)
    if benchmark.stats is not None and run is hornbeam_open and not case.endswith("h5py's file"):
        assert benchmark.stats.stats.min <= TARGET_SECONDS


@pytest.mark.parametrize("name", WRITERS)
def test_one_row(benchmark: Any, files: dict[str, Path], names: list[str], name: str) -> None:
    """A slice of one tensor of an open file."""
    with hornbeam.open(files[name]) as file:
        row = benchmark(lambda: file.tensors[names[7]][3:5])
        assert row.shape == (2,)
