"""Every feature of HDF5 that a file of weights could meet: read bit for bit as h5py reads it, or refused, and how.

What other writers do (MATLAB's user block, `h5copy`'s hard links, `h5repack`'s filters and layouts) is done by h5py.
"""

from __future__ import annotations

import h5py
import keras
import numpy as np
import pytest

import hornbeam
from hornbeam.errors import UnsafeFileError, UnsupportedError, WeightsFileError

VALUES = np.arange(1000, dtype="f4").reshape(20, 50)


def _plain(f):
    f["a/b"] = VALUES
    f["scalar"] = np.float32(3)
    f["empty"] = np.zeros((3, 0), "f8")


def _dtypes(f):
    names = "i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16 ? >i2 >i4 >i8 >u2 >f2 >f4 >f8 >c8 >c16 V1 V2 V7"
    for i, name in enumerate(names.split()):
        f[f"{i:02}"] = (
            np.frombuffer(bytes(range(64)) * 7, "u1").view(np.dtype(name)) if name[0] != "?" else [True, False]
        )


def _hard_links(f):
    f["a/b"] = VALUES
    f["again"] = f["a/b"]
    f["a/c"] = f["a/b"]
    f["group"] = f["a"]
    f["deep/er"] = f["group"]
    f.create_dataset("packed", data=VALUES, chunks=(7, 9), compression="gzip")
    f["packed_again"] = f["packed"]


def _chunks(f):
    for i, options in enumerate(
        [
            {},
            {"maxshape": (None, 50)},
            {"maxshape": (None, None)},
            {"compression": "gzip"},
            {"compression": "gzip", "shuffle": True, "fletcher32": True},
            {"compression": "lzf"},
            {"compression": "lzf", "shuffle": True, "fletcher32": True},
            {"fletcher32": True},
            {"shuffle": True},
        ]
    ):
        for chunk in [(20, 50), (7, 9), (1, 1), (1, 50), (20, 1)]:
            f.create_dataset(f"{i}/{chunk[0]}x{chunk[1]}", data=VALUES, chunks=chunk, **options)
    f.create_dataset("integers", data=np.arange(1000), chunks=(100,), scaleoffset=0)
    noise = np.random.default_rng(1).integers(0, 256, 100_000, "u1")
    f.create_dataset("noise", data=noise, chunks=(5000,), compression="lzf")
    f.create_dataset("zeros", data=np.zeros(100_000, "u1"), chunks=(50_000,), compression="lzf")
    mixed = np.where(np.arange(100_000) % 3000 < 1000, noise, np.arange(100_000) % 7).astype("u1")
    f.create_dataset("mixed", data=mixed, chunks=(30_000,), compression="lzf")
    partly = f.create_dataset("partly", (100, 100), "f4", chunks=(10, 10), fillvalue=7)
    partly[5:15, 20:35] = 1
    f.create_dataset("never", (10, 10), "f4", chunks=(5, 5), fillvalue=-1)
    f.create_dataset("never_either", (10, 10), "f4")
    f.create_dataset("filled", (10, 10), "f4", fillvalue=2.5)


def _nbit(f):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((100,))
    plist.set_filter(h5py.h5z.FILTER_NBIT)
    space = h5py.h5s.create_simple((1000,))
    made = h5py.h5d.create(f.id, b"nbit", h5py.h5t.STD_I32LE, space, plist)
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(1000, dtype="i4"))


def _compact(f):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    made = h5py.h5d.create(f.id, b"compact", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((10,)), plist)
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(10, dtype="f4"))
    f["again"] = f["compact"]


def _track_order(f):
    group = f.create_group("g", track_order=True)
    for i in range(20):
        group[f"k{19 - i:02}"] = np.arange(i)
    few = f.create_group("few", track_order=True)
    few["z"], few["a"] = 1.0, 2.0


def _many(f):
    for i in range(300):
        f[f"g/{i}"] = np.arange(i % 4)
    f["größe/ß"] = VALUES


