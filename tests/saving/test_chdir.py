"""The process changes its directory in the middle of what outlives a call: relative paths mean what they did."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import hornbeam
from hornbeam.base import locations, writer
from hornbeam.callbacks import BackupAndRestore, ModelCheckpoint, best_checkpoint, latest_checkpoint
from hornbeam.checkpoint import CheckpointManager
from hornbeam.data import resumable
from hornbeam.export import ExportArchive, export
from hornbeam.saving import load_model, load_weights, save_model, save_weights
from support.training import fit
from support.training import model as trained
from support.writing import held, small


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Callable[[], None]]:
    """The directory that the process is in, and what leaves it for an empty one."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    return here, lambda: os.chdir(elsewhere)


Places = tuple[Path, Callable[[], None]]


def written(root: Path) -> dict[str, list[str]]:
    """What is in the two directories."""
    found = {name: sorted(os.listdir(root.parent / name)) for name in ("here", "elsewhere")}
    assert found["elsewhere"] == []
    return found


@pytest.mark.parametrize(("save", "name"), [(save_model, "m.keras"), (save_weights, "m.weights.h5")])
@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("kind", [str, Path])
def test_an_asynchronous_save(save: Any, name: str, atomic: bool, kind: Any, places: Places) -> None:
    here, leave = places
    model = small()
    with held(), hornbeam.options(atomic=atomic):
        handle = save(model, kind(name), asynchronous=True)
        leave()
    assert handle.result() == handle.path == str(here / name)
    assert written(here)["here"] == [name]
    load_weights(model, here / name, strict=True)


def test_who_reads_the_file_by_another_name_waits(places: Places) -> None:
    here, leave = places
    model = small()
    with held() as first:
        handle = save_model(model, "m.keras", asynchronous=True)
        leave()
        writer.wait_for(str(here / "other.keras"), loads=True)
        assert not first.done()
    load_model(here / "m.keras")
    assert handle.done()


def test_what_went_wrong_is_told_to_who_reads_it(places: Places) -> None:
    here, leave = places
    os.mkdir("d")
    with held():
        save_model(small(), "d/m.keras", asynchronous=True)
        leave()
        for left in (here / "d").iterdir():
            left.unlink()
    with pytest.raises(OSError, match=r"m\.keras"):
        load_model(here / "d" / "m.keras")


def test_two_dots_behind_a_link_are_where_the_system_says(places: Places, tmp_path: Path) -> None:
    here, leave = places
    (tmp_path / "far" / "deep").mkdir(parents=True)
    os.symlink(tmp_path / "far" / "deep", "link")
    model = small()
    with held():
        handle = save_model(model, "link/../m.keras", asynchronous=True)
        leave()
    handle.result()
    assert sorted(os.listdir(tmp_path / "far")) == ["deep", "m.keras"]
    os.chdir(here)
    with hornbeam.open("link/../m.keras") as file:
        os.chdir(tmp_path)
        assert len(file) == 4
        assert file.tensors[next(iter(file))].read().size


@pytest.mark.trains
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("pattern", ["m-{epoch}.keras", "d/{epoch}/m.weights.h5", "best.keras"])
def test_model_checkpoint(asynchronous: bool, pattern: str, places: Places) -> None:
    here, leave = places
    once = {"save_best_only": True, "monitor": "loss"} if pattern == "best.keras" else {}
    callback = ModelCheckpoint(
        pattern, asynchronous=asynchronous, keep_last=2, save_weights_only=pattern.endswith(".h5"), **once
    )
    leaves = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: leave() if epoch == 1 else None)
    fit(trained(), callback, leaves, epochs=3)
    expected = [str(here / pattern.format(epoch=epoch)) for epoch in (2, 3)]
    assert [record["path"] for record in callback.history][-2:] == expected
    assert all(os.path.exists(path) for path in expected)
    assert latest_checkpoint(here / pattern) == expected[-1]
    deleted = pattern.format(epoch=1).removeprefix("d/")  # relative to where the account is
    assert callback.history[-1]["deleted"] == ([] if once else [deleted])
    assert os.listdir(here.parent / "elsewhere") == []
    if once:
        assert best_checkpoint(here / pattern) == str(here / pattern)


@pytest.mark.trains
def test_model_checkpoint_saves_what_was_interrupted_beside_the_others(places: Places) -> None:
    here, leave = places
    callback = ModelCheckpoint("m.keras", save_on_exception=True)

    def fail(batch: int, logs: Any) -> None:
        leave()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(trained(), callback, keras.callbacks.LambdaCallback(on_train_batch_end=fail))
    assert "m-interrupted.keras" in written(here)["here"]


@pytest.mark.trains
def test_model_checkpoint_in_a_directory_with_braces(places: Places) -> None:
    """The directory is no pattern."""
    here, leave = places
    os.mkdir("{epoch}")
    os.chdir("{epoch}")
    callback = ModelCheckpoint("m-{epoch}.keras", keep_last=1)
    leave()
    fit(trained(), callback, epochs=2)
    assert [name for name in os.listdir(here / "{epoch}") if name[0] != "."] == ["m-2.keras"]


