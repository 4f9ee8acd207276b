"""The container: what other tools make of our archives, and what we make of theirs."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import hornbeam
from hornbeam import _core
from hornbeam.errors import ArchiveError, HornbeamError, UnsupportedError
from hornbeam.flows.asset_store import AssetStore
from support.helpers import saved, state, tree
from support.zoo import ZOO, chain

WEIGHTS = "model.weights.h5"


def model_and_archive(path: Path, name: str = "functional") -> Any:
    model, _, _ = ZOO[name]()
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.save(path)
    return model


def ours(path: Any) -> Any:
    with hornbeam.installed(), hornbeam.options(fallback=False):
        return keras.models.load_model(path)


@pytest.mark.parametrize("name", ["functional", "custom_assets", "unicode_and_long_names"])
def test_other_tools_read_ours(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    model = model_and_archive(path, name)
    checked = subprocess.run([sys.executable, "-m", "zipfile", "-t", path], capture_output=True, text=True, check=True)
    assert "Done testing" in checked.stdout
    assert "corrupted" not in checked.stdout
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[:3] == [WEIGHTS, "metadata.json", "config.json"]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        archive.extract(WEIGHTS, tmp_path)
    # The member is a weights file: h5py lists it, stock Keras loads it.
    found = tree(tmp_path / WEIGHTS)
    assert sum(item[0] == "dataset" for item in found.values()) >= len(model.weights)
    before = state(model)
    for variable in model.weights:
        variable.assign(np.zeros(variable.shape))
    model.load_weights(tmp_path / WEIGHTS)
    assert state(model) == before


def test_unzip_reads_ours(tmp_path: Path) -> None:
    tool = shutil.which("unzip")
    if tool is None:
        pytest.skip("there is no unzip on this machine")
    path = tmp_path / "m.keras"
    model_and_archive(path, "custom_assets")
    checked = subprocess.run([tool, "-t", path], capture_output=True, text=True, check=True)
    assert "No errors detected" in checked.stdout
    subprocess.run([tool, "-q", path, "-d", tmp_path / "out"], check=True)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            assert (tmp_path / "out" / info.filename).read_bytes() == archive.read(info)


@pytest.mark.parametrize("mode", ["r", "r+", "a"])
def test_h5py_refuses_the_archive_and_leaves_it(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    model = model_and_archive(path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"signature|exist"):
        h5py.File(path, mode)
    assert path.read_bytes() == before
    assert saved(ours(path)) == saved(model)


def test_tensors_in_the_archive_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    model_and_archive(path, "convolutional")
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(WEIGHTS)
        image = archive.read(WEIGHTS)
    start = path.read_bytes().index(b"\x89HDF\r\n\x1a\n")
    assert start % 64 == 0
    assert info.header_offset == 0
    aligned = 0
    with h5py.File(io.BytesIO(image), "r") as file:

        def visit(_: str, item: Any) -> None:
            nonlocal aligned
            if isinstance(item, h5py.Dataset) and item.nbytes >= 64:
                assert (start + item.id.get_offset()) % 64 == 0
                aligned += 1

        file.visititems(visit)
    assert aligned > 3


def rewrite(path: Path, target: Path, **how: Any) -> None:
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", **how) as out:
        for info in source.infolist():
            out.writestr(info.filename, source.read(info))


@pytest.mark.parametrize("by", ["stock", "ours"])
@pytest.mark.parametrize("level", [1, 9])
def test_recompressed_copies_load(by: str, level: int, tmp_path: Path) -> None:
    model, _, _ = ZOO["functional"]()
    path, packed = tmp_path / "m.keras", tmp_path / "packed.keras"
    if by == "stock":
        model.save(path)
    else:
        with hornbeam.installed():
            model.save(path)
    rewrite(path, packed, compression=zipfile.ZIP_DEFLATED, compresslevel=level)
    assert packed.stat().st_size < path.stat().st_size
    before = saved(model)
    loaded = ours(packed)
    assert saved(loaded) == before
    for variable in loaded.weights:
        variable.assign(np.zeros(variable.shape))
    with hornbeam.installed(), hornbeam.options(fallback=False):
        loaded.load_weights(packed)
    assert saved(loaded) == before


def test_other_compression_is_refused_by_name(tmp_path: Path) -> None:
    model_and_archive(tmp_path / "m.keras")
    rewrite(tmp_path / "m.keras", tmp_path / "packed.keras", compression=zipfile.ZIP_BZIP2)
    with pytest.raises(UnsupportedError, match="compression method") as caught:
        ours(tmp_path / "packed.keras")
    assert caught.value.found == "12"
    assert caught.value.member == WEIGHTS


def test_streamed_archives_load_everywhere(tmp_path: Path) -> None:
    """Written to what cannot seek: sizes and CRC of the weights stand behind them."""
    from keras.src.saving import saving_lib

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, block: Any) -> int:
            self.data += bytes(block)
            return len(block)

    model, _, _ = ZOO["functional"]()
    pipe = Pipe()
    with hornbeam.installed(), hornbeam.options(fallback=False):
        saving_lib.save_model(model, pipe)
    path = tmp_path / "m.keras"
    path.write_bytes(pipe.data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.getinfo(WEIGHTS).flag_bits & 8
    tool = shutil.which("unzip")
    if tool is not None:  # stricter than zipfile about what stands behind the data
        subprocess.run([tool, "-tq", path], check=True)
    assert saved(keras.models.load_model(path)) == saved(ours(path)) == saved(model)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_gets_the_archive(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.keras"
    os.mkfifo(pipe)
    received = tmp_path / "received.keras"
    with subprocess.Popen(["cat", pipe], stdout=received.open("wb")) as reader:
        with hornbeam.installed(), hornbeam.options(fallback=False):
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
            keras.saving.save_model(model, pipe, overwrite=True)
        assert reader.wait(60) == 0
    assert saved(keras.saving.load_model(received)) == saved(model)


def test_assets_behind_links_are_kept(tmp_path: Path) -> None:
    store = AssetStore("w")
    try:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "words.txt").write_text("a")
        root = Path(store.make("layer"))
        (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        assert [name for name, _ in store.files()] == ["assets/layer/linked/words.txt"]
    finally:
        store.close()


@pytest.mark.parametrize("extra", [65_532, 65_533])  # 65,535 and 65,536 in all
def test_more_members_than_16_bits_count(extra: int, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    model = model_and_archive(path)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(extra):
            archive.writestr(zipfile.ZipInfo(f"extra/{i}"), b"")
        assert len(archive.namelist()) == extra + 3
    assert saved(ours(path)) == saved(model)
    with hornbeam.installed(), hornbeam.options(fallback=False):
        model.load_weights(path)
    if extra == 65_533:
        assert saved(keras.models.load_model(path)) == saved(model)


@keras.saving.register_keras_serializable("test_archive")
class ManyAssets(keras.layers.Layer):
    """More files than 16 bits count."""

    count = 66_000

    def call(self, x: Any) -> Any:
        return x

    def save_assets(self, path: str) -> None:
        for i in range(self.count):
            (Path(path) / str(i)).write_bytes(b"" if i else b"first")


def test_more_assets_than_16_bits_count(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    with hornbeam.installed(), hornbeam.options(fallback=False):
        chain(ManyAssets()).save(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert len(names) == ManyAssets.count + 3 == len(set(names))
        first = next(n for n in names if n.endswith("/0"))
        assert archive.read(first) == b"first"


# ---- archives that mean different things to different readers ----


def local_offset(data: bytes, name: str) -> int:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.getinfo(name).header_offset


def central_offset(data: bytes, name: str) -> int:
    at = struct.unpack("<I", data[-6:-2])[0]
    while data[at : at + 4] == b"PK\1\2":
        lengths = struct.unpack("<HHH", data[at + 28 : at + 34])
        if data[at + 46 : at + 46 + lengths[0]] == name.encode():
            return at
        at += 46 + sum(lengths)
    raise KeyError(name)


def put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def with_name(data: bytes) -> bytes:
    return put(data, local_offset(data, "config.json") + 30, b"konfig.json")


def with_size(data: bytes) -> bytes:
    return put(data, local_offset(data, "config.json") + 22, b"\1\0\0\0")


def with_crc(data: bytes) -> bytes:
    return put(data, local_offset(data, WEIGHTS) + 14, b"\1\2\3\4")


def with_method(data: bytes) -> bytes:
    return put(data, local_offset(data, "config.json") + 8, b"\x08\0")


def with_overlap(data: bytes) -> bytes:
    """Two members that start at the same place."""
    at = struct.pack("<I", local_offset(data, "metadata.json"))
    data = put(data, central_offset(data, "config.json") + 42, at)
    here = local_offset(data, "metadata.json")
    size = data[here + 14 : here + 26]
    return put(data, central_offset(data, "config.json") + 16, size)


def with_reach(data: bytes) -> bytes:
    """A member that reaches over the next one: its sizes agree with each other, and lie."""
    here, there = local_offset(data, "metadata.json"), central_offset(data, "metadata.json")
    size = struct.pack("<II", 400, 400)
    return put(put(data, here + 18, size), there + 20, size)


def with_duplicate(data: bytes) -> bytes:
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("config.json", b"{}")
    return buffer.getvalue()


def with_second(data: bytes) -> bytes:
    return data + data


def with_comment_that_is_an_end(data: bytes) -> bytes:
    """One reader takes the first end record, another the one in its comment."""
    return put(data, len(data) - 2, b"\x16\0") + data[-22:]


def with_prefix_that_is_read(data: bytes) -> bytes:
    """A reader that adds nothing to the offsets finds a directory, too."""
    start = struct.unpack("<I", data[-6:-2])[0]
    return b"#!/bin/sh\n".ljust(start, b"#") + data[start:-22] + data


def with_outer_directory_cut(data: bytes) -> bytes:
    """A whole archive as an asset of one that was cut short: what is left must not be taken for a model."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("assets/inner.keras", data)
        archive.writestr("config.json", b"{}")
    return buffer.getvalue()[:-30]


