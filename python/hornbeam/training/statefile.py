"""Training state on disk: JSON with arrays, in an archive whose every byte has a checksum. Never code.

The archive holds the arrays as a weights image (`arrays/0`, `arrays/1`, …) and `state.json`, in which
`{"!array": [0, "float32"]}` stands for the first of them. `docs/format.md` lists the other marks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hornbeam import _core
from hornbeam.base import dtypes
from hornbeam.errors import ArchiveError, InvalidError
from hornbeam.values import tensors

_STATE = "state.json"


class Encoded(NamedTuple):
    """A state, ready to be written.

    Attributes:
        text: Its JSON.
        arrays: Its arrays.
    """

    text: bytes
    arrays: list[np.ndarray]


def encode(state: Any, *, copy: bool) -> Encoded:
    """Makes a state ready to be written.

    Args:
        state: None, bools, numbers, texts, bytes, lists, tuples, dicts, NumPy arrays and scalars, tensors.
        copy: Copy arrays, which somebody may change before they are written.

    Raises:
        InvalidError: For anything else in `state`.
    """
    arrays: list[np.ndarray] = []
    text = _core.encode_json(_encode(state, arrays, "state"))
    return Encoded(text, [array.copy() for array in arrays] if copy else arrays)


def write(path: Path, state: Encoded, *, durable: bool) -> None:
    """Writes a state to a new file.

    Raises:
        OSError: When the file cannot be written.
    """
    datasets: list[tuple[str, str, tuple[int, ...], list[tuple[str, str]]]]
    datasets = [(f"arrays/{i}", dtypes.dtype_name(a.dtype), a.shape, []) for i, a in enumerate(state.arrays)]
    plan = _core.plan([], datasets)
    buffers = [tensors.as_buffer(array) for array in state.arrays]
    save = plan.start(str(path), buffers, archive=True, atomic=False, durable=durable)
    save.finish([(_STATE, state.text)])


def read(path: Path) -> Any:
    """What `write` wrote; every byte is checked first.

    Raises:
        HornbeamError: The file is damaged, or no such file.
    """
    file = _core.open(path, archive=True)
    state = _core.decode_json(file.read(_STATE), trusted=False)
    weights = file.weights()
    names = weights.names()
    reading = weights.fetch(range(len(names)), read_ahead=1 << 62)
    blocks = {name: reading.take(i) for i, name in enumerate(names)}
    reading.complete()
    shapes = {name: tuple(weights.dataset(i)[1]) for i, name in enumerate(names)}

    def array(i: int, dtype: str) -> np.ndarray:
        name = f"arrays/{i}"
        if name not in shapes:
            raise ArchiveError(f"'{path}' names '{name}', which it does not have")
        block: Any = blocks[name] or b""
        return np.frombuffer(block, dtypes.extended_dtype(dtype)).reshape(shapes[name])

    return _decode(state, array)


def _encode(item: Any, arrays: list[np.ndarray], where: str) -> Any:
    """JSON for `item`; its arrays are appended to `arrays`."""
    if item is None or (isinstance(item, bool | int | float | str) and not isinstance(item, np.generic)):
        return item
    if isinstance(item, list):
        return [_encode(inner, arrays, f"{where}[{i}]") for i, inner in enumerate(item)]
    if isinstance(item, tuple):
        return {"!tuple": [_encode(inner, arrays, f"{where}[{i}]") for i, inner in enumerate(item)]}
    if isinstance(item, dict):
        if all(isinstance(key, str) and not key.startswith("!") for key in item):
            return {key: _encode(inner, arrays, f"{where}[{key!r}]") for key, inner in item.items()}
        pairs = [[_encode(k, arrays, where), _encode(v, arrays, f"{where}[{k!r}]")] for k, v in item.items()]
        return {"!items": pairs}
    if isinstance(item, bytes):
        return {"!bytes": _note(np.frombuffer(item, np.uint8), arrays, where)}
    if isinstance(item, np.generic):
        return {"!scalar": _note(np.asarray(item), arrays, where)}
    return {"!array": _note(_to_array(item, where), arrays, where)}


def _to_array(item: Any, where: str) -> np.ndarray:
    if isinstance(item, np.ndarray):
        return item
    import keras

    if not (keras.ops.is_tensor(item) or isinstance(item, keras.Variable)):
        raise InvalidError(f"A checkpoint cannot hold {type(item).__name__!r} objects. Received: {where}={item!r}")
    return tensors.on_host(item)


def _note(array: np.ndarray, arrays: list[np.ndarray], where: str) -> list[Any]:
    if not _is_named(array.dtype):
        raise InvalidError(f"A checkpoint cannot hold arrays of dtype {array.dtype}. Received: {where}")
    arrays.append(array)
    return [len(arrays) - 1, array.dtype.name]


def _is_named(dtype: np.dtype) -> bool:
    """Whether the name of a dtype, which is what the file has, leads back to it."""
    if dtype.hasobject or dtype.kind not in "biufcV":
        return False
    try:
        return dtypes.extended_dtype(dtype.name) == dtype.newbyteorder("=")
    except (TypeError, ValueError):
        return False


def _decode(item: Any, array: Any) -> Any:
    if isinstance(item, list):
        return [_decode(inner, array) for inner in item]
    if not isinstance(item, dict):
        return item
    if len(item) == 1:
        ((mark, value),) = item.items()
        if mark == "!tuple":
            return tuple(_decode(inner, array) for inner in value)
        if mark == "!items":
            return {_decode(k, array): _decode(v, array) for k, v in value}
        if mark == "!array":
            return array(*value)
        if mark == "!scalar":
            return array(*value)[()]
        if mark == "!bytes":
            return array(*value).tobytes()
    return {key: _decode(inner, array) for key, inner in item.items()}
