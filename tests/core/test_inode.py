"""Files that a caller has open: what he saves to their path is what he reads through them."""

from __future__ import annotations

import json
import logging
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import hornbeam
from hornbeam.saving import load_weights, save_model, save_weights
from support.helpers import script


@pytest.fixture(autouse=True)
def _installed() -> Any:
    with hornbeam.installed(), hornbeam.options(fallback=False):
        yield


def build(value: float = 1.0) -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    for variable in model.variables:
        variable.assign(np.full(variable.shape, value, "float32"))
    return model


def _asynchronously(save: Callable[..., Any]) -> Callable[[Any, str], None]:
    def run(model: Any, path: str) -> None:
        save(model, path, asynchronous=True).result()

    return run


SAVES: list[tuple[str, Callable[[Any, str], Any]]] = [
    (".keras", lambda m, p: m.save(p)),
    (".keras", save_model),
    (".keras", _asynchronously(save_model)),
    (".h5", lambda m, p: m.save(p)),
    (".weights.h5", lambda m, p: m.save_weights(p)),
    (".weights.h5", _asynchronously(save_weights)),
    (".weights.json", lambda m, p: m.save_weights(p, max_shard_size=1)),
    (".safetensors", save_weights),
]


def check(suffix: str, content: bytes, value: float, beside: Path) -> None:
    """Whether the content is a whole file of a model with these values."""
    if suffix == ".weights.json":
        assert "weight_map" in json.loads(content)
        return
    path = beside / f"copy{suffix}"
    path.write_bytes(content)
    if suffix in (".keras", ".h5"):
        found = keras.saving.load_model(path)
    else:
        found = build(0)
        load_weights(found, path)
    assert {float(v) for w in found.get_weights() for v in np.unique(w)} == {value}


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize(("suffix", "save"), SAVES)
def test_what_is_saved_to_a_named_temporary_file_is_read_through_it(
    suffix: str, save: Callable[[Any, str], Any], durable: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        hornbeam.options(durable=durable),
        caplog.at_level(logging.WARNING, "hornbeam"),
        tempfile.NamedTemporaryFile(dir=tmp_path, suffix=suffix) as file,
    ):
        inode = os.stat(file.name).st_ino
        save(build(), file.name)
        file.seek(0)
        content = file.read()
        assert os.stat(file.name).st_ino == inode
        assert content == Path(file.name).read_bytes() != b""
        check(suffix, content, 1.0, tmp_path)
        assert "wrote over" not in caplog.text  # there was nothing to lose
        if sys.platform.startswith("linux"):  # no longer empty, and still open
            save(build(2), file.name)
            file.seek(0)
            check(suffix, file.read(), 2.0, tmp_path)
            assert os.stat(file.name).st_ino == inode
            assert ("open for writing" in caplog.text) == (suffix != ".weights.json")  # an old index is emptied first
    assert not list(tmp_path.glob(".*hornbeam*"))


def test_a_descriptor_of_mkstemp_reads_what_is_saved(tmp_path: Path) -> None:
    descriptor, name = tempfile.mkstemp(dir=tmp_path, suffix=".keras")
    try:
        build().save(name)
        check(".keras", os.pread(descriptor, os.fstat(descriptor).st_size, 0), 1.0, tmp_path)
    finally:
        os.close(descriptor)


def test_readers_and_maps_keep_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    build(1).save(path)
    old = path.read_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        held = hornbeam.open(path)
        build(2).save(path)
        assert (file.read(), mapped[:]) == (old, old)
        assert path.read_bytes() != old
        assert all(float(v) == 1.0 for name in held for v in np.unique(held[name]))


def test_a_save_that_fails_leaves_an_empty_file_empty(tmp_path: Path) -> None:
    class Broken(layers.Dense):
        def get_config(self) -> Any:
            raise RuntimeError("on purpose")

    model = keras.Sequential([keras.Input((3,)), Broken(2)])
    with tempfile.NamedTemporaryFile(dir=tmp_path, suffix=".keras") as file:
        with pytest.raises(RuntimeError, match="on purpose"):
            model.save(file.name)
        assert os.fstat(file.fileno()).st_size == 0
        assert os.listdir(tmp_path) == [os.path.basename(file.name)]


STICKY = r"""
import logging, os, sys
import keras
from keras import layers
import hornbeam
hornbeam.install()

root = sys.argv[1]
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger("hornbeam").addHandler(Keep())
model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
paths = [os.path.join(root, name) for name in ("m.keras", "m.weights.h5", "m.h5")]
for path in paths:
    with open(path, "wb") as file:
        file.write(b"of another owner")
    os.chmod(path, 0o666)
    os.chown(path, 12345, 12345)
os.chmod(root, 0o1777)
before = {path: os.stat(path) for path in paths}
os.setegid(65534)
os.seteuid(65534)
for path in paths:
    with hornbeam.options(fallback=False):
        (model.save_weights if ".weights" in path else model.save)(path)
    now = os.stat(path)
    assert (now.st_ino, now.st_uid, now.st_mode) == (before[path].st_ino, 12345, before[path].st_mode), now
    assert any(path in r and "directory" in r for r in records), records
    assert not [r for r in records if "could not be kept" in r], records
assert sorted(os.listdir(root)) == sorted(map(os.path.basename, paths)), os.listdir(root)
# Where it may be replaced but not given away, that is told.
os.seteuid(0)
os.setegid(0)
os.chmod(root, 0o777)
os.setegid(65534)
os.seteuid(65534)
records.clear()
model.save(paths[0])
now = os.stat(paths[0])
assert now.st_ino != before[paths[0]].st_ino and now.st_uid == 65534
assert any("owner or group could not be kept" in r for r in records), records
print("all of it")
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root makes files of other owners")
def test_a_file_of_another_owner_in_a_sticky_directory_is_written_over() -> None:
    root = tempfile.mkdtemp()  # one that others can reach
    try:
        os.chmod(root, 0o755)
        place = os.path.join(root, "sticky")
        os.mkdir(place)
        done = script(STICKY, place)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "all of it" in done.stdout
    finally:
        shutil.rmtree(root)