def _attributes(f):
    f["a"] = VALUES
    for i in range(30):
        f["a"].attrs[f"n{i}"] = np.arange(5)
    f["a"].attrs["text"] = "größe"
    f["a"].attrs["reference"] = f["a"].ref
    f["a"].attrs["nothing"] = h5py.Empty("S3")
    f["a"].attrs["typed"] = np.zeros(3, [("x", "i4")])
    f["t"] = np.dtype("f4")
    f["a"].attrs.create("shared", np.zeros(2, "f4"), dtype=f["t"])
    f["x"] = np.arange(50.0)
    f["x"].make_scale("x")
    f["a"].dims[1].attach_scale(f["x"])


def _named_type(f):
    f["type"] = np.dtype("f4")
    f.create_dataset("x", data=np.arange(3, dtype="f4"), dtype=f["type"])
    f["a/y"] = VALUES


def _others(f):
    """Each with the word that the refusal has."""
    f["number"] = VALUES
    f["text"] = "hello"
    f["texts"] = np.array([b"abc", b"d"])
    f.create_dataset("names", data=["a", "bc"], dtype=h5py.string_dtype())
    f["nothing"] = h5py.Empty("f4")
    f.create_dataset("enum", data=[0, 1], dtype=h5py.enum_dtype({"A": 0, "B": 1}, "i1"))
    f.create_dataset("enum3", data=[0, 1, 2], dtype=h5py.enum_dtype({"A": 0, "B": 1, "C": 2}, "i4"))
    f["structure"] = np.zeros(3, [("a", "i4"), ("b", "f8")])
    f["array"] = np.zeros(3, [("a", "f4", (2, 2))])
    f.create_dataset("arrays", (3,), np.dtype(("f4", (2, 2))))
    f.create_dataset("ragged", (3,), h5py.vlen_dtype(np.dtype("f4")))
    f["reference"] = np.array([f.ref], h5py.ref_dtype)
    kind = h5py.h5t.STD_B8LE.copy()
    h5py.h5d.create(f.id, b"bits", kind, h5py.h5s.create_simple((3,)))
    f.create_dataset("packed_text", data=[b"a"] * 100, chunks=(10,), compression="gzip")
    f["text"].attrs["note"] = "kept"


WORDS = {
    "text": "strings",
    "texts": "strings",
    "names": "strings",
    "nothing": "null dataspace",
    "enum": "an enumeration",
    "enum3": "an enumeration",
    "structure": "structures",
    "array": "structures",
    "ragged": "rows of variable length",
    "reference": "references",
    "bits": "bit fields",
    "packed_text": "strings",
}

READ = [_plain, _dtypes, _hard_links, _chunks, _nbit, _compact, _track_order, _many, _attributes, _named_type, _others]
VERSIONS = ["earliest", "latest", ("v108", "v108"), ("v110", "v110")]


def _datasets(group: h5py.Group, path: str = "") -> dict[str, h5py.Dataset]:
    found = {}
    for name in group:
        item = group[name]
        if isinstance(item, h5py.Group):
            found |= _datasets(item, f"{path}{name}/")
        elif isinstance(item, h5py.Dataset):
            found[f"{path}{name}"] = item
    return found


