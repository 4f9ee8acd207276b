"""The table of formats in the README is what happens: each is written and read here, by hornbeam and by stock Keras.

`python tests/test_format_table.py` writes the table; a format more is a line in `FORMATS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import hornbeam

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(?<=<!-- formats:begin -->\n)(.*?)(?=<!-- formats:end -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Format:
    """A row.

    Attributes:
        shown: How it is asked for.
        eras: Which Keras writes files of this kind.
        name: The name of an example.
        arguments: What the save is asked for.
        weights: Whether it holds weights alone.
    """

    shown: str
    eras: str
    name: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: bool = False


FORMATS = [
    Format("`.keras`", "3, 2.12 on", "m.keras"),
    Format("`zipped=False`: a directory", "3", "directory", {"zipped": False}),
    Format("`.h5`, `.hdf5`", "3, 2, 1", "m.h5"),
    Format("`save_format='tf'`, no extension: SavedModel", "2", "m"),
    Format("`.weights.h5`", "3", "m.weights.h5", weights=True),
    Format("`.weights.json`: shards", "3.10 on", "m.weights.json", {"max_shard_size": 1}, weights=True),
    *([Format("`.safetensors`", "", "m.safetensors", weights=True)] if find_spec("hornbeam._safetensors") else []),
]
HEAD = ["Format", "Written by Keras", "Save", "Load", "Optimizer", "Custom objects", "Assets", "Stock Keras reads it"]


@keras.saving.register_keras_serializable("formats")
class Labelled(keras.layers.Layer):
    """Has an asset, and must be known to be loaded."""

    text = ""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x: Any) -> Any:
        return x * self.scale

    def save_assets(self, path: str) -> None:
        (Path(path) / "text").write_text(self.text)

    def load_assets(self, path: str) -> None:
        self.text = (Path(path) / "text").read_text()


def build() -> Any:
    model = keras.Sequential([keras.Input((3,)), Labelled(), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    return model


def trained() -> Any:
    model = build()
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    model.layers[0].text = "label"
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save(form: Format, model: Any, path: Path) -> None:
    (model.save_weights if form.weights else model.save)(path, **form.arguments)


def load(form: Format, path: Path) -> Any:
    """Weights go into a model that is new: its optimizer has no slots yet, and takes no state."""
    if not form.weights:
        return keras.models.load_model(path)
    model = build()
    model.load_weights(path)
    return model


def same(a: list[Any], b: list[Any]) -> bool:
    return [np.asarray(v).tobytes() for v in a] == [np.asarray(v).tobytes() for v in b]


def attempt(form: Format, path: Path, model: Any) -> tuple[bool, Any]:
    """Whether the weights come back, and what did."""
    try:
        with _quiet():
            loaded = load(form, path)
    except (ValueError, OSError, TypeError):
        return False, None
    return same(loaded.weights, model.weights), loaded


def row(form: Format, root: Path) -> list[str]:
    """What happens to a trained model with a custom layer that has an asset."""
    model, path = trained(), root / form.name
    with hornbeam.installed(), _quiet():
        save(form, model, path)
        loads, loaded = attempt(form, path, model)
    optimizer = loads and same(loaded.optimizer.variables, model.optimizer.variables)
    known = loads and type(loaded.layers[0]) is Labelled
    assets = loads and loaded.layers[0].text == "label"
    stock, _ = attempt(form, path, model)
    marks = ["✓" if mark else "" for mark in (True, loads, optimizer, known, assets, stock)]
    if form.weights:
        marks[3] = "n/a"
    return [form.shown, form.eras, *marks]


def table() -> str:
    with tempfile.TemporaryDirectory() as root:
        rows = [row(form, Path(root)) for form in FORMATS]
    lines = [HEAD, ["---", "---", *[":-:"] * (len(HEAD) - 2)], *rows]
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def test_the_readme_has_this_table() -> None:
    pytest.importorskip("tensorflow", reason="SavedModels are written by TensorFlow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("the table is that of the TensorFlow backend")
    found = TABLE.search(README.read_text())
    assert found is not None
    assert found[1] == table()


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    new = table()
    README.write_text(TABLE.sub(lambda _: new, README.read_text()))
    print(new)
