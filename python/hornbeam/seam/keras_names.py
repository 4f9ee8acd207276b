"""Every name of Keras' that is not public and that hornbeam uses: `keras_names.json` says what each is known to be.

What an operation needs is compared with the Keras that is installed when the operation is first needed. Where a name is
missing, or takes other arguments, this Keras is not one that hornbeam knows, and stock Keras does that operation.

The names are below `keras.src`. `a.B:c` is an attribute of the class `a.B` or of its instances, and `archive` the
class that writes archives of endpoints, which every Keras calls something else.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import sys
import warnings
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

from hornbeam.base import counters
from hornbeam.errors import UnknownKerasWarning, UnsupportedError

_EXPORTS = "keras.src.export.saved_model"
_MISSING = object()
_verdicts: dict[str, str | None] = {}


@functools.cache
def table() -> dict[str, Any]:
    """The table.

    Returns:
        `operations`: operation → the modules of hornbeam that do it, and the functions of Keras that they replace;
        `uses`: module of hornbeam → the names that it uses; `known`: name → what it may be: its parameters, nothing for
        what is no function, `-` where it may be missing; `recognised`: what the digests of the code of adapters and
        epoch iterators may be, in Keras 3.12 to 3.16, and which attributes these have.
    """
    found: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return found


def unknown(operation: str) -> str | None:
    """Why this Keras is not known for an operation, or `None`; the first time, a warning says so.

    Args:
        operation: One of the table's `operations`.
    """
    if operation not in _verdicts:
        _verdicts[operation] = reason = _compare(operation)
        if reason is not None:
            _warn_once(operation, reason)
    return _verdicts[operation]


def unsupported(weights_format: str = "h5", path: Any = None) -> str | None:
    """Why stock Keras must do a save or load, if it must."""
    from keras.src.saving import saving_lib

    if weights_format != "h5":
        return f"weights_format={weights_format!r}"
    if saving_lib.H5IOStore.__module__ != saving_lib.__name__:  # another library has patched it
        return "saving_lib.H5IOStore is replaced"
    if path is not None and saving_lib.file_utils.is_remote_path(str(path)):
        return "remote path"
    return None


def require(operation: str) -> None:
    """Raises where an operation that stock Keras has not is not possible with this Keras.

    Raises:
        UnsupportedError: As said.
    """
    reason = unknown(operation)
    if reason is not None:
        raise UnsupportedError(f"{reason}; so hornbeam cannot do this: {operation}. A newer one may know this Keras.")


def needed(operation: str) -> list[str]:
    """The names that an operation needs."""
    found = table()["operations"][operation]
    uses = table()["uses"]
    return sorted({*found["replaces"], *(name for module in found["modules"] for name in uses.get(module, ()))})


def is_recognised(item: Any) -> bool:
    """Whether an adapter or epoch iterator is one whose state is known, by its class, its code and its attributes."""
    from keras.src.trainers.data_adapters.data_adapter import DataAdapter

    known = table()["recognised"]
    cls: Any = type(item)
    while cls is not object and cls is not DataAdapter:
        if _fingerprint(cls) not in known["code"].get(cls.__name__, ()):
            return False
        (cls,) = cls.__bases__[:1]
    return vars(item).keys() <= set(known["attributes"])


@functools.cache
def _fingerprint(cls: type) -> str:
    """A digest of all names that each method of a class uses: other sources of state or order have other names."""
    uses = []
    for name, member in vars(cls).items():
        function = inspect.unwrap(member) if callable(member) else getattr(member, "fget", None)
        todo = [getattr(function, "__code__", None)]
        found: set[str] = set()
        while todo:
            code = todo.pop()
            if code is not None:
                found.update(used for used in code.co_names if not used.startswith("__"))
                todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        if function is not None and (not name.startswith("__") or name == "__init__"):
            uses.append(f"{name}: {' '.join(sorted(found))}")
    return hashlib.sha256("\n".join(sorted(uses)).encode()).hexdigest()[:12]


def _compare(operation: str) -> str | None:
    import keras

    for name in needed(operation):
        if name.startswith("backend.tensorflow.") and keras.backend.backend() != "tensorflow":
            continue
        known, found = table()["known"][name], _describe(name)
        if found not in known:
            where = name if name.startswith(("archive", "keras.")) else f"keras.src.{name}"
            what = "is missing" if found == "-" else f"is {found or 'no function'}, expected {' | '.join(known)}"
            return f"Keras {keras.__version__} is unknown: {where} {what}"
    return None


def _warn_once(operation: str, reason: str) -> None:
    text = (
        f"{reason}. From now on stock Keras does without hornbeam what it can do itself (operation: {operation}). A "
        "newer hornbeam may know this Keras; `hornbeam.options(fallback=False)` makes this an error."
    )
    counters.logger.warning("%s", text)
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("hornbeam", "keras"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UnknownKerasWarning, stacklevel=level)


def backend_archive_class() -> Any:
    """The class of an archive of endpoints on this backend; `object`, where there is none."""
    module: Any = sys.modules[_EXPORTS]
    # Keras 3.12 has one class for all backends, 3.16 has given it another name.
    named = ("BackendSavedModelExportArchive", "SavedModelExportArchive", "ExportArchive")
    return next((getattr(module, name) for name in named if hasattr(module, name)), object)


def archive_class() -> Any:
    """The class of Keras' that writes archives of endpoints, or `None`."""
    return next((cls for cls in backend_archive_class().__mro__ if "write_out" in vars(cls)), None)


def _describe(name: str) -> str:
    """What is there: `(its, parameters)`, nothing for what is no function, `-` for nothing at all."""
    place, _, attribute = name.partition(":")
    owner = _resolve(place)
    if attribute and owner is not _MISSING:
        found = getattr(owner, attribute, _MISSING)
        if found is _MISSING:
            found = None if _code_mentions(owner, attribute) else _MISSING
    else:
        found = owner
    if found is _MISSING:
        return "-"
    if not isinstance(found, FunctionType | BuiltinFunctionType):
        return ""
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(found).parameters.values()
    return f"({', '.join(stars.get(p.kind, '') + p.name for p in parameters)})"


def _resolve(name: str) -> Any:
    if name == "archive":
        importlib.import_module(_EXPORTS)
        return archive_class() or _MISSING
    parts = name.split(".")
    start = [] if parts[0] == "keras" else ["keras", "src"]
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join([*start, *parts[:count]]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part, _MISSING)
        return found
    found = importlib.import_module("keras.src")
    for part in parts:
        found = getattr(found, part, _MISSING)
    return found


def _code_mentions(cls: Any, attribute: str) -> bool:
    """Whether the code of a class, or of one that it derives from, has an attribute of that name."""
    todo: list[Any] = []
    for base in cls.__mro__:
        for member in vars(base).values():
            functions = [getattr(member, "fget", None), getattr(member, "fset", None)]
            functions += [inspect.unwrap(member)] if callable(member) else []
            todo += [getattr(function, "__code__", None) for function in functions]
    while todo:
        code = todo.pop()
        if isinstance(code, CodeType):
            if attribute in code.co_names or attribute in code.co_consts:
                return True
            todo += code.co_consts
    return False
