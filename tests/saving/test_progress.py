"""Progress of long operations: what a callback is told, and that nothing is shown where nobody looks."""

from __future__ import annotations

import io
import logging
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from keras import layers

import hornbeam
from hornbeam import saving
from hornbeam.base import progress as progress_
from support.zoo import chain


def model() -> Any:
    return chain(layers.Dense(64), layers.Dense(64), shape=(64,))


def nbytes(built: Any) -> int:
    return sum(4 * math.prod(weight.shape) for weight in built.weights)


@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5"])
def test_a_callback_is_told_to_the_end(name: str, tmp_path: Path) -> None:
    built, told = model(), list[hornbeam.Progress]()
    save, load = (
        (saving.save_model, lambda **k: saving.load_model(tmp_path / name, **k))
        if name == "m.keras"
        else (saving.save_weights, lambda **k: saving.load_weights(built, tmp_path / name, **k))
    )
    began = time.monotonic()
    save(built, tmp_path / name, progress=told.append)
    load(progress=told.append)
    passed = time.monotonic() - began
    last = {p.operation: p for p in told}
    assert set(last) == {"save", "load"}
    for progress in last.values():
        assert progress.path == str(tmp_path / name)
        assert progress.done == progress.total == nbytes(built)
        assert 0 < progress.seconds < passed


def test_a_callback_that_fails_is_logged_and_harms_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(progress: hornbeam.Progress) -> None:
        raise RuntimeError("no more paper")

    with caplog.at_level(logging.ERROR, "hornbeam"):
        saving.save_model(model(), tmp_path / "m.keras", progress=fails)
    assert "no more paper" in caplog.text
    saving.load_model(tmp_path / "m.keras", strict=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_appears_on_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_, "_PATIENCE", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    for stream, options, shown in (
        (Terminal(), {}, True),
        (Terminal(), {"progress": False}, False),
        (io.StringIO(), {}, False),
    ):
        monkeypatch.setattr("sys.stderr", stream)
        drawn = threading.Event()

        def done(drawn: threading.Event = drawn) -> int:
            drawn.set()
            return 5

        with hornbeam.options(**options), progress_.watch("save", "m.keras", 10, done):
            assert not shown or drawn.wait(60)
        assert ("m.keras" in stream.getvalue()) == shown
