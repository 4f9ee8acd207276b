"""TensorFlow SavedModels: Keras' archive of endpoints, written atomically, verified, with errors that say where.

`get_input_signature`, `track`, `add_endpoint`, `add_variable_collection` and `write_out` stand in for the function, or
the method of the archive, of that name in `keras.src.export.saved_model`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.saving import saving_lib
from keras.src.utils import io_utils
from keras.src.utils.module_utils import tensorflow as tf

from hornbeam import _core
from hornbeam.base import counters, durability, locations, settings
from hornbeam.base.reports import ExportReport, remember
from hornbeam.base.savedmodel_parts import _DEBUG_INFO, FINGERPRINT, GRAPHS, PARTS, WHOLE
from hornbeam.errors import InvalidError, UnsupportedError, VerificationError
from hornbeam.seam import entry, keras_names, targets
from hornbeam.seam.culprits import describe, explain, unbuilt
from hornbeam.seam.operation import NotOurs

#: Of 16-bit numbers, and of others: the largest difference between two ways to compute the same, relative to the
#: largest number there, but at least to 1.
_TOLERANCE_16, _TOLERANCE = 2e-2, 1e-4
#: Sizes that stand for an unknown dimension other than the batch: the second where a model needs more than the first.
_SIZES = (4, 64)


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """What a SavedModel is to be, beyond what Keras' archive writes.

    Attributes:
        verify: Compare the reloaded artifact with the model.
        tolerance: How large a difference may be; `None` for what fits the dtype.
        extra: Writes more into the directory, given its path.
        foreign: Whether a directory that holds other files is written into, as Keras does.
    """

    verify: bool = False
    tolerance: float | None = None
    extra: Callable[[Path], None] | None = None
    foreign: bool = True


@dataclasses.dataclass
class _Endpoint:
    """What an endpoint was made of."""

    function: Any
    signature: Any
    verify: bool
    tolerance: float | None


def _endpoints(archive: Any) -> dict[str, _Endpoint]:
    return vars(archive).setdefault("_hornbeam_endpoints", {})


def _stock(name: str) -> Callable[..., Any]:
    return entry.original(targets.EXPORTS, name)


def get_input_signature(model: Any) -> Any:
    """`saved_model.get_input_signature`; its errors say which model."""
    try:
        return _stock("get_input_signature")(model)
    except ValueError as error:
        explain(error, lambda: f"The model is {describe(model)}{unbuilt(model)}.")
        raise


def track(self: Any, resource: Any) -> Any:
    """`ExportArchive.track`; its errors say which layer."""
    try:
        return _stock("track")(self, resource)
    except ValueError as error:
        if isinstance(resource, keras.Layer):
            explain(error, lambda: f"The layer is {describe(resource)}{unbuilt(resource)}.")
        raise


def add_endpoint(
    self: Any,
    name: str,
    fn: Any,
    input_signature: Any = None,
    *,
    verify: bool = False,
    tolerance: float | None = None,
    **kwargs: Any,
) -> Any:
    """`ExportArchive.add_endpoint`; `verify=True` has `write_out` compare it with `fn`, within `tolerance`."""
    if name not in self._endpoint_names and hasattr(self._tf_trackable, name):
        raise ValueError(f"Endpoint name '{name}' is already taken: by something of the archive that is no endpoint.")
    try:
        made = _stock("add_endpoint")(self, name, fn, input_signature, **kwargs)
    except (TypeError, ValueError) as error:
        made = f"The endpoint is '{name}', made of"
        explain(error, lambda: f"{made} {describe(fn)}, with input_signature={input_signature!r}.")
        raise
    _endpoints(self)[name] = _Endpoint(fn, self._endpoint_signatures.get(name), verify, tolerance)
    return made


def add_variable_collection(self: Any, name: str, variables: Any) -> Any:
    """`ExportArchive.add_variable_collection`; the collection is an attribute of the archive, as it was in Keras 2."""
    if name in self._endpoint_names:
        raise ValueError(f"'{name}' cannot be a variable collection: it is the name of an endpoint.")
    collections = vars(self).setdefault("_hornbeam_collections", set())
    if name in collections:
        raise ValueError(f"Variable collection '{name}' was added before.")
    _stock("add_variable_collection")(self, name, variables)
    collections.add(name)
    if not hasattr(self, name):
        setattr(self, name, getattr(self._tf_trackable, name))


def write_out(self: Any, filepath: Any, options: Any = None, verbose: bool = True) -> None:
    """`ExportArchive.write_out`: the directory appears, or is replaced, when it is complete."""
    remember(write(self, filepath, ExportRequest(), options, verbose=verbose))


def write(
    archive: Any, filepath: Any, request: ExportRequest, options: Any = None, *, verbose: bool = True
) -> ExportReport:
    """Writes an archive of endpoints.

    Raises:
        NotOurs: Where stock Keras has to do it; nothing was touched.
    """
    target = os.fsdecode(filepath)
    if not archive._endpoint_names:
        raise NotOurs(None)
    if saving_lib.file_utils.is_remote_path(target):
        if request != ExportRequest() or any(endpoint.verify for endpoint in _endpoints(archive).values()):
            raise UnsupportedError(f"Stock Keras writes to remote paths, and does not verify. Received: {filepath}")
        durability.tell(target)
        raise NotOurs("remote path")
    target = locations.absolute(target)
    others = _other_files(target)
    if others and not request.foreign:
        shown = ", ".join(repr(name) for name in others[:3])
        raise InvalidError(
            f"'{target}' holds what is no part of a SavedModel ({shown}), so it is not replaced. Choose another name."
        )
    report = ExportReport(target, list(archive._endpoint_names))
    known = _endpoints(archive)
    unknown = [name for name in report.endpoints if name not in known]
    if request.verify and unknown:
        raise UnsupportedError(f"Endpoints that hornbeam did not see being added cannot be verified: {unknown}")
    _trace(archive)
    current = settings.current()
    with _core.Directory(target, () if others else PARTS, atomic=current.atomic, durable=current.durable) as directory:
        root = Path(directory.path)
        in_place = os.path.realpath(root) == os.path.realpath(target)
        if request.extra is not None:
            request.extra(root)
        elif in_place and _is_savedmodel(target):
            (root / WHOLE).unlink(missing_ok=True)  # it belongs to the old one
        _stock("write_out")(archive, str(root), options, False)
        if request.extra is not None and (root / FINGERPRINT).exists():
            shutil.copyfile(root / FINGERPRINT, (root / WHOLE).with_name(FINGERPRINT))
        _keep_extra(Path(target), root)
        compared = [n for n in report.endpoints if request.verify or (n in known and known[n].verify)]
        if compared:
            artifact = tf.saved_model.load(str(root))  # its functions work as long as it is there
            for name in compared:
                tolerance = request.tolerance
                if tolerance is None and name in known:
                    tolerance = known[name].tolerance
                _compare(archive, name, artifact, tolerance, report)
        if current.durable:
            _core.sync(root)
        lost = directory.commit()
    if lost is not None:
        counters.logger.warning("'%s' was replaced, but %s could not be kept", target, lost)
    if in_place and current.atomic:
        why = f"it holds other files: {others}" if others else "no directory can be made beside it"
        counters.logger.warning("wrote over '%s' instead of replacing it: %s", target, why)
    if request.extra is None:
        counters.count(saves=1, bytes_written=sum(p.stat().st_size for p in Path(target).rglob("*") if p.is_file()))
    if verbose:
        _announce(archive, filepath, report, verbose)
    return report


def _keep_extra(old: Path, new: Path) -> None:
    """What others put into `assets.extra/`, warm-up requests for example, and `debug/` stays."""
    own = (WHOLE, os.path.join(os.path.dirname(WHOLE), FINGERPRINT), _DEBUG_INFO)
    for path in (*(old / "assets.extra").rglob("*"), *(old / "debug").rglob("*")):
        name = path.relative_to(old)
        if path.is_file() and str(name) not in own and not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, new / name)


def _is_savedmodel(target: str) -> bool:
    return any(os.path.exists(os.path.join(target, name)) for name in GRAPHS)


def _other_files(target: str) -> list[str]:
    """What is in the directory besides a SavedModel: everything, where there is none (`assets/` may be anybody's).

    Raises:
        NotADirectoryError: When it is a file.
    """
    try:
        names = os.listdir(target)
        return sorted(set(names) - set(PARTS) if _is_savedmodel(target) else names)
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        error.strerror = "A SavedModel is a directory, and a file stands there; remove it or choose another name"
        raise


def _announce(archive: Any, filepath: Any, report: ExportReport, verbose: bool) -> None:
    """What Keras prints."""
    show = sys.modules[keras_names.archive_class().__module__]._print_signature
    shown = [show(getattr(archive._tf_trackable, name), name, verbose=verbose) for name in report.endpoints]
    text = "\n\n".join(shown)
    io_utils.print_msg(f"Saved artifact at '{filepath}'. The following endpoints are available:\n\n{text}")
    if report.differences:
        io_utils.print_msg(f"\nVerified: the reloaded artifact differs from the model by {report.largest:.3g} at most.")


def _trace(archive: Any) -> None:
    """Traces every endpoint, as saving would: an error here can still say which one it was."""
    for name, endpoint in _endpoints(archive).items():
        if endpoint.signature is None:
            continue
        try:
            getattr(archive._tf_trackable, name).get_concrete_function()
        except Exception as error:
            explain(error, functools.partial(_traced, name, endpoint))
            raise


def _traced(name: str, endpoint: _Endpoint) -> str:
    made = f"The endpoint is '{name}', made of {describe(endpoint.function)}"
    return f"{made}, traced with input_signature={endpoint.signature!r}."


def _compare(archive: Any, name: str, artifact: Any, tolerance: float | None, report: ExportReport) -> None:
    """Asks the reloaded endpoint and what it was made of the same.

    Raises:
        VerificationError: When they answer differently.
    """
    endpoint = _endpoints(archive)[name]
    signature = endpoint.signature
    concrete = archive._get_concrete_fn(name)
    if signature is None:
        signature, keywords = concrete.structured_input_signature
        if keywords:
            raise UnsupportedError(
                f"Endpoint '{name}' has keyword-only inputs {sorted(keywords)}; they have no example."
            )
    kept = _kept_values(archive, concrete)
    try:
        inputs, expected = _call_on_example(name, endpoint.function, signature)
    finally:
        for variable, value in kept:
            if not np.array_equal(value, variable.numpy()):
                variable.assign(value)
    found = getattr(artifact, name)(*_structure(inputs, tf.constant))
    wanted, got = dict(_leaves(expected, name)), dict(_leaves(found, name))
    if wanted.keys() != got.keys():
        raise VerificationError(
            f"The reloaded endpoint '{name}' has outputs {sorted(got)}, the model {sorted(wanted)}."
        )
    for place, value in wanted.items():
        report.differences[place] = _difference(place, _array(value), _array(got[place]), tolerance)


def _kept_values(archive: Any, concrete: Any) -> list[tuple[Any, Any]]:
    """Values that asking the model may change. On JAX a stateless scope keeps them."""
    if keras.backend.backend() != "tensorflow":
        return []
    function = concrete if hasattr(concrete, "variables") else concrete.get_concrete_function()
    return [(v, v.numpy()) for v in function.variables if not v.trainable]


def _call_on_example(name: str, function: Any, signature: Any) -> tuple[Any, Any]:
    """Random inputs, and what the model answers to them."""
    for size in _SIZES:
        inputs = _structure(signature, functools.partial(_example, size, np.random.default_rng(0)))
        try:
            if keras.backend.backend() == "tensorflow":
                return inputs, function(*_structure(inputs, tf.constant))
            with keras.StatelessScope():
                return inputs, function(*_structure(inputs, keras.ops.convert_to_tensor))
        except Exception as error:
            if size == _SIZES[-1]:
                explain(
                    error,
                    lambda: (
                        f"Endpoint '{name}' could not be compared: the model refuses the example for {signature!r}."
                    ),
                )
                raise
    raise AssertionError("no size was tried")


def _example(size: int, generator: np.random.Generator, spec: Any) -> Any:
    """A random value of this dtype and shape: a batch of 3, indices that any table has."""
    if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
        raise UnsupportedError(f"An endpoint with such an input cannot be verified: {spec!r}")
    shape = [(3 if i == 0 else size) if n is None else n for i, n in enumerate(spec.shape.as_list())]
    dtype = spec.dtype
    if dtype == tf.string:
        return generator.choice(np.array([b"a", b"some text", b""], dtype=object), size=shape)
    if dtype == tf.bool:
        return generator.integers(0, 2, size=shape).astype(bool)
    if dtype.is_integer:
        return generator.integers(0, 2, size=shape).astype(dtype.as_numpy_dtype)
    return generator.random(size=shape).astype(dtype.as_numpy_dtype)


def _difference(place: str, wanted: Any, got: Any, tolerance: float | None) -> float:
    if (wanted.shape, wanted.dtype) != (got.shape, got.dtype):
        message = f"Output '{place}' of the reloaded artifact is {got.dtype}{list(got.shape)}"
        raise VerificationError(f"{message}; the model answers {wanted.dtype}{list(wanted.shape)}.")
    if wanted.dtype.kind in "OSUb":
        largest, allowed = float(not np.array_equal(wanted, got)), 0.0
    else:
        exact = wanted.dtype.kind in "iu"
        wide = np.complex128 if wanted.dtype.kind == "c" else np.float64
        a, b = wanted.astype(wide), got.astype(wide)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        gaps = np.abs(np.subtract(a, b, where=~same, out=np.zeros(a.shape, wide)))
        largest = float(np.max(gaps, initial=0.0))
        finite = np.abs(a[np.isfinite(a)])
        unit = _TOLERANCE_16 if wanted.dtype.itemsize <= 2 else _TOLERANCE
        allowed = 0.0 if exact else unit * max(1.0, float(np.max(finite, initial=0.0)))
    if tolerance is not None:
        allowed = tolerance
    if not largest <= allowed:  # a NaN is a difference, too
        error = VerificationError(
            f"Output '{place}' of the reloaded artifact differs from the model's by {largest:.3g}; "
            f"{allowed:.3g} is allowed. (Where random numbers are drawn without Keras' seed generators it always does.)"
        )
        error.entry, error.expected, error.found = place, f"at most {allowed:.3g}", f"{largest:.3g}"
        raise error
    return largest


def _structure(item: Any, make: Callable[[Any], Any]) -> Any:
    if isinstance(item, dict):
        return {key: _structure(inner, make) for key, inner in item.items()}
    if isinstance(item, tuple | list):
        return type(item)([_structure(inner, make) for inner in item]) if type(item) in (tuple, list) else item
    return make(item)


def _leaves(item: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(item, dict):
        for key in sorted(item):
            yield from _leaves(item[key], f"{place}/{key}")
    elif isinstance(item, Sequence) and not isinstance(item, str | bytes):
        for i, inner in enumerate(item):
            yield from _leaves(inner, f"{place}/{i}")
    elif item is not None:
        yield place, item


def _array(value: Any) -> Any:
    if hasattr(value, "numpy"):
        return np.asarray(value.numpy())
    return np.asarray(keras.ops.convert_to_numpy(value))
