"""`hornbeam.open`: every format against h5py and safetensors, slices, mapping, what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from keras.src.saving import saving_lib

import hornbeam
from hornbeam import errors
from hornbeam.base import model_file
from support.helpers import member

RNG = np.random.default_rng(7)


@pytest.fixture(scope="module")
def model() -> Any:
    layers = keras.layers
    made = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.Flatten(), layers.Dense(5)]
    )
    made.compile("adam", "mse")
    made.optimizer.build(made.trainable_variables)
    return made


def conv_name(model: Any) -> str:
    """Counts on with every model of the process."""
    return next(layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D))


def by_h5py(file: Any) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(file, "r") as opened:
        opened.visititems(lambda name, item: found.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
    return found


def check(file: hornbeam.File, wanted: dict[str, Any]) -> None:
    """Every value, shape and dtype, by every way of reading."""
    assert sorted(file) == sorted(wanted)
    assert len(file) == len(wanted) == len(file.tensors)
    assert file.nbytes == sum(np.asarray(a).nbytes for a in wanted.values())
    for name, value in wanted.items():
        value = np.asarray(value)
        tensor = file.tensors[name]
        assert name in file
        assert (tensor.name, tensor.shape, tensor.nbytes, tensor.ndim) == (name, value.shape, value.nbytes, value.ndim)
        assert tensor.dtype.itemsize == value.dtype.itemsize
        for array in (file[name], tensor.read(), tensor[...], np.asarray(tensor)):
            assert isinstance(array, np.ndarray)
            assert (array.shape, array.dtype) == (value.shape, tensor.dtype)
            assert array.tobytes() == value.tobytes()
            assert array.flags.writeable is not tensor.mapped
            assert tensor.mapped or array.size == 0 or array.ctypes.data % 64 == 0


def test_archives(model: Any, tmp_path: Path) -> None:
    for save in (model.save, lambda path: saved_by_hornbeam(model, path)):
        path = tmp_path / "m.keras"
        save(path)
        with hornbeam.open(path) as file:
            check(file, by_h5py(io.BytesIO(member(path))))
            assert (file.format, file.engine, file.path) == ("keras", "direct", str(path))
            assert "layers/conv2d/vars/0" in file
            assert file.config == json.loads(member(path, "config.json"))
            assert file.metadata == json.loads(member(path, "metadata.json"))
            assert "layers/conv2d/vars" in file.groups
            assert file.attributes("layers/conv2d/vars") == {"name": conv_name(model)}
            assert file.attributes("layers/conv2d/vars/0") == file.attributes() == {}
            assert file.verify() == "verified"


def saved_by_hornbeam(model: Any, path: Path) -> None:
    with hornbeam.installed():
        model.save(path)


def test_weights_files(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.weights.h5"
    model.save_weights(path)
    for engine in ("direct", "libhdf5"):
        with hornbeam.options(engine=engine), hornbeam.open(path) as file:
            check(file, by_h5py(path))
            assert (file.format, file.engine, file.config, file.verify()) == ("h5", engine, None, "none")
    path.rename(tmp_path / "no.suffix")
    with hornbeam.open(tmp_path / "no.suffix") as file:
        assert file.format == "h5"


def test_legacy_files(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    model.save(path)
    with h5py.File(path) as wanted:
        version, config = wanted.attrs["keras_version"], wanted.attrs["model_config"]
    for engine in ("auto", "libhdf5"):
        with hornbeam.options(engine=engine), hornbeam.open(path) as file:
            check(file, by_h5py(path))
            assert any(name.startswith("model_weights/") for name in file)
            assert file.attributes()["keras_version"] == file.metadata["keras_version"] == version
            assert file.config == json.loads(config)


def test_directories_and_shards(model: Any, tmp_path: Path) -> None:
    model.save(tmp_path / "d", zipped=False)
    with hornbeam.open(tmp_path / "d") as file:
        check(file, by_h5py(tmp_path / "d" / "model.weights.h5"))
        assert (file.format, file.verify()) == ("directory", "none")
        assert file.config["class_name"] == "Sequential"
        assert file.metadata["keras_version"] == keras.__version__

    model.save_weights(tmp_path / "s.weights.json", max_shard_size=3e-6)
    shards = sorted(tmp_path.glob("s_*.weights.h5"))
    assert len(shards) > 1
    wanted: dict[str, np.ndarray] = {}
    for shard in shards:
        wanted.update(by_h5py(shard))
    for mmap in (False, True):
        with hornbeam.open(tmp_path / "s.weights.json", mmap=mmap) as file:
            check(file, wanted)
            assert (file.format, file.config) == ("shards", None)
            assert file.metadata["total_size"] > 0
            assert file.attributes("layers/conv2d/vars") == {"name": conv_name(model)}
    (tmp_path / "s_00001.weights.h5").unlink()
    with pytest.raises(FileNotFoundError, match="s_00001"):
        hornbeam.open(tmp_path / "s.weights.json")


SAFE = {
    "model.embed": RNG.standard_normal((17, 5)).astype(np.float32),
    "größe/😀": RNG.standard_normal((3, 4)).astype(np.float16),
    "scalar": np.array(3, np.int64),
    "empty": np.empty((4, 0), np.float64),
    "bytes": RNG.integers(0, 255, 7).astype(np.uint8),
    "flags": np.array([True, False, True]),
    "": np.arange(3, dtype=np.int16),
    "complex": RNG.standard_normal(4).astype(np.complex64),
    "bf16": RNG.standard_normal((5, 3)).astype(ml_dtypes.bfloat16),
    "f8": RNG.standard_normal(9).astype(ml_dtypes.float8_e4m3fn),
    "f8_5": RNG.standard_normal(9).astype(ml_dtypes.float8_e5m2),
}


def save_safe(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None) -> Path:
    specs = {
        n: safetensors.TensorSpec(dtype=a.dtype.name, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes)
        for n, a in tensors.items()
    }
    path.write_bytes(safetensors.serialize(specs, metadata))
    return path


def test_safetensors(tmp_path: Path) -> None:
    path = save_safe(SAFE, tmp_path / "m.safetensors", {"format": "np"})
    for mmap in (False, True):
        with hornbeam.open(path, mmap=mmap) as file:
            check(file, SAFE)
            assert all(file.tensors[n].dtype == a.dtype for n, a in SAFE.items())
            assert (file.format, file.engine) == ("safetensors", "safetensors")
            assert file.metadata == file.attributes() == {"format": "np"}
            assert (file.groups, file.config, file.tensors["bf16"].attributes) == ((), None, {})
    plain = {n: a for n, a in SAFE.items() if a.dtype.isbuiltin == 1}
    safetensors.numpy.save_file(plain, path)
    with hornbeam.open(path) as file, safetensors.safe_open(path, "np") as reference:
        check(file, {name: reference.get_tensor(name) for name in reference.keys()})  # noqa: SIM118


def test_safetensors_shards(tmp_path: Path) -> None:
    names = list(SAFE)
    weight_map = {}
    for i, part in enumerate((names[:4], names[4:])):
        shard = f"model-{i + 1:05}-of-00002.safetensors"
        save_safe({n: SAFE[n] for n in part}, tmp_path / shard)
        weight_map.update(dict.fromkeys(part, shard))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map}))
    with hornbeam.open(index) as file:
        check(file, SAFE)
        assert (file.format, file.engine, file.metadata) == ("shards", "safetensors", {"total_size": 12})
    index.write_text(json.dumps({"weight_map": {**weight_map, "more": shard}}))
    with pytest.raises(errors.WeightsFileError, match="names 'more'"):
        hornbeam.open(index)
    save_safe(SAFE, tmp_path / shard)
    with pytest.raises(errors.WeightsFileError, match="is in two shards"):
        hornbeam.open(index)
    index.write_text(json.dumps({"weight_map": {"a": "../m.safetensors"}}))
    with pytest.raises(errors.UnsafeFileError, match="outside its directory"):
        hornbeam.open(index)


@pytest.fixture
def chunked(tmp_path: Path) -> Path:
    """What only libhdf5 reads, between what both engines read."""
    path = tmp_path / "chunked.h5"
    with h5py.File(path, "w") as f:
        f["plain"] = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
        f.create_dataset("zipped", data=RNG.integers(0, 9, (40, 30)), chunks=(16, 16), compression="gzip", shuffle=True)
        f.create_dataset("big", data=np.arange(7, dtype=">f8"))
        f.create_dataset("filled", (3, 2), np.int32, fillvalue=5)
        f.create_dataset("unwritten", (3, 2), np.int32)
        f.create_dataset("größe/😀", data=np.float16(2))
        f.attrs["title"] = "täglich"
    return path


def test_what_libhdf5_reads(chunked: Path) -> None:
    wanted = by_h5py(chunked)
    wanted["big"] = wanted["big"].astype("<f8")
    for mmap in (False, True):
        with hornbeam.open(chunked, mmap=mmap) as file:
            check(file, wanted)
            assert (file.engine, file.attributes()) == ("libhdf5", {"title": "täglich"})
            assert {n for n, t in file.tensors.items() if t.mapped} - {"größe/😀"} == ({"plain"} if mmap else set())
            np.testing.assert_array_equal(file.tensors["zipped"][3:9, ::2], wanted["zipped"][3:9, ::2])
            np.testing.assert_array_equal(file.tensors["big"][-2], wanted["big"][-2])
    with hornbeam.options(engine="direct"), pytest.raises(errors.UnsupportedError):
        hornbeam.open(chunked)


INDICES: list[Any] = [
    ...,
    (),
    0,
    -1,
    np.int64(2),
    slice(None),
    slice(1, 4),
    slice(-3, None),
    slice(None, None, 2),
    slice(4, 1, -1),
    slice(None, None, -2),
    slice(3, 3),
    slice(9, 99),
    (1, 2),
    (1, -1, 2),
    (slice(1, 3), 2),
    (1, slice(3, 0, -2)),
    (2, slice(None), 1),
    (2, ..., 1),
    (..., 0),
    (slice(1, 2), ..., slice(None, None, -1)),
    (None, 1),
    (1, None, slice(2)),
    [0, 3, -1],
    [],
    np.array([[4, 1], [1, 2]]),
    ([0, 2], [1, 3]),
    (1, [3, 1]),
    (slice(2, 4), [3, 1]),
    np.array([True, False, True, False, True]),
    True,
]


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_slices(index: Any, tmp_path: Path) -> None:
    value = RNG.standard_normal((5, 4, 3)).astype(np.float32)
    path = save_safe({"a": value, "b": value.astype(ml_dtypes.bfloat16)}, tmp_path / "m.safetensors")
    for mmap in (False, True):
        with hornbeam.open(path, mmap=mmap) as file:
            for name, whole in (("a", value), ("b", value.astype(ml_dtypes.bfloat16))):
                found, wanted = file.tensors[name][index], whole[index]
                assert type(found) is type(wanted)
                assert (np.shape(found), found.dtype) == (wanted.shape, wanted.dtype)
                assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


def test_slices_of_scalars_and_nothing(tmp_path: Path) -> None:
    with hornbeam.open(save_safe(SAFE, tmp_path / "m.safetensors")) as file:
        assert file.tensors["scalar"][()] == 3
        assert file.tensors["scalar"][...].shape == ()
        assert file.tensors["scalar"][None].shape == (1,)
        assert file.tensors["empty"][1:3].shape == (2, 0)
        assert file.tensors["empty"][:, ::-1].shape == (4, 0)
        for name, index in [("scalar", 0), ("empty", 4), ("empty", (0, 0)), ("model.embed", (0, 0, 0)), ("bytes", -8)]:
            with pytest.raises(IndexError):
                file.tensors[name][index]
            with pytest.raises(IndexError):
                SAFE[name][index]
        with pytest.raises(IndexError):
            file.tensors["bytes"][[9]]


def test_a_slice_reads_only_its_rows(tmp_path: Path) -> None:
    """The bytes read are counted where the file lets it: all others are cut off while it is open."""
    value = np.arange(4000, dtype=np.float32).reshape(1000, 4)
    path = save_safe({"a": value}, tmp_path / "m.safetensors")
    start = path.stat().st_size - value.nbytes
    with hornbeam.open(path) as file:
        tensor = file.tensors["a"]
        os.truncate(path, start + 160)  # ten rows
        for index in (slice(0, 10), slice(9, None, -1), 9, (9, slice(1, 4)), (0, 1), [3, 9, 1], (slice(2, 8), 1)):
            np.testing.assert_array_equal(tensor[index], value[index])
        for index in (slice(0, 11), 10, (10, 0), slice(None, None, -1), [10], ...):
            with pytest.raises(errors.StorageError, match=r"ends too early.*entry 'a'.*m\.safetensors"):
                tensor[index]
        with pytest.raises(errors.StorageError):
            file["a"]


def test_a_small_slice_keeps_no_large_memory(tmp_path: Path) -> None:
    value = np.zeros((1000, 100), np.float32)
    with hornbeam.open(save_safe({"a": value}, tmp_path / "m.safetensors")) as file:
        column = file.tensors["a"][:, 3]
        assert column.base is None
        assert column.flags.writeable


def test_bfloat16(tmp_path: Path) -> None:
    keras.config.set_dtype_policy("bfloat16")
    try:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    finally:
        keras.config.set_dtype_policy("float32")
    path = tmp_path / "m.keras"
    model.save(path)
    for engine in ("direct", "libhdf5"):
        with hornbeam.options(engine=engine), hornbeam.open(path) as file:
            kernel = file["layers/dense/vars/0"]
            assert kernel.dtype == ml_dtypes.bfloat16
            assert file.attributes("layers/dense/vars/0") == {"dtype": "bfloat16"}
            assert kernel.tobytes() == np.asarray(keras.ops.convert_to_numpy(model.layers[0].kernel)).tobytes()


def test_a_dtype_attribute_that_lies(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as f:
        f["a"] = np.zeros(3, np.float32)
        f["a"].attrs["dtype"] = "bfloat16"
    with hornbeam.open(tmp_path / "m.h5") as file:
        assert file.tensors["a"].dtype == np.float32
        np.testing.assert_array_equal(file["a"], np.zeros(3, np.float32))


def test_mapped_views(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    saved_by_hornbeam(model, path)
    wanted = by_h5py(io.BytesIO(member(path)))
    with hornbeam.open(path, mmap=True) as file:
        check(file, wanted)
        assert all(tensor.mapped for tensor in file.tensors.values())  # ours are aligned
        view, part = file["layers/conv2d/vars/0"], file.tensors["layers/conv2d/vars/0"][1:, ..., 0]
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        assert np.shares_memory(view, part)
        assert np.shares_memory(view, file["layers/conv2d/vars/0"])
    np.testing.assert_array_equal(view, wanted["layers/conv2d/vars/0"])  # also when the file is closed

    misaligned = save_safe({"a": np.arange(3, dtype=np.uint8), "b": np.arange(4.0)}, tmp_path / "m.safetensors")
    raw = misaligned.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    misaligned.write_bytes(struct.pack("<Q", size + 1) + raw[8 : 8 + size] + b" " + raw[8 + size :])
    with hornbeam.open(misaligned, mmap=True) as file:
        assert file.tensors["a"].mapped
        assert not file.tensors["b"].mapped
        np.testing.assert_array_equal(file["b"], np.arange(4.0))


def test_a_tensor_becomes_an_array_as_numpy_asks(tmp_path: Path) -> None:
    path = save_safe(SAFE, tmp_path / "m.safetensors")
    for mmap in (False, True):
        with hornbeam.open(path, mmap=mmap) as file:
            tensor: Any = file.tensors["bytes"]
            assert np.array(tensor).flags.writeable
            assert np.asarray(tensor, np.float32).dtype == np.float32
            if mmap:
                assert np.shares_memory(np.array(tensor, copy=False), file["bytes"])
            else:
                with pytest.raises(ValueError, match="without a copy"):
                    np.array(tensor, copy=False)


def test_a_dropped_file_is_closed(tmp_path: Path) -> None:
    file = hornbeam.open(save_safe(SAFE, tmp_path / "m.safetensors"))
    assert len(list(file.tensors.values())) == len(SAFE)
    gone = weakref.ref(file)
    del file
    assert gone() is None


def test_compressed_archives(model: Any, tmp_path: Path) -> None:
    stored, deflated = tmp_path / "m.keras", tmp_path / "z.keras"
    model.save(stored)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    for mmap in (False, True):
        with hornbeam.open(deflated, mmap=mmap) as file:
            check(file, by_h5py(io.BytesIO(member(stored))))
            assert not any(tensor.mapped for tensor in file.tensors.values())
            assert (file.verify(), file.config["class_name"]) == ("verified", "Sequential")


def test_a_changed_byte_is_found(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    saved_by_hornbeam(model, path)
    with hornbeam.open(path) as file:
        kernel = file["layers/dense/vars/0"]
    raw = bytearray(path.read_bytes())
    raw[raw.index(kernel.tobytes())] ^= 1
    path.write_bytes(raw)
    with hornbeam.open(path) as file:
        assert file["layers/dense/vars/0"].shape == kernel.shape  # single tensors have no checksum
        with pytest.raises(errors.ChecksumError):
            file.verify()


def test_closed_files(tmp_path: Path) -> None:
    file = hornbeam.open(save_safe(SAFE, tmp_path / "m.safetensors"))
    tensor, array = file.tensors["bytes"], file["bytes"]
    file.close()
    file.close()
    uses: list[Callable[[], Any]] = [
        lambda: file["bytes"],
        lambda: file.get("bytes"),
        lambda: "bytes" in file,
        lambda: len(file),
        lambda: list(file),
        lambda: file.tensors["bytes"],
        lambda: file.engine,
        lambda: file.groups,
        lambda: file.config,
        lambda: file.metadata,
        lambda: file.attributes(),
        lambda: file.verify(),
        lambda: file.nbytes,
        lambda: pickle.dumps(file),
        lambda: file.__enter__(),
        lambda: tensor.read(),
        lambda: tensor[0],
    ]
    for use in uses:
        with pytest.raises(ValueError, match="I/O operation on closed file"):
            use()
    assert repr(file) == f"<closed hornbeam.File {str(tmp_path / 'm.safetensors')!r}>"
    assert "closed" in file._repr_html_()
    assert (array == SAFE["bytes"]).all()


def test_the_mapping(tmp_path: Path) -> None:
    os.chdir(tmp_path)
    save_safe(SAFE, Path("m.safetensors"))
    with hornbeam.open(Path("m.safetensors")) as file:
        assert list(file) == sorted(SAFE, key=str.encode)
        assert set(file.keys()) == set(SAFE)
        assert {n: a.tobytes() for n, a in file.items()} == {n: a.tobytes() for n, a in SAFE.items()}
        assert file.get("nothing") is None
        assert file.get("scalar") == 3
        assert 3 not in file
        assert file == file
        assert len({file, file}) == 1
        assert repr(file).endswith(f"m.safetensors': safetensors, {len(SAFE)} tensors, {file.nbytes} B>")
        assert repr(file.tensors["model.embed"]) == "<hornbeam.Tensor 'model.embed': float32[17, 5], 340 B>"
        table = file._repr_html_()
        assert table.count("<tr>") == len(SAFE) + 1
        assert "17 &times; 5" in table


def test_names_are_escaped_in_html(tmp_path: Path) -> None:
    many = {f"<b>{i}": np.zeros(1) for i in range(1100)}
    with hornbeam.open(save_safe(many, tmp_path / "m.safetensors")) as file:
        table = file._repr_html_()
    assert "<b>" not in table
    assert "… and 100 more" in table


def test_pickles(tmp_path: Path) -> None:
    path = save_safe(SAFE, tmp_path / "m.safetensors")
    with hornbeam.open(path, mmap=True) as file:
        again, tensor = pickle.loads(pickle.dumps((file, file.tensors["model.embed"])))
    with again:
        check(again, SAFE)
        assert tensor._file is again
        assert tensor.mapped
        np.testing.assert_array_equal(tensor[2:4], SAFE["model.embed"][2:4])


def test_missing_names_are_answered_with_near_ones(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    model.save(path)
    with hornbeam.open(path) as file:
        for wrong, near in [
            ("layers/dense/var/0", "'layers/dense/vars/0'"),
            ("/layers/dense/vars/1", "'layers/dense/vars/1'"),
            ("layers/conv2d", "'layers/conv2d/vars/0', 'layers/conv2d/vars/1'"),
        ]:
            with pytest.raises(KeyError, match=near) as caught:
                file[wrong]
            assert repr(wrong) in str(caught.value)
            assert str(path) in str(caught.value)
        with pytest.raises(KeyError, match="no group or tensor"):
            file.attributes("layers/conv")
        with pytest.raises(KeyError):
            file[3]  # type: ignore[index]


def test_threads_read_at_once(model: Any, chunked: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "m.keras")
    for path in (tmp_path / "m.keras", chunked, save_safe(SAFE, tmp_path / "m.safetensors")):
        with hornbeam.open(path) as file:
            wanted = {name: array.tobytes() for name, array in file.items()}
            wrong: list[str] = []

            def read(file: hornbeam.File = file, wanted: dict[str, bytes] = wanted, wrong: list[str] = wrong) -> None:
                for _ in range(20):
                    wrong.extend(name for name in file if file[name].tobytes() != wanted[name])

            threads = [threading.Thread(target=read) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong


def test_a_read_starts_no_thread(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("counts threads as Linux tells them")

    def count() -> int:
        return int(status.read_text().split("Threads:")[1].split()[0])

    with hornbeam.open(save_safe({"a": np.zeros(30 << 20, np.uint8)}, tmp_path / "m.safetensors")) as file:
        before, most = count(), 0
        stop = threading.Event()

        def watch() -> None:
            nonlocal most
            while not stop.is_set():
                most = max(most, count())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            for _ in range(10):
                file["a"]
        finally:
            stop.set()
            thread.join()
    assert most <= before + 1


def test_neither_keras_nor_a_backend_is_imported(model: Any, tmp_path: Path) -> None:
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "s.weights.json", max_shard_size=3e-6)
    model.save(tmp_path / "d", zipped=False)
    save_safe(SAFE, tmp_path / "m.safetensors")
    code = """
