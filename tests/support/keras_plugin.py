"""A pytest plugin for Keras' own tests: `python -m pytest -p support.keras_plugin …`, in a process of its own.

Keras' wheel ships its tests, but neither the markers and warning filters of its repository nor a way to put hornbeam
below them. With `HORNBEAM_SUITE=stock` Keras stays as it is: the baseline. The report goes to `HORNBEAM_SUITE_REPORT`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

import hornbeam

if os.environ.get("HORNBEAM_SUITE") != "stock":
    hornbeam.install()  # before the tests import Keras, and take references to its functions

#: As Keras' pyproject.toml: what leaves a file open, for one, fails.
_FILTERS = [
    "error",
    "ignore::DeprecationWarning",
    "ignore::ImportWarning",
    "ignore::RuntimeWarning",
    "ignore::PendingDeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
]
_MARKERS = [
    "requires_trainable_backend: the test trains a model",
    "multi_device: the test needs several devices",
]

#: Some files import grain for one of their tests.
_NO_GRAIN = importlib.util.find_spec("grain") is None

#: Test → what became of it: outcome, message, and what hornbeam did during it.
_tests: dict[str, dict[str, Any]] = {}


def pytest_configure(config: pytest.Config) -> None:
    for name, lines in (("filterwarnings", _FILTERS), ("markers", _MARKERS)):
        for line in lines:
            config.addinivalue_line(name, line)
    if os.environ.get("HORNBEAM_SUITE_CALLBACKS"):
        _replace_callbacks(json.loads(os.environ["HORNBEAM_SUITE_CALLBACKS"]))


def _replace_callbacks(arguments: dict[str, Any]) -> None:
    """Has Keras' tests make our callback, with arguments of ours."""
    from keras.src import callbacks

    from hornbeam.callbacks import ModelCheckpoint

    def make(*args: Any, **kwargs: Any) -> ModelCheckpoint:
        return ModelCheckpoint(*args, **kwargs, **arguments)

    callbacks.ModelCheckpoint = make


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collects what only imports grain; when the tests run, Keras does not see the stand-in."""
    if _NO_GRAIN:
        sys.modules["grain"] = types.ModuleType("grain")
    try:
        return (yield)
    finally:
        if _NO_GRAIN:
            del sys.modules["grain"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import keras

    untrained = pytest.mark.skipif(keras.backend.backend() in ("numpy", "openvino"), reason="this backend cannot train")
    for item in items:
        if "requires_trainable_backend" in item.keywords:
            item.add_marker(untrained)
        if "multi_device" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="one device"))
        if _NO_GRAIN and "grain_dataset" in item.name:
            item.add_marker(pytest.mark.skip(reason="grain is not installed"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    hornbeam.stats(reset=True)
    result = yield
    _tests[item.nodeid]["stats"] = vars(hornbeam.stats())
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    test = _tests.setdefault(report.nodeid, {"outcome": "passed", "message": "", "seconds": 0.0})
    test["seconds"] += report.duration
    if report.outcome != "passed":
        test["outcome"] = report.outcome
        test["message"] = report.longreprtext
    if report.outcome == "failed" and report.when != "call":
        test["outcome"] = "error"


def pytest_sessionfinish() -> None:
    with open(os.environ["HORNBEAM_SUITE_REPORT"], "w", encoding="utf-8") as file:
        json.dump(_tests, file, indent=1)
