"""install, uninstall, installed, options, stats, `python -m hornbeam`: what is patched, when, and how it is undone."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras.src.saving import saving_lib

import hornbeam
import hornbeam.callbacks
from hornbeam import UnsupportedError
from hornbeam.seam import entry, hook, patches
from support.zoo import ZOO, chain

pytestmark = pytest.mark.keras_versions

_PACKAGE = str(Path(hornbeam.__file__).parent.parent)


def python(*args: str, cwd: Path | None = None, **env: str) -> str:
    """Runs a fresh interpreter; returns what it prints."""
    run = subprocess.run(
        [sys.executable, *args],
        env={**os.environ, "PYTHONPATH": _PACKAGE, **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def patched() -> list[str]:
    """Every name of Keras' modules, public ones included, that stands for something of hornbeam's."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "keras"]
    return [f"{m.__name__}.{k}" for m in modules for k, value in vars(m).items() if "__hornbeam__" in _dict(value)]


def _dict(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", {}) if callable(value) else {}  # modules that Keras imports late stay out


def test_uninstall_restores_every_attribute() -> None:
    def everything() -> dict[str, dict[str, Any]]:
        return {n: dict(vars(m)) for n, m in sys.modules.items() if n.partition(".")[0] == "keras"}

    before = everything()
    hornbeam.install()
    hornbeam.install()
    names = patched()
    assert {"keras.models.load_model", "keras.saving.save_weights", "keras.models.save_model"} <= {*names}
    hornbeam.uninstall()
    assert everything() == before
    hornbeam.uninstall()
    with hornbeam.installed():
        with hornbeam.installed():
            pass
        assert patched()
    assert everything() == before


def test_installing_waits_for_a_thread_that_imports_keras() -> None:
    program = """
import importlib, sys, threading
from hornbeam.seam import hook
from hornbeam.seam import targets
started, awaited = threading.Event(), threading.Event()

class Pause:
    def find_spec(self, name, path, target=None):
        if name == "keras.src.saving.object_registration":
            started.set()
            assert awaited.wait(60)

sys.meta_path.insert(0, Pause())
real = importlib.import_module
def import_module(name, package=None):
    if threading.current_thread() is threading.main_thread():
        awaited.set()
    return real(name, package)
importlib.import_module = import_module
thread = threading.Thread(target=lambda: real("keras"))
thread.start()
assert started.wait(60)
hook.install()
assert awaited.is_set()
thread.join()
import keras
assert "__hornbeam__" in vars(keras.saving.save_model)
assert "__hornbeam__" in vars(sys.modules["keras.src.saving.saving_lib"].save_model)
print("patched")
"""
    assert "patched" in python("-c", program, KERAS_BACKEND="numpy")


def test_references_taken_before_install_go_through_the_core(tmp_path: Path) -> None:
    from keras.models import load_model, save_model
    from keras.saving import load_weights, save_weights

    model = ZOO["functional"]()[0]
    with hornbeam.installed():
        save_model(model, tmp_path / "m.keras")
        load_model(tmp_path / "m.keras")
        save_weights(model, tmp_path / "m.weights.h5")
        load_weights(model, tmp_path / "m.weights.h5")
    assert (hornbeam.stats().saves, hornbeam.stats().loads) == (2, 2)


def test_importing_and_installing_import_nothing_heavy() -> None:
    code = """
import sys, hornbeam
hornbeam.install()
heavy = {"keras", "tensorflow", "jax", "torch", "numpy", "h5py"} & set(sys.modules)
assert not heavy, heavy
import os
os.environ["KERAS_BACKEND"] = "numpy"
import keras
assert keras.backend.backend() == "numpy"
from keras.src.saving import saving_lib
assert hasattr(saving_lib.save_model, "__hornbeam__")
assert hasattr(keras.models.load_model, "__hornbeam__")
assert type(saving_lib.__loader__).__module__ != "hornbeam.seam.hook"
hornbeam.uninstall()
assert not hasattr(saving_lib.save_model, "__hornbeam__")
assert not hasattr(keras.models.load_model, "__hornbeam__")
hornbeam.install(); hornbeam.uninstall()
print("fine")
"""
    assert python("-c", code) == "fine\n"


def test_an_install_undone_before_keras_is_imported_leaves_nothing() -> None:
    code = """
import hornbeam
hornbeam.install(); hornbeam.uninstall()
import os; os.environ["KERAS_BACKEND"] = "numpy"
import keras
from keras.src.saving import saving_lib
print(hasattr(saving_lib.save_model, "__hornbeam__"))
"""
    assert python("-c", code) == "False\n"


SCRIPT = """
import sys
import keras

import helper

model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
model.save(sys.argv[1])
keras.models.load_model(sys.argv[1])
if __name__ == "__main__":
    print(helper.NAME, sys.argv[1:], __file__)
    import hornbeam
    print(hornbeam.stats().saves, hornbeam.stats().loads, dict(hornbeam.stats().handovers))
"""


def test_blocks_in_two_threads_do_not_end_each_other() -> None:
    first, second = threading.Event(), threading.Event()

    def other() -> None:
        with hornbeam.installed():
            first.set()
            assert second.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert first.wait(60)
    with hornbeam.installed():
        second.set()
        thread.join()
        assert hasattr(saving_lib.save_model, "__hornbeam__")
    assert not hasattr(saving_lib.save_model, "__hornbeam__")


def test_a_wrapper_that_somebody_else_put_around_a_dispatcher_stays(tmp_path: Path) -> None:
    stock = saving_lib.save_model
    calls = []
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with hornbeam.installed():
        below = saving_lib.save_model

        @functools.wraps(below)
        def logged(*args: Any, **kwargs: Any) -> Any:
            calls.append(hook.is_installed())
            return below(*args, **kwargs)

        saving_lib.save_model = logged
    try:
        assert saving_lib.save_model is logged
        for installed in (False, True):
            with hornbeam.installed() if installed else contextlib.nullcontext():
                assert saving_lib.save_model is logged
                before = hornbeam.stats().saves
                saving_lib.save_model(model, tmp_path / "m.keras")
                assert hornbeam.stats().saves - before == installed
        assert calls == [False, True]
    finally:
        saving_lib.save_model = below
        with hornbeam.installed():
            pass
    assert saving_lib.save_model is stock


def test_a_patch_leaves_what_was_put_over_it() -> None:
    def make(original: Any) -> Any:
        return lambda: f"ours {original()}"

    owner, patch = types.SimpleNamespace(f=lambda: "stock"), patches.Patch(make)
    with patch(owner, "f"):
        ours = owner.f
        owner.f = functools.wraps(ours)(lambda: f"theirs {ours()}")
    for _ in range(2):
        assert owner.f() == "theirs ours stock"
        with patch(owner, "f"):
            assert owner.f() == "theirs ours stock"
    owner.f = ours
    with patch(owner, "f"):
        pass
    assert owner.f() == "stock"


def test_the_command_runs_a_module(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("NAME = 'beside'\n")
    out = python("-m", "hornbeam", "-m", "train", "m.keras", "--epochs", "3", "-h", cwd=tmp_path, KERAS_BACKEND="numpy")
    assert out.startswith("beside ['m.keras', '--epochs', '3', '-h']")
    assert out.endswith("\n1 1 {}\n")


def test_the_command_runs_an_unchanged_script(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "helper.py").write_text("NAME = 'beside'\n")
    script = os.path.join("scripts", "train.py")
    out = python("-m", "hornbeam", script, "m.keras", "--flag", cwd=tmp_path, KERAS_BACKEND="numpy")
    assert out.splitlines()[-2:] == [f"beside ['m.keras', '--flag'] {tmp_path / script}", "1 1 {}"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.keras", "scripts"]


LATE = """
import atexit, pickle, sys, threading

class Kept:
    pass

def late(where):
    threading.main_thread().join() if where == "thread" else None
    assert sys.modules["__main__"].Kept is Kept and __name__ == "__main__"
    print(where, type(pickle.loads(pickle.dumps(Kept()))).__name__, flush=True)

atexit.register(late, "atexit")
threading.Thread(target=late, args=["thread"]).start()
"""


def test_a_script_stays_main_until_threads_and_exit_handlers_are_done(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(LATE)
    (tmp_path / "package" / "__init__.py").write_text("")
    for args in (["late.py"], ["-m", "late"], ["-m", "package"], ["package"]):
        assert python("-m", "hornbeam", *args, cwd=tmp_path) == "thread Kept\natexit Kept\n", args


LOOK = """
import sys
names = ["__name__", "__file__", "__package__", "__cached__", "__doc__"]
print([globals().get(name) for name in names], __spec__ and __spec__.name, sys.argv)
print(__builtins__ is sys.modules["builtins"], vars(sys.modules["__main__"]) is globals(), type(__loader__).__name__)
print(sys.path[:2])
"""


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("args", [["look.py"], ["./look.py"], ["-m", "look"], ["folder"], ["-m", "folder"], ["z.zip"]])
def test_a_script_sees_what_python_itself_shows_it(args: list[str], safe: bool, tmp_path: Path) -> None:
    """Also under `-P`, where no directory comes before `PYTHONPATH`."""
    import zipfile

    (tmp_path / "look.py").write_text(LOOK)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text(LOOK)
    (tmp_path / "folder" / "__init__.py").write_text("")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as file:
        file.writestr("__main__.py", LOOK)
    paths = {"PYTHONPATH": os.pathsep.join([_PACKAGE, str(tmp_path)]), "PYTHONDONTWRITEBYTECODE": "1"}
    env = {**paths, **({"PYTHONSAFEPATH": "1"} if safe else {})}
    found = python("-m", "hornbeam", *args, "-x", "1", cwd=tmp_path, **env)
    expected = python(*args, "-x", "1", cwd=tmp_path, **env)
    if not args[0].startswith("-m") and args[0].endswith(".py"):  # of Python's own way to run a file
        expected = expected.replace("SourceFileLoader", "NoneType")
    assert found == expected


def test_what_is_no_module_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "__init__.py").write_text("")
    for args, text in (
        (["-m", "nowhere_at_all"], "no module to run is named 'nowhere_at_all'"),
        (["-m", "empty"], "is a package without `__main__.py`"),
        (["empty"], "no `__main__.py` in 'empty'"),
    ):
        command = [sys.executable, "-m", "hornbeam", *args]
        env = {**os.environ, "PYTHONPATH": _PACKAGE}
        run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 2
        assert text in run.stderr


FINDERS = """
import importlib.abc, importlib.util, os, sys
root = importlib.util.find_spec("keras").submodule_search_locations[0]
asked = []

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        asked.append(name)

class Own(importlib.abc.MetaPathFinder):
    "Serves keras from where Python's own finder cannot see it."
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] != "keras":
            return None
        place = os.path.join(root, *name.split(".")[1:])
        if os.path.isdir(place):
            init = os.path.join(place, "__init__.py")
            return importlib.util.spec_from_file_location(name, init, submodule_search_locations=["<bundle>"])
        return importlib.util.spec_from_file_location(name, place + ".py") if os.path.exists(place + ".py") else None

class AsksAll(importlib.abc.MetaPathFinder):
    "Wraps what all together find, as tools that instrument imports do."
    busy = set()
    def find_spec(self, name, path, target=None):
        if name in self.busy:
            return None
        self.busy.add(name)
        try:
            asked.append(name)
            return importlib.util.find_spec(name)
        finally:
            self.busy.discard(name)

class AsksOthers(importlib.abc.MetaPathFinder):
    "Knows itself, and not who else asks everybody."
    def find_spec(self, name, path, target=None):
        asked.append(name)
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        return next((spec for spec in found if spec is not None), None)

import hornbeam
from hornbeam.seam import hook
from hornbeam.seam import targets
kind, order = sys.argv[1:]
finder = {"watch": Watch, "own": Own, "asks_all": AsksAll, "asks_others": AsksOthers}[kind]()
if order == "before":
    sys.meta_path.insert(0, finder)
hornbeam.install()
if order == "after":
    sys.meta_path.insert(0, finder)
if order == "behind":
    sys.meta_path.insert(len(sys.meta_path) - 1, finder)
    hook._catch_up = lambda: None  # the hook asks whoever is behind it, and patches at once
import keras
for name in targets.MODULES:
    assert kind == "own" or name in asked, name
    from hornbeam.seam import entry
    assert entry.is_patched(sys.modules[name]), name
assert hasattr(keras.models.load_model, "__hornbeam__")
hornbeam.uninstall()
assert not hasattr(keras.models.load_model, "__hornbeam__")
assert not hasattr(sys.modules[targets.SAVING_LIB].save_model, "__hornbeam__")
print("fine")
"""


@pytest.mark.parametrize("kind", ["watch", "own", "asks_all", "asks_others"])
@pytest.mark.parametrize("order", ["before", "after", "behind"])
def test_whoever_finds_keras_it_is_patched(kind: str, order: str) -> None:
    assert python("-c", FINDERS, kind, order, KERAS_BACKEND="numpy") == "fine\n"


def test_a_module_that_cannot_be_patched_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from hornbeam.errors import UnknownKerasWarning

    monkeypatch.setattr(entry, "patch", lambda _: None)
    with pytest.warns(UnknownKerasWarning, match="cannot be patched"), hornbeam.installed():
        pass


def test_the_command_reports_a_missing_script_and_passes_on_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit(7)\n")

    def run(script: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hornbeam", script]
        env = {**os.environ, "PYTHONPATH": _PACKAGE}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    assert run(str(tmp_path / "fails.py")).returncode == 7
    missing = run("nowhere.py")
    assert missing.returncode == 2
    assert "no such script: 'nowhere.py'" in missing.stderr


@pytest.mark.trains
def test_callbacks_go_through_the_core(tmp_path: Path) -> None:
    model, x, y = ZOO["functional"]()
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.fit(x, y, epochs=2, callbacks=[checkpoint], verbose=0)
    assert hornbeam.stats().saves == 2
    hornbeam.stats(reset=True)
    backup = hornbeam.callbacks.BackupAndRestore(tmp_path / "backup")
    ours = hornbeam.callbacks.ModelCheckpoint(tmp_path / "best.weights.h5", save_weights_only=True)
    model.fit(x, y, epochs=2, callbacks=[ours, backup], verbose=0)
    assert hornbeam.stats().saves == 4
    assert not patched()


def test_handing_over_is_counted_and_refused_under_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chain(keras.layers.Dense(2))

    class Other(saving_lib.H5IOStore):
        pass

    with hornbeam.installed(), caplog.at_level("INFO", logger="hornbeam"):
        model.save(tmp_path / "m.keras")
        monkeypatch.setattr(saving_lib, "H5IOStore", Other)
        model.save(tmp_path / "stock.keras")
        keras.models.load_model(tmp_path / "stock.keras")
        assert hornbeam.stats().handovers == {"saving_lib.H5IOStore is replaced": 2}
        assert caplog.messages == ["handed over to Keras: saving_lib.H5IOStore is replaced"] * 2
        with hornbeam.options(fallback=False), pytest.raises(UnsupportedError, match="does not handle this"):
            model.save(tmp_path / "refused.keras")
        assert not (tmp_path / "refused.keras").exists()
    assert hornbeam.stats().saves == 1


def test_options_are_scoped_and_checked() -> None:
    with hornbeam.options(fallback=False) as outer:
        assert not outer.fallback
        with hornbeam.options(durable=True) as inner:
            assert not inner.fallback
            assert inner.durable
    with hornbeam.options() as after:
        assert after.fallback
    with pytest.raises(ValueError, match="engine must be"), hornbeam.options(engine="quick"):
        pass
    with pytest.raises(ValueError, match="shortcuts must be"), hornbeam.options(shortcuts=["copies"]):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("durable", [True, False])
def test_every_way_to_write_gives_the_same_file(atomic: bool, durable: bool, tmp_path: Path) -> None:
    from support.helpers import archive_tree

    model = ZOO["functional"]()[0]
    model.save(tmp_path / "stock.keras")
    target = tmp_path / "m.keras"
    target.write_bytes(b"x" * 1_000_000)
    inode = target.stat().st_ino
    with hornbeam.installed(), hornbeam.options(fallback=False, atomic=atomic, durable=durable):
        model.save(target)
    assert (target.stat().st_ino == inode) == (not atomic)
    assert archive_tree(target) == archive_tree(tmp_path / "stock.keras")


def test_wait_returns() -> None:
    assert hornbeam.wait() is None


def test_questions_and_warnings_are_keras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(keras.layers.Dense(2))
    path = tmp_path / "m.keras"
    with hornbeam.installed():
        model.save(path)
        before = path.read_bytes()
        monkeypatch.setattr("builtins.input", lambda *_: "n")
        model.save(path, overwrite=False)
        assert path.read_bytes() == before
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        model.save(path, overwrite=False)
        with pytest.raises(ValueError, match="not supported"):
            model.save(path, nonsense=1)
        with pytest.raises(ValueError, match="Invalid filepath extension"):
            model.save(tmp_path / "m.foo")
        with pytest.warns(UserWarning, match="not yet been built"):
            keras.Sequential([keras.layers.Dense(1)]).save(tmp_path / "unbuilt.keras")
        with pytest.raises(ValueError, match="not yet been built"):
            keras.Sequential([keras.layers.Dense(1)]).save_weights(tmp_path / "unbuilt.weights.h5")
        with pytest.raises(ValueError, match="File not found"):
            keras.models.load_model(tmp_path / "missing.keras")
        with pytest.raises(FileNotFoundError):
            model.load_weights(tmp_path / "missing.weights.h5")
        other = chain(keras.layers.Dense(3))
        with pytest.raises(ValueError, match="A total of 1 objects could not be loaded"):
            other.load_weights(path)
        weights = other.get_weights()
        with pytest.warns(UserWarning, match="A total of 1 objects could not be loaded"):
            other.load_weights(path, skip_mismatch=True)
        assert all(np.array_equal(a, b) for a, b in zip(other.get_weights(), weights, strict=True))
