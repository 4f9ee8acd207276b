"""What a file is, by its first bytes, whatever its name: a format that is read here, or what stands in its place.

Files with a model's name are often something else: an unfinished download, a pointer of Git LFS, a page that says that
nothing was found, another program's checkpoint. The error of a load says so, and what to do. Imports no Keras.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import stat
import zipfile
from collections.abc import Iterator
from typing import Any, Literal

from hornbeam import _core
from hornbeam.base import file_objects, settings
from hornbeam.base.file_objects import Stream

HDF5 = b"\x89HDF\r\n\x1a\n"
#: Bytes that are looked at.
_HEAD = 4096
#: Bytes of a safetensors header, at most, as its own library has it.
_HEADER = 100_000_000
_AGAIN = "Copy or download it again, and compare its size with the original's."
_WEIGHTS = "It has weights and no architecture: build the model, and call `model.load_weights` with {name}."


@dataclasses.dataclass(frozen=True)
class Content:
    """What was found.

    Attributes:
        kind: `"keras"`, `"h5"`, `"safetensors"` or `"shards"` for what is read here; else `None`.
        what: Completes "It is ...".
        advice: What to do about it.
    """

    kind: str | None
    what: str
    advice: str = ""

    def __str__(self) -> str:
        return f"It is {self.what}. {self.advice}".rstrip()


#: How something begins → what it is, and what to do.
_BEGINNINGS: list[tuple[bytes, str, str]] = [
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, which only names the file",
        "Run `git lfs install` and `git lfs pull` in the repository, or download the file itself.",
    ),
    (b"\x1f\x8b", "compressed with gzip", "Decompress it with `gunzip` (or `tar xzf`, if it is a tar archive) first."),
    (b"BZh", "compressed with bzip2", "Decompress it with `bunzip2` first."),
    (b"\xfd7zXZ\0", "compressed with xz", "Decompress it with `unxz` first."),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", "Decompress it with `unzstd` first."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it first."),
    (b"Rar!\x1a\x07", "a RAR archive", "Unpack it first."),
    (
        b"\x93NUMPY",
        "a NumPy array (`.npy`)",
        "Read it with `numpy.load`, and give it to a layer with `layer.set_weights`.",
    ),
    (b"GGUF", "a GGUF file", "Keras does not read it: convert it with the program that it is for."),
    (b"%PDF-", "a PDF document", "Download the file itself."),
    (b"\x89PNG", "a PNG image", "Pass the path of the model."),
    (b"\x08\x01\x12", "the graph of a SavedModel", "Pass the directory that it is in."),
]
_ONNX = "Keras does not read it: run it with ONNX Runtime, or load the model that it was exported from."
_PYTORCH = "Load it in PyTorch with `torch.load`; only what `model.save` of Keras has written is loaded here."
_PICKLE = (
    "Loading one runs whatever code it holds, so it is not loaded here. If you trust it, load it with `pickle` or "
    "`joblib` and save the model with `model.save`."
)


def identify(source: Any) -> Content | None:
    """What is there; `None` if nothing is, or it cannot be read.

    Args:
        source: A path, or a binary file object, which is left where it was.
    """
    try:
        if not isinstance(source, Stream) and file_objects.is_path(source):
            path = os.fsdecode(source)
            if os.path.isdir(path):
                return _directory(path)
            if not stat.S_ISREG(os.stat(path).st_mode):
                return Content(None, "no regular file, but a pipe, socket or device", "Copy what it gives to a file.")
            with open(path, "rb") as file:
                return _file(file)
        with file_objects.rewound(source) as file:
            return None if file is None else _file(file)
    except Exception:  # this is about another error, whose place it must not take
        return None


def kind(source: Any) -> Literal["keras", "h5", "safetensors", "shards"] | None:
    """What a local file or a file object is, by how it begins; `None` where it is something else or cannot be read."""
    try:
        if not isinstance(source, Stream) and file_objects.is_path(source):
            return _core.open(os.fsdecode(source), archive=False).kind()
        with file_objects.rewound(source) as file:
            return None if file is None else _core.open(file_objects.source(file), archive=False).kind()
    except (OSError, ValueError):
        return None


def open_weights(place: Any, kind: Literal["h5", "safetensors"]) -> _core.Weights:
    """The index of one file of weights, a path or a `Stream`; an error says what it is, if it is something else."""
    with explained(place, kind):
        engine = kind if kind == "safetensors" else settings.current().engine
        return _core.open(file_objects.openable(place), archive=False).weights(engine=engine)


@contextlib.contextmanager
def explained(source: Any, *kinds: str) -> Iterator[None]:
    """Has an error of a load say what the file is, if it is none of `kinds`.

    Raises:
        OSError: What was raised inside, of the same type; so are `ValueError`, `KeyError` and `zipfile.BadZipFile`.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        found = identify(source)
        if found is not None and found.kind not in kinds:
            _add(error, found, file_objects.path_to_str(source))
        raise


