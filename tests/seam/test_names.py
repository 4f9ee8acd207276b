"""Private names of Keras' that hornbeam uses: all are in a table, and a Keras in which one is different is stock."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import hornbeam
from hornbeam import UnsupportedError
from hornbeam.errors import UnknownKerasWarning
from hornbeam.seam import entry as entry_
from hornbeam.seam import keras_names
from support import names
from support.zoo import chain

pytestmark = pytest.mark.keras_versions

BACKEND = keras.backend.backend()
TABLE = keras_names.table()


@pytest.fixture(autouse=True)
def _compared_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(keras_names, "_verdicts", {})
    yield
    importlib.invalidate_caches()


@pytest.mark.parametrize("module", sorted(names.SOURCES))
def test_every_private_name_that_a_module_uses_is_in_the_table(module: str) -> None:
    listed = TABLE["uses"].get(module, [])
    assert {name for name in listed if ":" not in name} == names.used(module)
    attributes = {name.partition(":")[2] for name in listed if ":" in name}
    # What hornbeam's own classes have, too, cannot be told apart by its name.
    assert attributes - names.own() == names.attributes(module)


def test_the_table_has_nothing_else_and_operations_have_all_they_import() -> None:
    used = {name for uses in TABLE["uses"].values() for name in uses}
    replaced = {name for operation in TABLE["operations"].values() for name in operation["replaces"]}
    assert TABLE["known"].keys() == used | replaced
    expected = {f"{m.removeprefix('keras.src.')}.{name}" for m, found in entry_._REPLACED.items() for name in found}
    assert {name.replace("archive:", "export.saved_model.") for name in replaced} == expected
    for name, operation in TABLE["operations"].items():
        imported = set().union(*(names.imports(entry) for entry in names.ENTRIES[name]))
        assert {*operation["modules"]} == imported & TABLE["uses"].keys(), name
    for module, functions in entry_._REPLACED.items():
        for name in functions:
            assert entry_._operation(module, name) in TABLE["operations"]


def test_this_keras_is_known_for_every_operation() -> None:
    exports = ("export", "savedmodel") if BACKEND in ("numpy", "torch") else ()  # which these backends do not have
    unknown = {
        operation: keras_names.unknown(operation) for operation in TABLE["operations"] if operation not in exports
    }
    assert not any(unknown.values()), unknown


def _model() -> Any:
    return chain(keras.layers.Dense(2))


def _save(model: Any, path: Path) -> Any:
    model.save(path)
    return keras.models.load_model(path)


def _weights(model: Any, path: Path) -> Any:
    other = _model()
    model.save_weights(path)
    other.load_weights(path)
    return other


def _json(model: Any, path: Path) -> Any:
    other = keras.models.model_from_json(model.to_json())
    other.set_weights(model.get_weights())
    return other


def _legacy_weights(model: Any, path: Path) -> Any:
    model.save(path)
    other = _model()
    other.load_weights(path)
    return other


#: Operation → what makes stock Keras do it, and the file's name.
WORK: dict[str, list[tuple[Callable[[Any, Path], Any], str]]] = {
    "save": [(_save, "m.keras"), (_weights, "m.weights.h5")],
    "load": [(_save, "m.keras"), (_weights, "m.weights.h5")],
    "legacy save": [(_save, "m.h5")],
    "legacy load": [(_save, "m.h5"), (_legacy_weights, "m.h5")],
    "json": [(_json, "")],
}


def _other(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Makes a name one of a Keras to come: without it, or with another parameter, which all its callers pass."""
    if how == "missing":
        look = keras_names._describe
        monkeypatch.setattr(keras_names, "_describe", lambda asked: "-" if asked == name else look(asked))
        return "-" not in TABLE["known"][name]
    place, _, attribute = name.rpartition(":" if ":" in name else ".")
    owner = keras_names._resolve(place) if place else None
    found = getattr(owner, attribute, None)
    if not inspect.isfunction(found):
        return False

    @functools.wraps(found)
    def wider(*args: Any, **kwargs: Any) -> Any:
        return found(*args, **kwargs)

    signature = inspect.signature(found)
    added = inspect.Parameter("precision", inspect.Parameter.KEYWORD_ONLY)
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    wider.__signature__ = signature.replace(parameters=[*parameters[:at], added, *parameters[at:]])  # type: ignore[attr-defined]
    monkeypatch.setattr(owner, attribute, wider)
    return True


