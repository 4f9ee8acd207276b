"""Files with a model's name that are something else: the error says what they are and what to do."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import hornbeam
import hornbeam.saving
from hornbeam.base import contents


@pytest.fixture(scope="module")
def model() -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((40,)), keras.layers.Dense(300, name="d")], name="m")


@pytest.fixture(scope="module")
def files(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model in every format, as bytes."""
    place = tmp_path_factory.mktemp("files")
    hornbeam.saving.save_model(model, place / "m.keras")
    hornbeam.saving.save_model(model, place / "m.h5")
    for name in ("m.weights.h5", "m.safetensors"):
        hornbeam.saving.save_weights(model, place / name)
    return {path.name: path.read_bytes() for path in place.iterdir()}


def _zip(**members: bytes) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return memory.getvalue()


def _tar(content: bytes) -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as archive:
        first = tarfile.TarInfo("README")  # HDF5 that came first would be HDF5 behind a user block
        first.size = 1
        archive.addfile(first, io.BytesIO(b"."))
        member = tarfile.TarInfo("m.keras")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return memory.getvalue()


def _npy() -> bytes:
    memory = io.BytesIO()
    np.save(memory, np.zeros(3))
    return memory.getvalue()


def _latest_hdf5() -> bytes:
    """A superblock of version 3, cut off."""
    memory = io.BytesIO()
    with h5py.File(memory, "w", libver="latest") as file:
        file["a"] = np.zeros(5000)
    return memory.getvalue()[:9000]


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 132735\n"
)
_TORCH_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
#: What it is → its content, and what the error must say of it and of what to do.
THINGS: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str, str]] = {
    "empty": (lambda _: b"", "empty", "download"),
    "LFS pointer": (lambda _: LFS, "Git LFS pointer", "git lfs pull"),
    "LFS pointer, Windows": (lambda _: LFS.replace(b"\n", b"\r\n"), "Git LFS pointer", "git lfs pull"),
    "half a zip": (lambda f: f["m.keras"][:20_000], "cut off", "download"),
    "start of a zip": (lambda f: f["m.keras"][:30], "cut off", "download"),
    "half an HDF5 file": (lambda f: f["m.h5"][:20_000], "cut off", "download"),
    "start of an HDF5 file": (lambda f: f["m.h5"][:8], "cut off", "download"),
    "half a newer HDF5 file": (lambda _: _latest_hdf5(), "cut off", "download"),
    "half a safetensors file": (lambda f: f["m.safetensors"][:20_000], "cut off", "download"),
    "start of a safetensors file": (lambda f: f["m.safetensors"][:20], "cut off", "download"),
    "zeros": (lambda _: bytes(10_000), "zeros", "download"),
    "gzip": (lambda f: gzip.compress(f["m.keras"]), "gzip", "gunzip"),
    "bzip2": (lambda _: b"BZh91AY&SY" + bytes(50), "bzip2", "bunzip2"),
    "xz": (lambda _: b"\xfd7zXZ\0\0\4" + bytes(50), "xz", "unxz"),
    "zstd": (lambda _: b"\x28\xb5\x2f\xfd" + bytes(50), "Zstandard", "unzstd"),
    "HTML": (lambda _: b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "HTML page", "Download the file"),
    "HTML after blanks": (lambda _: b"\n\n  <HTML><body>404</body></HTML>", "HTML page", "Download the file"),
    "XML": (lambda _: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML", "error message"),
    "JSON": (lambda _: b'{"error": "not found"}', "JSON", "error message"),
    "a model's JSON": (
        lambda _: json.dumps({"module": "keras", "class_name": "Sequential", "config": {}}).encode(),
        "JSON that describes a model",
        "model_from_json",
    ),
    "text": (lambda _: b"404: Not Found", "404: Not Found", "Open it"),
    "pickle": (lambda _: pickle.dumps({"a": 1}), "pickle", "code"),
    "old pickle": (lambda _: pickle.dumps({"a": 1}, 2), "pickle", "code"),
    "torch": (lambda _: _zip(**{"archive/data.pkl": b"", "archive/data/0": b""}), "PyTorch", "torch.load"),
    "old torch": (lambda _: _TORCH_OLD, "PyTorch", "torch.load"),
    "npz": (lambda _: _zip(**{"a.npy": _npy()}), "npz", "numpy.load"),
    "npy": (lambda _: _npy(), "NumPy", "numpy.load"),
    "zip of a directory": (lambda _: _zip(**{"a/saved_model.pb": b"", "a/b": b""}), "zip archive", "Unpack it"),
    "zip of a model": (lambda f: _zip(**{"inner/m.keras": f["m.keras"]}), "zip archive", "Unpack it"),
    "zip": (lambda _: _zip(**{"readme.txt": b"hello"}), "readme.txt", "path"),
    "ONNX": (lambda _: b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xa0\x01", "ONNX", "ONNX Runtime"),
    "TFLite": (lambda _: b"\x1c\0\0\0TFL3" + bytes(40), "TensorFlow Lite", "Interpreter"),
    "SavedModel's graph": (lambda _: b"\x08\x01\x12\xdf\x08\x0a" + bytes(40), "SavedModel", "directory"),
    "tar": (lambda f: _tar(f["m.h5"]), "tar archive", "tar xf"),
    "noise": (lambda _: bytes(range(255, 100, -1)) * 9, "no kind known here", "path of a model"),
}
#: Name → the call, and the exception that stock Keras raises there.
LOADS: dict[str, tuple[str, Callable[[Any, Any], Any], Any]] = {
    "model .keras": ("x.keras", lambda model, path: hornbeam.saving.load_model(path), (ValueError, KeyError)),
    "model .h5": ("x.h5", lambda model, path: hornbeam.saving.load_model(path), (OSError, ValueError)),
    "weights .keras": ("y.keras", hornbeam.saving.load_weights, (zipfile.BadZipFile, KeyError)),
    "weights .h5": ("y.h5", hornbeam.saving.load_weights, OSError),
    "weights .weights.h5": ("x.weights.h5", hornbeam.saving.load_weights, OSError),
    "weights .safetensors": ("x.safetensors", hornbeam.saving.load_weights, (OSError, ValueError)),
    "index": ("x.weights.json", hornbeam.saving.load_weights, ValueError),
    "open": ("x.keras", lambda model, path: hornbeam.open(path), hornbeam.HornbeamError),
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("thing", THINGS)
def test_the_error_says_what_it_is(files: dict[str, bytes], model: Any, tmp_path: Path, thing: str, load: str) -> None:
    make, what, advice = THINGS[thing]
    name, call, kind = LOADS[load]
    path = tmp_path / name
    path.write_bytes(make(files))
    before = [np.asarray(v).tobytes() for v in model.weights]
    with pytest.raises(kind) as caught:
        call(model, path)
    text = str(caught.value)
    assert what in text, text
    assert advice in text, text
    assert str(path) in text, text
    assert "File not found" not in text
    assert [np.asarray(v).tobytes() for v in model.weights] == before
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("thing", THINGS)
def test_in_a_file_object(files: dict[str, bytes], model: Any, thing: str) -> None:
    make, what, advice = THINGS[thing]
    for call in (hornbeam.saving.load_model, lambda file: hornbeam.saving.load_weights(model, file), hornbeam.open):
        with pytest.raises((ValueError, OSError, zipfile.BadZipFile, KeyError)) as caught:
            call(io.BytesIO(make(files)))
        assert what in str(caught.value)
        assert advice in str(caught.value)


#: What is given, under which name, and what the error says to do.
MISPLACED = [
    ("m.safetensors", "x.keras", "safetensors"),
    ("m.keras", "x.h5", "ends in `.keras`"),
    ("m.keras", "x.model", "ends in `.keras`"),
    ("m.safetensors", "x.model", "safetensors"),
    ("m.weights.h5", "x.keras", "load_weights"),
    ("m.weights.h5", "x.h5", "load_weights"),
]


@pytest.mark.parametrize(("name", "under", "says"), MISPLACED)
def test_models_and_weights_under_another_name(
    files: dict[str, bytes], tmp_path: Path, name: str, under: str, says: str
) -> None:
    path = tmp_path / under
    path.write_bytes(files[name])
    with pytest.raises((ValueError, OSError)) as caught:
        hornbeam.saving.load_model(path)
    assert says in str(caught.value)
    assert "File not found" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "under"),
    [
        ("m.keras", "x.weights.h5"),
        ("m.keras", "x.safetensors"),
        ("m.safetensors", "x.weights.h5"),
        ("m.h5", "x.safetensors"),
        ("m.weights.h5", "y.keras"),
        ("m.h5", "x.bin"),
    ],
)
def test_weights_under_another_name(files: dict[str, bytes], model: Any, tmp_path: Path, name: str, under: str) -> None:
    path = tmp_path / under
    path.write_bytes(files[name])
    with pytest.raises((ValueError, OSError, zipfile.BadZipFile), match=r"It is an? .*(archive|file)"):
        hornbeam.saving.load_weights(model, path)


def test_a_directory_and_a_pipe(model: Any, tmp_path: Path) -> None:
    place = tmp_path / "x.keras"
    place.mkdir()
    (place / "real.keras").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a directory.*'real.keras'"):
        hornbeam.saving.load_model(place)
    weights = tmp_path / "x.weights.h5"
    weights.mkdir()
    with pytest.raises(OSError, match="a directory"):
        hornbeam.saving.load_weights(model, weights)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.keras")  # nobody writes to it: opening it would wait for ever
        assert contents.identify(str(tmp_path / "pipe.keras")).what.startswith("no regular file")  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="no regular file"):
            hornbeam.saving.load_model(tmp_path / "pipe.keras")


