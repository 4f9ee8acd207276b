"""A strict load of what was compiled and not trained yet: what Keras makes while it loads was not lost."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers, optimizers

import hornbeam
from hornbeam.errors import IncompleteLoadError
from hornbeam.saving import load_model, load_weights, save_model, save_weights
from support.helpers import saved
from support.zoo import ZOO, chain, floats

FORMATS = {"archive": "m.keras", "directory": "m", "h5": "m.h5", "savedmodel": "saved"}
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: "sgd",
    "momentum": lambda: optimizers.SGD(0.3, momentum=0.9),
    "adam": lambda: "adam",
    "ema": lambda: optimizers.Adam(use_ema=True),
    "accumulation": lambda: optimizers.Adam(gradient_accumulation_steps=4),
    "loss scale": lambda: optimizers.LossScaleOptimizer(optimizers.Adam()),
    "schedule": lambda: optimizers.Adam(optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)),
    "nadam": lambda: "nadam",
    "ftrl": lambda: "ftrl",
    "adafactor": lambda: "adafactor",
    "lion": lambda: "lion",
}
if hasattr(optimizers, "Muon"):
    OPTIMIZERS["muon"] = lambda: optimizers.Muon(learning_rate=0.1)


def save(model: Any, path: Path, **how: Any) -> Path:
    save_model(model, path, **({"zipped": False} if path.name == "m" else {}), **how)
    return path


def untrained(optimizer: Any) -> Any:
    """With everything that has a state of its own: seeds, metrics, statistics, the optimizer."""
    model = chain(layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(1))
    model.compile(optimizer, "mse", metrics=["mae", keras.metrics.RootMeanSquaredError()])
    return model


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize(
    "kind", ["archive", "directory", "h5", pytest.param("savedmodel", marks=pytest.mark.backend("tensorflow", "jax"))]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_was_never_trained_loads_strictly(name: str, kind: str, tmp_path: Path) -> None:
    model = untrained(OPTIMIZERS[name]())
    model.optimizer.learning_rate = 0.25 if name != "schedule" else model.optimizer._learning_rate
    path = save(model, tmp_path / FORMATS[kind])
    loaded = load_model(path, strict=True)
    report = hornbeam.last_report("load")
    assert report is not None
    assert report.complete
    assert report.missing == report.unexpected == []
    slots = {v.path for v in loaded.optimizer.variables} - {v.path for v in model.optimizer.variables}
    assert slots <= set(report.initialised)
    assert [np.asarray(w).tobytes() for w in loaded.get_weights()] == [
        np.asarray(w).tobytes() for w in model.get_weights()
    ]
    if name != "schedule":
        assert float(loaded.optimizer.learning_rate) == 0.25


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_model(name: str, tmp_path: Path) -> None:
    model, *_ = ZOO[name]()
    model.compile("adam", "mse")
    loaded = load_model(save(model, tmp_path / "m.keras"), strict=True)
    assert hornbeam.last_report("load").complete  # type: ignore[union-attr]
    assert type(loaded.optimizer) is type(model.optimizer)


@pytest.mark.trains
def test_it_is_in_order_for_training(tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    model = untrained("adam")
    path = save(model, tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        loaded = load_model(path, strict=True)
    x, y = floats(16, 6), floats(16, 1)
    for made in (model, loaded):
        made.layers[-2].rate = 0.0
        made.fit(x, y, shuffle=False, verbose=0)
    assert [entry[2] for entry in saved(loaded)] == [entry[2] for entry in saved(model)]


# ---- what is lost is still refused ----


def built(value: float = 1.0) -> Any:
    model = untrained("adam")
    model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables:
        variable.assign(np.full(variable.shape, value))
    return model


def change(path: Path, edit: Callable[[h5py.File], Any]) -> None:
    """Has `edit` change the weights of a file."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            edit(file)
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    image = io.BytesIO(members["model.weights.h5"])
    with h5py.File(image, "r+") as file:
        edit(file)
    members["model.weights.h5"] = image.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def cut(file: h5py.File, kept: int) -> None:
    """Leaves the optimizer its first values."""
    if "optimizer_weights" in file:
        group = file["optimizer_weights"]
        names = list(group.attrs["weight_names"])
        for name in names[kept:]:
            del group[name]
        group.attrs["weight_names"] = names[:kept]
    else:
        for i in range(kept, len(file["optimizer/vars"])):
            del file[f"optimizer/vars/{i}"]


def remove(file: h5py.File) -> None:
    del file["optimizer_weights" if "optimizer_weights" in file else "optimizer"]


LOSSES: dict[str, Callable[[h5py.File], Any]] = {
    "all of it": remove,
    "all its values": lambda file: cut(file, 0),
    "all but the step": lambda file: cut(file, 1),
    "the slots": lambda file: cut(file, 2),
    "one slot": lambda file: cut(file, 3),
}


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize("kind", ["archive", "h5"])
@pytest.mark.parametrize("how", LOSSES)
def test_the_state_of_a_trained_optimizer_is_missed(how: str, kind: str, tmp_path: Path) -> None:
    path = save(built(), tmp_path / FORMATS[kind])
    load_model(path, strict=True)
    change(path, LOSSES[how])
    with pytest.raises(IncompleteLoadError) as raised:
        load_model(path, strict=True)
    assert len(raised.value.report.missing) == len(built().optimizer.variables)
    load_model(path)
    assert not hornbeam.last_report("load").complete  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize("kind", ["archive", "directory"])
def test_what_was_left_out_on_purpose_is_missed(kind: str, tmp_path: Path) -> None:
    """The loaded model has an optimizer. (One from legacy HDF5 has none then.)"""
    path = save(built(), tmp_path / FORMATS[kind], include_optimizer=False)
    with pytest.raises(IncompleteLoadError):
        load_model(path, strict=True)


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
def test_a_step_that_was_counted_is_missed(tmp_path: Path) -> None:
    """An optimizer that nobody built, but whose step was set: the loaded one begins at 0."""
    model = untrained("adam")
    model.optimizer.iterations.assign(5)
    path = save(model, tmp_path / "m.keras")
    with pytest.raises(IncompleteLoadError, match=r"adam.*/iteration: not in the file"):
        load_model(path, strict=True)


def test_an_optimizer_that_cannot_be_made_again_is_missed(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("untrained")
    class Once(optimizers.Adam):
        made = 0

        @classmethod
        def from_config(cls, config: Any, custom_objects: Any = None) -> Any:
            cls.made += 1
            if cls.made > 1:
                raise ZeroDivisionError
            return super().from_config(config, custom_objects)

    path = save(untrained(Once()), tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="Skipping"), pytest.raises(IncompleteLoadError):
        load_model(path, strict=True)


def test_weights_into_a_trained_model_are_missed(tmp_path: Path) -> None:
    """It keeps the slots that it has: they are of another training."""
    save_weights(untrained("adam"), tmp_path / "m.weights.h5")
    with pytest.warns(UserWarning, match="Skipping"), pytest.raises(IncompleteLoadError):
        load_weights(built(), tmp_path / "m.weights.h5", strict=True)
    assert load_weights(untrained("adam"), tmp_path / "m.weights.h5", strict=True).complete