import sys, hornbeam
for path in sys.argv[1:]:
    with hornbeam.open(path) as file:
        assert sum(a.nbytes for a in file.values()) == file.nbytes
        file.config, file.metadata, file.verify(), repr(file), file._repr_html_()
found = {"keras", "tensorflow", "jax", "torch", "h5py"} & set(sys.modules)
assert not found, found
"""
    paths = [str(tmp_path / name) for name in ("m.keras", "s.weights.json", "d", "m.safetensors")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)


def test_limits_are_those_of_keras() -> None:
    assert saving_lib._ZIP_MEMBER_BOMB_FLOOR_BYTES == model_file._BOMB_FLOOR
    assert saving_lib._ZIP_MEMBER_MAX_EXPANSION == model_file._MAX_EXPANSION
    assert (saving_lib._VARS_FNAME_H5, saving_lib._VARS_FNAME_NPZ) == (model_file._WEIGHTS, model_file._NPZ)
    assert (saving_lib._CONFIG_FILENAME, saving_lib._METADATA_FILENAME) == (model_file._CONFIG, model_file._METADATA)


def test_what_is_no_model_file(tmp_path: Path) -> None:
    def refused(name: str, content: bytes, error: type[Exception], match: str | None = None) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        for mmap in (False, True):
            with pytest.raises(error, match=match) as caught:
                hornbeam.open(path, mmap=mmap)
            assert name in str(caught.value)

    with pytest.raises(FileNotFoundError, match="nothing"):
        hornbeam.open(tmp_path / "nothing.keras")
    with pytest.raises(FileNotFoundError, match=r"model\.weights\.h5"):
        hornbeam.open(tmp_path)
    refused("x.bin", b"", errors.UnsupportedError, "expected an archive")
    refused("x.txt", b"hello, world, once more", errors.UnsupportedError, "hello")
    refused("x.keras", b"hello", errors.ArchiveError)
    refused("y.h5", b"hello", errors.WeightsFileError, "HDF5 signature")
    refused("x.safetensors", b"hello", errors.WeightsFileError, "too short")
    refused("y.safetensors", b"hello world, hello", errors.LimitError)
    refused("x.json", b"{", ValueError)
    refused("y.json", b"[1]", errors.ConfigError, "no weight_map")
    refused("z.json", b'{"weight_map": {"a": "z.json"}}', errors.UnsupportedError, "is an index")
    refused("z.safetensors", struct.pack("<Q", 2) + b"{}more", errors.WeightsFileError, "left over")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.weights.npz", b"")
    refused("npz.keras", buffer.getvalue(), errors.UnsupportedError, "npz")
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("a.txt", b"")
    refused("zip.keras", buffer.getvalue(), errors.ArchiveError, r"model\.weights\.h5")


@pytest.mark.parametrize("kind", ["keras", "h5", "safetensors"])
def test_a_file_cut_short_is_refused(kind: str, model: Any, tmp_path: Path) -> None:
    path = tmp_path / f"m.{'weights.h5' if kind == 'h5' else kind}"
    if kind == "keras":
        saved_by_hornbeam(model, path)
    elif kind == "h5":
        with hornbeam.installed():
            model.save_weights(path)
    else:
        save_safe(SAFE, path)
    raw = path.read_bytes()
    for n in [*range(0, 64, 5), *range(64, len(raw), len(raw) // 20), len(raw) - 1]:
        path.write_bytes(raw[:n])
        with pytest.raises((errors.HornbeamError, OSError), match="m"):
            hornbeam.open(path)


def test_links_out_of_the_file_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as f:
        f["a"] = h5py.ExternalLink("other.h5", "/a")
    with pytest.raises(errors.UnsafeFileError, match="ExternalLink"):
        hornbeam.open(tmp_path / "m.h5")


def test_a_broken_config_is_an_error_when_it_is_asked_for(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    model.save(path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.keras", "w") as new:
        new.writestr("model.weights.h5", old.read("model.weights.h5"))
        new.writestr("config.json", "{")
    with hornbeam.open(tmp_path / "b.keras") as file:
        assert len(file) > 0
        assert file.metadata == {}
        with pytest.raises(errors.ConfigError, match=r"config\.json"):
            _ = file.config


def test_several_lists_and_small_integers_index_as_numpy_does(tmp_path: Path) -> None:
    values = np.arange(4000, dtype=np.float32).reshape(1000, 2, 2)
    with h5py.File(tmp_path / "m.h5", "w") as f:
        f["a"] = values
    with hornbeam.open(tmp_path / "m.h5") as file:
        tensor = file.tensors["a"]
        for index in ((0, slice(None), [1, 0]), ([1, 2], 0, [1, 0]), np.array([0, 1, -1], np.int8), (3, [0, 1])):
            np.testing.assert_array_equal(tensor[index], values[index])
