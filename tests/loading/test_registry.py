"""Keras' registry is the one registry, and what it lacks is named all at once."""

from __future__ import annotations

import contextlib
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import pytest
from keras import layers

import hornbeam
from hornbeam import models, saving
from hornbeam.seam import missing_classes
from support.zoo import chain, floats


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Whatever a test registers is gone afterwards."""
    before = dict(keras.saving.get_custom_objects())
    yield
    keras.saving.get_custom_objects().clear()
    keras.saving.get_custom_objects().update(before)


class Twice(layers.Layer):
    """Not registered."""

    def __init__(self, fn: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fn = fn

    def call(self, x: Any) -> Any:
        return 2 * x

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "fn": self.fn}


class Wide(layers.Dense):
    """Registered where a test says so."""


def act(x: Any) -> Any:
    return x


def loss(a: Any, b: Any) -> Any:
    return keras.ops.mean(keras.ops.square(a - b))


MODULES = {"hornbeam": saving, "keras": keras.saving, "utils": keras.utils}


@pytest.mark.parametrize("theirs", MODULES)
@pytest.mark.parametrize("ours", MODULES)
def test_what_one_import_registers_the_other_finds(ours: str, theirs: str) -> None:
    a, b = MODULES[ours], MODULES[theirs]
    registered = a.register_keras_serializable("pkg", "W")(Wide)
    assert registered is Wide
    assert b.get_registered_name(Wide) == "pkg>W"
    assert b.get_registered_object("pkg>W") is Wide
    assert a.get_custom_objects() is b.get_custom_objects() is keras.saving.get_custom_objects()
    assert b.get_custom_objects()["pkg>W"] is Wide
    a.get_custom_objects()["live"] = act
    assert b.get_registered_object("live") is act
    a.get_custom_objects().clear()
    assert b.get_registered_object("pkg>W") is None
    with a.custom_object_scope({"scoped": Wide}):
        assert b.get_registered_object("scoped") is Wide
        with b.custom_object_scope({"scoped": Twice}):
            assert a.get_registered_object("scoped") is Twice
        assert b.get_registered_object("scoped") is Wide
    assert b.get_registered_object("scoped") is None


def test_names_with_and_without_package_and_name() -> None:
    for arguments, name in [((), "Custom>Wide"), (("p",), "p>Wide"), (("p", "n"), "p>n")]:
        saving.register_keras_serializable(*arguments)(Wide)
        assert saving.get_registered_name(Wide) == name
        assert saving.serialize_keras_object(Wide(2))["registered_name"] == name
    assert saving.get_registered_name(Twice) == "Twice"
    saving.register_keras_serializable("p", "act")(act)
    assert keras.saving.get_registered_name(act) == "p>act"
    with pytest.raises(ValueError, match="get_config"):
        saving.register_keras_serializable()(type("Bare", (), {}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A model with custom objects of every kind, at several depths."""
    saving.register_keras_serializable("mine")(Wide)
    saving.register_keras_serializable("mine")(act)
    inputs = keras.Input((6,))
    x = Wide(3, name="one")(inputs)
    x = Twice(act, name="two")(x)
    x = layers.Dense(3, activation=act, name="three")(x)
    x = keras.Sequential([keras.Input((3,)), Wide(2, name="deep")], name="inner")(x)
    model = keras.Model(inputs, x)
    model.compile("sgd", loss)
    saving.save_model(model, tmp_path / "m.keras")
    keras.saving.get_custom_objects().clear()
    return tmp_path / "m.keras"


def all_of_them() -> dict[str, Any]:
    return {"mine>Wide": Wide, "Twice": Twice, "mine>act": act, "loss": loss}


@pytest.mark.parametrize("way", ["argument", "scope", "registry"])
@pytest.mark.parametrize("module", ["saving", "models", "installed"])
def test_each_of_the_three_ways_supplies_them(way: str, module: str, path: Path) -> None:
    known = all_of_them()
    context: Any = contextlib.nullcontext()
    if way == "scope":
        context = saving.custom_object_scope(known)
    elif way == "registry":
        keras.saving.get_custom_objects().update(known)
    load = {"saving": saving.load_model, "models": models.load_model, "installed": keras.models.load_model}[module]
    installed: Any = hornbeam.installed() if module == "installed" else contextlib.nullcontext()
    with context, installed:
        model = load(path, custom_objects=known if way == "argument" else None)
    assert [type(layer).__name__ for layer in model.layers[1:4]] == ["Wide", "Twice", "Dense"]
    assert model.get_layer("three").activation is act
    assert model.get_layer("inner").layers[0].__class__ is Wide
    assert model.predict(floats(2, 6), verbose=0).shape == (2, 2)


