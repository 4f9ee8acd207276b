"""Bad input and failing saves: the right exception, a model and an old file as they were, nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from keras.src.saving import saving_lib

import hornbeam
from hornbeam.errors import ArchiveError, ChecksumError, HornbeamError, StorageError, WeightsFileError
from support.helpers import saved, state
from support.zoo import chain, floats

WEIGHTS = "model.weights.h5"
NOBODY = 65_534


def small() -> Any:
    return chain(layers.Dense(40, name="first"), layers.Dense(30, name="middle"), layers.Dense(20, name="last"))


def failure(action: Callable[[], Any]) -> BaseException:
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("it succeeded")


def fails_like_stock(action: Callable[[], Any], *, own: bool) -> BaseException:
    """Runs `action` with stock Keras and with hornbeam; both must fail alike. Gives hornbeam's exception."""
    stock = failure(action)
    hornbeam.stats(reset=True)
    with hornbeam.installed():
        ours = failure(action)
    stats = hornbeam.stats()
    assert not stats.handovers
    assert (stats.saves, stats.loads) == (0, 0)
    assert isinstance(ours, HornbeamError) == own, repr(ours)
    python = next(c for c in type(stock).__mro__ if c.__module__ in ("builtins", "zipfile"))
    assert isinstance(ours, python), f"stock: {stock!r}, ours: {ours!r}"
    return ours


def tells(error: BaseException, path: Path | None = None) -> None:
    """The message is one for people: a sentence on what happened, and where it is known."""
    text = str(error)
    assert len(text) > 20
    if path is not None:
        assert getattr(error, "path", None) == str(path)
        assert str(path) in text


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that anybody may use, and that is only listed by the test's own files."""
    root = Path(tempfile.mkdtemp(prefix="hornbeam-test-"))
    root.chmod(0o777)
    yield root
    for path in [root, *root.rglob("*")]:
        if path.is_dir():
            path.chmod(0o777)
    shutil.rmtree(root)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions mean nothing to root, so root is somebody else meanwhile."""
    root = os.geteuid() == 0
    if root:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
            os.setegid(0)


@pytest.fixture(params=["stock", "ours"])
def archive(request: pytest.FixtureRequest, place: Path) -> tuple[Any, Path]:
    model, path = small(), place / "m.keras"
    with hornbeam.installed() if request.param == "ours" else hornbeam.options():
        model.save(path)
    return model, path


# ---- reading ----


def extent(path: Path, name: str) -> tuple[int, int]:
    """Where a stored member's bytes are in the archive."""
    with zipfile.ZipFile(path) as file:
        data = file.read(name)
    start = path.read_bytes().index(data)
    return start, len(data)


def tensor_at(path: Path, name: str) -> int:
    """Where a dataset's values are in the archive, or the weights file."""
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as file, file.open(WEIGHTS) as image, h5py.File(image, "r") as h5:
            return extent(path, WEIGHTS)[0] + h5[name].id.get_offset()
    with h5py.File(path, "r") as h5:
        return h5[name].id.get_offset()


def first_header(path: Path) -> int:
    with zipfile.ZipFile(path) as file:
        return file.getinfo(WEIGHTS).header_offset


FLIPS: dict[str, Callable[[Path], int]] = {
    "first tensor": lambda p: tensor_at(p, "layers/dense/vars/0") + 1,
    "last tensor": lambda p: tensor_at(p, "layers/dense_2/vars/0") + 20 * 30 * 4 - 1,
    "last byte": lambda p: sum(extent(p, WEIGHTS)) - 1,
    "weights' local header": first_header,
    "HDF5 signature": lambda p: extent(p, WEIGHTS)[0],
    "directory": lambda p: p.read_bytes().rindex(b"PK\1\2"),
    "name in the directory": lambda p: p.read_bytes().rindex(b"model.weights.h5"),
}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x20
    path.write_bytes(data)


