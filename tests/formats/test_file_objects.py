"""Every public save and load with every kind of path and file object, in every format, by import swap and install()."""

from __future__ import annotations

import contextlib
import gzip
import io
import mmap
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import hornbeam
import hornbeam.models
import hornbeam.saving
from hornbeam.errors import UnsupportedError
from support.helpers import saved


class Place:
    """A path that is no `str` and no `pathlib.Path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


class Nameless(io.RawIOBase):
    """A raw stream without a name, as sockets and cloud storage give them."""

    def __init__(self, content: bytes = b"") -> None:
        self.memory = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.memory.readinto(buffer)

    def write(self, data: Any) -> int:
        return self.memory.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.memory.seek(offset, whence)

    def tell(self) -> int:
        return self.memory.tell()

    def truncate(self, size: int | None = None) -> int:
        return self.memory.truncate(size)


class Once(Nameless):
    """A pipe: neither goes back."""

    def seekable(self) -> bool:
        return False

    def seek(self, offset: int, whence: int = 0) -> int:
        raise io.UnsupportedOperation("seek")

    def tell(self) -> int:
        raise io.UnsupportedOperation("tell")


class Duck:
    """No class of `io`; nothing but what is needed."""

    def __init__(self, content: bytes = b"") -> None:
        self.memory = io.BytesIO(content)
        self.read, self.write = self.memory.read, self.memory.write
        self.seek, self.tell = self.memory.seek, self.memory.tell


SUFFIXES = {"keras": ".keras", "h5": ".h5", "weights": ".weights.h5", "safetensors": ".safetensors"}


def _model(seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    keras.utils.clear_session()
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def _weights(model: Any) -> list[bytes]:
    return [np.asarray(v).tobytes() for v in model.weights]


@contextlib.contextmanager
def _kept(file: Any) -> Iterator[Any]:
    yield file
    assert not getattr(file, "closed", False)


class Silent(Duck):
    """Its `seek` says nothing, like that of TensorFlow's files."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        seek = self.seek
        self.seek = lambda *rest: [seek(*rest)].clear()  # type: ignore[assignment]


#: Kind → what a load gets for a path.
SOURCES: dict[str, Callable[[Path], Any]] = {
    "str": lambda path: contextlib.nullcontext(str(path)),
    "Path": lambda path: contextlib.nullcontext(path),
    "bytes": lambda path: contextlib.nullcontext(os.fsencode(path)),
    "PathLike": lambda path: contextlib.nullcontext(Place(path)),
    "open": lambda path: path.open("rb"),
    "unbuffered": lambda path: path.open("rb", buffering=0),
    "open for both": lambda path: path.open("r+b"),
    "descriptor": lambda path: os.fdopen(os.open(path, os.O_RDONLY), "rb"),
    "BytesIO": lambda path: _kept(io.BytesIO(path.read_bytes())),
    "nameless": lambda path: _kept(io.BufferedReader(Nameless(path.read_bytes()))),
    "nameless raw": lambda path: _kept(Nameless(path.read_bytes())),
    "pipe": lambda path: _kept(io.BufferedReader(Once(path.read_bytes()))),
    "duck": lambda path: _kept(Duck(path.read_bytes())),
    "silent": lambda path: _kept(Silent(path.read_bytes())),
    "temporary": lambda path: _filled(tempfile.NamedTemporaryFile(), path),  # noqa: SIM115
    "spooled": lambda path: _filled(tempfile.SpooledTemporaryFile(max_size=64), path),  # noqa: SIM115
    "mmap": lambda path: mmap.mmap(os.open(path, os.O_RDONLY), 0, access=mmap.ACCESS_READ),
    "member": lambda path: _member(path),
}
#: All by import swap, some of them under install(), which differs further outside only.
CASES = [("import swap", kind) for kind in SOURCES]
CASES += [("install", kind) for kind in ("bytes", "PathLike", "open", "BytesIO", "nameless", "pipe")]


def _filled(file: Any, path: Path) -> Any:
    file.write(path.read_bytes())  # and stays at its end
    return file


def _member(path: Path) -> Any:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.write(path, "inner")
    return zipfile.ZipFile(memory).open("inner")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    place, model = tmp_path_factory.mktemp("given"), _model(1)
    hornbeam.saving.save_model(model, place / "m.keras")
    hornbeam.saving.save_model(model, place / "m.h5")
    hornbeam.saving.save_weights(model, place / "m.weights.h5")
    hornbeam.saving.save_weights(model, place / "m.safetensors")
    return place, model