@pytest.mark.parametrize("make", READ)
@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize("block", [0, 512, 4096])
@pytest.mark.parametrize("engine", ["auto", "libhdf5"])
def test_what_h5py_writes_is_read_as_h5py_reads_it(make, version, block, engine, tmp_path):
    path = str(tmp_path / "m.h5")
    with h5py.File(path, "w", libver=version, userblock_size=block) as f:
        make(f)
    with h5py.File(path) as f, hornbeam.options(engine=engine), hornbeam.open(path) as ours:
        wanted = _datasets(f)
        assert sorted(ours) == sorted(wanted)
        for name, dataset in wanted.items():
            tensor = ours.tensors[name]
            if dataset.shape is not None and tensor.dtype != object:
                assert tensor.shape == dataset.shape, name
            if make is _others and name in WORDS:
                assert tensor.dtype == object
                for read in (tensor.read, lambda t=tensor: t[...], lambda n=name: ours[n]):
                    with pytest.raises(UnsupportedError, match=WORDS[name]) as caught:
                        read()
                    assert caught.value.entry == name
                    assert caught.value.path == path
                continue
            if tensor.dtype == object:  # as HDF5 has it, an array is one element
                assert name == "arrays"
                continue
            value, native = dataset[()], dataset.dtype.newbyteorder("=")
            assert tensor.dtype == native, name
            assert ours[name].tobytes() == np.asarray(value, native).tobytes(), name
        if make is _others:
            assert ours.tensors["text"].attributes == {"note": "kept"}
            assert "text" in ours._repr_html_()
        if block == 0 and make is _plain:
            with hornbeam.open(path, mmap=True) as mapped:
                assert mapped["a/b"].tobytes() == VALUES.tobytes()


@pytest.mark.parametrize("block", [512, 4096])
def test_a_mapped_file_may_have_a_user_block(block, tmp_path):
    path = tmp_path / "m.h5"
    with h5py.File(path, "w", userblock_size=block) as f:
        f["a"] = VALUES
    with open(path, "r+b") as f:
        f.write(b"MATLAB 7.3 MAT-file, written by somebody")
    with hornbeam.open(path, mmap=True) as ours:
        assert ours.tensors["a"].mapped
        assert ours["a"].tobytes() == VALUES.tobytes()


def _soft(f):
    f["a"] = VALUES
    f["l"] = h5py.SoftLink("/a")


def _external_link(f):
    f["a"] = VALUES
    f["l"] = h5py.ExternalLink("other.h5", "/a")


def _external_storage(f):
    f.create_dataset("x", (10,), "f4", external=[("values.bin", 0, 40)])


def _virtual(f):
    layout = h5py.VirtualLayout((10,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (10,))
    f.create_virtual_dataset("v", layout)


def _cycle(f):
    f["a/b"] = VALUES
    f["a/up"] = f["a"]


def _root_again(f):
    f["a/b"] = VALUES
    f["a/root"] = f["/"]


@pytest.mark.parametrize("version", ["earliest", "latest"])
@pytest.mark.parametrize("engine", ["auto", "libhdf5"])
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (_soft, UnsafeFileError, "SoftLink"),
        (_external_link, UnsafeFileError, "ExternalLink"),
        (_external_storage, UnsafeFileError, "external Dataset"),
        (_virtual, UnsafeFileError, "virtual Dataset"),
        (_cycle, WeightsFileError, "contains itself"),
        (_root_again, WeightsFileError, "contains itself"),
    ],
)
def test_what_leaves_the_file_or_has_no_end_is_refused(make, error, words, version, engine, tmp_path):
    path = tmp_path / "m.h5"
    with h5py.File(path, "w", libver=version) as f:
        make(f)
    with hornbeam.options(engine=engine), pytest.raises(error, match=words):
        hornbeam.open(path)


def test_an_unknown_filter_is_refused_for_its_dataset_only(tmp_path):
    """With the number of the filter changed, nobody here knows it."""
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as f:
        f["a"] = VALUES
        f.create_dataset("b", data=VALUES, chunks=(20, 50), compression="lzf")
    data = path.read_bytes()
    number = (32000).to_bytes(2, "little")
    at = data.index(b"lzf\0") - 8
    assert data[at : at + 2] == number
    path.write_bytes(data[:at] + (32001).to_bytes(2, "little") + data[at + 2 :])
    with hornbeam.open(path) as ours:
        assert sorted(ours) == ["a", "b"]
        assert ours["a"].tobytes() == VALUES.tobytes()
        with pytest.raises(UnsupportedError, match="filter that is unknown here"):
            ours["b"]


def _model() -> keras.Model:
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="one"), keras.layers.Dense(4, name="two")])


