"""A `.weights.h5` file and its peers: both engines of hornbeam, h5py, safetensors. Small where benchmarks are disabled.

`run.py` measures the same in fresh processes, for the published table.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import measure
from peers import PEERS, WEIGHTS, Tensors, same

ROUNDS = 5


@pytest.fixture(params=WEIGHTS, scope="module")
def tensors(request: Any) -> Tensors:
    """The tensors of one workload; small ones for a plain test run."""
    return _tensors(request.config, request.param)


def _tensors(config: Any, workload: str) -> Tensors:
    full, small = WEIGHTS[workload]
    return full() if _measuring(config) else small()


def _measuring(config: Any) -> bool:
    return bool(config.getoption("benchmark_enable") or not config.getoption("benchmark_disable"))


def _fresh(path: Path, tensors: Tensors) -> None:
    path.unlink(missing_ok=True)
    measure.settle(2 * sum(a.nbytes for a in tensors.values()))


@pytest.mark.parametrize("peer", PEERS)
def test_save(benchmark: Any, tensors: Tensors, peer: str, tmp_path: Path) -> None:
    target = tmp_path / "model.weights.h5"
    benchmark.pedantic(
        PEERS[peer].save,
        args=(target, tensors),
        setup=lambda: _fresh(target, tensors),
        rounds=ROUNDS,
        warmup_rounds=0,
    )
    _note(benchmark, tensors, target, PEERS[peer].load(target))
    # What one engine writes, the others of its format read.
    for reader in PEERS:
        if reader.endswith("safetensors") == peer.endswith("safetensors"):
            assert same(tensors, PEERS[reader].load(target)), reader


@pytest.mark.parametrize("peer", PEERS)
def test_load(benchmark: Any, tensors: Tensors, peer: str, tmp_path: Path) -> None:
    target = tmp_path / "model.weights.h5"
    PEERS["safetensors" if peer.endswith("safetensors") else "h5py"].save(target, tensors)
    loaded = benchmark.pedantic(
        PEERS[peer].load,
        args=(target,),
        setup=lambda: measure.settle(2 * sum(a.nbytes for a in tensors.values())),
        rounds=ROUNDS,
        warmup_rounds=0,
    )
    _note(benchmark, tensors, target, loaded)


def _note(benchmark: Any, tensors: Tensors, target: Path, loaded: Tensors) -> None:
    correct = same(tensors, loaded)
    benchmark.extra_info["correct"] = correct
    benchmark.extra_info["nbytes"] = sum(a.nbytes for a in tensors.values())
    benchmark.extra_info["file_bytes"] = target.stat().st_size
    assert correct


def test_many_small_tensors(benchmark: Any, request: Any, tmp_path: Path) -> None:
    """The targets: at least 15 times h5py, and no slower than safetensors. Measured in turns, best of five."""
    tensors = _tensors(request.config, "50,000 x 10 KB")
    best: dict[str, float] = {}
    for _ in range(ROUNDS if _measuring(request.config) else 1):
        for name in ("hornbeam", "safetensors", "h5py"):
            target = tmp_path / name
            _fresh(target, tensors)
            start = time.perf_counter()
            PEERS[name].save(target, tensors)
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
    ratios = {name: best[name] / best["hornbeam"] for name in ("h5py", "safetensors")}
    benchmark.extra_info.update(ratios)
    target = tmp_path / "hornbeam"
    benchmark.pedantic(PEERS["hornbeam"].save, args=(target, tensors), setup=lambda: _fresh(target, tensors), rounds=1)
    _note(benchmark, tensors, target, PEERS["h5py"].load(target))
    if _measuring(request.config):
        assert ratios["h5py"] >= 15, ratios
        assert ratios["safetensors"] >= 1, ratios