def stock_error(path: Path, custom_objects: Any = None) -> Exception:
    with pytest.raises((TypeError, ValueError)) as caught:
        keras.models.load_model(path, custom_objects=custom_objects)
    return caught.value


def our_error(path: Path, custom_objects: Any = None) -> Exception:
    with pytest.raises((TypeError, ValueError)) as caught:
        saving.load_model(path, custom_objects=custom_objects)
    return caught.value


def test_one_error_names_everything_that_is_missing(path: Path) -> None:
    stock, ours = stock_error(path), our_error(path)
    assert type(ours) is type(stock) is TypeError
    text = str(ours)
    assert text.startswith(str(stock).partition("\n\nconfig=")[0])
    assert "4 custom objects could not be located:" in text
    where = "config.layers"
    places = f"{where}[1] ('one'), {where}[4].config.layers[1] ('deep')"
    assert f"class 'mine>Wide', defined in {__name__}: used at {places}" in text
    assert f"class 'Twice', defined in {__name__}: used at {where}[2] ('two')" in text
    text = text.replace(f"', defined in {__name__}: used at", "': used at")  # of functions, too, from Keras 3.16 on
    assert (
        f"function 'mine>act': used at {where}[2].config.fn (of 'two'), {where}[3].config.activation (of 'three')"
        in text
    )
    assert "function 'loss': used at compile_config.loss" in text
    given = "{'mine>Wide': Wide, 'Twice': Twice, 'mine>act': act, 'loss': loss}"
    assert f"pass custom_objects={given}" in text
    assert f"with keras.saving.custom_object_scope({given}):" in text
    assert "@keras.saving.register_keras_serializable" in text
    assert f"(import {__name__})" in text
    assert len(text) < 2000
    assert str(ours.__cause__) == str(stock)


def test_what_is_left_is_named_step_by_step(path: Path) -> None:
    known: dict[str, Any] = {}
    for name, value in all_of_them().items():
        stock, ours = stock_error(path, known), our_error(path, known)
        assert type(ours) is type(stock)
        assert str(ours)[:40] == str(stock)[:40]
        missing = [other for other in all_of_them() if other not in known]
        listed = str(ours).partition("Supply them")[0].partition("could not be located:")[2]
        assert [other for other in all_of_them() if f"'{other}'" in listed] == missing
        known[name] = value
    assert saving.load_model(path, custom_objects=known)


def test_from_json_too(path: Path) -> None:
    text = zipfile.ZipFile(path).read("config.json").decode()
    with pytest.raises(TypeError, match="4 custom objects could not be located"):
        models.model_from_json(text)
    with hornbeam.installed(), pytest.raises(TypeError, match="3 custom objects could not be located"):
        keras.models.model_from_json(text, custom_objects={"mine>Wide": Wide})
    assert models.model_from_json(text, custom_objects=all_of_them()).get_layer("one").__class__ is Wide


def test_nothing_is_looked_for_where_nothing_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(missing_classes, "_missing", never)
    assert saving.load_model(path, custom_objects=all_of_them())


def test_nothing_that_the_config_names_is_imported(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hornbeam_trap.py").write_text("import pathlib; pathlib.Path(__file__).with_name('sprung').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    config["config"]["layers"][1]["module"] = "hornbeam_trap"
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert "defined in hornbeam_trap" in str(our_error(path))
    assert "hornbeam_trap" not in sys.modules
    assert not (tmp_path / "sprung").exists()


class Picky(layers.Layer):
    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        raise TypeError("never today")


def test_other_errors_are_keras_own(tmp_path: Path) -> None:
    saving.save_model(chain(layers.Lambda(lambda x: x + 1)), tmp_path / "lambda.keras")
    stock, ours = stock_error(tmp_path / "lambda.keras"), our_error(tmp_path / "lambda.keras")
    assert (type(ours), str(ours)) == (type(stock), str(stock))
    assert "unsafe" in str(ours) or "lambda" in str(ours).lower()


def test_a_failing_from_config_is_no_missing_object(tmp_path: Path) -> None:
    class Fine(Picky):
        def call(self, x: Any) -> Any:
            return x

    saving.save_model(chain(Fine(name="p")), tmp_path / "m.keras")
    known = {"Fine": Fine}
    stock, ours = stock_error(tmp_path / "m.keras", known), our_error(tmp_path / "m.keras", known)
    assert (type(ours), str(ours)) == (type(stock), str(stock))
    assert "never today" in str(ours)
    assert missing_classes._missing({"class_name": "Fine", "config": {}}, known) == {}
