"""Shared fixtures. `strict`: no fallback to stock Keras: through the core, or an error."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import hypothesis
import pytest

import hornbeam

# A shell starts its background jobs with Ctrl-C ignored; tests that interrupt need Python's own handler.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("fast", max_examples=50, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


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
