"""What tests compare: every value of a model, every object of a weights file; scripts in processes of their own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

import hornbeam

SOURCE = Path(hornbeam.__file__).parent.parent
TESTS = Path(__file__).parent.parent


def script(code: str, *arguments: Any, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own, with hornbeam and `support`; `environment` adds to ours."""
    path = os.pathsep.join([str(SOURCE), str(TESTS)])
    known = {**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=known, capture_output=True, text=True, timeout=timeout, check=False)


Value = tuple[str, str, tuple[int, ...], bytes]


def state(model: Any) -> list[Value]:
    """Path, dtype, shape and bytes of every variable, seed generator, metric and optimizer slot, in Keras' order."""
    return [value(v) for v in [*model.variables, *_slots(model)]]


def saved(model: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of what files hold: no file format of Keras has seed generators and metrics."""
    return [value(v)[1:] for v in [*model.weights, *_slots(model)]]


def _slots(model: Any) -> list[Any]:
    optimizer = getattr(model, "optimizer", None)
    return list(optimizer.variables) if optimizer is not None else []


def value(variable: Any) -> Value:
    array = np.asarray(keras.ops.convert_to_numpy(variable))
    return variable.path, str(array.dtype), array.shape, array.tobytes()


def values(model: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    """`state` without paths, which count on in every process."""
    return [entry[1:] for entry in state(model)]


def tree(file: Any) -> dict[str, Any]:
    """Every object of a weights image, by path: attributes, and for datasets type, shape and bytes."""
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        attributes = {key: item.attrs[key] for key in item.attrs}
        if isinstance(item, h5py.Group):
            found[name] = ("group", attributes)
            return
        kind = item.id.get_type()
        assert item.chunks is None
        assert item.compression is None
        assert item.maxshape == item.shape
        found[name] = ("dataset", attributes, kind.encode(), item.shape, item[()].tobytes())

    if not isinstance(file, h5py.File):
        with h5py.File(file, "r") as opened:
            opened.visititems(visit)
    else:
        file.visititems(visit)
    return found


def member(path: str | Path | io.BytesIO, name: str = "model.weights.h5") -> bytes:
    """A member of an archive, read by the standard library, which checks its CRC."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def archive_tree(path: str | Path | io.BytesIO) -> dict[str, Any]:
    return tree(io.BytesIO(member(path)))


def config(path: str | Path | io.BytesIO) -> Any:
    """`config.json` without `shared_object_id`, which is an address."""
    return without_ids(json.loads(member(path, "config.json")))


def without_ids(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: without_ids(inner) for key, inner in item.items() if key != "shared_object_id"}
    return [without_ids(inner) for inner in item] if isinstance(item, list) else item


def reported(save: Any, *args: Any, **kwargs: Any) -> hornbeam.SaveReport:
    """The report of a save that returns nothing, as Keras' do."""
    assert save(*args, **kwargs) is None
    report = hornbeam.last_report("save")
    assert report is not None
    return report


class Labelled(keras.layers.Layer):
    """Has an asset. Tests register classes of it, each under the name that their files have."""

    text = ""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x: Any) -> Any:
        return x * self.scale

    def save_assets(self, path: str) -> None:
        (Path(path) / "text").write_text(self.text)

    def load_assets(self, path: str) -> None:
        self.text = (Path(path) / "text").read_text()


class Subclassed(keras.Model):
    """The class of the same name in `golden/make_keras2.py`, for Keras 3."""

    def __init__(self, units: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.first = keras.layers.Dense(units, activation="relu")
        self.blocks = [keras.layers.Dense(units) for _ in range(2)]
        self.second = keras.layers.Dense(2)

    def call(self, x: Any) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.second(x)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}
