"""What is changed for the whole process, and given back: whoever meddles, whatever interrupts, whoever forks."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras.src.saving import saving_lib

import hornbeam
from hornbeam.formats import legacy_save
from hornbeam.seam import assignments, building, entry, hook, patches, shortcuts, walking
from hornbeam.training import fit
from support.helpers import script
from support.zoo import chain

pytestmark = pytest.mark.keras_versions

FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_there_is_no_other_kind_of_patch() -> None:
    made = [value for m in (building, fit, assignments, walking, legacy_save, shortcuts) for value in vars(m).values()]
    assert {id(p) for p in made if isinstance(p, patches.Patch)} == {
        id(p) for p in patches._patches if _is_hornbeams(p)
    }
    assert len({id(p) for p in made if isinstance(p, patches.Patch)}) == 17


def _is_hornbeams(patch: patches.Patch) -> bool:
    return getattr(patch._make, "__module__", "").startswith("hornbeam.")


PATCHES = [
    *((walking, n) for n in ("_walk_patch", "_save_patch", "_optimizer_patch")),
    *((assignments, n) for n in ("_assign_patch", "_load_patch")),
    *((building, n) for n in ("_variable_patch", "_slot_patch", "_key_patch")),
    *((shortcuts, n) for n in ("_attribute_patch", "_tensor_patch")),
    *((fit, n) for n in ("_shuffle_patch",)),
    *((legacy_save, n) for n in ("_serialize_patch",)),
]


@pytest.mark.parametrize(("module", "name"), PATCHES, ids=[name for _, name in PATCHES])
@pytest.mark.parametrize("put_back", [False, True])
def test_a_wrapper_put_on_in_the_middle_never_comes_back_to_itself(module: Any, name: str, put_back: bool) -> None:
    """Without `functools.wraps`, around every patch, several times, and also taken off after the patch has gone."""
    patch = patches.Patch(getattr(module, name)._make)
    calls: list[str] = []

    def stock(*_: Any) -> Iterator[Any]:
        calls.append("stock")
        return iter(())

    owner = types.SimpleNamespace(f=stock)
    arguments = (object(),) if name in ("_walk_patch", "_tensor_patch", "_serialize_patch", "_shuffle_patch") else ()
    for arity in (1, 2, 3, 4):
        if arguments:
            break
        with contextlib.suppress(TypeError), patch(owner, "f"):
            owner.f(*[object()] * arity)
            arguments = (object(),) * arity
    for turn in range(3):
        with patch(owner, "f"):
            below = owner.f

            def wrapper(*args: Any, below: Callable[..., Any] = below, turn: int = turn) -> Any:
                calls.append(f"wrapper {turn}")
                return below(*args)

            owner.f = wrapper
        calls.clear()
        owner.f(*arguments)
        assert calls == [*(f"wrapper {t}" for t in reversed(range(0 if not put_back else turn, turn + 1))), "stock"]
        if put_back:
            owner.f = below  # as `mock.patch` does when it ends
            with patch(owner, "f"):
                calls.clear()
                owner.f(*arguments)
                assert calls == ["stock"]
            assert owner.f in (stock, below)
    calls.clear()
    owner.f(*arguments)
    assert calls.count("stock") == 1


def test_keras_instrumented_while_a_load_runs_works_on(tmp_path: Path) -> None:
    """An import inside of a custom object, a tracer, a mock in another thread: all of `assign` and the walk."""
    from keras.src.backend.common.variables import Variable

    stock = {"assign": Variable.assign, "_load_state": saving_lib._load_state, "walk": saving_lib._walk_saveable}

    @keras.saving.register_keras_serializable("patched")
    class Instruments(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.w = self.add_weight(shape=shape[1:])

        def call(self, x: Any) -> Any:
            return x * self.w

        def load_own_variables(self, store: Any) -> None:
            for owner, name in ((Variable, "assign"), (saving_lib, "_load_state"), (saving_lib, "_walk_saveable")):
                setattr(owner, name, _around(getattr(owner, name)))
            super().load_own_variables(store)

    model = chain(Instruments())
    expected = model.get_weights()
    limit = sys.getrecursionlimit()
    try:
        hornbeam.saving.save_model(model, tmp_path / "m.keras")
        sys.setrecursionlimit(1000)
        for _ in range(4):
            loaded = hornbeam.saving.load_model(tmp_path / "m.keras")
            hornbeam.saving.load_weights(model, tmp_path / "m.keras")
            for found in (loaded.get_weights(), model.get_weights()):
                np.testing.assert_array_equal(found, expected)
        hornbeam.uninstall()
        variable = keras.Variable(np.zeros(2))
        variable.assign(np.ones(2))
        assert float(variable[1]) == 1
        assert hornbeam.last_report("load").cast == []
    finally:
        sys.setrecursionlimit(limit)
        Variable.assign = stock["assign"]
        saving_lib._load_state, saving_lib._walk_saveable = stock["_load_state"], stock["walk"]


def _around(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs)


def _contexts() -> dict[str, tuple[Callable[[], Any], Any]]:
    owner = types.SimpleNamespace(f=len)
    patch = patches.Patch(lambda original: lambda *args: original(*args))
    return {
        "collector_rests": (patches.collector_rests, patches.collector_rests),
        "scope": (entry.scope, entry.scope),
        "installed": (hornbeam.installed, hook.installed),
        "patch": (lambda: patch(owner, "f"), patches.Patch.__call__),
    }


@pytest.mark.parametrize("name", ["collector_rests", "scope", "installed", "patch"])
def test_an_interrupt_on_the_way_in_leaves_nothing_behind(name: str) -> None:
    """Before every line up to the `yield`, and right after it."""
    make, function = _contexts()[name]
    code = inspect.unwrap(function).__code__
    source, start = inspect.getsourcelines(inspect.unwrap(function))
    end = next(start + i for i, line in enumerate(source) if line.strip() == "yield")
    before = gc.get_threshold()
    lines = sorted({line for _, _, line in code.co_lines() if line is not None and start < line <= end})
    assert len(lines) > 3
    for line in lines:

        def trace(frame: Any, event: str, _: Any, line: int = line) -> Any:
            if frame.f_code is code and event == "line" and frame.f_lineno == line:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        with contextlib.suppress(KeyboardInterrupt):
            sys.settrace(trace)
            try:
                with make():
                    pass
            finally:
                sys.settrace(None)
        assert gc.get_threshold() == before, line
        assert not entry._users, line
        assert not hook.is_installed(), line
        assert not hasattr(saving_lib.save_model, "__hornbeam__"), line
        with make():
            pass
        assert gc.get_threshold() == before, line
        assert not hasattr(saving_lib.save_model, "__hornbeam__"), line


def test_an_error_of_the_patching_itself_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    patch, calls = entry.patch, 0

    def fails(module: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        patch(module)

    for enter in (entry.scope, hornbeam.installed):
        calls = 0
        with monkeypatch.context() as context:
            context.setattr(entry, "patch", fails)
            with pytest.raises(KeyboardInterrupt), enter():
                pass
        assert not hasattr(saving_lib.save_model, "__hornbeam__")
        with enter():
            assert hasattr(saving_lib.save_model, "__hornbeam__")
        assert not hasattr(saving_lib.save_model, "__hornbeam__")


def _in_a_child(work: Callable[[], bool]) -> None:
    gc.collect()  # a child that collects an iterator of `tf.data` waits for its thread for ever, as without hornbeam
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # a child that hangs is ended
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


_LOCKED = """
import os, signal, sys, threading
import hornbeam
from hornbeam.seam import entry
from hornbeam.seam import hook
from hornbeam.seam import patches
from hornbeam.seam import walking
from keras.src.saving import saving_lib

