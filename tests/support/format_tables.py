"""The tables of formats are what happens: each format is written and read, by hornbeam and by stock Keras.

The one of formats is in README.md, the one of files of older Keras in docs/formats.md.

`make tables` writes them; to add a format, add a line to `FORMATS`; to add a version of Keras, a golden file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

import hornbeam
from support import helpers

GOLDEN = helpers.TESTS / "golden"
ROOT = helpers.TESTS.parent


@dataclasses.dataclass(frozen=True)
class Format:
    """A row.

    Attributes:
        shown: How it is asked for.
        name: The name of an example.
        arguments: What the save is asked for.
        weights: Whether it holds weights alone.
    """

    shown: str
    name: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: bool = False


FORMATS = [
    Format("`.keras`", "m.keras"),
    Format("`zipped=False`: a directory", "directory", {"zipped": False}),
    Format("`.h5`, `.hdf5`", "m.h5"),
    Format("`save_format='tf'`, no extension: SavedModel", "m"),
    Format("`.weights.h5`", "m.weights.h5", weights=True),
    Format("`.weights.json`: shards", "m.weights.json", {"max_shard_size": 1}, weights=True),
    Format("`.safetensors`", "m.safetensors", weights=True),
]
HEAD = ["Format", "Save", "Load", "Optimizer", "Custom objects", "Assets", "Stock Keras reads it"]


@keras.saving.register_keras_serializable("formats")
class Labelled(helpers.Labelled):
    """Has an asset, and must be known to be loaded."""


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
    return [form.shown, *marks]


#: Of each version of Keras: models of Keras' own objects, and those with somebody's own.
ERAS = {
    "2": (["sequential", "functional", "nested", "recurrent"], ["subclassed"]),
    "3": (["convolutional", "recurrent"], ["functional", "subclassed"]),
}
ERA_HEAD = ["Files of", "`.keras`", "Optimizer", "Custom objects", "Assets", "`.weights.h5`", "`.h5`", "Optimizer"]


def unpack(root: Path) -> list[tuple[str, Path]]:
    """Every version that there are golden files of, and where they are now."""
    with tarfile.open(GOLDEN / "keras2.tar.xz") as archive:
        archive.extractall(root, filter="data")
    for path in GOLDEN.glob("keras-3*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(root / path.stem)
    found = [(path.name.rpartition("-"), path) for path in root.iterdir()]
    in_order = sorted(found, key=lambda f: ([int(n) for n in f[0][2].split(".")], f[0][0]))
    return [
        (f"{'Keras' if package == 'keras' else package} {version}", path) for (package, _, version), path in in_order
    ]


def bits(arrays: Any) -> list[bytes]:
    """Sorted: Keras 3 has its weights in an order of its own. Counts may be of another type."""
    return sorted(np.asarray(keras.ops.convert_to_numpy(a)).tobytes() for a in arrays if np.ndim(a))


def recorded(path: Path, letter: str) -> list[bytes]:
    """What the version wrote down: its weights (`w`), or the optimizer's variables (`o`)."""
    with np.load(path) as file:
        return bits(file[name] for name in file if name.startswith(letter))


def golden(root: Path, name: str, form: str) -> tuple[bool, bool]:
    """Whether the weights come back, and whether the optimizer's state does."""
    path = root / f"{name}.{form}"
    model = None
    if form == "weights.h5":  # into a model of other values
        model = keras.models.load_model(root / f"{name}.keras")
        for variable in model.weights:
            variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
        model.load_weights(path)
    else:
        with contextlib.suppress(ValueError):
            model = keras.models.load_model(path)
    if model is None:
        return False, False
    values = root / f"{name}.npz"
    return bits(model.weights) == recorded(values, "w"), bits(model.optimizer.variables) == recorded(values, "o")


def assets(root: Path, version: str) -> bool:
    """Whether two layers of somebody's own have theirs, one of them in a model in the model."""
    model = keras.models.load_model(root / "assets.keras")
    text = model.get_layer("label").text
    return text.endswith(f" {version}") and model.get_layer("inner").layers[-1].text == f"deep, {text}"


def era_row(shown: str, root: Path) -> list[str]:
    """What happens to the golden files of a version."""
    version = shown.split()[1]
    plain, custom = ERAS[version[0]]
    cells = []
    for form in ("keras", "weights.h5", "h5"):
        found = [golden(root, name, form) for name in plain if (root / f"{name}.{form}").exists()]
        mark = [all(loads for loads, _ in found), all(state for _, state in found)]
        cells.append(["✓" if yes else "" for yes in mark] if found else ["n/a", "n/a"])
    known = all(golden(root, name, "keras")[0] for name in custom)
    marks = ["✓" if yes else "" for yes in (known, assets(root, version))]
    return [shown, *cells[0], *marks, cells[1][0], *cells[2]]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *[":-:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def formats() -> str:
    with tempfile.TemporaryDirectory() as root:
        return markdown(HEAD, [row(form, Path(root)) for form in FORMATS])


def eras() -> str:
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # registers the classes of the golden files
    keras.saving.register_keras_serializable("golden")(helpers.Subclassed)
    with tempfile.TemporaryDirectory() as root, hornbeam.installed(), hornbeam.options(fallback=False), _quiet():
        return markdown(ERA_HEAD, [era_row(shown, path) for shown, path in unpack(Path(root))])


#: Name of a table's marks → the file that it is in, and what makes it.
TABLES = {"formats": (ROOT / "README.md", formats), "eras": (ROOT / "docs" / "formats.md", eras)}


def between(marks: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {marks}:begin -->\n)(.*?)(?=<!-- {marks}:end -->)", re.DOTALL)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name, (file, makes) in TABLES.items():
        new = f"\n{makes()}\n\n"
        file.write_text(between(name).sub(lambda _, new=new: new, file.read_text()))
        print(new)
