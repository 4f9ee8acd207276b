"""Nothing is read or decoded that the model has no place for; shapes are compared before a byte of a value is read."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import hornbeam
from hornbeam import _core
from hornbeam.flows import serving
from support.helpers import script

MB = 1 << 20
BIG = (64, MB)  # float32: 256 MB


def small() -> keras.Model:
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, name="a"), keras.layers.Dense(2, name="b")], name="m"
    )
    model.compile("sgd", "mse")
    return model


def values(model: Any) -> list[bytes]:
    return [np.asarray(v).tobytes() for v in model.weights]


def add_zeros(path: Path, where: str, *, chunks: bool, n: int = 20) -> None:
    """Datasets that declare 256 MB each; with chunks one chunk is written, else not a byte."""
    with h5py.File(path, "a") as file:
        for i in range(n):
            how: dict[str, Any] = {"chunks": (1, MB), "compression": "gzip"} if chunks else {}
            made = file.create_dataset(f"{where}/{i}", shape=BIG, dtype="float32", **how)
            if chunks:
                made[0] = 0


def change_archive(path: Path, change: Any) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    image = path.with_suffix(".image")
    image.write_bytes(members["model.weights.h5"])
    change(image)
    members["model.weights.h5"] = image.read_bytes()
    image.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def file_of(kind: str, tmp_path: Path, change: Any) -> Path:
    """A file of `small()` with `change` made to its HDF5 image."""
    model = small()
    path = tmp_path / f"m{kind}"
    if kind == ".weights.h5":
        model.save_weights(path)
        change(path)
    elif kind == ".weights.json":
        model.save_weights(path, max_shard_size=1)
        index = json.loads(path.read_text())
        shard = tmp_path / sorted({name for names in index["weight_map"].values() for name in names})[0]
        change(shard)
    elif kind == ".h5":
        model.save(path)
        change(path)
    else:
        model.save(path)
        change_archive(path, change)
    return path


@contextlib.contextmanager
def hornbeam_off() -> Iterator[None]:
    was = hornbeam.installed()
    hornbeam.uninstall()
    try:
        yield
    finally:
        if was:
            hornbeam.install()


def told(error: ValueError) -> str:
    """The line that says what the matter is, without the values of the variable."""
    lines = [line for line in str(error).splitlines() if "hape" in line]
    return lines[0].partition(" Target variable")[0]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shapes, in elements, of every large dataset that is asked of the core."""
    asked: list[int] = []
    monkeypatch.setattr(serving.Image, "read", _noting(asked))
    take = serving.Image.take

    def taken(self: Any, i: int) -> Any:
        asked.append(int(np.prod(self.datasets[i][2])))
        return take(self, i)

    monkeypatch.setattr(serving.Image, "take", taken)
    return asked


def _noting(asked: list[int]) -> Any:
    read = serving.Image.read

    def noted(self: Any, wanted: Any, **how: Any) -> None:
        positions = range(len(self.datasets)) if wanted is None else wanted
        asked.extend(int(np.prod(self.datasets[i][2])) for i in positions)
        read(self, wanted, **how)

    return noted


@pytest.mark.parametrize("chunks", [True, False], ids=["chunks", "never written"])
@pytest.mark.parametrize("where", ["layers/nobody/vars", "nobody"])
@pytest.mark.parametrize("kind", [".weights.h5", ".keras", ".weights.json", ".h5"])
def test_what_no_object_asks_for_is_not_decoded(
    tmp_path: Path, decoded: list[int], kind: str, where: str, chunks: bool
) -> None:
    path = file_of(kind, tmp_path, lambda image: add_zeros(image, where, chunks=chunks))
    model = small()
    before = [np.asarray(v) for v in model.weights]
    hornbeam.saving.load_weights(model, path)
    assert max(decoded) < MB
    assert any((a != np.asarray(b)).any() for a, b in zip(before, model.weights, strict=True))
    assert len(hornbeam.last_report("load").unexpected) == 20
    if kind in (".keras", ".h5"):
        decoded.clear()
        loaded = hornbeam.saving.load_model(path)
        assert max(decoded) < MB
        assert values(loaded) == values(model)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", [".weights.h5", ".keras", ".weights.json", ".h5"])