@pytest.fixture(params=["import swap", "install"])
def api(request: pytest.FixtureRequest) -> Iterator[dict[str, Callable[..., Any]]]:
    """The public functions."""
    if request.param == "import swap":
        yield {
            "save_model": hornbeam.saving.save_model,
            "load_model": hornbeam.models.load_model,
            "save_weights": hornbeam.saving.save_weights,
            "load_weights": hornbeam.saving.load_weights,
        }
        return
    with hornbeam.installed(), hornbeam.options(fallback=False):
        yield {
            "save_model": lambda model, *rest, **named: model.save(*rest, **named),
            "load_model": keras.models.load_model,
            "save_weights": lambda model, *rest, **named: model.save_weights(*rest, **named),
            "load_weights": lambda model, *rest, **named: model.load_weights(*rest, **named),
        }


@pytest.mark.parametrize(("api", "kind"), CASES, indirect=["api"])
@pytest.mark.parametrize("form", ["keras", "h5"])
def test_load_model(given: tuple[Path, Any], api: dict[str, Any], form: str, kind: str) -> None:
    place, model = given
    with SOURCES[kind](place / f"m{SUFFIXES[form]}") as source:
        assert saved(api["load_model"](source)) == saved(model)


@pytest.mark.parametrize(("api", "kind"), CASES, indirect=["api"])
@pytest.mark.parametrize("form", SUFFIXES)
def test_load_weights(given: tuple[Path, Any], api: dict[str, Any], form: str, kind: str) -> None:
    place, expected = given
    model = _model(2)
    with SOURCES[kind](place / f"m{SUFFIXES[form]}") as source:
        api["load_weights"](model, source)
    assert _weights(model) == _weights(expected)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("form", SUFFIXES)
def test_open(given: tuple[Path, Any], form: str, kind: str) -> None:
    place, _ = given
    path = place / f"m{SUFFIXES[form]}"
    with hornbeam.open(path) as expected, SOURCES[kind](path) as source, hornbeam.open(source) as file:
        assert dict(file.attributes()) == dict(expected.attributes())
        assert {name: array.tobytes() for name, array in file.items()} == {n: a.tobytes() for n, a in expected.items()}
        assert (file.format, file.config, file.metadata) == (expected.format, expected.config, expected.metadata)
        assert file.verify() == expected.verify()


@pytest.mark.parametrize("form", ["keras", "h5"])
def test_reports_and_requests(given: tuple[Path, Any], form: str) -> None:
    """Partial loads work from file objects too; a report has no path then."""
    place, expected = given
    model = _model(2)
    before = _weights(model)
    content = io.BytesIO((place / f"m{SUFFIXES[form]}").read_bytes())
    report = hornbeam.saving.load_weights(model, content, only=f"{model.layers[0].name}/*")
    assert report.path is None
    assert _weights(model) == _weights(expected)[:2] + before[2:]
    hornbeam.saving.load_model(content)
    assert hornbeam.last_report("load").path is None  # type: ignore[union-attr]


