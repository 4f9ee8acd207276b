"""Keras' own tests, as its wheel ships them, in a process of their own with `keras_plugin.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras

from support.helpers import SOURCE, TESTS

KERAS = Path(keras.__file__).parent / "src"


def pytest_on(
    tests: Iterable[str], *, select: str = "", stock: bool = False, callbacks: str = ""
) -> dict[str, dict[str, Any]]:
    """Runs files of Keras' tests.

    Args:
        tests: Files or tests, relative to `keras/src`.
        select: What pytest's `-k` takes.
        stock: Without hornbeam.
        callbacks: Arguments for our `ModelCheckpoint`, as JSON: it stands in for Keras'.

    Returns:
        Test → its outcome, message, and what hornbeam counted during it.
    """
    with tempfile.TemporaryDirectory() as tmp:
        report, config = Path(tmp) / "report.json", Path(tmp) / "pytest.ini"
        config.write_text("[pytest]\n")  # else pytest takes our own, if the environment is below it
        command = [sys.executable, "-m", "pytest", "-c", str(config), "--rootdir", str(KERAS)]
        command += ["-p", "support.keras_plugin", "-p", "no:cacheprovider", "-q", "--tb=short", "-k", select]
        process = subprocess.run(
            command + [str(KERAS / test) for test in tests],
            env={
                **os.environ,
                "KERAS_BACKEND": keras.backend.backend(),
                "HORNBEAM_SUITE": "stock" if stock else "hornbeam",
                "HORNBEAM_SUITE_REPORT": str(report),
                "HORNBEAM_SUITE_CALLBACKS": callbacks,
                "PYTEST_ADDOPTS": "",
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "PYTHONPATH": os.pathsep.join([str(SOURCE), str(TESTS)]),
            },
            cwd=tmp,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert process.returncode in (0, 1), process.stdout[-8000:] + process.stderr[-2000:]
        return json.loads(report.read_text())


def failures(tests: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {test: r["message"] for test, r in tests.items() if r["outcome"] in ("failed", "error")}