def with_other_end64_sizes(data: bytes) -> bytes:
    """The zip64 end record lists other members than the plain one."""
    count, size, start = struct.unpack("<HII", data[-12:-2])
    record = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size - 1, start + 1)
    locator = struct.pack("<IIQI", 0x07064B50, 0, start + size, 1)
    return data[:-22] + record + locator + data[-22:]


def with_utf8_and_no_flag(data: bytes) -> bytes:
    return renamed(data, "assets/ä.txt".encode())


def with_flag_and_no_utf8(data: bytes) -> bytes:
    return renamed(data, b"assets/\x84.txt", flags=0x800)


def with_flag_in_one_header(data: bytes) -> bytes:
    data = renamed(data, "assets/ä.txt".encode(), flags=0x800)
    return put(data, data.index(b"PK\3\4", data.rindex(b"PK\3\4")) + 6, b"\0\0")


def with_unicode_name(data: bytes) -> bytes:
    name = b"assets/a.txt"
    field = struct.pack("<HHBI", 0x7075, 5 + 12, 1, zlib.crc32(name)) + b"assets/b.txt"
    return renamed(data, name, extra=field)


def renamed(data: bytes, name: bytes, *, flags: int = 0, extra: bytes = b"", local_extra: bytes = b"") -> bytes:
    """With a member of this name at the end, byte for byte as given."""
    count, size, start = struct.unpack("<HII", data[-12:-2])
    text = b"text"
    numbers = (0, 0, 0x21, zlib.crc32(text), len(text), len(text), len(name))
    local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, flags, *numbers, len(local_extra)) + name + local_extra + text
    fixed = struct.pack("<IHHHHHHIIIHH", 0x02014B50, 20, 20, flags, *numbers, len(extra))
    central = fixed + struct.pack("<HHHII", 0, 0, 0, 0, start) + name + extra
    size += len(central)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count + 1, count + 1, size, start + len(local), 0)
    return data[:start] + local + data[start:-22] + central + end