def _values(model: keras.Model) -> list[bytes]:
    return [np.asarray(w).tobytes() for w in model.get_weights()]


def _rewritten(path, to, block=0, version="earliest", extras=(), **options):
    """The same file as another writer has it."""
    with h5py.File(path) as old, h5py.File(to, "w", libver=version, userblock_size=block) as new:
        for name, value in old.attrs.items():
            new.attrs[name] = value

        def copy(name, item):
            if isinstance(item, h5py.Group):
                made = new.require_group(name)
            else:
                made = new.create_dataset(name, data=item[()], **(options if item.ndim else {}))
            for key, value in item.attrs.items():
                made.attrs[key] = value

        old.visititems(copy)
        for make in extras:
            make(new.create_group(make.__name__))


@pytest.mark.parametrize("name", ["m.weights.h5", "m.h5"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block": 512},
        {"block": 2048, "version": "latest"},
        {"version": "latest"},
        {"extras": (_others, _named_type, _attributes)},
        {"extras": (_others, _hard_links), "version": "latest", "block": 1024},
        {"chunks": True, "compression": "lzf", "shuffle": True},
        {"chunks": True, "compression": "gzip", "fletcher32": True, "extras": (_others,)},
        {"chunks": True, "fletcher32": True},
    ],
    ids=[
        "as it is",
        "a user block",
        "a user block and the latest version",
        "the latest version",
        "other datasets beside",
        "hard links behind a user block",
        "lzf",
        "gzip and a checksum",
        "a checksum",
    ],
)
def test_weights_load_as_stock_keras_loads_them(name, options, tmp_path):
    model = _model()
    old, path = tmp_path / f"old.{name[2:]}", tmp_path / name
    (model.save_weights if name.endswith(".weights.h5") else model.save)(old)
    _rewritten(old, path, **options)
    wanted = _values(model)
    stock, ours = _model(), _model()
    for other in (stock, ours):
        other.set_weights([w + 1 for w in other.get_weights()])
    stock.load_weights(path)
    with hornbeam.installed(), hornbeam.options(fallback=False):
        ours.load_weights(path)
    assert _values(stock) == wanted
    assert _values(ours) == wanted


def test_variables_that_share_a_dataset_load(tmp_path):
    """Two paths of a file, one dataset: each variable gets its values, in memory of its own."""
    model = _model()
    path = tmp_path / "m.weights.h5"
    model.save_weights(path)
    with h5py.File(path, "r+") as f:
        groups = [n for n in f["layers"] if isinstance(f[f"layers/{n}/vars"], h5py.Group)]
        first, second = sorted(groups)
        del f[f"layers/{second}/vars/1"]
        f[f"layers/{second}/vars/1"] = f[f"layers/{first}/vars/1"]
        f[f"layers/{first}/vars/1"][...] = np.arange(4, dtype="f4")
    stock, ours = _model(), _model()
    stock.load_weights(path)
    with hornbeam.installed(), hornbeam.options(fallback=False):
        ours.load_weights(path)
    assert _values(ours) == _values(stock)
    biases = [layer.bias for layer in ours.layers]
    assert all(np.array_equal(b, np.arange(4, dtype="f4")) for b in biases)
    biases[0].assign_add(np.ones(4, "f4"))
    assert np.array_equal(biases[1], np.arange(4, dtype="f4"))


def test_a_variable_that_is_no_number_in_the_file_is_refused(tmp_path):
    model = _model()
    path = tmp_path / "m.weights.h5"
    model.save_weights(path)
    with h5py.File(path, "r+") as f:
        found = next(n for n in f["layers"] if "vars" in f[f"layers/{n}"])
        del f[f"layers/{found}/vars/1"]
        f[f"layers/{found}/vars/1"] = np.array([b"a", b"b", b"c", b"d"])
    before = _values(model)
    with hornbeam.installed(), pytest.raises(UnsupportedError, match="strings"):
        model.load_weights(path)
    assert _values(model) == before, "nothing was changed"
