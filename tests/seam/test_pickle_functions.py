"""Functions of Keras' that hornbeam replaces can be pickled: references taken before, meanwhile and afterwards."""

from __future__ import annotations

import functools
import importlib
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import keras
import pytest

import hornbeam
import hornbeam.callbacks
from hornbeam.seam import displaced, entry
from support.helpers import script

NAMES = [(module, name) for module, names in entry._REPLACED.items() for name in names]


def _in_place(module: str, name: str) -> Any:
    importlib.import_module(module)
    return getattr(*entry._place(module, name), None)


@pytest.fixture(params=NAMES, ids=lambda place: place[1])
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    hornbeam.uninstall()
    if _in_place(*request.param) is None:
        pytest.skip("this Keras has no such function")
    return request.param  # type: ignore[no-any-return]


def _is_pickled(function: Any) -> bool:
    return all(pickle.loads(pickle.dumps(function, protocol)) is function for protocol in range(6))


def test_every_reference_in_one_process(place: tuple[str, str]) -> None:
    before = _in_place(*place)
    names = before.__module__, before.__qualname__
    assert _is_pickled(before)
    hornbeam.install()
    meanwhile = _in_place(*place)
    assert meanwhile is not before
    assert _is_pickled(before)
    assert _is_pickled(meanwhile)
    hornbeam.install()  # again
    assert _in_place(*place) is meanwhile
    hornbeam.uninstall()
    assert _in_place(*place) is before
    assert (before.__module__, before.__qualname__) == names
    assert _is_pickled(before)
    assert _is_pickled(meanwhile)
    with hornbeam.installed():
        assert _in_place(*place) is meanwhile
        assert _is_pickled(before)
        assert _is_pickled(meanwhile)
    with entry.scope():  # what another thread's call of hornbeam.saving does
        assert _is_pickled(before)
        assert _is_pickled(meanwhile)


def test_at_every_moment_of_an_import_swap(place: tuple[str, str]) -> None:
    """Other threads pickle while a call puts the dispatchers in place and takes them away, line by line."""
    before, failed = _in_place(*place), []
    with hornbeam.installed():
        meanwhile = _in_place(*place)

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != entry.__file__:
            return None
        for function in (before, meanwhile):
            try:
                assert pickle.loads(pickle.dumps(function)) is function
            except (pickle.PicklingError, AssertionError) as error:
                failed.append((frame.f_lineno, event, error))
        return trace

    def swap() -> None:
        sys.settrace(trace)
        with entry.scope():
            pass
        sys.settrace(None)

    thread = threading.Thread(target=swap)
    thread.start()
    thread.join()
    assert failed == []


def test_a_wrapper_over_ours() -> None:
    """Somebody else's stays in place: what is below it can still be pickled."""
    module = sys.modules["keras.src.saving.saving_api"]
    before = module.load_model
    hornbeam.install()
    ours = module.load_model

    @functools.wraps(ours)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    module.load_model = theirs
    hornbeam.uninstall()
    assert pickle.loads(pickle.dumps(theirs)) is theirs
    assert pickle.loads(pickle.dumps(before)) is before
    module.load_model = ours
    hornbeam.uninstall()
    assert module.load_model is before
    assert _is_pickled(before)


def test_ours_that_somebody_puts_back_later() -> None:
    """As `mock.patch` does that began while ours was in place."""
    module = sys.modules["keras.src.saving.saving_api"]
    before = module.load_model
    with hornbeam.installed():
        ours = module.load_model
    module.load_model = ours
    with hornbeam.installed():
        assert module.load_model is keras.saving.load_model is keras.models.load_model is ours
    assert module.load_model is keras.saving.load_model is keras.models.load_model is before


def test_fit_which_stays_wrapped() -> None:
    original = keras.Model.fit.__wrapped__  # a reference taken before `hornbeam.callbacks` was imported
    assert _is_pickled(keras.Model.fit)
    assert _is_pickled(original)


_READS = """
import pickle, sys
import hornbeam
if sys.argv[2] == "installed":
    hornbeam.install()
import importlib, inspect
for text in open(sys.argv[1]).read().split():
    found = pickle.loads(bytes.fromhex(text))
    import hornbeam.seam.entry as k
    places = [k._place(m, n) for m, names in k._REPLACED.items() for n in names if importlib.import_module(m)]
    assert any(inspect.unwrap(found) is inspect.unwrap(getattr(*place, len)) for place in places), found
    print(found.__name__)
"""


@pytest.mark.parametrize("there", ["installed", "not installed"])
def test_in_another_process(tmp_path: Path, there: str) -> None:
    """What was pickled here, before, meanwhile or afterwards, is Keras' function there, or our dispatcher before it."""
    found = [(module, name) for module, name in NAMES if _in_place(module, name) is not None]
    before = {place: _in_place(*place) for place in found}
    texts = [pickle.dumps(function) for function in before.values()]
    hornbeam.install()
    meanwhile = {place: _in_place(*place) for place in found}
    texts += [pickle.dumps(function) for function in [*before.values(), *meanwhile.values()]]
    hornbeam.uninstall()
    texts += [pickle.dumps(function) for function in [*before.values(), *meanwhile.values()]]
    (tmp_path / "pickles").write_text("\n".join(text.hex() for text in texts))
    ran = script(_READS, tmp_path / "pickles", there, KERAS_BACKEND=keras.backend.backend())
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == [name.rpartition(".")[2] for _, name in found] * 5


def test_what_is_no_function() -> None:
    """It stays as it is."""
    for thing in (object(), len, functools.partial(len)):
        known = getattr(thing, "__module__", None)
        displaced.displace(thing, "original")
        assert getattr(thing, "__module__", None) == known
        displaced.put_back(thing)
        assert getattr(thing, "__module__", None) == known
    with pytest.raises(AttributeError, match="nothing"):
        displaced.nothing  # noqa: B018


_POOL = """
import sys, os
os.environ["KERAS_BACKEND"] = "numpy"
import multiprocessing
from pathlib import Path
import numpy as np
from keras.models import load_model

if __name__ == "__main__":
    import keras, hornbeam
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    paths = [Path(sys.argv[1]) / f"{i}.keras" for i in range(2)]
    for path in paths:
        model.save(path)
    hornbeam.install()
    for context in sys.argv[2].split():
        with multiprocessing.get_context(context).Pool(2) as pool:
            models = [*pool.map(load_model, paths), *pool.map(keras.models.load_model, paths)]
        for found in models:
            for a, b in zip(found.weights, model.weights, strict=True):
                assert np.array_equal(a, b)
        print(context, len(models))
"""


def test_pools_of_processes(tmp_path: Path) -> None:
    """`pool.map(load_model, paths)` with a reference that was taken before `install()`, and one taken after."""
    contexts = ["spawn"] if sys.platform == "win32" else ["fork", "forkserver", "spawn"]
    program = tmp_path / "program.py"
    program.write_text(_POOL)
    arguments = f"{str(program)!r}, {str(tmp_path)!r}, {' '.join(contexts)!r}"
    code = f"import runpy, sys; sys.argv = [{arguments}]; runpy.run_path({str(program)!r}, run_name='__main__')"
    ran = script(code, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.splitlines() == [f"{context} 4" for context in contexts]
