"""Trainings that commit 5411634 began and did not end (`old_runs/make.py`) go on bit-exactly, with the same files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from support.helpers import script

OLD = Path(__file__).parents[1] / "old_runs"
BACKEND = keras.backend.backend()

pytestmark = pytest.mark.trains


def make() -> Any:
    spec = importlib.util.spec_from_file_location("old_runs_make", OLD / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["old_runs_make"] = module
    spec.loader.exec_module(module)
    return module


MAKE = make()
RUNS = MAKE.names()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this backend, gone on with by one new process."""
    root: Path = tmp_path_factory.mktemp("old_runs")
    MAKE.unpack(OLD / f"{BACKEND}.tar.xz", root)
    code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = script(code, OLD / "make.py", "resume", root)
    assert done.returncode == 0, done.stderr
    return root


def test_every_run_is_there(unpacked: Path) -> None:
    assert sorted(path.name for path in unpacked.iterdir()) == sorted(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_as_if_it_had_not_been_killed(unpacked: Path, name: str) -> None:
    with np.load(unpacked / name / "end.npz") as wanted, np.load(unpacked / name / "now" / "end.npz") as found:
        assert found.files == wanted.files
        for key in wanted.files:
            assert (found[key].dtype, found[key].tobytes()) == (wanted[key].dtype, wanted[key].tobytes()), key


@pytest.mark.parametrize("name", RUNS)
def test_latest_and_best_are_what_the_old_account_says(unpacked: Path, name: str) -> None:
    assert json.loads((unpacked / name / "now" / "said.json").read_text()) == json.loads(
        (unpacked / name / "said.json").read_text()
    )


@pytest.mark.parametrize("name", RUNS)
def test_files_and_accounts_are_what_the_old_commit_makes_of_the_run(unpacked: Path, name: str) -> None:
    found, wanted = (json.loads((unpacked / name / where / "end.json").read_text()) for where in ("now", "."))
    assert found == wanted