#: Kind → a file object to write to, and what it holds afterwards.
TARGETS: dict[str, Callable[[Path], tuple[Any, Callable[[], bytes]]]] = {
    "BytesIO": lambda path: (file := io.BytesIO(), lambda: file.getvalue()),
    "longer BytesIO": lambda path: (file := io.BytesIO(b"x" * 200_000), lambda: file.getvalue()),
    "nameless": lambda path: (file := io.BufferedRandom(Nameless()), lambda: (file.seek(0), file.read())[1]),
    "nameless raw": lambda path: (file := Nameless(), lambda: file.memory.getvalue()),
    "pipe": lambda path: (file := Once(), lambda: file.memory.getvalue()),
    "duck": lambda path: (file := Duck(), lambda: file.memory.getvalue()),
    "temporary": lambda path: (file := tempfile.NamedTemporaryFile(), lambda: (file.seek(0), file.read())[1]),  # noqa: SIM115
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", ["keras", "weights"])
def test_save_without_a_name(
    given: tuple[Path, Any], tmp_path: Path, api: dict[str, Any], form: str, kind: str
) -> None:
    """A model becomes a `.keras` archive, weights `.weights.h5`; the object stays open, at the end of it."""
    _, model = given
    file, content = TARGETS[kind](tmp_path / "x")
    api["save_model" if form == "keras" else "save_weights"](model, file)
    if kind != "pipe":
        assert file.tell() == len(content())
    path = tmp_path / f"m{SUFFIXES[form]}"
    path.write_bytes(content())
    loaded = _model(2)
    loaded.load_weights(path)  # stock Keras
    assert _weights(loaded) == _weights(model)


@pytest.mark.parametrize("suffix", SUFFIXES.values())
@pytest.mark.parametrize("mode", ["wb", "w+b", "r+b"])
def test_save_by_name(given: tuple[Path, Any], tmp_path: Path, api: dict[str, Any], suffix: str, mode: str) -> None:
    _, model = given
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"x" * 100_000)  # "r+b" writes over it
    with path.open(mode) as file:
        api["save_model" if suffix in (".keras", ".h5") else "save_weights"](model, file)
        file.flush()
        assert file.tell() == os.fstat(file.fileno()).st_size > 2000  # nothing of the old content
        assert not file.closed
    loaded = _model(2)
    hornbeam.saving.load_weights(loaded, path, strict=suffix != ".h5")
    assert _weights(loaded) == _weights(model)
    if suffix in (".keras", ".h5"):
        assert saved(hornbeam.saving.load_model(path)) == saved(model)


@pytest.mark.parametrize("kind", ["str", "Path", "bytes", "PathLike"])
@pytest.mark.parametrize("form", SUFFIXES)
def test_save_to_paths(given: tuple[Path, Any], tmp_path: Path, api: dict[str, Any], form: str, kind: str) -> None:
    _, model = given
    path = tmp_path / f"ü{SUFFIXES[form]}"
    with SOURCES[kind](path) as target:
        api["save_model" if form in ("keras", "h5") else "save_weights"](model, target)
        again = _model(2)
        api["load_weights"](again, target)
    assert os.listdir(tmp_path) == [path.name]
    assert _weights(again) == _weights(model)


def test_save_format_and_compression(given: tuple[Path, Any]) -> None:
    _, model = given
    file = io.BytesIO()
    hornbeam.saving.save_model(model, file, save_format="h5", compression="gzip")
    assert file.getvalue().startswith(b"\x89HDF")
    assert saved(hornbeam.saving.load_model(file)) == saved(model)
    file = io.BytesIO()
    hornbeam.saving.save_model(model, file, include_optimizer=False, dtype="float16")
    assert hornbeam.last_report("save").path is None  # type: ignore[union-attr]
    assert len(hornbeam.saving.load_model(file).weights) == 4
    file = io.BytesIO()
    hornbeam.saving.save_weights(model, file, compression=9)
    assert hornbeam.saving.load_weights(_model(2), file, strict=True).complete


def test_what_only_goes_forward(given: tuple[Path, Any]) -> None:
    """A `GzipFile` says that it can seek, but goes back for nobody."""
    _, model = given
    memory = io.BytesIO()
    with gzip.GzipFile(fileobj=memory, mode="wb") as file:
        hornbeam.saving.save_weights(model, file)
    memory.seek(0)
    loaded = _model(2)
    with gzip.GzipFile(fileobj=memory) as file:
        hornbeam.saving.load_weights(loaded, file)
    assert _weights(loaded) == _weights(model)


def test_saving_lib_itself(given: tuple[Path, Any]) -> None:
    """The reported case: a reader over a stream without a name."""
    from keras.src.saving import saving_lib

    place, model = given
    with hornbeam.installed():
        reader = io.BufferedReader(Nameless((place / "m.keras").read_bytes()))
        assert saved(saving_lib.load_model(reader)) == saved(model)


