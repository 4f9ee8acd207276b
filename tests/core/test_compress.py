"""Compressed saves: the same values for Keras, h5py and us, in fewer bytes; damage found before anything is changed."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from keras.src.saving import saving_lib

import hornbeam
from hornbeam import saving
from hornbeam.errors import HornbeamError, LimitError
from support.helpers import member, saved, state
from support.zoo import ZOO, chain, floats, train

pytestmark = pytest.mark.keras_versions


@pytest.fixture(autouse=True)
def _strict() -> Any:
    with hornbeam.options(fallback=False):
        hornbeam.stats(reset=True)
        yield


def compressible() -> Any:
    """Large enough for chunks, of values that repeat."""
    model, *_ = train(chain(layers.Dense(300), layers.Dense(200, dtype="float64"), shape=(400,)), *data(), "adam")
    for variable in model.weights:
        shape = variable.shape
        variable.assign(np.resize(np.arange(37, dtype="float32"), shape))
    return model


def data() -> tuple[np.ndarray, np.ndarray]:
    return floats(8, 400), floats(8, 200)


#: Models with a tensor that is worth a chunk.
LARGE = {"bfloat16", "embedding_with_sparse_updates"}


def chunked(path: Path) -> bool:
    """Whether anything in an archive is."""
    found: list[Any] = []
    with h5py.File(io.BytesIO(member(path)), "r") as file:
        file.visititems(lambda _, item: found.append(getattr(item, "chunks", None)))
    return any(found)


@pytest.mark.parametrize("name", ZOO)
def test_every_model_survives(name: str, tmp_path: Path) -> None:
    model, *_ = ZOO[name]()
    path, plain = tmp_path / "m.keras", tmp_path / "plain.keras"
    with hornbeam.options(chunk_bytes=1024):
        saving.save_model(model, path, compression=1)
    assert hornbeam.stats(reset=True).engines == {"libhdf5": 1}
    saving.save_model(model, plain)
    assert hornbeam.stats(reset=True).engines == {"direct": 1}
    assert zipfile.ZipFile(path).testzip() is None
    assert chunked(path) == (name in LARGE)
    expected = saved(keras.saving.load_model(plain))
    assert saved(saving.load_model(path, strict=True)) == expected
    assert hornbeam.stats().engines == {"libhdf5" if name in LARGE else "direct": 1}
    assert saved(keras.saving.load_model(path)) == expected


@pytest.mark.parametrize("compression", ["gzip", 0, 9])
@pytest.mark.parametrize("shuffle", [True, False])
def test_h5py_and_keras_read_it(compression: Any, shuffle: bool, tmp_path: Path) -> None:
    model = compressible()
    path = tmp_path / "m.weights.h5"
    with hornbeam.options(shuffle=shuffle, chunk_bytes=50_000):
        saving.save_weights(model, path, compression=compression)
    assert hornbeam.stats().engines == {"libhdf5": 1}
    with h5py.File(path, "r") as file:
        kernel = file["layers/dense/vars/0"]
        level = {"gzip": 4}.get(compression, compression)
        assert (kernel.compression, kernel.compression_opts, kernel.shuffle) == ("gzip", level, shuffle)
        assert np.prod(kernel.chunks) * 4 <= 50_000
        np.testing.assert_array_equal(kernel[()], keras.ops.convert_to_numpy(model.layers[1].kernel))
        assert file["layers/dense/vars/1"].chunks is None  # too small to be worth it
    saving.save_weights(model, tmp_path / "plain.weights.h5")
    smaller = path.stat().st_size < 0.9 * (tmp_path / "plain.weights.h5").stat().st_size
    assert smaller == (compression != 0)
    for load in (keras.Model.load_weights, saving.load_weights):
        other = compressible()
        for variable in other.weights:
            variable.assign(variable * 0)
        load(other, path)
        assert saved(other) == saved(model)


@pytest.mark.trains
def test_training_goes_on_as_it_would(tmp_path: Path) -> None:
    model = compressible()
    saving.save_model(model, tmp_path / "m.keras", compression="gzip")
    loaded = saving.load_model(tmp_path / "m.keras")
    for each in (model, loaded):
        each.fit(*data(), epochs=2, shuffle=False, verbose=0)
    assert saved(loaded) == saved(model)


def test_options_reach_every_save(tmp_path: Path) -> None:
    model = compressible()
    with hornbeam.installed(), hornbeam.options(compression="gzip"):
        model.save(tmp_path / "m.keras")
        model.save_weights(tmp_path / "m.weights.json", max_shard_size=6e-4)
        keras.saving.save_model(model, tmp_path / "directory", zipped=False)
        with hornbeam.options(compression="none"):
            model.save(tmp_path / "plain.keras")
    assert (tmp_path / "m.keras").stat().st_size < 0.9 * (tmp_path / "plain.keras").stat().st_size
    for path in [tmp_path / "directory" / "model.weights.h5", *tmp_path.glob("*_*.weights.h5")]:
        with h5py.File(path, "r") as file:
            found: list[Any] = []
            file.visititems(lambda _, item, found=found: found.append(getattr(item, "compression", None)))
            assert "gzip" in found, path
    other = compressible()
    saving.load_weights(other, tmp_path / "m.weights.json")
    assert saved(other) == saved(model)
    assert saved(saving.load_model(tmp_path / "directory")) == saved(model)


def test_memory_takes_it(tmp_path: Path) -> None:
    model = compressible()
    file = io.BytesIO(b"before" * 100)
    file.seek(6)
    with hornbeam.installed(), hornbeam.options(compression=6):
        saving_lib.save_model(model, file)
    end = file.tell()
    assert len(file.getvalue()) == end
    assert file.getvalue()[:6] == b"before"
    assert saved(saving_lib.load_model(io.BytesIO(file.getvalue()[6:]))) == saved(model)


@pytest.mark.parametrize("wrong", [{"compression": "lzf"}, {"compression": 10}, {"compression": True}])
def test_wrong_arguments(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be"), hornbeam.options(chunk_bytes=5):
        pass
    with pytest.raises(ValueError, match="must be"):
        saving.save_model(chain(layers.Dense(2)), tmp_path / "m.keras", **wrong)
    assert not list(tmp_path.iterdir())


def test_the_direct_engine_does_not_compress(tmp_path: Path) -> None:
    with hornbeam.options(engine="direct"), pytest.raises(HornbeamError, match="does not compress"):
        saving.save_model(chain(layers.Dense(2)), tmp_path / "m.keras", compression="gzip")
    assert not list(tmp_path.iterdir())


def test_a_damaged_chunk_leaves_the_model(tmp_path: Path) -> None:
    model = compressible()
    path = tmp_path / "m.weights.h5"
    with hornbeam.options(chunk_bytes=30_000):
        saving.save_weights(model, path, compression="gzip")
    with h5py.File(path, "r") as file:
        last = file["layers/dense_1/vars/0"].id
        info = last.get_chunk_info(last.get_num_chunks() - 1)
    content = bytearray(path.read_bytes())
    content[info.byte_offset + info.size - 2] ^= 0x55  # its Adler-32
    path.write_bytes(content)
    model.layers[1].kernel.assign(floats(400, 300))
    before = state(model)
    with pytest.raises(HornbeamError, match="layers/dense_1/vars/0") as raised:
        saving.load_weights(model, path)
    assert str(path) in str(raised.value)
    assert state(model) == before


def test_the_checksum_is_compared_before_the_c_library_looks(tmp_path: Path) -> None:
    model = compressible()
    path = tmp_path / "m.keras"
    saving.save_model(model, path, compression="gzip")
    image = member(path)
    content = bytearray(path.read_bytes())
    content[content.index(image) + len(image) // 2] ^= 1
    path.write_bytes(content)
    for engine in ("auto", "libhdf5"):
        with hornbeam.options(engine=engine), pytest.raises(HornbeamError, match="CRC"):
            saving.load_model(path)


def test_small_models_have_nothing_to_compress(tmp_path: Path) -> None:
    for i, model in enumerate((chain(layers.Dense(2)), chain(layers.Flatten()))):
        saving.save_model(model, tmp_path / f"{i}.keras", compression="gzip")
        assert saved(saving.load_model(tmp_path / f"{i}.keras")) == saved(model)
        assert saved(keras.saving.load_model(tmp_path / f"{i}.keras")) == saved(model)


def test_progress_counts_tensors_and_nothing_twice(tmp_path: Path) -> None:
    model, told = compressible(), list[hornbeam.Progress]()
    saving.save_model(model, tmp_path / "m.keras", compression="gzip", progress=told.append)
    saving.load_model(tmp_path / "m.keras", progress=told.append)
    saving.save_weights(model, tmp_path / "m.weights.json", max_shard_size=6e-4, progress=told.append)
    for operation in ("save", "load"):
        last = [p for p in told if p.operation == operation][-1]
        assert last.done == last.total == sum(np.asarray(v).nbytes for v in _values(model)), operation


def _values(model: Any) -> list[Any]:
    optimizer = getattr(model, "optimizer", None)
    return [keras.ops.convert_to_numpy(v) for v in [*model.weights, *(optimizer.variables if optimizer else ())]]


def test_a_pipe_gets_nothing_of_what_cannot_be_written_there() -> None:
    class Pipe(io.RawIOBase):
        content = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.content += bytes(data)
            return len(data)

    pipe = Pipe()
    with hornbeam.installed(), hornbeam.options(compression=1), pytest.raises(HornbeamError, match="can seek"):
        saving_lib.save_model(compressible(), pipe)
    assert pipe.content == b""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forks_while_a_file_object_is_read(tmp_path: Path) -> None:
    """As a data loader does in another thread. The lock of the HDF5 library is waited for by `fork`, and whoever forks
    has the interpreter, which a file object needs: it must not be read under that lock."""

    class Forking(io.BytesIO):
        forks = 0

        def read(self, size: int | None = -1) -> bytes:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of threads in this process, which the child does not need
                child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
            self.forks += 1
            return super().read(size)

    model = compressible()
    saving.save_model(model, tmp_path / "m.keras", compression=1)
    file = Forking((tmp_path / "m.keras").read_bytes())
    with hornbeam.installed():
        loaded = saving_lib.load_model(file)
    assert file.forks > 5
    assert hornbeam.stats().engines == {"libhdf5": 2}
    assert saved(loaded) == saved(model)


def test_what_is_decoded_is_judged_together(tmp_path: Path) -> None:
    """Each dataset is below Keras' limit for one; nearly all of their chunks were never written."""
    model = chain(layers.Dense(2))
    before = state(model)
    path = tmp_path / "m.weights.h5"
    names = [f"layers/dense/vars/{i}" for i in range(3)]
    with h5py.File(path, "w") as file:
        for name in names:
            file.create_dataset(name, (1 << 29,), "float32", chunks=(1 << 18,))[0] = 1
    with pytest.raises(ValueError, match="expected 2 variables, but received 3"):
        saving.load_weights(model, path)  # nothing is read for that
    with hornbeam.options(verify=True), pytest.raises(LimitError, match="together") as caught:
        saving.load_weights(model, path)
    assert caught.value.path == str(path)
    assert caught.value.expected == f"{3 << 31} bytes declared"
    assert state(model) == before
    with hornbeam.open(path) as file:  # one by one
        assert [file.tensors[name].nbytes for name in names] == [1 << 31] * 3


