"""Files of Keras 3.0 to 3.15, written by those versions themselves (`golden/make.py`), load and answer as recorded."""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import hornbeam
from hornbeam import saving
from support.helpers import TESTS

GOLDEN = TESTS / "golden"
VERSIONS = ["3.0.5", "3.3.3", "3.6.0", "3.9.2", "3.12.0", "3.15.1"]
MODELS = ["functional", "convolutional", "recurrent", "subclassed"]


@pytest.fixture(scope="module")
def make() -> Any:
    """The script's classes, registered, and its models."""
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden_make"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with zipfile.ZipFile(GOLDEN / f"keras-{request.param}.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


def recorded(path: Path) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray]]:
    with np.load(path) as file:
        weights = [file[f"w{i}"] for i in range(sum(name.startswith("w") for name in file))]
        slots = [file[f"o{i}"] for i in range(sum(name.startswith("o") for name in file))]
        return file["x"], file["y"], weights, slots


def same(variables: Any, wanted: list[np.ndarray]) -> bool:
    """Whether the variables have these very values; integers may be of another width (`iteration`)."""
    found = [np.asarray(keras.ops.convert_to_numpy(v)) for v in variables]
    assert len(found) == len(wanted)
    return all(np.array_equal(a, b) and a.dtype.kind == b.dtype.kind for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("files", VERSIONS, indirect=True)
def test_a_file_of_every_era_loads(files: Path, name: str, make: Any) -> None:
    x, y, weights, slots = recorded(files / f"{name}.npz")
    with hornbeam.options(fallback=False):
        model = saving.load_model(files / f"{name}.keras")
    report = hornbeam.last_report("load")
    assert report is not None
    assert (report.crc, report.missing, report.mismatched) == ("verified", [], [])
    assert same(model.weights, weights)
    assert np.allclose(model.predict(x, verbose=0), y, rtol=0, atol=2e-6)
    assert same(model.optimizer.variables, slots)
    with hornbeam.options(fallback=False):
        for file in (f"{name}.weights.h5", f"{name}.keras"):
            other, _ = getattr(make, name)()
            other.optimizer.build(other.trainable_variables)
            saving.load_weights(other, files / file)
            assert same(other.weights, weights)
            assert same(other.optimizer.variables, slots)
            assert np.allclose(other.predict(x, verbose=0), y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("files", VERSIONS, indirect=True)
def test_what_an_old_file_becomes_is_what_stock_keras_makes_of_it(files: Path, make: Any) -> None:
    ours = saving.load_model(files / "functional.keras")
    stock = keras.models.load_model(files / "functional.keras")
    assert ours.get_config() == stock.get_config()
    assert ours.get_compile_config() == stock.get_compile_config()
    assert same(ours.weights, [keras.ops.convert_to_numpy(v) for v in stock.weights])


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.glob("*.zip")) < 300_000
