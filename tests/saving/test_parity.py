"""ours == Keras': same trees, same values, same training, over the zoo and both ways."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import hornbeam
from support.helpers import archive_tree, config, saved, state, tree, value, values
from support.zoo import AWKWARD, ZOO, chain

pytestmark = pytest.mark.keras_versions

#: What is asked for, and what runs then.
RAN = {"auto": "direct", "libhdf5": "libhdf5"}


def step(model: Any, x: Any, y: Any) -> Any:
    """One more training step, from the same random state."""
    keras.utils.set_random_seed(7)
    model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
    return values(model)


def load(path: Any, *, ours: bool, compile: bool = True, engine: str = "auto") -> Any:
    keras.utils.set_random_seed(3)
    if not ours:
        return keras.models.load_model(path, compile=compile)
    with hornbeam.installed(), hornbeam.options(fallback=False, engine=engine):
        return keras.models.load_model(path, compile=compile)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What h5py opens."""
    opens: list[Any] = []
    original = h5py.File.__init__

    def noted(self: Any, name: Any, *args: Any, **kwargs: Any) -> None:
        opens.append(name)
        original(self, name, *args, **kwargs)

    monkeypatch.setattr(h5py.File, "__init__", noted)
    return opens


@pytest.mark.parametrize("name", ZOO | AWKWARD)
def test_zoo(name: str, opened: list[Any], tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model, x, y = (ZOO | AWKWARD)[name]()
    before = state(model)
    stock, ours = tmp_path / "stock.keras", {engine: tmp_path / f"{engine}.keras" for engine in RAN}
    model.save(stock)
    assert opened  # by stock Keras
    expected = archive_tree(stock)
    count = sum(item[0] == "dataset" for item in expected.values())
    for engine, path in ours.items():
        opened.clear()
        hornbeam.stats(reset=True)
        with hornbeam.installed(), hornbeam.options(fallback=False, engine=engine):
            model.save(path)
        assert not opened
        stats = hornbeam.stats()
        assert (stats.saves, stats.engines, dict(stats.handovers)) == (1, {RAN[engine]: 1}, {})
        assert stats.tensors_written == count
        assert state(model) == before

        # The file: same objects, attributes, types, shapes, bytes; same configuration; and nothing else.
        assert archive_tree(path) == expected
        assert config(path) == config(stock)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["auto.keras", "libhdf5.keras", "stock.keras"]

    # The models: stock reads ours, and each engine of ours reads everybody's.
    models = [load(stock, ours=False), load(ours["auto"], ours=False)]
    opened.clear()
    for engine in RAN:
        hornbeam.stats(reset=True)
        models += [load(path, ours=True, engine=engine) for path in (stock, *ours.values())]
        assert (hornbeam.stats().loads, hornbeam.stats().engines) == (3, {RAN[engine]: 3})
    assert not opened
    for loaded in models[1:]:
        assert values(loaded) == values(models[0])
        assert [v.trainable for v in loaded.variables] == [v.trainable for v in models[0].variables]
        assert type(loaded) is type(models[0])
    del models[4:]  # the same once more
    outputs = [np.asarray(o) for m in models for o in keras.tree.flatten(m.predict(x, verbose=0))]
    each = len(outputs) // 4
    for i in range(each, len(outputs)):
        np.testing.assert_array_equal(outputs[i], outputs[i % each])
    if y is not None:
        trained = [step(m, x, y) for m in models]
        assert trained[1:] == [trained[0]] * 3


@pytest.mark.parametrize("name", ["functional", "subclassed", "bfloat16", "odd_variables", "unicode_and_long_names"])
def test_weights_files(name: str, tmp_path: Path) -> None:
    model, _, _ = ZOO[name]()
    paths = {engine: tmp_path / f"{engine}.weights.h5" for engine in ("stock", *RAN)}
    model.save_weights(paths["stock"])
    for engine in RAN:
        with hornbeam.installed(), hornbeam.options(fallback=False, engine=engine):
            model.save_weights(paths[engine])
        assert hornbeam.stats(reset=True).engines == {RAN[engine]: 1}
        assert tree(paths[engine]) == tree(paths["stock"])
    before = saved(model)
    for path in paths.values():
        for engine in (None, *RAN):
            for variable in model.variables:
                variable.assign(np.zeros(variable.shape, "int8"))
            if engine is not None:
                with hornbeam.installed(), hornbeam.options(fallback=False, engine=engine):
                    model.load_weights(path)
            else:
                model.load_weights(path)
            assert hornbeam.stats(reset=True).engines == ({RAN[engine]: 1} if engine is not None else {})
            assert saved(model) == before


@pytest.mark.parametrize("engine", ["direct", "libhdf5"])
def test_engines_write_and_read_the_same(engine: str, tmp_path: Path) -> None:
    model, _, _ = ZOO["odd_variables"]()
    path = tmp_path / "m.keras"
    model.save(tmp_path / "stock.keras")
    with hornbeam.installed(), hornbeam.options(fallback=False, engine=engine):
        model.save(path)
        loaded = keras.models.load_model(path)
    assert hornbeam.stats().engines == {engine: 2}
    assert archive_tree(path) == archive_tree(tmp_path / "stock.keras")
    assert saved(loaded) == saved(model)


@keras.saving.register_keras_serializable("parity")
class Complex(keras.layers.Layer):
    """Has the numbers that only some backends and formats have; the zoo has those that all have."""

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(shape=(3,), dtype="complex128", initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        return x


@pytest.mark.backend("tensorflow", "numpy", reason="JAX computes complex64 instead")
@pytest.mark.parametrize("engine", RAN)
def test_wide_complex_numbers(engine: str, tmp_path: Path) -> None:
    model = chain(Complex())
    model.layers[1].w.assign(np.array([0.1 - 2j, 1e300j, complex(0, -0.0)]))
    assert saved(model)[0][:2] == ("complex128", (3,))
    stock, ours = tmp_path / "stock.keras", tmp_path / "ours.keras"
    model.save(stock)
    with hornbeam.installed(), hornbeam.options(fallback=False, engine=engine):
        model.save(ours)
    assert archive_tree(ours) == archive_tree(stock)
    assert saved(load(ours, ours=False)) == saved(model)
    for path in (stock, ours):
        hornbeam.stats(reset=True)
        assert saved(load(path, ours=True, engine=engine)) == saved(model)
        assert hornbeam.stats().engines == {RAN[engine]: 1}


def test_compile_false_leaves_the_model_uncompiled(tmp_path: Path) -> None:
    model, _, _ = ZOO["functional"]()
    model.save(tmp_path / "m.keras")
    loaded = load(tmp_path / "m.keras", ours=True, compile=False)
    assert not loaded.compiled
    assert saved(loaded) == saved(model)[: len(model.weights)]


def test_import_swap_needs_no_install(tmp_path: Path) -> None:
    import hornbeam.models
    import hornbeam.saving

    model, _, _ = ZOO["functional"]()
    path, weights = tmp_path / "m.keras", tmp_path / "m.weights.h5"
    before = saved(model)
    with hornbeam.options(fallback=False):
        hornbeam.saving.save_model(model, path)
        loaded = hornbeam.models.load_model(path)
        hornbeam.saving.save_weights(model, weights)
        hornbeam.saving.load_weights(loaded, weights)
    stats = hornbeam.stats()
    assert (stats.saves, stats.loads) == (2, 2)
    assert saved(loaded) == before
    model.save(path)  # stock again
    assert hornbeam.stats().saves == 2


def test_swapped_modules_mirror_keras_name_by_name() -> None:
    import hornbeam.callbacks
    import hornbeam.export
    import hornbeam.models
    import hornbeam.saving

    for ours, theirs in [
        (hornbeam.saving, keras.saving),
        (hornbeam.models, keras.models),
        (hornbeam.callbacks, keras.callbacks),
        (hornbeam.export, keras.export),
    ]:
        for name in dir(theirs):
            if not name.startswith("_"):
                assert hasattr(ours, name), name
    assert hornbeam.saving.get_custom_objects() is keras.saving.get_custom_objects()


def test_file_objects(tmp_path: Path) -> None:
    from keras.src.saving import saving_lib

    model, _, _ = ZOO["functional"]()
    model.save(tmp_path / "stock.keras")
    expected = archive_tree(tmp_path / "stock.keras")
    with hornbeam.installed(), hornbeam.options(fallback=False):
        memory = io.BytesIO(b"before" + bytes(10_000_000))
        memory.seek(6)
        saving_lib.save_model(model, memory)
        assert memory.tell() == len(memory.getvalue())
        assert memory.getvalue()[:6] == b"before"
        assert archive_tree(memory) == expected
        with open(tmp_path / "file.keras", "wb") as file:
            saving_lib.save_model(model, file)
            file.write(b"")
        assert archive_tree(tmp_path / "file.keras") == expected

        class Unseekable(io.RawIOBase):
            data = bytearray()

            def writable(self) -> bool:
                return True

            def write(self, block: Any) -> int:
                self.data += bytes(block)[:1000]
                return min(len(block), 1000)

        pipe = Unseekable()
        saving_lib.save_model(model, pipe)
        assert archive_tree(io.BytesIO(bytes(pipe.data))) == expected

        for source in (io.BytesIO(bytes(pipe.data)), io.BytesIO((tmp_path / "file.keras").read_bytes())):
            assert saved(saving_lib.load_model(source)) == saved(model)
            source.write(b"")  # no longer held
        with open(tmp_path / "file.keras", "rb", buffering=0) as raw:
            assert saved(saving_lib.load_model(raw)) == saved(model)
        with open(tmp_path / "file.keras", "rb") as file:
            assert saved(saving_lib.load_model(file)) == saved(model)
    assert not hornbeam.stats().handovers


def test_deepcopy_and_pickle_use_no_temporary_files(strict: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import copy
    import pickle
    import tempfile

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a temporary file was made")

    for name in ("mkdtemp", "mkstemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory"):
        monkeypatch.setattr(tempfile, name, refuse)
    model, _, _ = ZOO["functional"]()
    assert saved(copy.deepcopy(model)) == saved(model)
    assert saved(pickle.loads(pickle.dumps(model))) == saved(model)
    layer = model.layers[1]
    assert [value(v)[1:] for v in copy.deepcopy(layer).weights] == [value(v)[1:] for v in layer.weights]
    assert hornbeam.stats().saves == hornbeam.stats().loads == 3


def test_no_h5py_file_is_opened(strict: None, opened: list[Any], tmp_path: Path) -> None:
    model, _, _ = ZOO["subclassed"]()
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    loaded.load_weights(tmp_path / "m.keras")
    loaded.save_weights(tmp_path / "m.weights.h5")
    loaded.load_weights(tmp_path / "m.weights.h5")
    assert saved(loaded) == saved(model)
    assert not opened


@pytest.mark.parametrize("size", [1e-9 * 400, 1e-9 * 200, 1.0])
def test_shards(size: float, tmp_path: Path) -> None:
    import json

    model, _, _ = ZOO["functional"]()
    (tmp_path / "stock").mkdir()
    (tmp_path / "ours").mkdir()
    model.save_weights(tmp_path / "stock" / "m.weights.json", max_shard_size=size)
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.save_weights(tmp_path / "ours" / "m.weights.json", max_shard_size=size)
    stock, ours = ({p.name: p for p in (tmp_path / d).iterdir()} for d in ("stock", "ours"))
    assert sorted(ours) == sorted(stock)
    for name in stock:
        if name.endswith(".json"):
            assert json.loads(ours[name].read_text()) == json.loads(stock[name].read_text())
        else:
            assert tree(ours[name]) == tree(stock[name])
    before = saved(model)
    for files, installed in ((stock, True), (ours, False), (ours, True)):
        for variable in model.variables:
            variable.assign(np.zeros(variable.shape))
        with hornbeam.installed() if installed else hornbeam.options():
            model.load_weights(files["m.weights.json"])
        assert saved(model) == before


def test_directories(tmp_path: Path) -> None:
    model, _x, _ = ZOO["custom_assets"]()
    stock, ours = tmp_path / "stock", tmp_path / "ours"
    model.save(stock, zipped=False)
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.save(ours, zipped=False)
        model.layers[1].text = "second"
        model.save(ours, zipped=False)  # stock Keras fails here
        loaded = keras.models.load_model(ours)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "stock"]
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in stock.iterdir())
    assert tree(ours / "model.weights.h5") == tree(stock / "model.weights.h5")
    for one in (loaded, keras.models.load_model(ours)):
        assert one.layers[1].text == "second"
        assert saved(one) == saved(model)
    (ours / "notes.txt").write_text("mine")
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.save(ours, zipped=False)
    assert (ours / "notes.txt").read_text() == "mine"
    assert saved(keras.models.load_model(ours)) == saved(model)


def test_file_editor_opens_ours(strict: None, tmp_path: Path) -> None:
    model, _, _ = ZOO["shared_layers"]()
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    for name in ("m.keras", "m.weights.h5"):
        editor = keras.saving.KerasFileEditor(str(tmp_path / name))
        assert editor.compare(model)["status"] == "success"
