"""Every argument of hornbeam's works, or is refused, in every function that the table of docs/formats.md names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import hornbeam
from hornbeam import saving
from hornbeam.errors import IncompleteLoadError
from support.zoo import TRAINABLE_BACKEND

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"
FUNCTIONS = ("save_model", "save_weights", "load_model", "load_weights")
#: Where each of them is called; all but the first need `install()`.
PLACES: dict[str, dict[str, Callable[..., Any]]] = {
    "hornbeam.saving": {name: getattr(saving, name) for name in FUNCTIONS},
    "keras.saving": {name: lambda *a, name=name, **k: getattr(keras.saving, name)(*a, **k) for name in FUNCTIONS},
    "keras.models": {
        name: lambda *a, name=name, **k: getattr(keras.models, name)(*a, **k) for name in ("save_model", "load_model")
    },
    "Model": {
        "save_model": lambda model, path, **k: model.save(path, **k),
        "save_weights": lambda model, path, **k: model.save_weights(path, **k),
        "load_weights": lambda model, path, **k: model.load_weights(path, **k),
    },
}


def table() -> dict[str, list[str]]:
    """Argument → the functions that take it, as the documentation has them."""
    text = DOCS.read_text().partition("<!-- arguments:begin -->")[2].partition("<!-- arguments:end -->")[0]
    found: dict[str, list[str]] = {}
    for line in text.strip().splitlines()[2:]:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[name.strip("`")] = [f for f, cell in zip(FUNCTIONS, cells, strict=True) if cell]
    return found


def model(value: float = 0.5) -> Any:
    made = keras.Sequential(
        [keras.Input((128,)), keras.layers.Dense(64, name="a"), keras.layers.Dense(2, name="b")], name="m"
    )
    made.compile("adam", "mse")
    if TRAINABLE_BACKEND:
        made.optimizer.build(made.trainable_variables)
    for variable in made.trainable_variables:
        variable.assign(np.full(variable.shape, value, "float32"))
    return made


def size(made: Any) -> int:
    return sum(4 * math.prod(v.shape) for v in made.weights)


class Call:
    """One function at one place, and a file for it."""

    def __init__(self, place: str, function: str, root: Path) -> None:
        self.function, self.call = function, PLACES[place][function]
        self.path = root / ("m.keras" if function.endswith("model") else "m.weights.h5")

    def save(self, made: Any | None = None, **arguments: Any) -> Any:
        return self.call(model() if made is None else made, self.path, **arguments)

    def load(self, made: Any | None = None, **arguments: Any) -> Any:
        if self.function == "load_model":
            return self.call(self.path, **arguments)
        return self.call(model() if made is None else made, self.path, **arguments)

    def write(self, made: Any | None = None) -> None:
        save = saving.save_model if self.function == "load_model" else saving.save_weights
        save(model() if made is None else made, self.path)


def asynchronous(call: Call) -> None:
    handle = call.save(asynchronous=True)
    assert handle.result() == str(call.path)
    assert handle.report.path == str(call.path)


def include_optimizer(call: Call) -> None:
    call.save(include_optimizer=False)
    assert len(hornbeam.last_report("save").left_out) == len(model().optimizer.variables)


def dtype(call: Call) -> None:
    call.save(dtype="float16")
    assert len(hornbeam.last_report("save").cast) == 4


def allow_overflow(call: Call) -> None:
    with pytest.raises(ValueError, match="allow_overflow"):
        call.save(model(1e6), dtype="float16")
    call.save(model(1e6), dtype="float16", allow_overflow=True)
    assert sum(cast.infinite for cast in hornbeam.last_report("save").cast) == 128 * 64 + 64 + 128 + 2


def compression(call: Call) -> None:
    call.save()
    plain = call.path.stat().st_size
    call.save(compression=9)
    assert call.path.stat().st_size < plain - size(model()) / 2


def progress(call: Call) -> None:
    told: list[hornbeam.Progress] = []
    if call.function.startswith("load"):
        call.write()
        call.load(progress=told.append)
    else:
        call.save(progress=told.append)
    assert told[-1].operation == call.function[:4]
    assert told[-1].done == told[-1].total >= size(model())


def strict(call: Call) -> None:
    made = model()
    if call.function == "load_model":
        saving.save_model(made, call.path, include_optimizer=False)
    else:
        saving.save_weights(made, call.path, include_optimizer=False)
    with pytest.raises(IncompleteLoadError):
        call.load(strict=True)


def only(call: Call) -> None:
    if call.function == "save_weights":
        call.save(only="a")
        with h5py.File(call.path) as file:
            assert list(file["layers"]) == ["dense"]
    else:
        call.write(model(2.0))
        made = model(1.0)
        call.load(made, only="a")
        assert len(hornbeam.last_report("load").loaded) == 2
        assert [float(np.mean(w)) for w in made.get_weights()] == [2.0, 2.0, 1.0, 1.0]


def skip(call: Call) -> None:
    if call.function == "save_weights":
        call.save(skip=["b"])
        with h5py.File(call.path) as file:
            assert list(file["layers"]) == ["dense"]
    else:
        call.write(model(2.0))
        made = model(1.0)
        call.load(made, skip=["a"])
        assert [float(np.mean(w)) for w in made.get_weights()] == [1.0, 1.0, 2.0, 2.0]


def replace_complete(call: Call) -> None:
    call.save()
    with pytest.raises(ValueError, match="complete weights"):
        call.save(only="a")
    call.save(only="a", replace_complete=True)
    with h5py.File(call.path) as file:
        assert list(file["layers"]) == ["dense"]


def name_map(call: Call) -> None:
    call.write(model(2.0))
    made = model(1.0)
    call.load(made, name_map=lambda name: name if name.startswith("layers/dense/") else None, skip="b")
    assert [float(np.mean(w)) for w in made.get_weights()] == [2.0, 2.0, 1.0, 1.0]


def by_name(call: Call) -> None:
    other = keras.Sequential([keras.Input((64,)), keras.layers.Dense(2, name="b")])
    call.write(model(2.0))
    if call.call is not saving.load_weights:  # Keras' own tests want that
        with pytest.raises(ValueError, match="only supports loading legacy"):
            call.load(other, by_name=True)
        call.path = call.path.with_name("m.h5")
        saving.save_model(model(2.0), call.path)
    call.load(other, by_name=True)
    assert [float(np.mean(w)) for w in other.get_weights()] == [2.0, 2.0]


CHECKS = {name: check for name, check in globals().items() if name in table()}


@pytest.fixture(autouse=True)
def installation(request: pytest.FixtureRequest) -> Iterator[None]:
    place = request.node.callspec.params.get("place") if hasattr(request.node, "callspec") else None
    with hornbeam.installed() if place not in (None, "hornbeam.saving") else nullcontext():
        yield


def test_the_table_is_that_of_the_signatures() -> None:
    taken: dict[str, list[str]] = {}
    for function in FUNCTIONS:
        for name, parameter in inspect.signature(getattr(saving, function)).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                taken.setdefault(name, []).append(function)
    assert table() == taken
    assert CHECKS.keys() == taken.keys()


@pytest.mark.parametrize(
    ("place", "function", "argument"),
    [(place, f, name) for place, found in PLACES.items() for f in found for name in CHECKS if f in table()[name]],
)
def test_an_argument_works(place: str, function: str, argument: str, tmp_path: Path) -> None:
    CHECKS[argument](Call(place, function, tmp_path))


@pytest.mark.parametrize(("place", "function"), [(place, f) for place, found in PLACES.items() for f in found])
def test_others_are_refused(place: str, function: str, tmp_path: Path) -> None:
    call, made = Call(place, function, tmp_path), model()
    for argument in [name for name, taken in table().items() if function not in taken] + ["nonsense"]:
        with pytest.raises((TypeError, ValueError), match=f"{argument}|saved whole") as refused:
            (call.load if "load" in function else call.save)(made, **{argument: "a"})
        assert "lib_" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
