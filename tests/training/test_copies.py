"""Everything public is copied and pickled as one would expect, or refuses in words; `import *` hides nothing.

KerasTuner deep-copies callbacks for each trial (`test_tuner.py`); `multiprocessing`, joblib and Ray pickle whatever
they are given.
"""

from __future__ import annotations

import builtins
import copy
import importlib
import inspect
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hornbeam
from hornbeam import _core, errors, export
from hornbeam.callbacks import BackupAndRestore, ModelCheckpoint
from hornbeam.checkpoint import CheckpointManager
from hornbeam.data import resumable
from hornbeam.saving import load_weights, save_weights
from support.helpers import script
from support.training import At, fit, model
from support.writing import held, small

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda item: pickle.loads(pickle.dumps(item)),
}
MODULES = ("callbacks", "checkpoint", "data", "errors", "export", "models", "saving")
PUBLIC = ("hornbeam", *(f"hornbeam.{name}" for name in MODULES))


def public_classes() -> dict[str, type]:
    """Those that our own modules define and offer."""
    found = {}
    for place in PUBLIC:
        module = importlib.import_module(place)
        names = set(dir(hornbeam)) if module is hornbeam else set(getattr(module, "__all__", vars(module)))
        for name in names:
            item = getattr(module, name)
            if inspect.isclass(item) and item.__module__.startswith("hornbeam") and not name.startswith("_"):
                found[f"{item.__module__}.{item.__qualname__}"] = item
    return found


# ---- what there is, and how it is made ----


def report(root: Path) -> Any:
    save_weights(small(), root / "m.weights.h5")
    return load_weights(small(), root / "m.weights.h5")


def save_report(root: Path) -> Any:
    save_weights(small(), root / "m.weights.h5", dtype="float16")
    return hornbeam.last_report("save")


def opened(root: Path) -> Any:
    save_weights(small(), root / "m.weights.h5")
    return hornbeam.open(root / "m.weights.h5")


def committed(root: Path) -> Any:
    with CheckpointManager(root / "c") as manager:
        return manager.save(3, small(), metrics={"loss": 1.5})


def same(a: Any, b: Any) -> bool:
    return a == b


def same_tensors(a: Any, b: Any) -> bool:
    return [(name, array.tobytes()) for name, array in a.items()] == [(name, x.tobytes()) for name, x in b.items()]


def same_batches(a: Any, b: Any) -> bool:
    return [x[0].tolist() for x in a] == [x[0].tolist() for x in b]


def same_arguments(a: Any, b: Any) -> bool:
    plain = (bool, int, float, str, tuple, list, dict, Path, type(None))
    ours, theirs = ({k: v for k, v in vars(item).items() if isinstance(v, plain)} for item in (a, b))
    return {k: v for k, v in ours.items() if k != "_saved_at"} == {k: v for k, v in theirs.items() if k != "_saved_at"}


#: Class → how to make one, and what a copy has of it.
COPIED: dict[str, tuple[Callable[[Path], Any], Callable[[Any, Any], bool]]] = {
    "hornbeam.base.reports.LoadReport": (report, same),
    "hornbeam.base.reports.SaveReport": (save_report, same),
    "hornbeam.base.progress.Progress": (lambda root: hornbeam.Progress("save", "m.keras", 1, 2, 0.5), same),
    "hornbeam.base.counters.Stats": (lambda root: hornbeam.stats(), same),
    "hornbeam.base.model_file.File": (opened, same_tensors),
    "hornbeam.base.model_file.Tensor": (
        lambda root: opened(root).tensors["layers/dense/vars/0"],
        lambda a, b: a.name == b.name and a.read().tobytes() == b.read().tobytes(),
    ),
    "hornbeam.training.accounts.Checkpoint": (committed, same),
    "hornbeam.training.manager.CheckpointManager": (
        lambda root: CheckpointManager(root / "c", keep_best=2, monitor="loss", asynchronous=True),
        same_arguments,
    ),
    "hornbeam.training.model_checkpoint.ModelCheckpoint": (
        lambda root: ModelCheckpoint(
            root / "m.keras", keep_last=2, asynchronous=True, save_on_signal=(signal.SIGTERM,), every_seconds=3
        ),
        same_arguments,
    ),
    "hornbeam.training.backup.BackupAndRestore": (
        lambda root: BackupAndRestore(root / "b", seed=3, asynchronous=True, double_checkpoint=True),
        lambda a, b: same_arguments(a, b) and same_arguments(a._manager, b._manager),
    ),
    "hornbeam.training.resumable.Resumable": (
        lambda root: resumable(np.arange(10), batch_size=2, shuffle=True, seed=1),
        same_batches,
    ),
    "hornbeam.base.reports.ExportReport": (lambda root: export.ExportReport(str(root), ["serve"]), same),
}


def pending(root: Path) -> Any:
    with held() as handle:
        pass
    return handle


#: Class → how to make one that says that it cannot be copied.
REFUSED: dict[str, Callable[[Path], Any]] = {"hornbeam.base.writer.Handle": pending}
#: TensorFlow's, copied or not as it decides.
KERAS_OWN = {"hornbeam.export.ExportArchive"}


