"""Keras' own tests, as its wheel ships them, with hornbeam installed below them.

Each group of files runs in one process; `support/keras_plugin.py` installs hornbeam there and reports what happened.
The lists below are exact: a test that fails and is not listed, one that is listed and passes, and a save or load that
stock Keras did instead are all failures here. They hold for the Keras named in `KERAS`, on TensorFlow and JAX.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import keras
import pytest

from support.keras_suite import failures, pytest_on

KERAS = "3.15.1"
BACKEND = keras.backend.backend()


@dataclasses.dataclass(frozen=True)
class File:
    """What a file must at least do on TensorFlow; less means that tests went missing, or hornbeam was not used."""

    passed: int
    saves: int = 0
    loads: int = 0


@dataclasses.dataclass(frozen=True)
class Group:
    """Files that share a process, and pytest's `-k`."""

    files: dict[str, File]
    select: str = ""


#: In files of which few tests save: those that do, and their neighbours.
_SAVING = "sav or serializ or pickl or lora or weights or quantize_int or float8_fitting"

GROUPS = {
    "saving_lib": Group({"saving/saving_lib_test.py": File(73, saves=66, loads=60)}),
    "saving": Group(
        {
            "saving/saving_api_test.py": File(62, saves=45, loads=43),
            "saving/serialization_lib_test.py": File(31),
            "saving/object_registration_test.py": File(5),
            "saving/file_editor_test.py": File(5, saves=4, loads=1),
            "legacy/saving/legacy_h5_format_test.py": File(11),
            "legacy/saving/json_utils_test.py": File(7),
        }
    ),
    "callbacks": Group(
        {
            "callbacks/model_checkpoint_test.py": File(2, saves=35, loads=2),
            "callbacks/backup_and_restore_test.py": File(7, saves=30, loads=3),
            "callbacks/swap_ema_weights_test.py": File(5, saves=2, loads=1),  # resets TensorFlow: the last
        }
    ),
    "small": Group(
        {
            "models/cloning_test.py": File(17),
            "models/sequential_test.py": File(19, saves=2, loads=2),
            "models/functional_test.py": File(42, saves=1, loads=1),
            "models/variable_mapping_test.py": File(1),
            "layers/preprocessing/index_lookup_test.py": File(33, saves=2, loads=2),
            "layers/preprocessing/string_lookup_test.py": File(18, saves=1, loads=1),
            "layers/preprocessing/text_vectorization_test.py": File(39, saves=2, loads=2),
            "layers/preprocessing/discretization_test.py": File(40, saves=2, loads=2),
            "layers/preprocessing/hashing_test.py": File(50, saves=1, loads=1),
            "layers/core/masking_test.py": File(3, saves=1, loads=1),
            "metrics/metric_test.py": File(11, saves=1, loads=1),
            "optimizers/optimizer_test.py": File(42, saves=11, loads=11),
            "dtype_policies/dtype_policy_map_test.py": File(11, saves=1, loads=1),
            "quantizers/quantization_config_test.py": File(13, saves=1, loads=1),
            "export/tfsm_layer_test.py": File(6, saves=2, loads=2),
        }
    ),
    "layers": Group(
        {
            "models/model_test.py": File(10, saves=8, loads=8),
            "layers/core/dense_test.py": File(20, saves=19, loads=19),
            "layers/core/einsum_dense_test.py": File(23, saves=26, loads=24),
            "layers/core/embedding_test.py": File(16, saves=17, loads=17),
            "layers/core/reversible_embedding_test.py": File(22, saves=17, loads=17),
            "layers/convolutional/conv_test.py": File(9, saves=18, loads=18),
            "layers/attention/multi_head_attention_test.py": File(3, saves=3, loads=3),
            "layers/layer_test.py": File(3, saves=1, loads=1),
            "layers/preprocessing/feature_space_test.py": File(1, saves=2, loads=2),
            "distillation/distiller_test.py": File(1, saves=1, loads=1),
            "utils/jax_layer_test.py": File(1, saves=1, loads=1),
        },
        select=_SAVING,
    ),
}

#: Test → (the line of it that fails, why hornbeam differs on purpose). Also in docs/divergences.md.
DIFFERENT = {
    f"saving/saving_lib_test.py::SavingTest::test_save_model_exception_raised_{memory}_memory_config": (
        "self.assertTrue(Path(filepath).exists())",
        "Keras leaves an archive without weights when a save fails; ours leaves what was there before: nothing here",
    )
    for memory in ("high", "low")
}

#: Test → why it fails without hornbeam too, with the wheel alone.
STOCK_FAILS = {
    "saving/saving_lib_test.py::SavingBattleTest::test_legacy_load_skips_missing_nested_containers": (
        "the wheel lacks the file saving/test_data/pre_pr22362_nested_container.keras"
    ),
}

#: File → what stock Keras does instead of hornbeam there, and how often.
HANDOVERS = {
    # The test says that its local path is a remote one, and saves and loads weights.
    "saving/saving_lib_test.py": {"remote path": 2},
}

FILES = [(group, file) for group in GROUPS for file in GROUPS[group].files]

pytestmark = pytest.mark.skipif(keras.__version__ != KERAS, reason=f"the lists are for Keras {KERAS}")
listed = pytest.mark.backend("tensorflow", "jax", reason="the lists are for TensorFlow and JAX")


@functools.cache
def run(group: str) -> dict[str, dict[str, Any]]:
    """Runs a group under hornbeam, once.

    Returns:
        Test → its outcome, message, and what hornbeam counted during it.
    """
    return pytest_on(GROUPS[group].files, select=GROUPS[group].select)


def of_file(tests: dict[str, dict[str, Any]], file: str) -> dict[str, dict[str, Any]]:
    return {test: result for test, result in tests.items() if test.split("::")[0] == file}


@listed
@pytest.mark.parametrize(("group", "file"), FILES)
def test_file(group: str, file: str) -> None:
    tests = of_file(run(group), file)
    failed = failures(tests)
    known = {test for test in (*DIFFERENT, *STOCK_FAILS) if test.startswith(f"{file}::")}
    unlisted = [f"{test}\n{text}" for test, text in failed.items() if test not in known]
    assert not unlisted, "\n\n".join(unlisted)
    assert failed.keys() == known, "listed, but passes"
    for test in failed.keys() & DIFFERENT.keys():
        line, _ = DIFFERENT[test]
        assert line in failed[test], f"{test} fails for another reason:\n{failed[test]}"

    handovers: Counter[str] = Counter()
    for result in tests.values():
        handovers.update(result["stats"]["handovers"])
    assert handovers == HANDOVERS.get(file, {})

    passed = sum(r["outcome"] == "passed" for r in tests.values())
    saves, loads = (sum(r["stats"][what] for r in tests.values()) for what in ("saves", "loads"))
    if BACKEND == "tensorflow":
        expected = GROUPS[group].files[file]
        assert passed >= expected.passed > 0
        assert saves >= expected.saves
        assert loads >= expected.loads


@listed
def test_baseline() -> None:
    """Without hornbeam, those of the listed tests fail that are said to, and the others pass."""
    tests = pytest_on([*DIFFERENT, *STOCK_FAILS], stock=True)
    assert tests.keys() == DIFFERENT.keys() | STOCK_FAILS.keys()
    assert failures(tests).keys() == STOCK_FAILS.keys()
    assert not any(r["stats"]["saves"] or r["stats"]["loads"] for r in tests.values())
