"""Whoever knows Keras' signatures knows hornbeam's; arguments of one name mean, and default to, the same everywhere."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_overloads

import keras
import pytest
from keras.src.saving import saving_api

import hornbeam
from hornbeam import callbacks, checkpoint, export, models, saving
from hornbeam.base.settings import Options

#: Hornbeam's → Keras'.
STANDS_FOR: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (saving.save_model, saving_api.save_model),
    (saving.load_model, saving_api.load_model),
    (saving.save_weights, saving_api.save_weights),
    (saving.load_weights, saving_api.load_weights),
    (models.model_from_json, keras.models.model_from_json),
    (callbacks.ModelCheckpoint, keras.callbacks.ModelCheckpoint),
    (callbacks.BackupAndRestore, keras.callbacks.BackupAndRestore),
    (export.export, keras.Model.export),
    (export.ExportArchive, keras.export.ExportArchive),
    (export.ExportArchive.add_endpoint, keras.export.ExportArchive.add_endpoint),
    (export.ExportArchive.write_out, keras.export.ExportArchive.write_out),
]


def positional(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Names and defaults of what can be given by its place, but the object itself."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind in places and p.name not in ("self", "model")]


@pytest.mark.parametrize(("ours", "theirs"), STANDS_FOR, ids=lambda f: f"{f.__module__}.{f.__qualname__}")
def test_positional_arguments_are_keras(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    assert positional(ours) == positional(theirs)
    for overload in get_overloads(ours):
        assert positional(overload) == positional(theirs)


def test_models_has_the_functions_of_saving() -> None:
    assert (models.save_model, models.load_model) == (saving.save_model, saving.load_model)


@pytest.mark.parametrize("save", [saving.save_model, saving.save_weights])
def test_every_overload_takes_every_argument(save: Callable[..., Any]) -> None:
    overloads = get_overloads(save)
    assert len(overloads) == 3
    named = {name for name, p in inspect.signature(save).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for overload in overloads:
        shared = re.fullmatch(r"Unpack\[(\w+)\]", inspect.signature(overload).parameters["kwargs"].annotation)
        assert shared is not None
        arguments = getattr(saving, shared[1]).__optional_keys__
        assert named == {*arguments, "asynchronous"} - {"save_format", "objects_to_skip"}  # of Keras' `**kwargs`


def default(function: Callable[..., Any], name: str) -> Any:
    parameter = inspect.signature(function).parameters.get(name)
    return None if parameter is None else (parameter.default,)


def test_defaults_agree_as_the_documentation_says() -> None:
    """The table in docs/checkpointing.md; its reasons are there, too."""
    training = (callbacks.ModelCheckpoint, callbacks.BackupAndRestore, checkpoint.CheckpointManager)
    every = (saving.save_model, saving.save_weights, *training)
    assert [default(f, "asynchronous") for f in every] == [(False,)] * 5
    assert [default(f, "durable") for f in every] == [None, None, (True,), (True,), (True,)]
    assert not Options().durable
    assert default(hornbeam.options, "durable") == (None,)  # which leaves it as it is
    assert [default(f, "timeout") for f in every] == [None, None, (600.0,), (600.0,), (600.0,)]
    assert [default(f, "keep_last") for f in every] == [None, None, (None,), None, (3,)]
    assert [default(f, "keep_best") for f in training] == [(None,), None, (None,)]
    assert [default(f, "keep_every") for f in training] == [(None,), None, (None,)]
    for keep, double in ((1, False), (2, True)):
        backup = callbacks.BackupAndRestore("b", double_checkpoint=double)
        assert (backup._manager.keep_last, backup._manager.timeout) == (keep, 600.0)
    rows = [
        "| `durable` | `False`, an option | `True` | `True` | `True` |",
        "| `asynchronous` | `False` | `False` | `False` | `False` |",
        "| `timeout` | none | `600.0`; `None`: no waiting | `600.0` | `600.0` |",
        "| `keep_last` | none | `None`: all stay | 1; 2 with `double_checkpoint=True` | `3`; `None`: no limit |",
    ]
    text = (Path(__file__).parents[2] / "docs" / "checkpointing.md").read_text()
    assert [row for row in rows if row not in text] == []


def test_options_default_to_what_is_in_force() -> None:
    for name in inspect.signature(hornbeam.options).parameters:
        assert default(hornbeam.options, name) == (None,)
        assert hasattr(Options(), name)