@pytest.mark.trains
def test_as_keras_has_it_the_directory_is_that_of_the_save(places: Places) -> None:
    here, leave = places
    callback = ModelCheckpoint("m.keras")
    leave()
    fit(trained(), callback)
    assert os.listdir(here.parent / "elsewhere") == ["m.keras"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoint_manager(asynchronous: bool, places: Places) -> None:
    here, leave = places
    model = small()
    with CheckpointManager("c", asynchronous=asynchronous, keep_last=2) as manager:
        manager.save(0, model)
        leave()
        for step in (1, 2):
            manager.save(step, model)
        manager.wait()
        assert [c.path for c in manager.all()] == [here / "c" / f"step-0000000{i}" for i in (1, 2)]
        assert manager.restore(model) == 3
        manager.latest().check()  # type: ignore[union-attr]
    written(here)
    with CheckpointManager(here / "c") as manager:
        manager.delete_all()
    assert written(here)["here"] == []


@pytest.mark.trains
@pytest.mark.parametrize("asynchronous", [False, True])
def test_backup_and_restore(asynchronous: bool, places: Places) -> None:
    here, leave = places
    callback = BackupAndRestore("b", delete_checkpoint=False, asynchronous=asynchronous)
    leaves = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: leave() if epoch == 1 else None)
    fit(trained(), callback, leaves, epochs=3)
    assert callback.backup_dir == str(here / "b")
    assert written(here)["here"] == ["b"]
    made = trained()
    made.fit(*data(made), epochs=3, callbacks=[BackupAndRestore(here / "b")], verbose=0)
    assert made.optimizer.iterations == 12  # none was trained again
    assert written(here)["here"] == []


def data(model: Any) -> tuple[Any, Any]:
    return np.ones((32, *model.input_shape[1:]), "float32"), np.ones((32, *model.output_shape[1:]), "float32")


def test_a_file_object_that_is_open_stands_for_its_file(places: Places) -> None:
    here, leave = places
    save_model(small(), "m.keras")
    with open("m.keras", "rb") as stream, hornbeam.open(stream) as file:
        leave()
        assert file.path == str(here / "m.keras")
        assert file["layers/dense/vars/0"].ndim == 2


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5", "m.h5", "m.safetensors", "m.weights.json", "m"])
def test_an_open_file(name: str, mmap: bool, places: Places) -> None:
    """Tensors, configuration, checksum, pickles: all that is read later."""
    import pickle

    _here, leave = places
    model = small()
    if name == "m.weights.json":
        save_weights(model, name, max_shard_size=1e-7)
    elif name.endswith((".keras", "m.h5")) or name == "m":
        save_model(model, name, **({"zipped": False} if name == "m" else {}))
    else:
        save_weights(model, name)
    with hornbeam.open(name, mmap=mmap) as file:
        leave()
        read = {key: file[key] for key in file}
        assert sum(array.size for array in read.values()) >= sum(np.prod(v.shape) for v in model.variables)
        assert (file.config is not None) == (name in ("m.keras", "m.h5", "m"))
        assert file.verify() == ("verified" if name == "m.keras" else "none")
        with pickle.loads(pickle.dumps(file)) as again:
            assert {key: array.tobytes() for key, array in again.items()} == {k: a.tobytes() for k, a in read.items()}


@pytest.mark.trains
def test_resumable_data(places: Places) -> None:
    """It holds no path."""
    here, leave = places
    rows = resumable(np.arange(8), batch_size=2)
    next(iter(rows))
    state = rows.get_state()
    leave()
    rows.set_state(state)
    assert [batch[0].tolist() for batch in rows] == [[2, 3], [4, 5], [6, 7]]
    written(here)


@pytest.mark.backend("tensorflow", reason="exports are TensorFlow's")
@pytest.mark.parametrize("archive", [False, True])
def test_an_export(places: Places, archive: bool) -> None:
    """Whatever runs while it is traced may change the directory."""
    here, leave = places

    class Leaves(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            leave()
            return x * 2

    inputs = keras.Input((4,))
    model = keras.Model(inputs, Leaves()(inputs))
    os.chdir(here)
    if archive:
        endpoints = ExportArchive()
        endpoints.track(model)
        endpoints.add_endpoint("serve", model.call, [keras.InputSpec(shape=(None, 4), dtype="float32")])
        endpoints.write_out("artifact", verbose=False)
    else:
        export(model, "artifact", verbose=False)
    assert written(here)["here"] == ["artifact"]


@pytest.mark.backend("tensorflow", reason="SavedModels are TensorFlow's")
def test_a_savedmodel(places: Places) -> None:
    """Its report says where it is from the root."""
    here, leave = places
    save_model(small(), "artifact")
    leave()
    assert hornbeam.last_report("save").path == str(here / "artifact")
    assert written(here)["here"] == ["artifact"]


def test_a_save_that_the_user_refuses(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    here, leave = places
    save_weights(small(), "m.weights.h5")
    monkeypatch.setattr("keras.src.utils.io_utils.ask_to_proceed_with_overwrite", lambda _: False)
    handle = save_weights(small(), "m.weights.h5", overwrite=False, asynchronous=True)
    leave()
    assert handle.path == str(here / "m.weights.h5")
    assert isinstance(handle.exception(), CancelledError)


def test_remote_paths_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert locations.absolute("gs://bucket/m.keras") == "gs://bucket/m.keras"
    assert locations.absolute(b"m.keras") == str(tmp_path / "m.keras")
    assert locations.absolute("./a//m.keras") == str(tmp_path / "a" / "m.keras")
    assert locations.absolute("a/../m.keras") == f"{tmp_path}/a/../m.keras"
