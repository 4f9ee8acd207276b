"""Files that Keras 2 wrote (`golden/make_keras2.py`) load, answer as recorded, and train on as they would have."""

from __future__ import annotations

import io
import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import hornbeam
from hornbeam import _migrate

GOLDEN = Path(__file__).parent / "golden" / "keras2"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
BUILTIN = ("sequential", "functional", "recurrent")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Subclassed(keras.Model):
    """The class of the same name in `make_keras2.py`, for Keras 3."""

    def __init__(self, units: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.first = keras.layers.Dense(units, activation="relu")
        self.second = keras.layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.second(self.first(x))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


CUSTOM = {"golden>Subclassed": Subclassed, "Subclassed": Subclassed}


def data(name: str) -> tuple[np.ndarray, np.ndarray]:
    shape = EXPECTED[name]["shape"]
    if name == "recurrent":
        x = np.arange(np.prod(shape), dtype="int32").reshape(shape) % 7
    else:
        x = np.linspace(-1, 1, int(np.prod(shape)), dtype="float32").reshape(shape)
    return x, np.linspace(-1, 1, 16, dtype="float32").reshape(8, 2)


def check(model: Any, name: str, *, trained: bool = False) -> None:
    x, y = data(name)
    np.testing.assert_allclose(model.predict(x, verbose=0), EXPECTED[name]["answers"], **CLOSE)
    if trained and keras.backend.backend() != "numpy":
        model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
        np.testing.assert_allclose(model.predict(x, verbose=0), EXPECTED[name]["trained"], rtol=1e-4, atol=1e-5)


def load(path: Path, **kwargs: Any) -> Any:
    with hornbeam.installed(), hornbeam.options(strict=True):
        return keras.models.load_model(path, **kwargs)


@pytest.mark.parametrize("name", ["sequential", "functional", "old_optimizer"])
def test_whole_models_in_h5(name: str) -> None:
    check(load(GOLDEN / f"{name}.h5"), name, trained=True)
    report = hornbeam.last_report()
    assert report is not None
    assert report.engine == "direct"
    assert (
        not report.missing or report.missing == ["learning_rate"] or all("learning_rate" in m for m in report.missing)
    )


@pytest.mark.parametrize("name", [*BUILTIN, "subclassed"])
def test_keras_files(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hornbeam"):
        model = load(GOLDEN / f"{name}.keras", custom_objects=CUSTOM)
    check(model, name)
    with zipfile.ZipFile(GOLDEN / f"{name}.keras") as archive:
        moved = b"engine.functional" in archive.read("config.json")
    assert ("of Keras 2 is read as" in caplog.text) == moved


@pytest.mark.parametrize("by_name", [None, True])
def test_weights_in_h5(by_name: bool | None) -> None:
    model = load(GOLDEN / "functional.h5", compile=False)
    for variable in model.weights:
        variable.assign(np.zeros(variable.shape))
    with hornbeam.installed(), hornbeam.options(strict=True):
        model.load_weights(GOLDEN / "functional_weights.h5", by_name=by_name)
    check(model, "functional")


def test_every_entry_of_the_table_is_in_a_file() -> None:
    """Or it is there for another era's name of what is."""
    found = set()
    for path in GOLDEN.glob("*.keras"):
        with zipfile.ZipFile(path) as archive:
            text = archive.read("config.json").decode()
        found |= {key for key in _migrate._CLASSES if f'{key[0]}"' in text}
    assert found == set(_migrate._CLASSES)


@pytest.mark.parametrize(
    "module", ["os", "keras.src.engine.training", "tf_keras.src.engine.functional.x", "subprocess"]
)
def test_nothing_else_is_imported(module: str, tmp_path: Path) -> None:
    """A class that is in no table is for Keras to refuse, whatever module it claims to be from."""
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(GOLDEN / "functional.keras") as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename == "config.json":
                config = json.loads(content)
                config["module"], config["class_name"], config["registered_name"] = module, "system", None
                content = json.dumps(config).encode()
            new.writestr(item.filename, content)
    with pytest.raises((TypeError, ValueError)):
        load(path)


def test_keras_3_files_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_migrate, "_migrated", lambda _: pytest.fail("walked"))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    buffer = io.BytesIO()
    with hornbeam.installed():
        keras.src.saving.saving_lib.save_model(model, buffer)
        buffer.seek(0)
        assert keras.src.saving.saving_lib._load_model_from_fileobj(buffer, None, True, True).compiled


def test_safe_mode_holds_for_keras_2_files(tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    shutil.copy(GOLDEN / "sequential.h5", path)
    import h5py

    with h5py.File(path, "a") as file:
        config = json.loads(file.attrs["model_config"])
        node = {"class_name": "Lambda", "config": {"name": "l", "function": ["4wAAAAA=", None, None]}}
        config["config"]["layers"].append(node)
        file.attrs["model_config"] = json.dumps(config)
    with pytest.raises(ValueError, match=r"[Ll]ambda"):
        load(path)