def test_no_public_class_is_forgotten() -> None:
    raised = {name for name, item in public_classes().items() if issubclass(item, BaseException)}
    assert {*COPIED, *REFUSED, *KERAS_OWN} == public_classes().keys() - raised
    assert len(raised) >= 12


LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Thread, CheckpointManager)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", COPIED)
def test_what_is_copied(name: str, how: str, tmp_path: Path) -> None:
    make, compare = COPIED[name]
    original = make(tmp_path)
    assert isinstance(original, public_classes()[name])
    copied = COPIES[how](original)
    assert type(copied) is type(original)
    assert copied is not original
    assert compare(original, copied)
    for attribute, mine in getattr(original, "__dict__", {}).items():
        assert not isinstance(mine, LOCKS) or vars(copied)[attribute] is not mine, attribute


#: Every argument, with a value that is not its default.
ARGUMENTS: dict[type, dict[str, Any]] = {
    ModelCheckpoint: {
        "filepath": "{epoch}.weights.h5",
        "monitor": "loss",
        "verbose": 1,
        "save_best_only": True,
        "save_weights_only": True,
        "mode": "max",
        "save_freq": 7,
        "initial_value_threshold": 0.5,
        "asynchronous": True,
        "keep_last": 2,
        "keep_best": 3,
        "keep_every": 4,
        "every_seconds": 5.0,
        "durable": False,
        "save_on_exception": True,
        "save_on_signal": (signal.SIGTERM, signal.SIGINT),
        "remember": False,
        "timeout": None,
    },
    BackupAndRestore: {
        "backup_dir": "b",
        "save_freq": 7,
        "double_checkpoint": True,
        "delete_checkpoint": False,
        "seed": 3,
        "asynchronous": True,
        "durable": False,
        "timeout": 9.0,
    },
    CheckpointManager: {
        "directory": "c",
        "keep_last": 2,
        "keep_best": 3,
        "keep_every": 4,
        "monitor": "loss",
        "mode": "max",
        "save_weights_only": False,
        "asynchronous": True,
        "durable": False,
        "timeout": 9.0,
    },
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_copies_have_every_argument(kind: type, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parameters = inspect.signature(kind).parameters
    assert ARGUMENTS[kind].keys() == parameters.keys()
    assert [name for name, value in ARGUMENTS[kind].items() if value == parameters[name].default] == []
    original, plain = kind(**ARGUMENTS[kind]), kind(**dict(list(ARGUMENTS[kind].items())[:1]))
    copied = COPIES[how](original)
    work = {"_lock", "_manager", "_saved_at"}  # locks are anew, the manager is a copy, the time is that of the making
    assert vars(copied).keys() == vars(original).keys()
    assert {n: v for n, v in vars(copied).items() if n not in work} == {
        n: v for n, v in vars(original).items() if n not in work
    }
    if kind is BackupAndRestore:
        assert same_arguments(copied._manager, original._manager)
        assert not same_arguments(copied._manager, plain._manager)
    else:
        assert not same_arguments(copied, plain)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_refuses(name: str, how: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        COPIES[how](REFUSED[name](tmp_path))


@pytest.mark.backend("tensorflow", reason="tf.data")
@pytest.mark.parametrize("how", COPIES)
def test_datasets_refuse(how: str) -> None:
    import tensorflow as tf

    with pytest.raises(TypeError, match="neither copied nor pickled"):
        COPIES[how](resumable(tf.data.Dataset.range(4)))


@pytest.mark.parametrize("how", COPIES)
def test_errors_keep_what_they_say(how: str, tmp_path: Path) -> None:
    raised: list[BaseException] = []
    (tmp_path / "d").mkdir()
    (tmp_path / "m.keras").write_bytes(b"PK\x03\x04 no archive")
    for call in (
        lambda: _core.open(str(tmp_path / "none"), archive=True),
        lambda: _core.open(str(tmp_path / "m.keras"), archive=True),
        lambda: _core.write_file(str(tmp_path / "none" / "x"), b""),
        lambda: load_weights(small(), tmp_path / "m.keras", strict=True),
    ):
        with pytest.raises(errors.HornbeamError) as found:
            call()
        raised.append(found.value)
    for name, item in public_classes().items():
        if issubclass(item, errors.HornbeamError):
            raised.append(made := item(2, name) if issubclass(item, OSError) else item(name))
            made.path, made.entry = "m.keras", "layers/dense/vars/0"
    for builtin in (PermissionError, BlockingIOError, IsADirectoryError, OSError):
        raised.append(errors._storage_class(builtin)(13, "no"))
    for error in raised:
        copied = COPIES[how](error)
        assert type(copied) is type(error)
        assert (str(copied), copied.args, vars(copied)) == (str(error), error.args, vars(error))
    assert isinstance(raised[0], FileNotFoundError)
    with pytest.raises(AttributeError):
        errors.StorageNothing  # noqa: B018


def test_an_error_is_unpickled_where_none_of_its_kind_was_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as found:
        _core.open(str(tmp_path / "none"), archive=True)
    (tmp_path / "error").write_bytes(pickle.dumps(found.value))
    code = """
import pickle, sys
error = pickle.load(open(sys.argv[1], "rb"))
print(isinstance(error, FileNotFoundError), error.filename)
"""
    done = script(code, tmp_path / "error")
    assert done.stdout == f"True {tmp_path / 'none'}\n", done.stderr


# ---- copies of what is at work begin anew ----


@pytest.mark.trains
@pytest.mark.parametrize("how", COPIES)
def test_a_callback_copied_while_it_trains(how: str, tmp_path: Path) -> None:
    """The copy has nothing of the training, and trains for itself."""
    copies: list[Any] = []
    callback = ModelCheckpoint(
        tmp_path / "{epoch}.keras", asynchronous=True, keep_last=1, save_on_signal=(signal.SIGTERM,)
    )
    fit(model(), callback, At(6, lambda: copies.append(COPIES[how](callback))), epochs=2)
    (copied,) = copies
    assert (copied.history, copied.model, copied._handlers, copied._held) == ([], None, {}, None)
    assert len(callback.history) == 2
    before = signal.getsignal(signal.SIGTERM)
    copied.filepath = str(tmp_path / "other" / "{epoch}.keras")
    fit(model(), copied, epochs=3)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [Path(record["path"]).name for record in copied.history] == ["1.keras", "2.keras", "3.keras"]
    assert [name for name in os.listdir(tmp_path / "other") if name[0] != "."] == ["3.keras"]
    assert len(callback.history) == 2


@pytest.mark.trains
@pytest.mark.parametrize("how", COPIES)
def test_the_best_score_is_not_forgotten(how: str, tmp_path: Path) -> None:
    """As a copy of Keras' own: a worse model must not take the place of the best."""
    callback = ModelCheckpoint(tmp_path / "m.keras", "loss", save_best_only=True, keep_best=1, remember=False)
    fit(model(), callback)
    assert callback.best is not None
    assert COPIES[how](callback).best == callback.best


@pytest.mark.trains
@pytest.mark.parametrize("how", COPIES)
def test_a_backup_copied_while_it_trains(how: str, tmp_path: Path) -> None:
    copies: list[Any] = []
    callback = BackupAndRestore(tmp_path / "b", delete_checkpoint=False, asynchronous=True)
    fit(model(), callback, At(6, lambda: copies.append(COPIES[how](callback))), epochs=2)
    (copied,) = copies
    assert (copied.model, copied._others, copied._input) == (None, [], None)
    assert copied._manager is not callback._manager
    made = model()
    fit(made, copied, epochs=3)
    assert made.optimizer.iterations == 12  # 8 of them were restored


@pytest.mark.parametrize("how", COPIES)
def test_a_manager_copied_while_it_has_the_directory_reads(how: str, tmp_path: Path) -> None:
    made = small()
    with CheckpointManager(tmp_path, asynchronous=True, durable=False) as manager:
        manager.save(0, made, extra={"a": 1})
        copied = COPIES[how](manager)
        assert (copied._lock, copied._pending, copied.extra) == (None, None, {})
        manager.wait()
        assert [c.step for c in copied.all()] == [0]
        assert copied.restore(made) == 1
        with pytest.raises(errors.CheckpointError, match="in use"):
            copied.save(1, made)
    copied.save(1, made)
    copied.close()
    assert [c.step for c in manager.all()] == [0, 1]


@pytest.mark.parametrize("how", COPIES)
def test_data_copied_in_the_middle_go_on_by_themselves(how: str) -> None:
    rows = resumable(np.arange(8), batch_size=2)
    batches = iter(rows)
    next(batches)
    copied = COPIES[how](rows)
    assert [batch[0].tolist() for batch in copied] == [[2, 3], [4, 5], [6, 7]]
    assert [batch[0].tolist() for batch in batches] == [[2, 3], [4, 5], [6, 7]]


# ---- `import *` ----


def test_import_everything_hides_nothing_and_imports_little() -> None:
    code = """
import builtins, sys
before = dict(vars(builtins))
from hornbeam import *
assert open is builtins.open
assert not {"keras", "tensorflow", "jax", "torch", "numpy"} & sys.modules.keys()
assert {"install", "options", "wait", "Handle"} <= globals().keys()
import hornbeam
assert hornbeam.open is not open
print("done")
"""
    done = script(code)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("place", PUBLIC)
def test_no_name_is_that_of_a_builtin(place: str) -> None:
    found: dict[str, Any] = {}
    exec(f"from {place} import *", found)
    known = vars(builtins)
    hidden = {name for name, item in found.items() if name in known and item is not known[name]}
    assert hidden <= {"__builtins__", "__doc__", "__name__"}


def test_every_name_is_listed() -> None:
    assert {"open", "File", "CheckpointManager", "saving", "wait"} <= set(dir(hornbeam))
    for name in dir(hornbeam):
        assert getattr(hornbeam, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        hornbeam.nothing  # noqa: B018
