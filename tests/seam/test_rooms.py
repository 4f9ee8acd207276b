"""The rooms of the Python layer import downward only; saves and loads take short ways through them."""

from __future__ import annotations

import graphlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import keras
import pytest

import hornbeam
from support import rooms
from support.zoo import chain

#: The most lines of code that each room may have. A commit that raises a limit says what for.
SIZES = {
    "errors": 70,
    "base": 1720,
    "values": 480,
    "seam": 2015,
    "flows": 1615,
    "formats": 2000,
    "training": 2000,
    "faces": 480,
}
BACKENDS = ("tensorflow", "jax", "torch")


@pytest.mark.parametrize("module", sorted(rooms.MODULES))
def test_a_module_imports_from_its_own_room_and_those_below(module: str) -> None:
    height = rooms.ORDER.index(rooms.room(module)) if module else len(rooms.ORDER)
    assert {name for name in rooms.own(module) if rooms.ORDER.index(rooms.room(name)) > height} == set()
    libraries = {name.partition(".")[0] for name in rooms.imported(module)}
    if rooms.room(module) != "values":
        assert libraries.isdisjoint(BACKENDS)
    if rooms.room(module) in ("base", "errors"):
        assert "keras" not in libraries


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: rooms.own(module) for module in rooms.MODULES}
    assert len(tuple(graphlib.TopologicalSorter(graph).static_order())) >= len(graph)  # raises for a circle


def test_the_drawn_graph_is_the_graph() -> None:
    text = (Path(rooms.__file__).parents[2] / "docs" / "design.md").read_text()
    drawn = text.partition("```mermaid\n")[2].partition("\n```")[0]
    assert drawn == rooms.graph()


def test_the_rooms_are_no_larger_than_agreed() -> None:
    found = rooms.sizes()
    assert found.keys() == SIZES.keys()
    assert {room: size for room, size in found.items() if size > SIZES[room]} == {}


def _crossings(work: Callable[[], Any], core: tuple[str, ...]) -> tuple[int, int]:
    """The frames of ours on the way to the core's first call among `core`, and how often it enters or leaves Keras."""
    best: list[tuple[int, int]] = []

    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or best or getattr(called, "__name__", "") not in core:
            return
        if not str(getattr(called, "__module__", "")).startswith("hornbeam"):
            return
        sides, at = [], frame
        while at is not None:
            name = at.f_globals.get("__name__", "")
            if name.startswith("hornbeam."):
                sides.append("ours")
            elif name.startswith("keras.") and "traceback_utils" not in name:
                sides.append("keras")
            at = at.f_back  # type: ignore[assignment]
        best.append((sides.count("ours"), sum(a != b for a, b in itertools.pairwise(sides))))

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return best[0]


def test_the_ways_to_the_core_are_short(tmp_path: Path) -> None:
    model, path = chain(keras.layers.Dense(2)), tmp_path / "m.keras"
    model.compile(loss="mse")
    hornbeam.saving.save_model(model, path)
    hornbeam.saving.load_model(path)
    frames, crossings = _crossings(lambda: hornbeam.saving.save_model(model, path), ("plan",))
    assert (frames <= 6, crossings <= 2) == (True, True), (frames, crossings)
    frames, crossings = _crossings(lambda: hornbeam.saving.load_model(path), ("open",))
    assert (frames <= 4, crossings <= 2) == (True, True), (frames, crossings)
    callback = hornbeam.callbacks.ModelCheckpoint(tmp_path / "c.keras", asynchronous=True)
    callback.set_model(model)
    callback.set_params({})
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    callback.on_epoch_end(0, {})
    frames, crossings = _crossings(lambda: callback.on_epoch_end(1, {}), ("plan",))
    callback.on_train_end()
    assert (frames <= 8, crossings <= 4) == (True, True), (frames, crossings)