def with_encryption(data: bytes) -> bytes:
    at = central_offset(data, "config.json") + 8
    return put(data, at, b"\1\0")


def with_other_end64(data: bytes) -> bytes:
    """A zip64 locator that points nowhere; zipfile used to ignore it (CVE-2025-8291)."""
    return data[:-22] + struct.pack("<IIQI", 0x07064B50, 0, 17, 1) + data[-22:]


REFUSED = {
    with_name: "disagrees with the directory",
    with_size: "disagrees with the directory",
    with_crc: "disagrees with the directory",
    with_method: "disagrees with the directory",
    with_overlap: "disagrees with the directory",
    with_reach: "share bytes",
    with_duplicate: "two members of the same name",
    with_second: "not where the end record says",
    with_comment_that_is_an_end: "two end records",
    with_prefix_that_is_read: "not where the end record says",
    with_outer_directory_cut: "not where the end record says",
    with_other_end64_sizes: "two end records disagree",
    with_utf8_and_no_flag: "its flag says that it is not",
    with_flag_and_no_utf8: "its flag says that it is",
    with_flag_in_one_header: "disagrees with the directory",
    with_unicode_name: "two names",
    with_encryption: "encrypted",
    with_other_end64: "not where its locator says",
}


@pytest.mark.parametrize("damage", REFUSED)
def test_ambiguous_archives_are_refused(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    model = model_and_archive(path)
    before = state(model)
    path.write_bytes(damage(path.read_bytes()))
    hornbeam.stats(reset=True)
    with hornbeam.installed():  # not strict: it must not be handed over either
        with pytest.raises(HornbeamError, match=REFUSED[damage]) as caught:
            model.load_weights(path)
        assert isinstance(caught.value, ArchiveError | UnsupportedError)
        assert caught.value.path == str(path)
        with pytest.raises((HornbeamError, ValueError)):  # Keras itself says ValueError to what is no zip at all
            keras.models.load_model(path)
    assert state(model) == before
    assert not hornbeam.stats().handovers
    assert hornbeam.stats().loads == 0


# ---- archives that every reader reads alike ----


def repacked(data: bytes, **options: Any) -> bytes:
    """Written again by `zipfile`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", **options) as new:
        new.comment = b"a comment"
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as member:
                member.write(old.read(name))
    return buffer.getvalue()


READ = {
    "bytes behind the end": lambda data: data + b"\n",
    "bytes before the archive": lambda data: b"#!/bin/sh\n" + data,
    "both": lambda data: b"MZ" + bytes(1000) + data + b"\0",
    "a comment, and zip64 sizes that are not needed": repacked,
    "the same, deflated": lambda data: repacked(data, compression=zipfile.ZIP_DEFLATED),
    "bytes before a deflated archive": lambda data: b"#" * 77 + repacked(data, compression=zipfile.ZIP_DEFLATED),
    "another archive as an asset": lambda data: renamed(data, b"assets/PK\5\6" + bytes(b"x" * 30)),
}


@pytest.mark.parametrize("how", READ)
def test_what_zipfile_reads_without_doubt_is_read(how: str, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    model = model_and_archive(path)
    data = READ[how](path.read_bytes())
    path.write_bytes(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        wanted = {info.filename: archive.read(info) for info in archive.infolist()}
    file = _core.open(str(path), archive=True)
    assert {name: file.read(name) for name, *_ in file.members()} == wanted
    assert saved(ours(path)) == saved(keras.models.load_model(path)) == saved(model)