def test_what_is_not_there_is_not_found(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="File not found"):
        hornbeam.saving.load_model(tmp_path / "x.keras")
    with pytest.raises(FileNotFoundError):
        hornbeam.saving.load_weights(model, tmp_path / "x.weights.h5")
    with pytest.raises(FileNotFoundError):
        hornbeam.open(tmp_path / "x.keras")


def test_good_files_are_left_alone(files: dict[str, bytes], tmp_path: Path) -> None:
    """`look` recognises them, and an error about something else says nothing of the content."""
    kinds = {"m.keras": "keras", "m.h5": "h5", "m.weights.h5": "h5", "m.safetensors": "safetensors"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert contents.identify(tmp_path / name).kind == kinds[name]  # type: ignore[union-attr]
        file = io.BytesIO(content)
        file.seek(7)
        assert contents.identify(file).kind == kinds[name]  # type: ignore[union-attr]
        assert file.tell() == 7
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    for name in files:
        with pytest.raises(ValueError, match="m") as caught:
            hornbeam.saving.load_weights(other, tmp_path / name)
        assert "It is a" not in str(caught.value)
    assert contents.identify(tmp_path / "nothing") is None
    assert contents.identify(3.5) is None


@pytest.mark.parametrize("name", ["x.weights.json", "x.safetensors.index.json", "directory"])
def test_a_part_of_many_files(model: Any, tmp_path: Path, name: str) -> None:
    """One of the shards, or the weights in a directory, as a clone without Git LFS has them."""
    if name == "directory":
        hornbeam.saving.save_model(model, tmp_path / name, zipped=False)
        calls = [lambda path: hornbeam.saving.load_model(path), hornbeam.open]
        part = tmp_path / name / "model.weights.h5"
    else:
        hornbeam.saving.save_weights(model, tmp_path / name, max_shard_size=1)
        calls = [lambda path: hornbeam.saving.load_weights(model, path), hornbeam.open]
        part = next(path for path in tmp_path.iterdir() if path.suffix != ".json")
    part.write_bytes(LFS)
    for call in calls:
        with pytest.raises((OSError, ValueError), match="git lfs pull") as caught:
            call(tmp_path / name)
        assert part.name in str(caught.value)
