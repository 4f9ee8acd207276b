"""Exports: what is written and printed, what is compared, what is refused, and what stays as it was."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import keras.export
import numpy as np
import pytest

import hornbeam
import hornbeam.export
import hornbeam.saving
from hornbeam.errors import InvalidError, UnsupportedError, VerificationError
from hornbeam.export import ExportArchive, export
from hornbeam.formats import exports
from hornbeam.seam import keras_names

tf = pytest.importorskip("tensorflow", reason="SavedModels are written by TensorFlow")
FLOAT = "float32"


def spec(*shape: int | None, dtype: str = FLOAT, name: str | None = None) -> Any:
    return keras.InputSpec(shape=shape, dtype=dtype, name=name)


def model_of(*layers: Any, inputs: int = 4, name: str = "chain") -> Any:
    return keras.Sequential([keras.Input((inputs,)), *layers], name=name)


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def nested_model() -> Any:
    a, b, c = keras.Input((2,), name="a"), keras.Input((3,), name="b"), keras.Input((1,), dtype="int32", name="c")
    mixed = keras.layers.Concatenate()([a, b, keras.ops.cast(c, FLOAT)])
    # TensorFlow's signatures take no nested outputs.
    outputs = {
        "sum": keras.layers.Dense(2)(mixed),
        "first": keras.layers.Dense(1)(a),
        "second": keras.layers.Dense(3)(b),
    }
    return keras.Model({"a": a, "rest": [b, c]}, outputs, name="nested")


SERVE = """
import sys
for name in ("keras", "tf_keras", "jax", "hornbeam"):
    sys.modules[name] = None  # TensorFlow imports the first and the third by itself, where they are
import numpy as np, tensorflow as tf
artifact = tf.saved_model.load(sys.argv[1])
x = np.load(sys.argv[2])
given = {"a": x["a"], "rest": [x["b"], x["c"]]}
answers = artifact.serve(given)
signature = artifact.signatures["serving_default"]
names = {name: spec.dtype.as_numpy_dtype for name, spec in signature.structured_input_signature[1].items()}
flat = signature(**{name: tf.constant(x[name]) for name in ("a", "b", "c")}) if set(names) == {"a", "b", "c"} else {}
one = artifact.serve({"a": x["a"][:1], "rest": [x["b"][:1], x["c"][:1]]})
try:
    artifact.signatures["half"](a=tf.constant(x["a"], tf.float64))
except Exception as error:
    wrong = type(error).__name__
np.savez(sys.argv[3], sum=answers["sum"], first=answers["first"], second=answers["second"], one=one["sum"],
         half=artifact.half(x["a"]), flat=sorted(names), wrong=wrong, n=len(artifact.kernels),
         kernel=artifact.kernels[0].numpy(), endpoints=sorted(artifact.signatures))
assert not {n for n, module in sys.modules.items() if module and n.partition(".")[0] in ("keras", "tf_keras", "jax")}
"""


def described(variable: Any) -> tuple[str, Any]:
    """Keras 3.16 makes collections of the backend's variables, which have a name and no path."""
    return variable.name.rpartition("/")[2].partition(":")[0], np.asarray(variable).tolist()


