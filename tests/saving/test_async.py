"""Asynchronous saves: what is written is what was there at the call, in order, and nothing fails in silence.

The writer is held by a save that ends when the test says so: whatever is saved meanwhile is written afterwards.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import gc
import importlib
import io
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import hornbeam
from hornbeam.base import deferred, writer
from hornbeam.checkpoint import CheckpointManager
from hornbeam.errors import UnsupportedError
from hornbeam.saving import load_model, load_weights, save_model, save_weights
from hornbeam.values import tensors
from support.helpers import archive_tree, saved, script, tree
from support.writing import held, small
from support.zoo import ZOO, chain, floats

BACKEND = keras.backend.backend()
SHARED = BACKEND in ("tensorflow", "jax")


@pytest.fixture(autouse=True)
def _nothing_is_pending() -> Iterator[None]:
    yield
    hornbeam.wait()
    assert not [t for t in threading.enumerate() if t.name == "hornbeam-writer" and t is writer._queue.thread]


def fill(model: Any, value: float) -> None:
    for variable in model.variables:
        variable.assign(np.full(variable.shape, value, "float32"))


def values(path: Path) -> set[float]:
    return {float(v) for w in load_model(path).get_weights() for v in np.unique(w)}


# ---- isolation ----


def dense() -> tuple[Any, Any, Any]:
    model = chain(layers.Dense(300), layers.BatchNormalization(), layers.Dropout(0.5, seed=1), layers.Dense(1))
    return model, floats(64, 6), floats(64, 1)


def embedding(rows: int = 5000) -> tuple[Any, Any, Any]:
    model = chain(layers.Embedding(rows, 16), layers.Flatten(), layers.Dense(1), shape=(8,), dtype="int32")
    return model, np.arange(512).reshape(64, 8) % 97, floats(64, 1)


def mixed() -> tuple[Any, Any, Any]:
    with contextlib.ExitStack() as stack:
        before = keras.config.dtype_policy()
        stack.callback(keras.config.set_dtype_policy, before)
        keras.config.set_dtype_policy("mixed_bfloat16")
        return chain(layers.Dense(300), layers.Dense(1, dtype="float32")), floats(64, 6), floats(64, 1)


def low_precision() -> tuple[Any, Any, Any]:
    return chain(layers.Dense(300, dtype="bfloat16"), layers.Dense(1)), floats(64, 6), floats(64, 1)


CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "adam": (dense, lambda: {"optimizer": "adam"}),
    "compiled": (dense, lambda: {"optimizer": "adam", "jit_compile": True}),
    "eager": (dense, lambda: {"optimizer": "adam", "run_eagerly": True}),
    "ema": (dense, lambda: {"optimizer": keras.optimizers.SGD(0.001, momentum=0.9, use_ema=True)}),
    "sparse sgd": (embedding, lambda: {"optimizer": "sgd"}),
    "sparse adam": (embedding, lambda: {"optimizer": "adam"}),
    "sparse and small": (lambda: embedding(100), lambda: {"optimizer": "adam"}),  # read by copying it on TensorFlow
    "sparse compiled": (embedding, lambda: {"optimizer": "adam", "jit_compile": True}),
    "mixed precision": (mixed, lambda: {"optimizer": "adam"}),
    "bfloat16": (low_precision, lambda: {"optimizer": "adam"}),
}
if BACKEND == "torch":  # compiles with a C++ compiler for minutes
    CASES = {name: case for name, case in CASES.items() if "compiled" not in name}
elif BACKEND == "jax":  # it always compiles
    CASES.pop("eager")
    CASES.pop("ema")  # stock Keras donates one buffer twice: such a model cannot go on training


@pytest.mark.trains
@pytest.mark.parametrize("case", CASES)
def test_training_after_the_call_changes_nothing_in_the_file(case: str, tmp_path: Path) -> None:
    make, arguments = CASES[case]
    model, x, y = make()
    model.compile(loss="mse", **arguments())
    model.fit(x, y, batch_size=16, verbose=0)
    path, weights = tmp_path / "m.keras", tmp_path / "m.weights.h5"
    save_model(model, tmp_path / "sync.keras")
    for save, target in ((save_model, path), (save_weights, weights)):
        expected = saved(model)
        save_weights(model, tmp_path / "sync.weights.h5")
        with held():
            handle = save(model, target, asynchronous=True)
            assert not handle.done()
            model.fit(x, y, batch_size=16, epochs=2, verbose=0)
            gc.collect()
            changed = sum(a != b for a, b in zip(expected, saved(model), strict=True))
            assert changed > len(expected) // 2
        assert handle.result() == str(target)
        assert handle.bytes == target.stat().st_size
        found = tree(target) if target is weights else archive_tree(target)
        assert found == tree(tmp_path / "sync.weights.h5")
        if target is path:
            loaded = load_model(path)
            assert saved(loaded) == expected
            loaded.fit(x, y, batch_size=16, verbose=0)  # its memory is in order


@pytest.mark.trains
def test_many_saves_between_steps(tmp_path: Path) -> None:
    model, x, y = dense()
    model.compile("adam", "mse")
    model.fit(x, y, batch_size=16, verbose=0)
    expected = {}
    for step in range(12):
        path = tmp_path / f"{step}.weights.h5"
        expected[path] = saved(model)
        save_weights(model, path, asynchronous=True)
        model.train_on_batch(x, y)
    hornbeam.wait()
    for path, wanted in expected.items():
        load_weights(model, path, strict=True)
        assert saved(model) == wanted


@pytest.mark.backend("jax", reason="only JAX donates")
def test_a_donated_array_stays_in_the_file(tmp_path: Path) -> None:
    import jax

    model = small()
    expected = saved(model)
    again = jax.jit(lambda values: [v + 1 for v in values], donate_argnums=0)
    with held():
        save_model(model, tmp_path / "m.keras", asynchronous=True)
        values = [v.value for v in model.variables]
        results = values
        for _ in range(3):
            results = again(results)
        jax.block_until_ready(results)
        for variable, result in zip(model.variables, results, strict=True):
            variable._value = result
    hornbeam.wait()
    assert saved(model) != expected
    assert saved(load_model(tmp_path / "m.keras")) == expected


def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has what the backend would share fetched as from an accelerator, large values in many pieces."""
    if SHARED:
        monkeypatch.setitem(
            tensors._VIEWERS,
            BACKEND,
            getattr(importlib.import_module(f"hornbeam.values.on_{BACKEND}"), f"_fetch_{BACKEND}"),
        )
        monkeypatch.setattr(deferred, "_FETCHED", 30_000)


