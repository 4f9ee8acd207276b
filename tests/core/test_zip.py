"""Archives of others: read where `zipfile` reads them without doubt, refused where readers could disagree."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any

import h5py
import numpy as np
import pytest

from hornbeam import _core
from hornbeam.errors import HornbeamError

WEIGHTS = b"model.weights.h5"
LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


def image() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as f:
        f["x"] = np.arange(4)
    return file.getvalue()


def make(
    *members: tuple[bytes, bytes],
    prefix: bytes = b"",
    suffix: bytes = b"",
    comment: bytes = b"",
    local_extra: bytes = b"",
    central_extra: bytes = b"",
    flags: int = 0,
    local_flags: int | None = None,
    local_name: bytes | None = None,
    moved: bool = False,
    streamed: bool = False,
    zip64: bool = False,
    small: tuple[int, int, int] = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
    locator: int = 0,
) -> bytes:
    """An archive of the weights and `members`, put together by hand; `moved`: offsets count from the file's start."""
    out, directory = bytearray(prefix), bytearray()
    base = 0 if moved else len(prefix)
    for name, data in ((WEIGHTS, image()), *members):
        last = name is not WEIGHTS
        offset, crc = len(out) - base, zlib.crc32(data)
        extra_here, extra_there = (local_extra, central_extra) if last else (b"", b"")
        bits, bits_here = (flags, flags if local_flags is None else local_flags) if last else (0, 0)
        if streamed:
            bits, bits_here = bits | 8, bits_here | 8
        sizes = (0, 0, 0) if streamed else (crc, len(data), len(data))
        name_here = name if local_name is None or not last else local_name
        out += LOCAL + struct.pack("<HHHHHIIIHH", 20, bits_here, 0, 0, 0x21, *sizes, len(name_here), len(extra_here))
        out += name_here + extra_here + data
        if streamed:
            out += struct.pack("<4sIII", b"PK\7\10", crc, len(data), len(data))
        directory += CENTRAL + struct.pack(
            "<HHHHHHIIIHHHHHII", 20, 20, bits, 0, 0, 0x21, crc, len(data), len(data), len(name), len(extra_there),
            0, 0, 0, 0, offset,
        ) + name + extra_there  # fmt: skip
    start, count = len(out) - base, 1 + len(members)
    out += directory
    if zip64:
        at = len(out) - base
        out += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
        out += struct.pack("<4sIQI", b"PK\6\7", 0, at + locator, 1)
        written = small
    else:
        written = (count, len(directory), start)
    out += END + struct.pack("<HHHHIIH", 0, 0, written[0], written[0], written[1], written[2], len(comment)) + comment
    return bytes(out) + suffix


ASSET = (b"assets/a", b"hi")
UNICODE = b"assets/\xc3\xa9"


def unicode_path(raw: bytes, name: str) -> bytes:
    data = b"\1" + zlib.crc32(raw).to_bytes(4, "little") + name.encode()
    return struct.pack("<HH", 0x7075, len(data)) + data


def deflated() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(WEIGHTS.decode(), image())
        archive.writestr("assets/größe", b"hi")
        archive.mkdir("assets/d")
    return file.getvalue()


READ: dict[str, bytes] = {
    "plain": make(ASSET),
    "no members but the weights": make(),
    "three bytes left in a local extra field": make(ASSET, local_extra=b"\0\0\0"),
    "one byte left in a central extra field": make(ASSET, central_extra=b"\0"),
    "two bytes left behind a record": make(ASSET, central_extra=b"\x99\x99\1\0x\0\0"),
    "a local extra field that is no list": make(ASSET, local_extra=b"\1\2\xff\xff\0"),
    "a script before it": make(ASSET, prefix=b"#!/bin/sh\n"),
    "a script before it, counted": make(ASSET, prefix=b"#!/bin/sh\n", moved=True),
    "zip64 behind a script": make(ASSET, prefix=b"#!/bin/sh\n", zip64=True),
    "a comment": make(ASSET, comment=b"hello"),
    "the longest comment": make(ASSET, comment=b"x" * 65535),
    "a byte behind the end": make(ASSET, suffix=b"\n"),
    "many bytes behind the end": make(ASSET, suffix=b"\0" * 60000),
    "more than the comment says": make(ASSET, comment=b"hello", suffix=b" world"),
    "code page 437": make((b"assets/\x82\xe1", b"hi")),
    "UTF-8": make((UNICODE, b"hi"), flags=1 << 11),
    "UTF-8, told twice": make((UNICODE, b"hi"), flags=1 << 11, central_extra=unicode_path(UNICODE, "assets/é")),
    "another name of another name": make(ASSET, central_extra=unicode_path(b"other", "assets/é")),
    "sizes behind the data": make(ASSET, streamed=True),
    "zip64": make(ASSET, zip64=True),
    "zip64, and the small numbers as well": make(ASSET, zip64=True, small=(2, 0xFFFFFFFF, 0xFFFFFFFF)),
    "a folder": make((b"assets/", b"")),
    "spaces and dots": make((b"assets/a b..c/.d", b"hi")),
    # Names that lead out of a directory are read; `hornbeam` extracts none of them, as stock Keras.
    "out of the archive": make((b"../../a", b"hi")),
    "out, in the middle": make((b"assets/../../a", b"hi")),
    "from the root": make((b"/etc/a", b"hi")),
    "a drive": make((b"C:/a", b"hi")),
    "a backslash": make((b"assets\\..\\a", b"hi")),
    "as zipfile writes": deflated(),
}

REFUSED: dict[str, bytes] = {
    "two members of one name": make(ASSET, ASSET),
    "two weights": make((bytes(bytearray(WEIGHTS)), b"hi")),
    "UTF-8 without the flag": make((UNICODE, b"hi")),
    "the flag without UTF-8": make((b"assets/\x82", b"hi"), flags=1 << 11),
    "the flag in one header only": make((UNICODE, b"hi"), flags=1 << 11, local_flags=0),
    "two names": make(ASSET, central_extra=unicode_path(b"assets/a", "assets/b")),
    "another local name": make(ASSET, local_name=b"assets/b"),
    "a NUL": make((b"assets/a\0b", b"hi")),
    "two archives": make(ASSET) + make(ASSET),
    "an archive in the comment of another": make(ASSET, comment=make(ASSET)),
    "an end record in the comment": make(ASSET, comment=END + b"\0" * 18),
    "an end record behind the comment": make(ASSET, suffix=b"x" + END + b"\0" * 30),
    "half an end record at the end": make(ASSET, suffix=END),
    "two end records that disagree": make(ASSET, zip64=True, small=(1, 0xFFFFFFFF, 0xFFFFFFFF)),
    "a locator that leads elsewhere": make(ASSET, zip64=True, locator=1),
    "encrypted in one header only": make(ASSET, local_flags=1),
    "an extra field that is cut short": make(ASSET, central_extra=b"\1\2\xff\xff\0"),
    "the front is missing": make(ASSET)[10:],
}


def by_zipfile(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


@pytest.mark.parametrize("name", READ)
def test_what_zipfile_reads_without_doubt(name: str) -> None:
    file: Any = _core.open(READ[name], archive=True)
    expected = by_zipfile(READ[name])
    assert sorted(name for name, *_ in file.members()) == sorted(expected)
    assert {member: bytes(file.read(member)) for member in expected} == expected
    assert file.weights().names() == ["x"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_readers_could_disagree_on(name: str) -> None:
    with pytest.raises(HornbeamError):
        _core.open(REFUSED[name], archive=True)
