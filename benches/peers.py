"""Weights without a model, written and read by the engines of hornbeam, h5py and safetensors. Knows no Keras."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]


def equal_tensors(count: int, nbytes: int) -> Tensors:
    """`count` float32 tensors of `nbytes` each, four a layer."""
    rng = np.random.default_rng(0)
    return {_path(i): rng.random(nbytes // 4, np.float32) for i in range(count)}


def mixed_tensors(count: int, nbytes: int) -> Tensors:
    """`count` float32 tensors of very different sizes, `nbytes` in all, like those of a convolutional network."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(0, 2.5, count)
    sizes = np.maximum(1, sizes / sizes.sum() * nbytes / 4).astype(int)
    return {_path(i): rng.random(int(n), np.float32) for i, n in enumerate(sizes)}


def dense_tensors(layers: int, units: int, copies: int) -> Tensors:
    """Kernels and biases of `layers` Dense layers; with their Adam slots there are three `copies`."""
    rng = np.random.default_rng(0)
    shapes = [(units, units), (units,)] * layers * copies
    return {_path(i): rng.random(shape, np.float32) for i, shape in enumerate(shapes)}


def _path(i: int) -> str:
    return f"layers/layer_{i // 4}/vars/{i % 4}"


def trained_tensors(count: int, nbytes: int) -> Tensors:
    """`count` float32 tensors of `nbytes` each, of values as weights have them: deflate has something to do."""
    rng = np.random.default_rng(0)
    return {_path(i): rng.normal(0, 0.05, nbytes // 4).astype(np.float32) for i in range(count)}


#: Name → tensors at full size, and at a size for tests.
WEIGHTS: dict[str, tuple[Callable[[], Tensors], Callable[[], Tensors]]] = {
    "50,000 x 10 KB": (partial(equal_tensors, 50_000, 10_240), partial(equal_tensors, 1_000, 10_240)),
    "2,464, 800 MB": (partial(mixed_tensors, 2_464, 800_000_000), partial(mixed_tensors, 100, 8_000_000)),
    "16 x 64 MB": (partial(equal_tensors, 16, 64_000_000), partial(equal_tensors, 4, 1_000_000)),
}


@dataclass(frozen=True)
class Peer:
    """Something that writes tensors to a file and reads all of them back into memory."""

    save: Callable[[Path, Tensors], None]
    load: Callable[[Path], Tensors]


def save_hornbeam(engine: str, path: Path, tensors: Tensors, *, archive: bool = False) -> None:
    """As `hornbeam.saving` does it, without a model."""
    from hornbeam import _core

    dtypes = {dtype: dtype.name for dtype in {a.dtype for a in tensors.values()}}  # slow, so cached
    datasets: list[Any] = [(name, dtypes[a.dtype], a.shape, []) for name, a in tensors.items()]
    plan = _core.plan([] if engine == "safetensors" else _groups(tensors), datasets, engine=engine)
    buffers = [a.reshape(-1) for a in tensors.values()]
    save = plan.start(str(path), buffers, archive=archive, atomic=True, durable=False)
    save.finish([("config.json", b"{}")] if archive else [])


def load_hornbeam(engine: str, path: Path, *, archive: bool = False) -> Tensors:
    """Every tensor in memory of its own, as `hornbeam.saving.load_weights` gets them."""
    from hornbeam import _core

    weights = _core.open(str(path), archive=archive).weights(engine=engine)
    datasets = weights.datasets()
    reading = weights.fetch(list(range(len(datasets))), verify=True, read_ahead=1 << 62)
    loaded = {}
    for i, (name, dtype, shape, _) in enumerate(datasets):
        block: Any = reading.take(i)
        loaded[name] = np.frombuffer(block, np.uint8).view(dtype).reshape(shape)
    reading.complete(drop_rest=False)
    return loaded


def _groups(tensors: Tensors) -> list[tuple[str, list[tuple[str, str]]]]:
    """As Keras does, every layer's `vars` has the layer's name."""
    groups = dict.fromkeys(path.rpartition("/")[0] for path in tensors)
    return [(group, [("name", group.split("/")[-2])]) for group in groups]


def _save_h5py(path: Path, tensors: Tensors) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for group, attributes in _groups(tensors):
            file.create_group(group).attrs.update(attributes)
        for name, array in tensors.items():
            file[name] = array


def _load_h5py(path: Path) -> Tensors:
    import h5py

    loaded = {}
    with h5py.File(path, "r") as file:
        layers = file["layers"]
        for layer in layers:
            for key, dataset in layers[layer]["vars"].items():
                loaded[f"layers/{layer}/vars/{key}"] = dataset[()]
    return loaded


def _save_safetensors(path: Path, tensors: Tensors) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path)


def _load_safetensors(path: Path) -> Tensors:
    from safetensors.numpy import load_file

    return load_file(path)


PEERS: dict[str, Peer] = {
    "hornbeam": Peer(partial(save_hornbeam, "direct"), partial(load_hornbeam, "direct")),
    "hornbeam, libhdf5": Peer(partial(save_hornbeam, "libhdf5"), partial(load_hornbeam, "libhdf5")),
    "h5py": Peer(_save_h5py, _load_h5py),
    "hornbeam, safetensors": Peer(partial(save_hornbeam, "safetensors"), partial(load_hornbeam, "safetensors")),
    "safetensors": Peer(_save_safetensors, _load_safetensors),
}


#: Bytes of a chunk, level of deflate.
_CHUNK, _LEVEL = 1 << 20, 4


def _save_compressed(path: Path, tensors: Tensors) -> None:
    from hornbeam import _core

    datasets: list[Any] = [(name, a.dtype.name, a.shape, []) for name, a in tensors.items()]
    plan = _core.plan(_groups(tensors), datasets, compression=_LEVEL, shuffle=True, chunk_bytes=_CHUNK)
    plan.start(str(path), [a.reshape(-1) for a in tensors.values()], archive=False).finish([])


def _save_h5py_compressed(path: Path, tensors: Tensors) -> None:
    import h5py

    how = {"compression": "gzip", "compression_opts": _LEVEL, "shuffle": True}
    with h5py.File(path, "w") as file:
        for name, array in tensors.items():
            file.create_dataset(name, data=array, chunks=(min(_CHUNK // 4, len(array)),), **how)


COMPRESSED_WEIGHTS = {
    "16 x 8 MB, deflated": (partial(trained_tensors, 16, 8_000_000), partial(trained_tensors, 4, 400_000)),
}
COMPRESSED_PEERS: dict[str, Peer] = {
    "hornbeam": Peer(_save_compressed, partial(load_hornbeam, "auto")),
    "h5py": Peer(_save_h5py_compressed, _load_h5py),
}


def same(ours: Tensors, theirs: Tensors) -> bool:
    """Whether names, dtypes, shapes and bytes are equal."""
    return ours.keys() == theirs.keys() and all(_same_array(a, theirs[name]) for name, a in ours.items())


def _same_array(a: np.ndarray, b: np.ndarray) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))