def test_assets_are_judged_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_ZIP_MEMBER_BOMB_FLOOR_BYTES", "_ZIP_EXTRACT_BOMB_FLOOR_BYTES"):
        monkeypatch.setattr(saving_lib, name, 100_000, raising=False)
    path = tmp_path / "m.keras"
    saving.save_model(chain(layers.Dense(2)), path)
    saving.load_model(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for i in range(100):
            archive.writestr(f"assets/{i}", bytes(90_000))
    with pytest.raises(LimitError, match="bomb"):
        saving.load_model(path)


SUMMED = pytest.mark.skipif(
    not hasattr(saving_lib, "_ZIP_CUMULATIVE_BOMB_FLOOR_BYTES"), reason="before Keras 3.16 there is no limit of the sum"
)
FLOOR = 200_000
#: Sizes of members, and whether Keras 3.16 refuses the archive: what expands a lot counts, and only together.
SUMS = {
    "at": ([FLOOR // 2, FLOOR // 2], False),
    "above": ([FLOOR // 2, FLOOR // 2 + 1], True),
    "many": ([FLOOR // 40] * 41, True),
    "one": ([FLOOR + 1], True),
    "stored": ([FLOOR, -FLOOR], False),
}


@SUMMED
@pytest.mark.parametrize("case", SUMS)
def test_members_are_judged_together_as_keras_does(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, refused = SUMS[case]
    path = tmp_path / "m.keras"
    model = chain(layers.Dense(2))
    saving.save_model(model, path)
    with zipfile.ZipFile(path, "a") as archive:
        for i, size in enumerate(sizes):
            how = zipfile.ZIP_DEFLATED if size > 0 else zipfile.ZIP_STORED
            archive.writestr(f"other/{i}", bytes(abs(size)), how)
    monkeypatch.setattr(saving_lib, "_ZIP_CUMULATIVE_BOMB_FLOOR_BYTES", FLOOR)
    monkeypatch.setattr(saving_lib, "_ZIP_MEMBER_MAX_EXPANSION", 50)

    def load(how: str) -> Any:
        if how == "weights":
            return model.load_weights(path)
        return saving_lib.load_model(io.BytesIO(path.read_bytes()) if how == "file object" else path)

    before = state(model)
    for how in ("model", "file object", "weights"):
        if not refused:
            load(how)
            with hornbeam.installed():
                load(how)
            continue
        with pytest.raises(ValueError, match=r"members declare .* decompression bomb") as theirs:
            load(how)
        with hornbeam.installed(), pytest.raises(LimitError) as found:
            load(how)
        assert str(theirs.value) in str(found.value)
        assert found.value.found == saving_lib.readable_memory_size(sum(sizes))
        assert found.value.path == (None if how == "file object" else str(path))
        assert state(model) == before


@SUMMED
def test_a_member_at_the_limit_of_expansion_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.keras"
    saving.save_model(chain(layers.Dense(2)), path)
    size = next(n for n in range(200, 10_000) if n % len(zlib.compress(bytes(n), wbits=-15)) == 0)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("other", bytes(size))
        ratio, rest = divmod(size, archive.getinfo("other").compress_size)
    assert (ratio > 1, rest) == (True, 0)
    monkeypatch.setattr(saving_lib, "_ZIP_CUMULATIVE_BOMB_FLOOR_BYTES", 10)
    for most, refused in ((ratio, False), (ratio - 1, True)):
        monkeypatch.setattr(saving_lib, "_ZIP_MEMBER_MAX_EXPANSION", most)
        for context in (contextlib.nullcontext(), hornbeam.installed()):
            with context, pytest.raises(ValueError, match="bomb") if refused else contextlib.nullcontext():
                saving_lib.load_model(path)