module, name = sys.argv[1].split(".")
inside, done = threading.Event(), threading.Event()

def holds():
    with getattr({"hook": hook, "entry": entry, "patches": patches}[module], name):
        inside.set()
        done.wait()

with hornbeam.installed(), entry.scope(), patches.collector_rests(), walking.fast_walk():
    pass  # imports what it needs
thread = threading.Thread(target=holds)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that hangs is ended
    hornbeam.install()
    with hornbeam.installed(), entry.scope(), patches.collector_rests(), walking.fast_walk():
        pass
    patched = hasattr(saving_lib.save_model, "__hornbeam__")
    hornbeam.uninstall()
    os._exit(0 if patched and not hasattr(saving_lib.save_model, "__hornbeam__") else 2)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
done.set()
thread.join()
sys.exit(abs(code))
"""


@FORK
@pytest.mark.parametrize("lock", ["hook._lock", "entry._lock", "patches._lock", "patches._collector_lock"])
def test_a_child_forked_while_another_thread_holds_a_lock_works(lock: str) -> None:
    """In a process of its own: what other tests left for the collector may wait for TensorFlow's threads in a child."""
    ran = script(_LOCKED, lock, KERAS_BACKEND=keras.backend.backend())
    assert ran.returncode == 0, ran.stderr[-2000:]


@FORK
def test_a_child_does_not_keep_what_other_threads_of_its_parent_needed() -> None:
    inside, done = threading.Event(), threading.Event()
    stock = saving_lib.save_model, saving_lib._walk_saveable, gc.get_threshold()

    def needs() -> None:
        with hornbeam.installed(), entry.scope(), walking.fast_walk(), patches.collector_rests():
            inside.set()
            done.wait()

    thread = threading.Thread(target=needs)
    thread.start()
    inside.wait()
    try:
        assert saving_lib.save_model is not stock[0]
        _in_a_child(lambda: stock == (saving_lib.save_model, saving_lib._walk_saveable, gc.get_threshold()))
        with hornbeam.installed():
            _in_a_child(lambda: hook.is_installed() and hasattr(saving_lib.save_model, "__hornbeam__"))
    finally:
        done.set()
        thread.join()
    assert stock == (saving_lib.save_model, saving_lib._walk_saveable, gc.get_threshold())


def test_an_older_replacement_that_somebody_puts_back_goes_with_the_next() -> None:
    def stock() -> str:
        return "stock"

    owner, patch = types.SimpleNamespace(f=stock), patches.Patch(lambda original: lambda: f"ours {original()}")
    with patch(owner, "f"):
        older = owner.f
        owner.f = lambda: f"theirs {older()}"
    with patch(owner, "f"):
        assert owner.f() == "ours theirs ours stock"
    owner.f = older
    with patch(owner, "f"):
        assert owner.f() == "ours stock"
    assert owner.f is stock