def test_a_failed_save_leaves_memory_as_it_was(given: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from hornbeam.flows import saves

    _, model = given
    file = io.BytesIO(b"old")

    def fails(*_: Any) -> Any:
        raise OSError("no")

    monkeypatch.setattr(saves.progress, "watch", fails)
    with pytest.raises(OSError, match="no"):
        hornbeam.saving.save_weights(model, file)
    assert (file.getvalue(), file.tell()) == (b"old", 0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model, file: hornbeam.saving.save_model(model, file, zipped=False), "one file, not as a directory"),
        (lambda model, file: hornbeam.saving.save_model(model, file, save_format="tf"), "one file, not as a directory"),
        (lambda model, file: hornbeam.saving.save_model(model, file, save_format="x"), "save_format"),
        (lambda model, file: hornbeam.saving.save_model(model, file, unknown=1), "not supported"),
        (lambda model, file: hornbeam.saving.save_weights(model, file, max_shard_size=1), "several files"),
        (lambda model, file: hornbeam.saving.save_model(model, file, asynchronous=True), "a file object"),
        (lambda model, file: hornbeam.saving.save_weights(model, file, asynchronous=True), "a file object"),
        (lambda model, file: hornbeam.saving.save_weights(model, _at(file, 3)), "at byte 3"),
        (lambda model, file: hornbeam.saving.save_model(model, io.StringIO()), "open for text"),
        (lambda model, file: hornbeam.saving.load_model(io.StringIO("x")), "open for text"),
        (lambda model, file: hornbeam.saving.load_weights(model, io.StringIO("x")), "open for text"),
        (lambda model, file: hornbeam.open(io.StringIO("x")), "open for text"),
        (lambda model, file: hornbeam.open(file, mmap=True), "map"),
        (lambda model, file: hornbeam.saving.load_model(_closed()), "closed file"),
        (lambda model, file: hornbeam.saving.save_model(model, _closed()), "closed file"),
        (lambda model, file: hornbeam.saving.save_model(model, io.BufferedReader(Nameless())), "not open to write"),
        (lambda model, file: hornbeam.saving.load_model(io.BufferedWriter(Nameless())), "not open to read"),
        (lambda model, file: hornbeam.saving.save_model(model, _appending()), "only appends"),
        (lambda model, file: hornbeam.saving.save_weights(model, _appending()), "only appends"),
        (lambda model, file: hornbeam.saving.save_weights(model, Duck(bytes(100_000))), "cannot be cut"),
        (lambda model, file: hornbeam.saving.load_weights(model, file), "empty"),
        (lambda model, file: hornbeam.saving.load_model(file), "empty"),
        (lambda model, file: hornbeam.saving.load_weights(model, io.BytesIO(b'{"weight_map": {}}')), "pass its path"),
    ],
)
def test_what_cannot_be_done(given: tuple[Path, Any], call: Callable[..., Any], says: str) -> None:
    _, model = given
    file = io.BytesIO()
    with pytest.raises(ValueError, match=says):
        call(model, file)
    assert file.getvalue() in (b"", b"\0\0\0")


def _at(file: io.BytesIO, position: int) -> io.BytesIO:
    file.write(b"\0" * position)
    return file


def _appending() -> Any:
    return tempfile.NamedTemporaryFile("ab")


def _closed() -> io.BytesIO:
    file = io.BytesIO()
    file.close()
    return file


def test_weights_by_a_name_that_keras_refuses(given: tuple[Path, Any], tmp_path: Path) -> None:
    _, model = given
    for name in ("m.keras", "m.h5", "m.weights.json"):
        with (tmp_path / name).open("wb") as file, pytest.raises(ValueError, match="must end in"):
            hornbeam.saving.save_weights(model, file)
        assert (tmp_path / name).read_bytes() == b""


def test_arguments_that_do_not_fit_the_content(given: tuple[Path, Any]) -> None:
    """As for paths."""
    place, _ = given
    model = _model(2)
    for form, named in [("weights", {"by_name": True}), ("keras", {"objects_to_skip": [model.layers[0]]})]:
        content = io.BytesIO((place / f"m{SUFFIXES[form]}").read_bytes())
        with hornbeam.installed(), pytest.raises(ValueError, match="only supports loading"):
            model.load_weights(content, **named)
    content = io.BytesIO((place / "m.weights.h5").read_bytes())
    before = _weights(model)
    with hornbeam.installed():
        model.load_weights(content, objects_to_skip=[model.layers[0]])
    assert _weights(model)[:2] == before[:2]
    assert _weights(model)[2:] != before[2:]


def test_an_open_file_of_a_file_object_is_no_path(given: tuple[Path, Any]) -> None:
    import pickle

    place, _ = given
    with hornbeam.open(io.BytesIO((place / "m.keras").read_bytes())) as file:
        assert file.path is None
        assert "file object" in repr(file) or "BytesIO" in repr(file)
        with pytest.raises((TypeError, UnsupportedError), match="pickled"):
            pickle.dumps(file)
        with pytest.raises(KeyError, match="nearest"):
            file["layers/dense/vars/00"]
