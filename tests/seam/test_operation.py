"""What is asked travels with the call: tasks, threads and nested operations keep theirs apart."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import hornbeam
from hornbeam import saving
from support.helpers import saved
from support.zoo import chain


def _model() -> Any:
    return chain(keras.layers.Dense(3), keras.layers.Dense(2))


def test_tasks_keep_their_options_and_reports_apart(tmp_path: Path) -> None:
    model = _model()

    async def save(name: str, compression: int | None) -> hornbeam.SaveReport:
        with hornbeam.options(compression=compression):
            await asyncio.sleep(0)  # the other task comes in between
            saving.save_weights(model, tmp_path / name)
            await asyncio.sleep(0)
        return hornbeam.last_report("save")

    async def both() -> list[hornbeam.SaveReport]:
        return await asyncio.gather(save("a.weights.h5", 9), save("b.weights.h5", None))

    reports = asyncio.run(both())
    assert [Path(report.path).name for report in reports] == ["a.weights.h5", "b.weights.h5"]
    assert hornbeam.base.settings.current().compression is None


def test_options_may_be_left_in_another_context() -> None:
    scope = hornbeam.options(durable=True)
    contextvars.copy_context().run(scope.__enter__)
    assert not hornbeam.base.settings.current().durable
    scope.__exit__(None, None, None)
    assert not hornbeam.base.settings.current().durable


def test_threads_keep_their_reports_apart(tmp_path: Path) -> None:
    model = _model()
    saving.save_model(model, tmp_path / "here.keras")
    seen: list[Any] = []

    def work() -> None:
        seen.append(hornbeam.last_report("save"))
        saving.save_model(_model(), tmp_path / "there.keras")
        seen.append(hornbeam.last_report("save").path)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, str(tmp_path / "there.keras")]
    assert hornbeam.last_report("save").path == str(tmp_path / "here.keras")


def test_the_last_report_is_of_what_succeeded(tmp_path: Path) -> None:
    model = _model()
    for kind in ("load", "save", "export"):  # nothing yet in a new context
        assert contextvars.Context().run(hornbeam.last_report, kind) is None
    saving.save_weights(model, tmp_path / "m.weights.h5")
    loaded, saved = saving.load_weights(model, tmp_path / "m.weights.h5"), hornbeam.last_report("save")
    assert (saved.kind, saved.path) == ("save", str(tmp_path / "m.weights.h5"))
    with pytest.raises(OSError, match=r"n\.weights"):
        saving.load_weights(model, tmp_path / "n.weights.h5")
    with pytest.raises(OSError, match=r"nowhere"):
        saving.save_weights(model, "/dev/null/nowhere/m.weights.h5")
    handle = saving.save_weights(model, tmp_path / "later.weights.h5", asynchronous=True)
    handle.result()
    assert handle.report.path == str(tmp_path / "later.weights.h5")
    assert hornbeam.last_report("load") is loaded
    assert hornbeam.last_report("save") is saved
    with pytest.raises(ValueError, match="kind must be 'load', 'save' or 'export'"):
        hornbeam.last_report("saves")


class LoadsAnother(keras.layers.Layer):
    """While its state is loaded, it loads the whole of another model."""

    others: list[tuple[Any, str]] = []  # noqa: RUF012 - of the class, which Keras does not walk into

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(2,), name="kernel")

    def call(self, x: Any) -> Any:
        return x

    def load_own_variables(self, store: Any) -> None:
        model, path = LoadsAnother.others[-1]
        model.load_weights(path)
        super().load_own_variables(store)


def test_a_load_inside_of_a_partial_load_is_whole(tmp_path: Path) -> None:
    inner, copy = _model(), _model()
    inner.save_weights(tmp_path / "inner.weights.h5")
    layer = LoadsAnother(name="loads")
    LoadsAnother.others.append((copy, str(tmp_path / "inner.weights.h5")))
    model = chain(keras.layers.Dense(2, name="first"), layer)
    for variable in model.variables:
        variable.assign(np.ones(variable.shape))
    saving.save_weights(model, tmp_path / "m.weights.h5")
    for variable in model.variables:
        variable.assign(np.zeros(variable.shape))
    with hornbeam.installed():
        report = saving.load_weights(model, tmp_path / "m.weights.h5", only="loads*")
    assert saved(copy) == saved(inner)
    assert report.loaded == [f"layers/{name}" for name in ["loads_another/vars/0"]]
    assert [float(np.max(v)) for v in model.get_weights()] == [0.0, 0.0, 1.0]


def test_methods_take_all_arguments_under_install(tmp_path: Path) -> None:
    model, seen = _model(), []
    with hornbeam.installed():
        handle = model.save(tmp_path / "m.keras", asynchronous=True, compression=1, progress=False)
        assert handle.result() == str(tmp_path / "m.keras")
        model.save_weights(tmp_path / "half.weights.h5", dtype="float16", compression="gzip")
        assert hornbeam.last_report("save").dtype == "float16"
        handle = model.save_weights(tmp_path / "m.weights.h5", asynchronous=True, include_optimizer=False)
        assert handle.result() == str(tmp_path / "m.weights.h5")
        assert handle.report.tensors == len(model.weights)
        loaded = keras.saving.load_model(tmp_path / "m.keras", strict=True, progress=seen.append)
        assert saved(loaded) == saved(model)
        other = _model()
        before = other.get_weights()
        other.load_weights(tmp_path / "m.weights.h5", only="*kernel", strict=True)
        report = hornbeam.last_report("load")
        assert report.complete
        assert len(report.loaded) == 2
        after = other.get_weights()
        for i, (old, new, whole) in enumerate(zip(before, after, model.get_weights(), strict=True)):
            np.testing.assert_array_equal(new, whole if i % 2 == 0 else old)
        for call in (
            lambda: model.save(tmp_path / "x.keras", nonsense=1),
            lambda: model.load_weights(tmp_path / "m.weights.h5", nonsense=1),
        ):
            with pytest.raises(ValueError, match="nonsense"):
                call()
    assert not os.path.exists(tmp_path / "x.keras")
    with pytest.raises(TypeError, match="asynchronous"):  # not installed: Keras' own again
        model.save_weights(tmp_path / "y.weights.h5", asynchronous=True)
