"""The guide "Save, serialize, and export models": its code runs, and what its text promises holds.

The code is in `guide/blocks.txt`, the promises of the blocks in `support/guide_checks.py`; the sentences without
code are tests here. The guide runs three times: with its imports swapped, under `install()`, and as a script of
`python -m hornbeam`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hornbeam

pytest.importorskip("tensorflow", reason="the guide's code uses TensorFlow")
pytestmark = pytest.mark.backend("tensorflow", reason="the guide's code is written for it")

pytest.register_assert_rewrite("support.guide_checks")
TESTS = Path(__file__).parents[1]
TEXT = TESTS.parent.parent / "shared" / "guide.txt"

#: Block → what must be changed for it to run: `(as printed, as run, why)`.
CHANGES = {
    "save": [
        (
            "model = ...",
            "model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])",
            "the dots stand for one",
        )
    ],
    "export_by_hand": [
        ("export_archive = ", "from keras.export import ExportArchive\nexport_archive = ", "where the name comes from"),
        (
            "# `input_signature`\nchanges",
            "# `input_signature` changes",
            "the comment is wrapped onto a line of its own",
        ),
        ("shape=(None, 3)", "shape=(None, 16)", "it changes depending on the model, says the comment"),
    ],
}

#: The import swap: what of Keras' becomes what of hornbeam's, and methods become functions.
SWAP = [
    (r"\bkeras\.(saving|models)\.(?=[a-z])", r"hornbeam.\1."),
    (r"\bkeras\.export\b", "hornbeam.export"),
    (r"\b(\w*model)\.save\(", r"hornbeam.saving.save_model(\1, "),
    (r"\b(\w*model)\.(save_weights|load_weights)\(", r"hornbeam.saving.\2(\1, "),
    (r"\b(\w*model)\.export\(", r"hornbeam.export.export(\1, "),
]


def blocks() -> dict[str, str]:
    parts = re.split(r"^# %% (\w+)\n", (TESTS / "guide" / "blocks.txt").read_text(), flags=re.MULTILINE)
    return {name: code.rstrip("\n") for name, code in zip(parts[1::2], parts[2::2], strict=True)}


def script(*, swap: bool = False) -> str:
    """The guide as a script; after each block it is checked."""
    code = blocks()
    first = {"setup": code.pop("setup")}  # the text shows two blocks before it
    lines = ["import os", "from support import guide_checks", "os.makedirs('path/to')"]
    for name, block in {**first, **code}.items():
        for printed, run, _ in CHANGES.get(name, []):
            assert block.count(printed) == 1
            block = block.replace(printed, run)
        if swap:
            for pattern, ours in SWAP:
                block = re.sub(pattern, ours, block)
        lines += [f"# {name}", block, f"guide_checks.check({name!r}, globals())"]
    return "\n".join(lines) + "\n"


@pytest.fixture
def registry() -> Iterator[None]:
    """The guide clears the registry of custom objects; the other tests' ones come back."""
    import keras

    objects = keras.saving.get_custom_objects()
    known = dict(objects)
    yield
    objects.clear()
    objects.update(known)


def test_the_code_is_the_guides() -> None:
    """Every block is in the text, in order, and what is left of the text is no code."""
    if not TEXT.exists():
        pytest.skip("the guide's text is not beside this checkout")
    rest, at = TEXT.read_text(), 0
    for code in blocks().values():
        at = rest.index(f"\n{code}\n", at) + 1
        rest = rest[:at] + rest[at + len(code) :]
    code_like = re.compile(r"( {4}|import |from |def |class |@|with |for |#|[\w.]+ = |[\w.]+\()")
    left = [line for line in rest.splitlines() if code_like.match(line)]
    printed = ("    args_0: ", "    query: ", "    value: ", "    float32 Tensor", "     ")
    assert [line for line in left if not line.startswith(printed)] == [
        "get_config() and from_config()",
        "to_json() and keras.models.model_from_json()",
    ]


@pytest.mark.usefixtures("registry")
def test_by_import_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = script(swap=True)
    assert (
        re.findall(r"\bkeras\.(?:saving|models|export)\b|model\.(?:save|export|save_weights|load_weights)\(", code)
        == []
    )
    exec(compile(f"import hornbeam\n{code}", "guide.py", "exec"), {"__name__": "__main__"})
    done(hornbeam.stats())


@pytest.mark.usefixtures("registry")
def test_by_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with hornbeam.installed():
        exec(compile(script(), "guide.py", "exec"), {"__name__": "__main__"})
    done(hornbeam.stats())


def test_by_command(tmp_path: Path) -> None:
    count = "from hornbeam import stats\nprint('counted', stats().saves, stats().loads, stats().handovers)\n"
    (tmp_path / "guide.py").write_text(script() + count)
    places = [str(Path(hornbeam.__file__).parent.parent), str(TESTS)]
    run = subprocess.run(
        [sys.executable, "-m", "hornbeam", "guide.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "KERAS_BACKEND": "tensorflow"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "counted 15 16 {}"
    for endpoint in ("serve", "call"):
        assert f"* Endpoint '{endpoint}'" in run.stdout


def done(stats: Any) -> None:
    """Every save and load of the guide, and of its checks, went through the core."""
    assert (stats.saves, stats.loads, stats.handovers) == (15, 16, {})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("m.keras", {}),
        ("no_extension", {}),
        ("m", {"save_format": "tf"}),
        ("m.h5", {}),
        ("m.hdf5", {}),
        ("m", {"save_format": "h5"}),
    ],
)
@pytest.mark.parametrize("installed", [False, True])
def test_every_format_comes_back_whole(name: str, arguments: dict[str, str], installed: bool, tmp_path: Path) -> None:
    """Passing `save_format`, a name without an extension, or one that ends in `.h5`; `load_model` knows what it is."""
    import keras
    import numpy as np

    import hornbeam.models
    from support.helpers import saved

    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile("adam", "mean_squared_error")
    x, y = np.ones((8, 4)), np.ones((8, 1))
    model.fit(x, y, verbose=0)
    if installed:
        with hornbeam.installed():
            model.save(tmp_path / name, **arguments)
            loaded = keras.models.load_model(tmp_path / name)
    else:
        hornbeam.models.save_model(model, tmp_path / name, **arguments)
        loaded = hornbeam.models.load_model(tmp_path / name)
    assert type(loaded) is type(model)
    assert [w.tobytes() for w in loaded.get_weights()] == [w.tobytes() for w in model.get_weights()]
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert keras.losses.get(loaded.loss) is keras.losses.mean_squared_error
    assert saved(loaded) == saved(model)


def test_the_module_is_the_same_by_either_name() -> None:
    import keras

    import hornbeam.export
    import hornbeam.models
    import hornbeam.saving

    assert hornbeam.models.save_model is hornbeam.saving.save_model
    assert hornbeam.models.load_model is hornbeam.saving.load_model
    same = ["register_keras_serializable", "custom_object_scope", "get_custom_objects", "serialize_keras_object"]
    for name in [*same, "deserialize_keras_object", "get_registered_name", "get_registered_object"]:
        assert getattr(hornbeam.saving, name) is getattr(keras.saving, name)  # one registry
    for name in ("clone_model", "Model", "Sequential"):
        assert getattr(hornbeam.models, name) is getattr(keras.models, name)