def test_copies_are_bounded_and_their_memory_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(layers.Dense(1000), layers.Dense(1000, dtype="bfloat16"))
    save_weights(model, tmp_path / "expected.weights.h5")
    size = sum(len(data) for _, _, data in saved(model))
    on_a_device(monkeypatch)
    with held():
        save_weights(model, tmp_path / "m.weights.h5", asynchronous=True)
        memory = writer._queue.staging.memory
        assert size <= len(memory) < size + (2 << 20) + 64 * len(model.variables)
        assert writer._queue.staged
        fill(model, 7)
    save_weights(model, tmp_path / "n.weights.h5", asynchronous=True)
    assert writer._queue.staging.memory is memory
    hornbeam.wait()
    assert writer._queue.staging.memory is None
    assert tree(tmp_path / "m.weights.h5") == tree(tmp_path / "expected.weights.h5")
    load_weights(model, tmp_path / "n.weights.h5", strict=True)
    assert {float(x) for v in model.variables for x in np.unique(keras.ops.convert_to_numpy(v))} == {7.0}


@pytest.mark.parametrize("pieces", [False, True])
def test_what_is_fetched_from_a_device_is_there_once(pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer has a place, but the memory is another save's: the call waits for it."""
    into = (lambda memory: memory.fill(1)) if pieces else None
    value = deferred.Deferred(lambda: np.full((3, 5), 16843009, "int32"), "int32", (3, 5), into)
    changed, waits = writer._queue.changed, threading.Event()
    wait = changed.wait
    monkeypatch.setattr(changed, "wait", lambda *timeout: waits.set() or wait(*timeout))
    taken: list[Any] = []

    def second() -> None:
        with writer.Reservation() as request:
            taken.extend([*request.stage([value, value]), first.done()])

    with held([value]) as first:
        assert writer._queue.places() == 1
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(60)
        assert not taken
    thread.join()
    one, two, done = taken
    assert done
    assert (one == 16843009).all()
    assert (two == one).all()
    memory = np.frombuffer(writer._queue.staging.memory, np.uint8)
    assert np.shares_memory(one, memory)
    assert np.shares_memory(two, memory)
    assert not np.shares_memory(one, two)


@pytest.mark.backend("tensorflow", "jax", reason="the others copy everything")
def test_shared_values_take_no_memory(tmp_path: Path) -> None:
    model = chain(layers.Dense(1000), layers.Dense(1000))
    with held():
        save_weights(model, tmp_path / "m.weights.h5", asynchronous=True)
        assert writer._queue.staging.memory is None
        assert not writer._queue.staged


@pytest.mark.parametrize(
    "name", sorted({"custom_state", "odd_variables", "int8", "adapted_preprocessing"} & ZOO.keys())
)
def test_every_kind_of_model(name: str, tmp_path: Path) -> None:
    model, *_ = ZOO[name]()
    save_model(model, tmp_path / "sync.keras")
    save_model(model, tmp_path / "m.keras", asynchronous=True)
    hornbeam.wait()
    assert archive_tree(tmp_path / "m.keras") == archive_tree(tmp_path / "sync.keras")


def test_config_and_assets_are_those_of_the_call(tmp_path: Path) -> None:
    model = small()
    if BACKEND == "tensorflow":
        lookup = layers.StringLookup(vocabulary=["a", "b"], name="lookup")
        model = chain(lookup, shape=(1,), dtype="string", name="before")
    with held():
        save_model(model, tmp_path / "m.keras", asynchronous=True)
        model.name = "after"
        if BACKEND == "tensorflow":
            lookup.set_vocabulary(["x", "y", "z"])
    hornbeam.wait()
    loaded = load_model(tmp_path / "m.keras")
    assert loaded.name != "after"
    if BACKEND == "tensorflow":
        assert loaded.get_layer("lookup").get_vocabulary() == ["[UNK]", "a", "b"]


# ---- the queue ----


def test_a_third_save_waits_for_a_place(tmp_path: Path) -> None:
    model = small()
    seen: list[bool] = []

    def third() -> None:
        save_model(model, tmp_path / "3.keras", asynchronous=True)
        seen.append(first.done())

    with held() as first:
        save_model(model, tmp_path / "2.keras", asynchronous=True)
        assert writer._queue.places() == 0
        thread = threading.Thread(target=third)
        thread.start()
    thread.join()
    assert seen == [True]
    hornbeam.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2.keras", "3.keras"]


def test_one_path_keeps_its_order(tmp_path: Path) -> None:
    model = small()
    path = tmp_path / "m.keras"
    for i in range(10):
        fill(model, i)
        save_model(model, path, asynchronous=True)
    hornbeam.wait()
    assert values(path) == {9.0}
    assert [p.name for p in tmp_path.iterdir()] == ["m.keras"]


@pytest.mark.parametrize("atomic", [True, False])
def test_what_follows_on_the_same_path_waits(atomic: bool, tmp_path: Path) -> None:
    model = small()
    path = tmp_path / "m.keras"
    link = tmp_path / "link.keras"
    link.symlink_to(path)
    outcome: list[Any] = []

    def follow(what: Callable[[], Any]) -> None:
        outcome.append((what(), first.done()))

    def save_again() -> None:
        fill(model, 2)
        save_model(model, path)

    for what in (lambda: values(path), lambda: values(link), lambda: hornbeam.open(path).close(), save_again):
        fill(model, 1)
        with hornbeam.options(atomic=atomic), held() as first:
            save_model(model, path, asynchronous=True)
            thread = threading.Thread(target=follow, args=(what,))
            thread.start()
        thread.join()
    assert [o for o, _ in outcome] == [{1.0}, {1.0}, None, None]
    assert all(done for _, done in outcome)
    assert values(path) == {2.0}


def test_another_path_does_not_wait(tmp_path: Path) -> None:
    model = small()
    save_model(model, tmp_path / "a.keras")
    with held() as first:
        save_model(model, tmp_path / "b.keras", asynchronous=True)
        save_model(model, tmp_path / "a.keras")
        load_model(tmp_path / "a.keras")
        assert not first.done()


def test_the_handle_tells(tmp_path: Path) -> None:
    model = small()
    calls: list[Any] = []
    with held():
        handle = save_weights(model, tmp_path / "m.weights.h5", asynchronous=True)
        assert (handle.done(), handle.bytes, handle.write_seconds) == (False, None, None)
        assert "pending" in repr(handle)
        with pytest.raises(TimeoutError, match=r"m\.weights\.h5"):
            handle.result(timeout=0)
        with pytest.raises(TimeoutError):
            hornbeam.wait(timeout=0)
        handle.add_done_callback(lambda h: calls.append((h, h.bytes, threading.current_thread().name)))
        handle.add_done_callback(lambda h: hornbeam.wait())  # of itself: does not wait
    assert handle.result() == handle.path == str(tmp_path / "m.weights.h5")
    hornbeam.wait()
    assert calls == [(handle, (tmp_path / "m.weights.h5").stat().st_size, "hornbeam-writer")]
    handle.add_done_callback(lambda h: calls.append(threading.current_thread()))
    assert calls[1:] == [threading.current_thread()]
    assert handle.stall_seconds > 0
    assert handle.write_seconds > 0
    assert "done" in repr(handle)


def test_options_count_for_the_save(tmp_path: Path) -> None:
    model = chain(layers.Dense(300), layers.Dense(300))
    fill(model, 0)
    seen: list[Any] = []
    hornbeam.stats(reset=True)
    with hornbeam.options(compression="gzip"):
        handle = save_weights(model, tmp_path / "m.weights.h5", asynchronous=True, progress=seen.append)
    assert handle.result()
    hornbeam.wait()
    assert handle.bytes < 100_000
    assert seen[-1].done == seen[-1].total > 0
    assert hornbeam.stats().saves == 1
    assert hornbeam.stats().bytes_written == handle.bytes
    load_weights(model, tmp_path / "m.weights.h5", strict=True)


# ---- errors ----


def break_next(model: Any, directory: Path) -> writer.Handle:
    """A save that fails when it is written: its directory is gone."""
    directory.mkdir()
    with held():
        handle = save_model(model, directory / "m.keras", asynchronous=True)
        for left in directory.iterdir():
            left.unlink()
        directory.rmdir()
    while not handle.done():
        futures.wait([handle])
    return handle


def test_an_error_surfaces_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    with caplog.at_level(logging.ERROR, logger="hornbeam"):
        broken = break_next(model, tmp_path / "gone")
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert str(tmp_path / "gone" / "m.keras") in caplog.text
    with pytest.raises(OSError, match=r"gone") as raised:  # at the next save
        save_model(model, tmp_path / "next.keras", asynchronous=True)
    assert any("asynchronously" in note for note in raised.value.__notes__)
    assert not (tmp_path / "next.keras").exists()
    hornbeam.wait()
    save_model(model, tmp_path / "next.keras", asynchronous=True)
    hornbeam.wait()
    assert broken.exception() is raised.value
    break_next(model, tmp_path / "gone")
    break_next_error = pytest.raises(OSError, match="gone")
    with break_next_error:  # at `wait()`
        hornbeam.wait()
    handle = break_next(model, tmp_path / "gone")
    with pytest.raises(OSError, match="gone"):  # at its handle
        handle.result()
    hornbeam.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["next.keras"]


def test_the_failed_file_is_not_loaded_in_silence(tmp_path: Path) -> None:
    model = small()
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "m.keras"
    save_model(model, path)
    with held():
        save_model(model, path, asynchronous=True)
        for left in path.parent.glob(".m.keras.*"):
            left.unlink()
    with pytest.raises(OSError, match=r"m\.keras"):
        load_model(path)
    load_model(path)  # told; the old file is whole


def outcome(call: Callable[[], Any]) -> tuple[type, str] | None:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def test_mistakes_are_raised_at_the_call_as_ever(tmp_path: Path) -> None:
    model = small()
    (tmp_path / "directory.keras").mkdir()
    unbuilt = keras.Sequential([layers.Dense(1)])
    odd = chain(layers.Dense(2))
    unspeakable = object()
    odd.layers[-1].get_config = lambda: {"name": unspeakable}  # type: ignore[method-assign]
    calls: list[Callable[..., Any]] = [
        lambda **how: save_model(model, tmp_path / "m.zip", **how),
        lambda **how: save_model(model, tmp_path / "none" / "m.keras", **how),
        lambda **how: save_model(model, tmp_path / "directory.keras", **how),
        lambda **how: save_weights(model, tmp_path / "m.keras", **how),
        lambda **how: save_weights(model, tmp_path / "none" / "m.weights.h5", **how),
        lambda **how: save_weights(unbuilt, tmp_path / "m.weights.h5", **how),
        lambda **how: save_model(odd, tmp_path / "odd.keras", **how),
        lambda **how: save_model(model, tmp_path / "m.keras", unknown=1, **how),
    ]
    for call in calls:
        expected = outcome(call)
        assert expected is not None
        with held() as first:
            assert outcome(lambda call=call: call(asynchronous=True)) == expected
            assert not first.done()
        hornbeam.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["directory.keras"]
    assert writer._queue.reserved == 0
    assert not writer._queue.staged


@pytest.mark.parametrize("asynchronous", [False, True])
def test_arrays_of_other_processes_are_refused(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spread:
        """As a `jax.Array` that lies on the devices of several processes."""

        is_fully_addressable = False

    model = small()
    real = model.layers[-1].kernel._value
    monkeypatch.setattr(model.layers[-1].kernel, "_value", Spread())
    with pytest.raises(UnsupportedError, match=r"'layers/dense_1/vars/0' is spread over several processes"):
        save_model(model, tmp_path / "m.keras", asynchronous=asynchronous)
    monkeypatch.setattr(model.layers[-1].kernel, "_value", real)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_saved_asynchronously_says_so(tmp_path: Path) -> None:
    model, memory = small(), io.BytesIO()
    for call in (
        lambda: save_model(model, tmp_path / "m", zipped=False, asynchronous=True),
        lambda: save_model(model, tmp_path / "m.h5", asynchronous=True),
        lambda: save_weights(model, tmp_path / "m.weights.json", max_shard_size=1.0, asynchronous=True),
        lambda: save_model(model, memory, zipped=False, asynchronous=True),
        lambda: save_model(model, "memory://m.keras", asynchronous=True),
    ):
        with pytest.raises(UnsupportedError):
            call()
    assert memory.getvalue() == b""
    assert list(tmp_path.iterdir()) == []


def test_a_handle_is_a_future(tmp_path: Path) -> None:
    model = small()
    handles = {save_model(model, tmp_path / f"{i}.keras", asynchronous=True): i for i in range(3)}
    assert {handles[handle] for handle in futures.as_completed(handles, 60)} == {0, 1, 2}
    handle = save_weights(model, tmp_path / "m.weights.h5", asynchronous=True)

    async def path() -> str:
        return await asyncio.wrap_future(handle)

    assert asyncio.run(path()) == str(tmp_path / "m.weights.h5")
    assert not handle.cancel()
    assert handle.report.tensors == len(model.variables)
    assert handle.report.bytes == handle.bytes == (tmp_path / "m.weights.h5").stat().st_size


def test_who_keeps_the_old_file_has_a_handle_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keras.src.utils.io_utils.ask_to_proceed_with_overwrite", lambda _: False)
    (tmp_path / "m.keras").write_bytes(b"old")
    handle = save_model(small(), tmp_path / "m.keras", overwrite=False, asynchronous=True)
    with pytest.raises(futures.CancelledError, match="old file"):
        handle.result()
    assert (tmp_path / "m.keras").read_bytes() == b"old"
    hornbeam.wait()  # nothing went wrong


class SavesElsewhere(keras.Model):
    """Its own `save` writes another file; one of its layers' first."""

    def save(self, filepath: Any, **kwargs: Any) -> None:
        small().save(f"{filepath}.encoder.keras")
        super().save(f"{filepath}.other.keras", **kwargs)


@pytest.mark.trains
def test_a_save_that_nobody_made_asynchronous_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs = keras.Input((4,))
    model = SavesElsewhere(inputs, layers.Dense(3)(inputs))
    callback = hornbeam.callbacks.ModelCheckpoint(tmp_path / "m.keras", asynchronous=True)
    model.compile(loss="mse")
    with pytest.raises(FileNotFoundError):  # its file was not saved
        model.fit(np.zeros((2, 4)), np.zeros((2, 3)), callbacks=[callback], verbose=0)
    assert "`asynchronous=True` did nothing" in caplog.text
    load_model(tmp_path / "m.keras.encoder.keras")


class SavesItsEncoder(keras.Model):
    def save(self, filepath: Any, **kwargs: Any) -> None:
        small().save(f"{filepath}.encoder.keras")
        self.pending = not os.path.exists(f"{filepath}.encoder.keras")
        super().save(filepath, **kwargs)


@pytest.mark.trains
def test_a_model_that_saves_its_encoder_first_is_itself_saved_asynchronously(tmp_path: Path) -> None:
    inputs = keras.Input((4,))
    model = SavesItsEncoder(inputs, layers.Dense(64)(inputs))
    model.compile(loss="mse")
    callback = hornbeam.callbacks.ModelCheckpoint(tmp_path / "m.keras", asynchronous=True)
    model.fit(np.zeros((2, 4)), np.zeros((2, 64)), callbacks=[callback], verbose=0)
    assert not model.pending  # the encoder's file was complete at once
    assert callback.history[0]["bytes"] == os.path.getsize(tmp_path / "m.keras")


def test_whoever_looks_for_the_first_file_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Keras itself looks before it calls us."""
    model, path, weights = small(), tmp_path / "m.keras", tmp_path / "m.weights.h5"
    asked: list[Any] = []
    monkeypatch.setattr("keras.src.utils.io_utils.ask_to_proceed_with_overwrite", asked.append)
    found: list[Any] = []
    for save, target, look in (
        (save_model, path, lambda: keras.models.load_model(path)),
        (save_weights, weights, lambda: model.load_weights(weights)),
        (save_model, path, lambda: save_model(model, path, overwrite=False)),
        (save_weights, weights, lambda: save_weights(model, weights, overwrite=False)),
    ):
        target.unlink(missing_ok=True)
        with hornbeam.installed():
            with held() as first:
                save(model, target, asynchronous=True)
                thread = threading.Thread(target=lambda look=look, first=first: found.append((look(), first.done())))
                thread.start()
            thread.join()
        assert found[-1][1]
    assert [str(file) for file in asked] == [str(path), str(weights)]


class Inner(layers.Layer):
    """Saves a model of its own among its assets."""

    def save_assets(self, directory: str) -> None:
        with hornbeam.installed():
            small().save(os.path.join(directory, "inner.keras"))
        self.seen = os.path.getsize(os.path.join(directory, "inner.keras"))

    def load_assets(self, directory: str) -> None: ...

    def call(self, x: Any) -> Any:
        return x


def test_a_save_inside_of_a_save_is_complete_before_it(tmp_path: Path) -> None:
    layer = Inner()
    handle = save_model(chain(layer), tmp_path / "m.keras", asynchronous=True)
    assert handle.result()
    assert layer.seen > 0


# ---- the process ----

SCRIPT = r"""
import atexit, os, signal, sys, threading
import keras, numpy as np
from keras import layers
import hornbeam
from hornbeam.base import writer
from hornbeam.saving import load_model, save_model

root = sys.argv[1]
inputs = keras.Input((500,))
model = keras.Model(inputs, layers.Dense(3000)(layers.Dense(3000)(inputs)))

def fill(value):
    for variable in model.variables:
        variable.assign(np.full(variable.shape, value, "float32"))

def check(path, value):
    assert {float(v) for w in load_model(path).get_weights() for v in np.unique(w)} == {value}, path

fill(1)
"""


def run(code: str, root: Path, *, fails: bool = False) -> subprocess.CompletedProcess[str]:
    done = script(SCRIPT + code, root, KERAS_BACKEND="numpy")
    assert (done.returncode != 0) == fails, done.stderr
    return done


@pytest.mark.parametrize("end", ["", "raise SystemError('as if')"])
def test_the_interpreter_waits_for_what_is_pending(end: str, tmp_path: Path) -> None:
    code = """
save_model(model, root + "/a.keras", asynchronous=True)
fill(2)
save_model(model, root + "/b.keras", asynchronous=True)
fill(3)
atexit.register(lambda: save_model(model, root + "/c.keras", asynchronous=True))
"""
    run(code + end, tmp_path, fails="raise" in end)
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        assert values(tmp_path / f"{name}.keras") == {value}
    assert len(list(tmp_path.iterdir())) == 3


def test_an_error_at_exit_is_told(tmp_path: Path) -> None:
    done = run(
        """
os.mkdir(root + "/d")
release = threading.Event()
write = lambda: release.wait(60) and hornbeam.SaveReport()
with writer.Reservation() as request:
    request.submit("held", write, lambda: None, hornbeam.base.settings.current())
save_model(model, root + "/d/a.keras", asynchronous=True)
for name in os.listdir(root + "/d"):
    os.unlink(root + "/d/" + name)
os.rmdir(root + "/d")
release.set()
""",
        tmp_path,
        fails=True,
    )
    assert "d/a.keras" in done.stderr
    assert "failed" in done.stderr


def test_a_forked_child_starts_anew(tmp_path: Path) -> None:
    run(
        """
import gc
release = threading.Event()
write = lambda: release.wait(60) and hornbeam.SaveReport()
with writer.Reservation() as request:
    request.submit("held", write, lambda: None, hornbeam.base.settings.current())
handle = save_model(model, root + "/parent.keras", asynchronous=True)
for how in ("exit", "_exit"):
    child = os.fork()
    if child == 0:
        assert handle.done() and "parent process" in str(handle.exception())
        assert writer._queue.writing is None and writer._queue.places() == 2
        hornbeam.wait()
        fill(2)
        save_model(model, root + f"/{how}.keras", asynchronous=True)
        hornbeam.wait()
        check(root + f"/{how}.keras", 2.0)
        del handle
        gc.collect()
        if how == "_exit":
            os._exit(0)
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not handle.done()
fill(3)
release.set()
assert handle.result()
check(handle.path, 1.0)
child = os.fork()
if child == 0:  # nothing pending
    save_model(model, root + "/third.keras", asynchronous=True)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
check(root + "/third.keras", 3.0)
assert sorted(os.listdir(root)) == ["_exit.keras", "exit.keras", "parent.keras", "third.keras"], os.listdir(root)
""",
        tmp_path,
    )


def test_another_process_is_refused_while_one_writes(tmp_path: Path) -> None:
    model = small()
    with held():
        save_model(model, tmp_path / "m.keras", asynchronous=True)
        done = run('save_model(model, root + "/m.keras")', tmp_path, fails=True)
        assert f"under way, in process {os.getpid()}" in done.stderr
        assert "Let one process write each path" in done.stderr
    hornbeam.wait()
    run('save_model(model, root + "/m.keras")', tmp_path)
    assert values(tmp_path / "m.keras") == {1.0}


# ---- what runs in the writer's thread cannot wait for what that thread does later ----


def in_a_callback(ask: Callable[[Path], Any], tmp_path: Path) -> list[Any]:
    """What `ask` gives, or raises, in a callback of the save before one that waits at the path it is given."""
    found: list[Any] = []

    def callback(_handle: writer.Handle) -> None:
        try:
            found.append(ask(tmp_path / "behind.keras"))
        except Exception as error:
            found.append(error)

    model = small()
    with held() as first:
        behind = save_model(model, tmp_path / "behind.keras", asynchronous=True)
        behind.add_done_callback(lambda h: found.append("behind"))
        HANDLES[:] = [behind]
        first.add_done_callback(callback)
    assert futures.wait([behind], 60).done
    hornbeam.wait()
    return found


HANDLES: list[Any] = []


def manager_waits(path: Path) -> None:
    with CheckpointManager(path.parent / "c", asynchronous=True) as manager:
        manager.save(0, small())


WAITS: dict[str, Callable[[Path], Any]] = {
    "result": lambda path: HANDLES[0].result(),
    "result in time": lambda path: HANDLES[0].result(timeout=60),
    "exception": lambda path: HANDLES[0].exception(),
    "wait": lambda path: hornbeam.wait(),
    "wait in time": lambda path: hornbeam.wait(60),
    "load": load_model,
    "open": lambda path: hornbeam.open(path),
    "weights": lambda path: load_weights(small(), path),
    "save": lambda path: save_model(small(), path),
    "save there asynchronously": lambda path: save_model(small(), path, asynchronous=True),
    "save asynchronously": lambda path: save_model(small(), path.with_name("third.keras"), asynchronous=True),
    "manager": manager_waits,
}


ALL_WAITS = """
import pathlib, sys
from hornbeam.base import writer
from saving import test_async
for how, ask in test_async.WAITS.items():
    root = pathlib.Path(sys.argv[1]) / how
    root.mkdir()
    error, after = test_async.in_a_callback(ask, root)
    assert (writer._queue.reserved, writer._queue.staged) == (0, False)
    test_async.load_model(root / "behind.keras")
    left = sorted(p.name for p in root.iterdir() if p.name != "c")
    print("answer", [how, type(error).__name__, "cannot wait" in str(error), after, left], flush=True)
"""


def test_a_callback_that_waits_for_what_comes_after_it_is_told(tmp_path: Path) -> None:
    """In a process of its own: it would never end."""
    done = script(ALL_WAITS, tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [ast.literal_eval(line[7:]) for line in done.stdout.splitlines() if line.startswith("answer ")]
    assert found == [[how, "UnsupportedError", True, "behind", ["behind.keras"]] for how in WAITS]


def test_what_a_callback_may_do(tmp_path: Path) -> None:
    """Ask, and read what was saved, also where the save that waits goes to the same place."""
    found: list[Any] = []

    def callback(handle: writer.Handle) -> None:
        found.extend([handle.result(), handle.exception(), values(tmp_path / "m.keras"), behind.done()])
        with pytest.raises(TimeoutError):
            behind.result(timeout=0)
        found.append("all")

    model = small()
    with held():
        fill(model, 1)
        first = save_model(model, tmp_path / "m.keras", asynchronous=True)
        release = threading.Event()
        first.add_done_callback(lambda _: release.wait(60))  # until there is one behind it
        first.add_done_callback(callback)
    fill(model, 2)
    behind = save_model(model, tmp_path / "m.keras", asynchronous=True)
    release.set()
    hornbeam.wait()
    assert found == [str(tmp_path / "m.keras"), None, {1.0}, False, "all"]
    assert values(tmp_path / "m.keras") == {2.0}


def test_progress_of_a_save_cannot_wait_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has a thread of its own, which the writer waits for."""
    model, begun = small(), threading.Event()
    with held():
        handle = save_model(
            model, tmp_path / "m.keras", asynchronous=True, progress=lambda p: (begun.set(), handle.result())
        )
    assert handle.result() == str(tmp_path / "m.keras")
    assert begun.is_set()
    assert "cannot wait for a save" in caplog.text


def test_a_log_handler_cannot_wait_for_the_save_it_is_told_of(tmp_path: Path) -> None:
    """The commit of a checkpoint is told to the log in the writer's thread."""
    found: list[Any] = []

    class Waits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("saved step 0"):
                try:
                    manager.wait()
                except Exception as error:
                    found.append(error)

    handler = Waits()
    logger = logging.getLogger("hornbeam")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with CheckpointManager(tmp_path, asynchronous=True) as manager:
            manager.save(0, small())
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert [type(error) for error in found] == [UnsupportedError]
    assert [c.step for c in manager.all()] == [0]


# ---- the end of the program ----

AT_THE_END = """
import os, shutil, sys
import numpy as np
import keras, hornbeam
from hornbeam.saving import save_model
from hornbeam.checkpoint import CheckpointManager
from hornbeam import _core
what, root = sys.argv[1:]
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
os.makedirs(f"{root}/d")
hornbeam.errors  # imported
import atexit
atexit.register(lambda: print("cleaned up", flush=True) or print("said", file=sys.stderr, flush=True))
from hornbeam.base import writer
import threading
release = threading.Event()
write = lambda: release.wait(60) and hornbeam.SaveReport()
with writer.Reservation() as request:
    request.stage([])
    request.submit("held", write, lambda: None, hornbeam.base.settings.current())

def break_it():
    shutil.rmtree(f"{root}/d")
    release.set()

if what == "manager":
    manager = CheckpointManager(f"{root}/d/c", asynchronous=True)
    manager.save(0, model)
    break_it()
elif what == "manager told":
    manager = CheckpointManager(f"{root}/d/c", asynchronous=True)
    manager.save(0, model)
    break_it()
    try:
        manager.wait()
    except Exception as error:
        print("told", type(error).__name__)
elif what == "at exit":
    release.set()
    hornbeam.wait()
    def save():
        original = writer._Job.run
        def run(job):
            shutil.rmtree(f"{root}/d")
            return original(job)
        writer._Job.run = run
        save_model(model, f"{root}/d/m.keras", asynchronous=True)
    atexit.register(save)
elif what == "good":
    save_model(model, f"{root}/d/m.keras", asynchronous=True)
    release.set()
else:
    handle = save_model(model, f"{root}/d/m.keras", asynchronous=True)
    break_it()
    if what == "asked":
        print("told", type(handle.exception()).__name__)
    elif what == "callback":
        handle.add_done_callback(lambda h: h.exception())
    elif what == "exits":
        sys.exit(0)
    elif what == "raises":
        raise ZeroDivisionError
print("done")
"""


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("lost", 120),
        ("exits", 120),
        ("manager", 120),
        ("at exit", 120),
        ("raises", 1),
        ("asked", 0),
        ("callback", 0),
        ("manager told", 0),
        ("good", 0),
    ],
)
def test_a_program_whose_save_failed_unnoticed_fails(what: str, status: int, tmp_path: Path) -> None:
    done = script(AT_THE_END, what, tmp_path)
    assert done.returncode == status, done.stderr
    assert done.stdout.endswith("cleaned up\n")  # everybody's cleanup ran
    assert "\nsaid" in f"\n{done.stderr}"
    assert ("hornbeam: nothing asked how the asynchronous save of" in done.stderr) == (status != 0)
    if what == "at exit":
        assert not (tmp_path / "d").exists()
    if "told" in done.stdout:
        assert "FileNotFoundError" in done.stdout