@pytest.mark.parametrize("how", ["missing", "wider"])
@pytest.mark.parametrize("operation", WORK)
def test_what_needs_a_name_that_is_different_is_stock(
    operation: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each name, for the first operation that needs it: one warning, a count, the right result; refused if strict."""
    model, tried = _model(), 0
    before = list(WORK)[: list(WORK).index(operation)]
    for name in sorted(
        {*keras_names.needed(operation)} - {name for other in before for name in keras_names.needed(other)}
    ):
        if name.startswith("backend.tensorflow.") and BACKEND != "tensorflow":
            continue
        with monkeypatch.context() as patch:
            patch.setattr(keras_names, "_verdicts", {})
            if not _other(name, how, patch):
                continue
            tried += 1
            hornbeam.stats(reset=True)
            with hornbeam.installed():
                for work, file in WORK[operation]:
                    with warnings.catch_warnings(record=True) as told:
                        warnings.simplefilter("always", UnknownKerasWarning)
                        other = work(model, tmp_path / file)
                    for ours, theirs in zip(other.get_weights(), model.get_weights(), strict=True):
                        np.testing.assert_array_equal(ours, theirs, err_msg=name)
                    said = [str(w.message) for w in told if issubclass(w.category, UnknownKerasWarning)]
                    assert len(said) == len(set(said)), name
                reasons = hornbeam.stats().handovers
                assert reasons, name
                assert all("is unknown" in reason for reason in reasons), (name, reasons)
                assert set(reasons) <= set(keras_names._verdicts.values()), name
                with warnings.catch_warnings(record=True) as told, hornbeam.options(fallback=False):
                    warnings.simplefilter("always", UnknownKerasWarning)
                    with pytest.raises(UnsupportedError, match="is unknown"):
                        work(model, tmp_path / file)
                assert not [w for w in told if w.category is UnknownKerasWarning], name  # it was said before
    assert tried > 0


def test_the_warning_is_said_once_where_the_user_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _other("saving.saving_lib._save_state", "wider", monkeypatch)
    model = _model()
    with hornbeam.installed(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            model.save(tmp_path / "m.keras")
    (warning,) = [w for w in told if w.category is UnknownKerasWarning]
    assert warning.filename == __file__
    assert "_save_state" in str(warning.message)
    assert "precision" in str(warning.message)
    assert sum(hornbeam.stats().handovers.values()) == 3


def test_what_only_hornbeam_does_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _other("saving.saving_lib._save_state", "missing", monkeypatch)
    monkeypatch.setattr(keras_names, "_warn_once", lambda *_: None)
    model = _model()
    for request in ({"dtype": "float16"}, {"compression": 4}, {"asynchronous": True}, {"include_optimizer": False}):
        with pytest.raises(UnsupportedError, match=r"_save_state"):
            hornbeam.saving.save_model(model, tmp_path / "m.keras", **request)
    with hornbeam.options(durable=True), pytest.raises(UnsupportedError, match="stable storage"):
        hornbeam.saving.save_model(model, tmp_path / "m.keras")
    with pytest.raises(UnsupportedError, match=r"_save_state"):
        hornbeam.saving.save_weights(model, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    model.save(tmp_path / "m.keras")
    with pytest.raises(UnsupportedError, match=r"_save_state"):
        hornbeam.saving.load_weights(model, tmp_path / "m.keras", only="*kernel")
    hornbeam.saving.save_model(model, tmp_path / "m.keras")  # nothing is left of what was refused
    assert hornbeam.saving.load_weights(model, tmp_path / "m.keras") is not None


def test_a_module_that_keras_has_no_more_is_found_before_it_is_imported(tmp_path: Path) -> None:
    """In a fresh process, in which nothing of hornbeam's that needs the module was imported before."""
    code = """
import sys, warnings
import keras
import keras.src.utils.tracking
sys.modules["keras.src.utils.tracking"] = None  # importing it raises ImportError
del keras.src.utils.tracking
import hornbeam, hornbeam.saving
hornbeam.install()
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    model.save(sys.argv[1])
    keras.models.load_model(sys.argv[1])
    hornbeam.saving.load_model(sys.argv[1])
print([w.category.__name__ for w in told if "hornbeam" in str(w.message)])
print(sum(hornbeam.stats().handovers.values()))
try:
    import hornbeam.callbacks
except hornbeam.UnsupportedError as error:
    print("utils.tracking" in str(error))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.keras")],
        env={**os.environ, "KERAS_BACKEND": BACKEND, "PYTHONPATH": str(Path(hornbeam.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-3:] == ["['UnknownKerasWarning', 'UnknownKerasWarning']", "3", "True"]