def test_several_endpoints_nested_inputs_any_batch_without_keras(tmp_path: Path) -> None:
    model = nested_model()
    half = model_of(keras.layers.Dense(2), inputs=2, name="half")
    archive = ExportArchive()
    archive.track(half)  # on JAX, before the first endpoint
    archive.track_and_add_endpoint(
        "serve", model, [{"a": spec(None, 2), "rest": [spec(None, 3), spec(None, 1, dtype="int32")]}]
    )
    archive.add_endpoint("half", lambda a: half(a) / 2, [spec(None, 2, name="a")])
    kernels = [layer.kernel for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    archive.add_variable_collection("kernels", kernels)
    assert [described(v) for v in archive.kernels] == [described(v) for v in kernels]
    report = archive.write_out(tmp_path / "m", verbose=False, verify=True)
    assert report == hornbeam.last_report("export")
    assert report.endpoints == ["serve", "half"]
    assert set(report.differences) == {"serve/sum", "serve/first", "serve/second", "half"}
    assert 0 <= report.largest < 1e-5

    rng = np.random.default_rng(0)
    x = {"a": rng.random((5, 2), FLOAT), "b": rng.random((5, 3), FLOAT), "c": rng.integers(0, 9, (5, 1), "int32")}
    np.savez(tmp_path / "x.npz", **x)
    env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    command = [sys.executable, "-c", SERVE, *(str(tmp_path / name) for name in ("m", "x.npz", "answers.npz"))]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answers = np.load(tmp_path / "answers.npz")
    expected = model({"a": x["a"], "rest": [x["b"], x["c"]]})
    for name, value in expected.items():
        np.testing.assert_allclose(answers[name], value, atol=1e-6)
    np.testing.assert_allclose(answers["one"], expected["sum"][:1], atol=1e-6)
    np.testing.assert_allclose(answers["half"], half(x["a"]) / 2, atol=1e-6)
    assert answers["endpoints"].tolist() == ["half", "serve", "serving_default"]
    assert answers["wrong"] != ""  # a signature takes no other dtype
    assert answers["n"] == 3
    np.testing.assert_array_equal(answers["kernel"], kernels[0])


def test_it_prints_and_writes_what_keras_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(keras.layers.Dense(2), keras.layers.BatchNormalization())
    model.export(tmp_path / "e")
    stock, parts = capsys.readouterr().out, {p.name for p in (tmp_path / "e").iterdir()}
    with hornbeam.installed():
        model.export(tmp_path / "e")
    assert {p.name for p in (tmp_path / "e").iterdir()} == parts
    installed = capsys.readouterr().out
    export(model, tmp_path / "e")
    swapped = capsys.readouterr().out
    assert "* Endpoint 'serve'" in stock
    numbers = re.compile(r"\d{6,}")  # addresses
    assert numbers.sub("", stock) == numbers.sub("", installed) == numbers.sub("", swapped)
    export(model, tmp_path / "e", verbose=False)
    assert capsys.readouterr().out == ""
    export(model, tmp_path / "e", verify=True)
    assert "Verified: the reloaded artifact differs from the model by" in capsys.readouterr().out


@pytest.mark.parametrize("installed", [False, True])
def test_an_artifact_is_replaced_when_the_new_one_is_complete(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(model: Any) -> None:
        if installed:
            with hornbeam.installed():
                model.export(str(tmp_path / "e"), verbose=False)
        else:
            export(model, tmp_path / "e", verbose=False)

    first, second = model_of(keras.layers.Dense(2)), model_of(keras.layers.Dense(3))
    write(first)
    before = files(tmp_path / "e")
    with monkeypatch.context() as patch:
        stock = tf.saved_model.save

        def fails(*args: Any, **kwargs: Any) -> None:
            stock(*args, **kwargs)
            raise RuntimeError("no space")

        patch.setattr(tf.saved_model, "save", fails)
        with pytest.raises(RuntimeError, match="no space"):
            write(second)
    assert files(tmp_path / "e") == before
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    write(second)
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    artifact = tf.saved_model.load(str(tmp_path / "e"))
    assert artifact.serve(np.ones((1, 4), FLOAT)).shape == (1, 3)
    assert hornbeam.stats().saves == 2
    assert hornbeam.stats().handovers == {}


def test_other_files_in_the_directory_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "README").write_text("mine")
    with caplog.at_level("WARNING", logger="hornbeam"):
        export(model_of(keras.layers.Dense(2)), tmp_path / "e", verbose=False)
    assert any("it holds other files: ['README']" in message for message in caplog.messages)
    assert (tmp_path / "e" / "README").read_text() == "mine"
    assert tf.saved_model.contains_saved_model(str(tmp_path / "e"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="a file stands there"):
        export(model_of(keras.layers.Dense(2)), tmp_path / "file", verbose=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_of_such_names_is_somebody_elses_without_a_graph(tmp_path: Path) -> None:
    model = model_of(keras.layers.Dense(2))
    names = ("assets/logo.png", "debug/notes.txt", "assets.extra/model.keras")
    for name in names:
        (tmp_path / "site" / name).parent.mkdir(parents=True)
        (tmp_path / "site" / name).write_text("mine")
    with pytest.raises(InvalidError, match="no part of a SavedModel"):
        hornbeam.saving.save_model(model, tmp_path / "site")
    assert {p.name for p in (tmp_path / "site").iterdir()} == {"assets", "debug", "assets.extra"}
    export(model, tmp_path / "site", verbose=False)  # in place
    assert [(tmp_path / "site" / name).read_text() for name in names] == ["mine"] * 3
    export(model, tmp_path / "site", verbose=False)  # replaced: it is a SavedModel now
    assert (tmp_path / "site" / "debug" / "notes.txt").read_text() == "mine"
    assert tf.saved_model.contains_saved_model(str(tmp_path / "site"))


def test_a_difference_is_found_and_the_old_artifact_stays(tmp_path: Path) -> None:
    model = model_of(keras.layers.Dense(2, kernel_initializer="ones"))
    export(model, tmp_path / "e", verbose=False)
    before = files(tmp_path / "e")
    calls: list[int] = []

    def drifts(x: Any) -> Any:
        calls.append(1)
        return {"same": model(x), "other": model(x) * float(len(calls))}

    archive = ExportArchive()
    archive.track(model)
    archive.add_endpoint("drifts", drifts, [spec(None, 4)])
    with pytest.raises(VerificationError, match="Output 'drifts/other' of the reloaded artifact differs") as raised:
        archive.write_out(tmp_path / "e", verbose=False, verify=True)
    assert raised.value.entry == "drifts/other"
    assert files(tmp_path / "e") == before
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    report = archive.write_out(tmp_path / "e", verbose=False, verify=True, tolerance=100.0)
    assert report.differences["drifts/same"] == 0.0
    assert 0 < report.largest < 100

    noisy = model_of(keras.layers.Dropout(0.5))
    archive = ExportArchive()
    archive.track(noisy)
    archive.add_endpoint("train", lambda x: noisy(x, training=True), [spec(8, 4)], verify=True)
    archive.write_out(tmp_path / "seeded", verbose=False)  # the artifact has the seed state, and draws the same


@pytest.mark.backend("tensorflow", reason="the endpoint is of its operations")
def test_where_random_numbers_differ_they_are_named(tmp_path: Path) -> None:
    archive = ExportArchive()
    archive.track(model_of(keras.layers.Dense(2)))
    archive.add_endpoint("noise", lambda x: x + tf.random.normal(tf.shape(x)), [spec(8, 4)], verify=True)
    with pytest.raises(VerificationError, match=r"Output 'noise'.*random numbers"):
        archive.write_out(tmp_path / "noisy", verbose=False)
    assert not (tmp_path / "noisy").exists()


def test_comparing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = model_of(keras.layers.Dense(3), keras.layers.BatchNormalization())
    archive = ExportArchive()
    archive.track(model)
    archive.add_endpoint("train", lambda x: model(x, training=True), [spec(None, 4)])
    before = model.get_weights()
    report = archive.write_out(tmp_path / "e", verbose=False, verify=True)
    assert report.largest < 1e-5
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.backend("tensorflow", reason="the others have no strings")
def test_strings_are_compared(tmp_path: Path) -> None:
    words = keras.layers.StringLookup(vocabulary=["a", "some text"])
    text = keras.Input((2,), dtype="string")
    lookup = keras.Model(text, words(text))
    assert export(lookup, tmp_path / "words", verbose=False, verify=True).differences == {"serve": 0.0}
    artifact = tf.saved_model.load(str(tmp_path / "words"))
    np.testing.assert_array_equal(artifact.serve(tf.constant([["a", "b"]])), [[1, 0]])


def test_integers_and_halves_are_compared(tmp_path: Path) -> None:
    table = keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(2, 5)])
    assert export(table, tmp_path / "table", verbose=False, verify=True).largest == 0.0
    half = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_bfloat16")])
    assert export(half, tmp_path / "half", verbose=False, verify=True).largest <= 2e-2


@pytest.mark.backend("tensorflow", reason="JAX cannot tell that what is left of an unknown size is not empty")
def test_unknown_sizes_are_compared(tmp_path: Path) -> None:
    pixels = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(2, 9, strides=4)(pixels)
    image = keras.Model(pixels, keras.layers.GlobalMaxPooling2D()(keras.layers.Conv2D(2, 5)(x)))
    assert export(image, tmp_path / "image", verbose=False, verify=True).largest < 1e-4


@pytest.mark.backend("tensorflow", reason="JAX traces no unknown ranks")
def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    model = model_of(keras.layers.Dense(2))
    archive = keras.export.ExportArchive()
    archive.track_and_add_endpoint("serve", model, [spec(None, 4)])  # by stock Keras
    with hornbeam.installed():
        archive.add_endpoint("any", lambda x: x, [tf.TensorSpec(None, tf.float32)])
        with pytest.raises(UnsupportedError, match="did not see being added"):
            exports.write(archive, tmp_path / "e", exports.ExportRequest(verify=True), verbose=False)
        assert list(tmp_path.iterdir()) == []
        archive.write_out(tmp_path / "e", verbose=False)
    archive = ExportArchive()
    archive.add_endpoint("any", lambda x: x, [tf.TensorSpec(None, tf.float32)], verify=True)
    with pytest.raises(UnsupportedError, match="cannot be verified: TensorSpec"):
        archive.write_out(tmp_path / "any", verbose=False)
    assert not (tmp_path / "any").exists()


@pytest.mark.backend("tensorflow", reason="a tf.function calls the model")
def test_a_tf_function_and_a_method(tmp_path: Path) -> None:
    model = model_of(keras.layers.Dense(2))

    @tf.function
    def doubled(x: Any) -> Any:
        return 2 * model(x)

    archive = ExportArchive()
    with pytest.raises(ValueError, match="has never been called"):
        archive.add_endpoint("serve", doubled)
    x = np.ones((2, 4), FLOAT)
    expected = doubled(tf.constant(x))
    archive.track(model)
    archive.add_endpoint("serve", doubled)
    archive.add_endpoint("call", model.call, [spec(None, 4)])
    assert set(archive.write_out(tmp_path / "e", verbose=False, verify=True).differences) == {"serve", "call"}
    artifact = tf.saved_model.load(str(tmp_path / "e"))
    np.testing.assert_allclose(artifact.serve(x), expected, atol=1e-6)
    np.testing.assert_allclose(artifact.call(inputs=x), model(x), atol=1e-6)


@pytest.mark.parametrize("installed", [False, True])
def test_errors_name_the_object_and_its_place(installed: bool, tmp_path: Path) -> None:
    make = keras.export.ExportArchive if installed else ExportArchive
    model = model_of(keras.layers.Dense(2), name="whole")
    with hornbeam.installed():
        archive = make()
        with pytest.raises(ValueError, match=r"(?s)has not yet been built.*'scaling' \(Dense\)"):
            archive.track(keras.layers.Dense(2, name="scaling"))
        deep = keras.Sequential([keras.Sequential([keras.layers.Dense(1, name="in")], name="mid")], name="out")
        with pytest.raises(ValueError, match=r"(?s)'out' \(Sequential\); not built in it: 'mid' .*'in' \(Dense\)"):
            archive.track(deep)
        with pytest.raises(ValueError, match=r"(?s)has not yet been built.*'out' \(Sequential\)"):
            deep.export(tmp_path / "e")
        with pytest.raises(ValueError, match="Invalid resource type"):
            archive.track("a string")
        with pytest.raises(ValueError, match="No endpoints"):
            archive.write_out(tmp_path / "e")
        archive.track(model)
        with pytest.raises(
            ValueError, match=r"(?s)must provide an `input_signature`.*'serve', made of `call` of 'whole'"
        ):
            archive.add_endpoint("serve", model.call)
        archive.add_endpoint("serve", model.call, [spec(None, 4)])
        with pytest.raises(ValueError, match="Endpoint name 'serve' is already taken"):
            archive.add_endpoint("serve", model.call, [spec(None, 4)])
        with pytest.raises(ValueError, match="'variables' is already taken"):
            archive.add_endpoint("variables", model.call, [spec(None, 4)])
        with pytest.raises(ValueError, match="it is the name of an endpoint"):
            archive.add_variable_collection("serve", model.weights)
        archive.add_variable_collection("mine", model.weights)
        with pytest.raises(ValueError, match="'mine' was added before"):
            archive.add_variable_collection("mine", [])
        with pytest.raises(ValueError, match="'mine' is already taken"):
            archive.add_endpoint("mine", model.call, [spec(None, 4)])
        with pytest.raises(ValueError, match="list/tuple/set"):
            archive.add_variable_collection("other", model.weights[0])
        archive.add_endpoint("wrong", model.call, [spec(None, 5)])
        with pytest.raises(
            ValueError, match=r"(?s)to have value 4.*'wrong', made of `call` of 'whole'.*shape=\(None, 5\)"
        ):
            archive.write_out(tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_collections_are_attributes_while_installed_and_uninstalling_restores_keras() -> None:
    owner = keras_names.archive_class()
    module = sys.modules["keras.src.export.saved_model"]
    before, names = dict(vars(owner)), dict(vars(module))
    model = model_of(keras.layers.Dense(2))
    archive = keras.export.ExportArchive()
    archive.add_variable_collection("my_vars", model.weights)
    stock = hasattr(archive, "my_vars")
    with hornbeam.installed():
        assert vars(owner)["write_out"] is not before["write_out"]
        archive = keras.export.ExportArchive()
        archive.add_variable_collection("my_vars", model.weights)
        archive.add_variable_collection("track", model.weights)  # methods and properties stay what they are
        assert [described(v) for v in archive.my_vars] == [described(v) for v in model.weights]
        assert callable(archive.track)
    assert dict(vars(owner)) == before
    assert dict(vars(module)) == names
    archive = keras.export.ExportArchive()
    archive.add_variable_collection("my_vars", model.weights)
    assert hasattr(archive, "my_vars") == stock


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize(
    ("form", "path", "more"),
    [
        ("onnx", "m.onnx", {"opset_version": 18}),
        ("openvino", "m.xml", {}),
        ("litert", "m.tflite", {"allow_custom_ops": True}),
    ],
)
def test_other_formats_are_keras(
    form: str, path: str, more: dict[str, Any], installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_of(keras.layers.Dense(2))
    signature = [spec(None, 4)]
    seen: list[Any] = []
    before = hornbeam.last_report("export")
    if not hasattr(sys.modules["keras.src.export"], f"export_{form}"):
        with pytest.raises(ValueError, match="Unrecognized format"):
            export(model, path, format=form)
        return
    monkeypatch.setattr(f"keras.src.export.export_{form}", lambda *args, **kwargs: seen.append((args, kwargs)))
    if form == "litert" and keras.backend.backend() not in ("tensorflow", "torch"):
        with pytest.raises(ValueError, match="requires TensorFlow"):
            export(model, path, format=form)
        return
    calls = {"verbose": False, "input_signature": signature, **more}
    model.export(path, format=form, **calls)
    if installed:
        with hornbeam.installed():
            model.export(path, format=form, **calls)
    else:
        assert export(model, path, format=form, **calls) is None
    stock, ours = seen
    assert ours == stock
    assert ours[0][:2] == (model, path)
    assert ours[1] == {**stock[1], **more, "input_signature": signature}
    assert hornbeam.last_report("export") is before
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnsupportedError, match="Only SavedModels can be verified"):
        export(model, path, format=form, verify=True)
    assert seen == [stock, ours]


@pytest.mark.backend("tensorflow", reason="Keras writes LiteRT from that backend")
@pytest.mark.skipif(not hasattr(keras.src.export, "export_litert"), reason="this Keras does not write LiteRT")
def test_a_format_of_keras_own_is_written_as_without_us(tmp_path: Path) -> None:
    """Keras makes it from an archive, whose class is patched."""
    model = model_of(keras.layers.Dense(2))
    model.export(tmp_path / "stock.tflite", format="litert", verbose=False)
    with hornbeam.installed():
        model.export(tmp_path / "ours.tflite", format="litert", verbose=False)
    export(model, tmp_path / "swapped.tflite", format="litert", verbose=False)
    first, *others = (path.read_bytes() for path in tmp_path.iterdir())
    assert first[4:8] == b"TFL3"
    assert others == [first, first]


def test_formats_that_keras_does_not_know() -> None:
    with pytest.raises(ValueError, match="Unrecognized format"):
        export(model_of(keras.layers.Dense(2)), "m", format="nothing")
    with pytest.raises(ValueError, match="Unsupported format"):
        ExportArchive(format="nothing")
    assert isinstance(ExportArchive(), ExportArchive)
    assert set(dir(keras.export)) <= set(dir(hornbeam.export))