def _add(error: BaseException, found: Content, source: Any) -> None:
    text, said = str(found), str(error)
    if text.removeprefix("It ") in said:  # further inside
        return
    if isinstance(source, str) and source not in said:
        text = f"'{source}' {text.removeprefix('It ')}"
    if isinstance(error, OSError) and isinstance(error.strerror, str):
        error.strerror = f"{error.strerror}. {text}"
        error.args = (error.args[0], error.strerror, *error.args[2:])
    elif len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (f"{error.args[0].rstrip().rstrip('.')}. {text}",)
    else:
        error.add_note(text)


def _file(file: Any) -> Content:
    begin = bytes(file.read(_HEAD))
    file.seek(0, io.SEEK_END)
    size = file.tell()
    if not begin:
        return Content(None, "empty (0 bytes)", f"What wrote it did not finish. {_AGAIN}")
    if begin[:4] in (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"):
        return _zip(file, size)
    if begin.startswith(HDF5):
        return _hdf5(begin, size)
    for start, what, advice in _BEGINNINGS:
        if begin.startswith(start):
            return Content(None, what, advice)
    if begin[4:8] == b"TFL3":
        return Content(None, "a TensorFlow Lite model", "Run it with `tf.lite.Interpreter`; Keras does not load it.")
    if begin[257:262] == b"ustar":
        return Content(None, "a tar archive", "Unpack it with `tar xf` first, and pass the path of the file in it.")
    if (begin[0] == 0x80 and 2 <= begin[1] <= 5) or (begin[:1] in b"c(" and file_ends(file, b".") and b"\n" in begin):
        torch = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." in begin
        return Content(None, "a PyTorch checkpoint", _PYTORCH) if torch else Content(None, "a Python pickle", _PICKLE)
    if begin[0] == 8 and len(begin) > 3 and begin[1] < 32 and begin[2] in (0x12, 0x1A, 0x3A, 0x42):
        return Content(None, "an ONNX model, it seems", _ONNX)
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") <= _HEADER:
        return _safetensors(file, size)
    if not begin.strip(b"\0"):
        return Content(None, f"{size} bytes that begin with zeros only", f"What wrote it did not finish. {_AGAIN}")
    if _core.open(file_objects.source(file), archive=False).kind() == "h5":
        return Content("h5", "an HDF5 file behind a user block", "Give it a name that ends in `.h5` or `.weights.h5`.")
    return _text(file, begin) or Content(
        None, f"of no kind known here ({size} bytes that begin with {begin[:8]!r})", "Pass the path of a model file."
    )


def file_ends(file: Any, end: bytes) -> bool:
    """Whether these are a file's last bytes."""
    file.seek(-len(end), io.SEEK_END)
    return bool(file.read(len(end)) == end)


def _zip(file: Any, size: int) -> Content:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError):
        return Content(None, f"a zip archive that is cut off or damaged, after {size} bytes", _AGAIN)
    if not {"config.json", "model.weights.h5", "model.weights.npz"}.isdisjoint(names):
        return Content("keras", "a `.keras` archive", "Give it a name that ends in `.keras`.")
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return Content(None, "a PyTorch checkpoint", _PYTORCH)
    if names and all(name.endswith(".npy") for name in names):
        return Content(None, "a NumPy archive (`.npz`)", "Read it with `numpy.load`.")
    listed = ", ".join(map(repr, names[:4])) or "nothing"
    inner = next((n for n in names if n.endswith((".keras", ".h5", ".hdf5", ".pb", ".safetensors", "config.json"))), "")
    advice = f"Unpack it and pass the path of '{inner}' or its directory." if inner else "Pass the path of a model."
    return Content(None, f"a zip archive that holds no Keras model, but {listed}", advice)


