"""What all tests share: the fixture `strict`, and the markers that say what a test needs of a backend."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import hypothesis
import keras
import pytest

import hornbeam

# A shell starts its background jobs with Ctrl-C ignored; tests that interrupt need Python's own handler.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: The backends that hornbeam supports, and those of them that can train.
BACKENDS = ("tensorflow", "jax", "torch", "numpy")
TRAIN = BACKENDS[:-1]

hypothesis.settings.register_profile("fast", max_examples=50, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what other backends are for: `@pytest.mark.backend(*names, reason=...)`, `@pytest.mark.trains`."""
    here = keras.backend.backend()
    for item in items:
        needs = [(mark.args, mark.kwargs.get("reason", "")) for mark in item.iter_markers("backend")]
        needs += [(TRAIN, "it trains a model") for _ in item.iter_markers("trains")]
        for names, reason in needs:
            assert set() < {*names} < {*BACKENDS}, f"{item.nodeid}: a marker names {names}, not some of {BACKENDS}"
            if here not in names:
                item.add_marker(pytest.mark.skip(f"not on {here}, only on {' and '.join(names)}: {reason}"))


@pytest.fixture
def strict() -> Iterator[None]:
    """Everything goes through hornbeam; handing over to stock Keras is an error."""
    with hornbeam.installed(), hornbeam.options(fallback=False):
        yield


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Counters start at zero; nothing stays installed."""
    hornbeam.stats(reset=True)
    yield
    hornbeam.uninstall()