@pytest.mark.parametrize("chunks", [True, False], ids=["chunks", "never written"])
def test_another_shape_is_an_error_before_it_is_read(
    tmp_path: Path, decoded: list[int], kind: str, skip: bool, chunks: bool
) -> None:
    def change(image: Path) -> None:
        found: list[str] = []
        with h5py.File(image, "a") as file:
            file.visititems(lambda n, d: found.append(n) if getattr(d, "shape", None) == (3, 4) else None)
            for name in found[:1]:
                attributes = dict(file[name].attrs)
                del file[name]
                how: dict[str, Any] = {"chunks": (1, MB), "compression": "gzip"} if chunks else {}
                made = file.create_dataset(name, shape=BIG, dtype="float32", **how)
                made.attrs.update(attributes)

    path = file_of(kind, tmp_path, change)
    stock, ours = small(), small()
    first = values(ours)
    if skip:
        with pytest.warns(UserWarning, match="could not be loaded|mismatch"):
            hornbeam.saving.load_weights(ours, path, skip_mismatch=True)
        assert values(ours)[0] == first[0]
        assert values(ours)[2] != first[2]
    else:
        with pytest.raises(ValueError, match="hape") as ours_says:
            hornbeam.saving.load_weights(ours, path)
        assert values(ours) == first
        with hornbeam_off(), pytest.raises(ValueError, match="hape") as stock_says:
            stock.load_weights(path)
        assert told(stock_says.value) == told(ours_says.value)
    assert max(decoded, default=0) < MB


def test_verify_reads_everything(tmp_path: Path, decoded: list[int]) -> None:
    path = file_of(".weights.h5", tmp_path, lambda image: add_zeros(image, "nobody", chunks=True, n=1))
    with hornbeam.options(verify=True):
        hornbeam.saving.load_weights(small(), path)
    assert max(decoded) == 64 * MB


def test_a_dataset_that_was_not_asked_for_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.weights.h5"
    small().save_weights(path)
    weights = _core.open(path, archive=False).weights()
    reading = weights.fetch([0], verify=False, read_ahead=0)
    n = len(weights.names())
    for i in (n, n + 5, 2**40):
        with pytest.raises(ValueError, match="no dataset has this position"):
            reading.take(i)
        with pytest.raises(ValueError, match="position"):
            weights.read(i, 0, 0)
        with pytest.raises(ValueError, match="position"):
            weights.dataset(i)
        with pytest.raises(ValueError, match="position"):
            weights.fetch([i], verify=False, read_ahead=0)
    with pytest.raises(ValueError, match="not asked for"):
        reading.take(1)
    with pytest.raises(OverflowError):
        reading.take(-1)
    assert len(reading.take(0)) > 0


_SWEEP = r"""
import resource, sys
import faulthandler
import numpy as np
from hornbeam import _core
from hornbeam.errors import OutOfMemoryError
faulthandler.dump_traceback_later(150, exit=True)
path, engine = sys.argv[1], sys.argv[2]
weights = _core.open(path, archive=False).weights(engine=engine)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
ends = set()
for step in range(0, 160, 3):
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + (step << 20), hard))
    try:
        reading = weights.fetch(range(8), verify=False, read_ahead=1 << 40)
        for i in range(8):
            block = reading.take(i)
            ends.add("read")
            del block
        reading.complete()
        ends.add("whole")
        weights.read(0, 0, 16 << 20)
    except MemoryError:
        ends.add("memory")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        reading = None
assert ends == {"read", "whole", "memory"}, ends
print("all is well")
"""


@pytest.mark.parametrize("kind", ["direct", "chunks"])
def test_memory_that_runs_out_is_a_memory_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        how: dict[str, Any] = {"chunks": (MB,), "compression": "gzip"} if kind == "chunks" else {}
        for i in range(8):
            file.create_dataset(f"x{i}", data=np.zeros(4 * MB, "f4"), **how)
    done = script(_SWEEP, path, "auto", timeout=200, KERAS_BACKEND="numpy")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "all is well"
    assert "panicked" not in done.stderr