def _hdf5(begin: bytes, size: int) -> Content:
    """The superblock says how long the file is (III.A of the HDF5 file format specification)."""
    if size < 48:  # the shortest superblock
        return Content(None, f"an HDF5 file that is cut off after {size} bytes", _AGAIN)
    version = begin[8]
    at = {0: 40, 1: 44, 2: 28, 3: 28}.get(version)
    if at is not None and begin[13 if version < 2 else 9] == 8:  # bytes of an address
        whole = int.from_bytes(begin[at : at + 8], "little")
        if size < whole < 1 << 62:
            return Content(None, f"an HDF5 file that is cut off: {size} of {whole} bytes are there", _AGAIN)
    return Content("h5", "an HDF5 file", "Give it a name that ends in `.h5`, or `.weights.h5` if it has weights only.")


def _safetensors(file: Any, size: int) -> Content:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    whole = 8 + length
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        header = json.loads(file.read(length))
        whole += max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    if size < whole:
        return Content(None, f"a safetensors file that is cut off: {size} of {whole} bytes are there", _AGAIN)
    return Content("safetensors", "a safetensors file", _WEIGHTS.format(name="a name that ends in `.safetensors`"))


def _text(file: Any, begin: bytes) -> Content | None:
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = text[:512].lower()
    if lower.startswith((b"<!doctype html", b"<html")) or b"<html" in lower:
        advice = (
            "It is what a server shows in place of the file: a page about it, a login, an error. Download the file."
        )
        return Content(None, "an HTML page", advice)
    if lower.startswith((b"<?xml", b"<error")):
        return Content(None, "an XML document", "It may be a server's error message: open it, and download the file.")
    if text[:1] in (b"{", b"["):
        file.seek(0)
        if b'"weight_map"' in file.read(1 << 24):
            return Content("shards", "an index of sharded weights", _WEIGHTS.format(name="its `.json` name"))
        if b'"class_name"' in begin:
            advice = "Build the model with `keras.models.model_from_json`, and load its weights from another file."
            return Content(None, "JSON that describes a model", advice)
        return Content(None, "JSON", "It may be a server's error message: open it, and download the file.")
    try:
        line = begin.decode("utf-8", "strict" if len(begin) < _HEAD else "ignore").strip().splitlines()[0]
    except (UnicodeDecodeError, IndexError):
        return None
    return Content(None, f"text that begins {line[:60]!r}", "Open it: it may be a message in place of the file.")


def _directory(path: str) -> Content:
    names = os.listdir(path)
    if "config.json" in names:
        return Content("directory", "the directory of a model that was saved with `zipped=False`", "")
    if not {"saved_model.pb", "saved_model.pbtxt"}.isdisjoint(names):
        return Content("savedmodel", "the directory of a SavedModel", "")
    found = sorted(name for name in names if name.endswith((".keras", ".h5", ".hdf5", ".safetensors", ".json")))
    advice = (
        f"In it are {', '.join(map(repr, found[:4]))}." if found else f"In it are {len(names)} files, none a model."
    )
    return Content(None, "a directory", advice)