@pytest.mark.parametrize("where", FLIPS)
def test_a_flipped_bit_leaves_the_model(where: str, archive: tuple[Any, Path]) -> None:
    model, path = archive
    flip(path, FLIPS[where](path))
    model.layers[1].kernel.assign(floats(6, 40, seed=9))
    before = state(model)
    stock = failure(lambda: model.load_weights(path))
    with hornbeam.installed():
        error = failure(lambda: model.load_weights(path))
        again = failure(lambda: keras.models.load_model(path))
    assert state(model) == before
    for found in (error, again):
        if found is again and where == "name in the directory":
            continue  # without weights, Keras asks for another format first
        assert isinstance(found, ArchiveError), repr(found)
        tells(found, path)
    if not isinstance(stock, KeyError):  # a renamed member is "not there" to zipfile; we see two names
        assert isinstance(error, type(stock)), repr(stock)
    if where in ("first tensor", "last tensor", "last byte"):
        assert isinstance(error, ChecksumError)
        assert error.expected != error.found
        assert "use another copy" in str(error)
    assert not hornbeam.stats().handovers


@pytest.mark.parametrize("member", ["config.json", "metadata.json"])
def test_a_flipped_bit_in_json(member: str, archive: tuple[Any, Path]) -> None:
    model, path = archive
    start, length = extent(path, member)
    flip(path, start + length // 2)
    if member == "config.json":
        error = fails_like_stock(lambda: keras.models.load_model(path), own=True)
        assert isinstance(error, ChecksumError)
        assert (error.member, error.path) == ("config.json", str(path))
    before = state(model)
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.load_weights(path)  # needs neither
    assert state(model) == before


def test_truncated_archives(archive: tuple[Any, Path]) -> None:
    model, path = archive
    whole = path.read_bytes()
    before = state(model)
    cuts = [0, 1, 4, 29, 30, 46, 63, 64, 65, len(whole) - 1, len(whole) - 21, len(whole) - 22, len(whole) - 23]
    cuts += random.Random(0).sample(range(len(whole)), 20)
    for cut in cuts:
        path.write_bytes(whole[:cut])
        error = fails_like_stock(lambda: model.load_weights(path), own=True)
        assert isinstance(error, ArchiveError)
        tells(error, path)
        assert "use another copy" in str(error)
        tells(fails_like_stock(lambda: keras.models.load_model(path), own=True), path)
    assert state(model) == before


def test_truncated_weights_files(place: Path) -> None:
    model, path = small(), place / "m.weights.h5"
    with hornbeam.installed():
        model.save_weights(path)
    whole = path.read_bytes()
    before = state(model)
    cuts = [0, 1, 7, 8, 40, 48, 95, 96, len(whole) - 1, len(whole) - 4, *random.Random(0).sample(range(len(whole)), 20)]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        error = fails_like_stock(lambda: model.load_weights(path), own=True)
        assert isinstance(error, WeightsFileError | StorageError), repr(error)
        tells(error, path)
    assert state(model) == before


def test_damaged_metadata_of_weights_files_leaves_the_model(place: Path) -> None:
    """There is no checksum here: it is refused, or read as what it now says, but never half of it."""
    model, path = small(), place / "m.weights.h5"
    with hornbeam.installed():
        model.save_weights(path)
    whole = path.read_bytes()
    with h5py.File(path, "r") as file:
        payload = file["layers/dense/vars/0"].id.get_offset()
    before = state(model)
    refused = 0
    for at in random.Random(1).sample(range(payload), 150):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
        with hornbeam.installed():
            try:
                model.load_weights(path)
            except (HornbeamError, ValueError, KeyError):
                refused += 1
                assert state(model) == before, at
        for variable, (_, dtype, shape, data) in zip(model.variables, before, strict=True):
            variable.assign(np.frombuffer(data, dtype).reshape(shape))
    assert refused > 5
    for signature in (b"TREE", b"SNOD", b"HEAP", b"GCOL"):
        path.write_bytes(whole.replace(signature, b"XXXX"))
        with hornbeam.installed(), pytest.raises(WeightsFileError, match="wrong signature") as caught:
            model.load_weights(path)
        assert caught.value.path == str(path)
    assert state(model) == before
    assert not hornbeam.stats().handovers


def test_memory_is_free_after_a_failed_load() -> None:
    file = io.BytesIO(b"PK\3\4 and no more")
    with hornbeam.installed(), pytest.raises(zipfile.BadZipFile) as raised:
        saving_lib.load_model(file)
    file.truncate(0)  # BufferError if the traceback still held it
    assert raised.value is not None


@pytest.mark.parametrize("content", [b"", b"not a model", b"\0" * 5000, b"PK\3\4" + b"\0" * 500, b"\x89HDF\r\n\x1a\n"])
def test_what_is_no_model_file(content: bytes, place: Path) -> None:
    model = small()
    before = state(model)
    for name in ("m.keras", "m.weights.h5"):
        path = place / name
        path.write_bytes(content)
        tells(fails_like_stock(lambda path=path: model.load_weights(path), own=True), path)
    error = fails_like_stock(lambda: keras.models.load_model(place / "m.keras"), own=True)
    tells(error, place / "m.keras")
    assert "File not found" not in str(error)  # which stock Keras says
    assert state(model) == before


def test_wrong_extensions_and_missing_files(place: Path) -> None:
    model = small()
    for action in (
        lambda: model.save(place / "m.zip"),
        lambda: model.save_weights(place / "m.h6"),
        lambda: model.load_weights(place / "m.txt"),
        lambda: keras.models.load_model(place / "m.txt"),
        lambda: keras.models.load_model(place / "missing.keras"),
    ):
        fails_like_stock(action, own=False)
    for name in ("missing.keras", "missing.weights.h5", "no/such.keras", "no/such.weights.h5"):
        error = fails_like_stock(lambda name=name: model.load_weights(place / name), own=True)
        assert isinstance(error, FileNotFoundError)
        assert error.errno == errno.ENOENT
        tells(error, place / name)
    assert not list(place.iterdir())


def test_missing_members(place: Path) -> None:
    model, path = small(), place / "m.keras"
    model.save(path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    for missing in ("config.json", WEIGHTS):
        with zipfile.ZipFile(path, "w") as file:
            for name, data in members.items():
                if name != missing:
                    file.writestr(name, data)
        stock = failure(lambda: keras.models.load_model(path))
        with hornbeam.installed():
            ours = failure(lambda: keras.models.load_model(path))
        assert (type(ours), str(ours)) == (type(stock), str(stock))
    before = state(model)
    fails_like_stock(lambda: model.load_weights(path), own=False)
    assert state(model) == before


def test_directories_and_files_change_places(place: Path) -> None:
    model = small()
    for name in ("d.keras", "d.weights.h5"):
        (place / name).mkdir()
        (place / name / "mine").write_text("mine")
    (place / "file").write_text("mine")
    before = state(model)
    for action, path, own in (
        (model.load_weights, place / "d.keras", True),
        (model.load_weights, place / "d.weights.h5", True),
        (keras.models.load_model, place / "d.keras", False),
        (model.save, place / "d.keras", True),
        (model.save_weights, place / "d.weights.h5", True),
        (model.save, place / "file" / "m.keras", True),
        (model.save_weights, place / "file" / "m.weights.h5", True),
        (lambda path: model.save(path, zipped=False), place / "file", True),
    ):
        error = fails_like_stock(lambda action=action, path=path: action(path), own=own)
        tells(error, path if own else None)
    assert state(model) == before
    assert sorted(str(p.relative_to(place)) for p in place.rglob("*")) == [
        "d.keras", "d.keras/mine", "d.weights.h5", "d.weights.h5/mine", "file",
    ]  # fmt: skip


def test_unreadable_files(place: Path) -> None:
    model, path = small(), place / "m.keras"
    with unprivileged():
        with hornbeam.installed():
            model.save(path)
            model.save_weights(place / "m.weights.h5")
        before = state(model)
        for name in ("m.keras", "m.weights.h5"):
            (place / name).chmod(0)
            error = fails_like_stock(lambda name=name: model.load_weights(place / name), own=True)
            assert isinstance(error, PermissionError)
            tells(error, place / name)
        fails_like_stock(lambda: keras.models.load_model(path), own=False)
    assert state(model) == before


def test_a_read_of_a_file_object_may_be_given_up() -> None:
    """The reader may be waiting for the interpreter at that moment: in a process of its own, for it may hang."""
    code = (
        "import io, numpy as np, zipfile\n"
        "from hornbeam import _core\n"
        "plan = _core.plan([], [('x', 'uint8', (30_000_000,), [])])\n"
        "file = io.FileIO('m.keras', 'w+')\n"
        "save = plan.start(file, [np.zeros(30_000_000, 'uint8')], archive=True)\n"
        "save.finish([('config.json', b'{}')])\n"
        "for _ in range(20):\n"
        "    reading = _core.open(file, archive=True).weights().fetch([0], read_ahead=1 << 40)\n"
        "    sum(range(100_000))\n"
        "    del reading\n"
        "print('done')\n"
    )
    root = Path(hornbeam.__file__).parent.parent
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stdout == "done\n", done.stderr


# ---- writing ----


@keras.saving.register_keras_serializable("test_errors")
class Awkward(layers.Layer):
    """Does as it is told when it is saved."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._when: dict[str, Callable[[], Any]] = {}

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(name="w", shape=(300, 300), initializer="ones")

    def call(self, x: Any) -> Any:
        return x

    def _now(self, name: str) -> None:
        self._when.get(name, lambda: None)()

    def get_config(self) -> Any:
        self._now("config")
        return super().get_config()

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        self._now("variables")

    def save_assets(self, path: str) -> None:
        (Path(path) / "asset").write_text("asset")
        self._now("assets")


class Custom(Exception):
    pass


def fail() -> None:
    raise Custom("by request")


@pytest.fixture
def target(place: Path) -> tuple[Any, Any, Path]:
    """A model, its awkward layer, and the file it was saved to."""
    layer = Awkward()
    model = chain(layers.Dense(4), layer)
    path = place / "m.keras"
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.save(path)
    model.layers[1].bias.assign(np.ones(4))
    return model, layer, path


def unchanged(place: Path, before: dict[str, bytes]) -> None:
    assert {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


def files(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


@pytest.mark.parametrize("where", ["config", "variables", "assets"])
@pytest.mark.parametrize("form", ["archive", "directory", "weights"])
def test_code_that_fails_while_it_is_saved(where: str, form: str, target: Any, place: Path) -> None:
    model, layer, path = target

    def save() -> None:
        if form == "weights":
            model.save_weights(place / "m.weights.h5")
        else:
            model.save(path if form == "archive" else place / "directory", zipped=form == "archive")

    with hornbeam.installed(), hornbeam.options(fallback=False):
        save()
        before, values = files(place), state(model)
        layer._when = {where: fail}
        if form == "weights" and where != "variables":
            save()  # asks for neither
            return
        with pytest.raises(Custom, match="by request"):
            save()
        assert state(model) == values
        unchanged(place, before)
        layer._when = {where: lambda: signal.raise_signal(signal.SIGINT)}
        with pytest.raises(KeyboardInterrupt):
            save()
        unchanged(place, before)
        layer._when = {}
        save()
    assert sorted(files(place)) == sorted(before)


def test_a_config_that_no_json_can_hold(target: Any, place: Path) -> None:
    model, layer, path = target
    before = files(place)
    layer.get_config = lambda: {"thing": object()}  # type: ignore[method-assign]
    stock = failure(lambda: model.save(place / "stock.keras"))
    (place / "stock.keras").unlink(missing_ok=True)
    with hornbeam.installed():
        ours = failure(lambda: model.save(path))
    assert isinstance(ours, type(stock)), (stock, ours)
    unchanged(place, before)


def test_a_directory_that_vanishes(target: Any, place: Path) -> None:
    model, layer, _ = target
    inner = place / "inner"
    layer._when = {"config": lambda: shutil.rmtree(inner)}
    inner.mkdir()
    with hornbeam.installed(), pytest.raises(FileNotFoundError) as caught:
        model.save(inner / "m.keras")
    assert isinstance(caught.value, StorageError)
    tells(caught.value, inner / "m.keras")
    assert not inner.exists()


def test_a_read_only_directory(target: Any, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _, _ = target
    closed = place / "closed"
    with unprivileged():
        closed.mkdir()
        with hornbeam.installed(), hornbeam.options(fallback=False):
            model.save(closed / "m.keras")
            closed.chmod(0o555)
            before = files(closed)
            for action in (
                lambda: model.save(closed / "new.keras"),
                lambda: model.save_weights(closed / "new.weights.h5"),
                lambda: model.save(closed / "new", zipped=False),
            ):
                error = fails_like_stock(action, own=True)
                assert isinstance(error, PermissionError)
            unchanged(closed, before)
            # The file itself may be written, so it is, in place, and said so.
            model.layers[1].bias.assign(np.full(4, 7.0))
            with hornbeam.installed():
                model.save(closed / "m.keras")
    assert "takes no temporary file" in caplog.text
    assert saved(keras.models.load_model(closed / "m.keras")) == saved(model)


def test_a_read_only_file(target: Any, place: Path) -> None:
    model, _, _ = target
    with unprivileged():
        with hornbeam.installed():
            model.save(place / "mine.keras")
        (place / "mine.keras").chmod(0o444)
        before = files(place)
        error = fails_like_stock(lambda: model.save(place / "mine.keras"), own=True)
    assert isinstance(error, PermissionError)
    tells(error, place / "mine.keras")
    unchanged(place, before)


@contextlib.contextmanager
def at_most(nbytes: int) -> Iterator[None]:
    """No file may become larger, as on a full disk; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form", ["archive", "weights", "directory"])
def test_no_room(form: str, target: Any, place: Path) -> None:
    model, _, path = target
    values = state(model)
    written = {"archive": path, "weights": place / "m.weights.h5", "directory": place / "directory" / WEIGHTS}

    def save() -> None:
        if form == "weights":
            model.save_weights(place / "m.weights.h5")
        else:
            model.save(path if form == "archive" else place / "directory", zipped=form == "archive")

    with hornbeam.installed():
        save()
        before = files(place)
        model.layers[1].bias.assign(np.full(4, 9.0))
        rooms = [10, 100, 5000, 200_000]
        if form == "archive":
            rooms.append(sum(extent(path, WEIGHTS)) + 10)  # enough for the weights, not for what follows
        for room in rooms:
            with at_most(room):
                error = failure(save)
            assert isinstance(error, StorageError), repr(error)
            assert error.errno == errno.EFBIG
            assert "free some space" in str(error).lower()
            tells(error, written[form])
            assert "tmp" not in str(error).replace(str(place), "")
            unchanged(place, before)
        with at_most(1000), hornbeam.options(atomic=False):
            error = failure(save)
        assert isinstance(error, StorageError)
        if form != "directory":
            assert "incomplete" in str(error)
        save()
        assert sorted(files(place)) == sorted(before)
    assert not hornbeam.stats().handovers
    assert state(model) != values


def test_a_full_file_system(place: Path) -> None:
    disk = place / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("no file system may be mounted here")
    try:
        model = chain(layers.Dense(400), layers.Dense(350))  # 570 kB: one file fits, two do not
        path = disk / "m.keras"
        with hornbeam.installed(), hornbeam.options(fallback=False):
            model.save(path)
            before = files(disk)
            error = failure(lambda: model.save(path))
            assert isinstance(error, StorageError), repr(error)
            assert error.errno == errno.ENOSPC
            tells(error, path)
            assert "the old file is unchanged" in str(error)
            unchanged(disk, before)
            with hornbeam.options(atomic=False):
                model.save(path)  # over the old one it fits
        assert saved(keras.models.load_model(path)) == saved(model)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_strings_cannot_be_stored(target: Any, place: Path) -> None:
    _, _, path = target

    class Strings(Awkward):
        def save_own_variables(self, store: Any) -> None:
            store["name"] = np.array(["text"])

    before = files(place)
    wrong = chain(Strings())
    stock = failure(lambda: wrong.save(place / "stock.keras"))
    (place / "stock.keras").unlink(missing_ok=True)
    with hornbeam.installed():
        ours = failure(lambda: wrong.save(path))
    assert isinstance(ours, type(stock)), (stock, ours)
    unchanged(place, before)
