"""Smaller files: what a save leaves out, and weights in half precision, cast one tensor at a time."""

from __future__ import annotations

import numpy as np

from hornbeam.base import deferred, dtypes
from hornbeam.base.reports import Cast, SaveReport
from hornbeam.errors import InvalidError
from hornbeam.flows.recording import Dataset, RecordStore
from hornbeam.flows.requests import SaveRequest

#: Elements that are cast and compared while they are in cache.
_BLOCK = 1 << 16


def narrow(store: RecordStore, request: SaveRequest) -> SaveReport:
    """Leaves out of a recorded save what it is not to hold, and has the rest cast when its turn to be written comes.

    Cast are the weights of the model (`model.weights`) in wider floating-point types. What belongs to metrics and
    optimizers stays: counts overflow, and second moments vanish, in half precision. So do the weights of a layer that
    holds quantised ones, whose scales would no longer fit them.

    Returns:
        The report, in which each cast appears when it is done.
    """
    report = SaveReport(dtype=request.dtype)
    quantised = set() if request.dtype is None else _quantised(store)  # of whole layers
    if not request.include_optimizer:
        report.left_out = store.drop_optimizers()
    if request.partial:
        from hornbeam.flows import parts  # which needs what only loads need otherwise

        report.left_out += parts.keep(store, request)
    if request.dtype is None:
        return report
    dtype = dtypes.own_dtype(request.dtype, request.dtype)
    weights = {id(variable) for variable in getattr(request.model, "weights", ())}
    for path, dataset in store.datasets.items():
        wider = dataset.name.startswith("float") and dataset.memory.dtype.itemsize > dtype.itemsize
        if not wider or id(dataset.variable) not in weights or path.rpartition("/")[0] in quantised:
            continue
        assert dataset.variable is not None
        store.datasets[path] = cast_dataset(dataset, dtype, path, request, report)
    return report


def _quantised(store: RecordStore) -> set[str]:
    """The groups with integers and their scales."""
    integers = {path.rpartition("/")[0] for path, d in store.datasets.items() if d.name in ("int8", "uint8")}
    scaled = {p.rpartition("/")[0] for p, d in store.datasets.items() if "scale" in getattr(d.variable, "name", "")}
    return integers & scaled


def cast_dataset(dataset: Dataset, dtype: np.dtype, path: str, request: SaveRequest, report: SaveReport) -> Dataset:
    """The same dataset in another type, cast when it is asked for."""
    name = dataset.variable.path if dataset.variable is not None else path

    def array() -> np.ndarray:
        narrow, lost = cast(dataset.array(), dtype, name)
        if lost.infinite and not request.allow_overflow:
            raise InvalidError(
                f"'{name}' ('{path}' in the file) holds values that {dtype.name} cannot: {lost.infinite} would become "
                "infinite. Save it as bfloat16, which reaches as far as float32, or with `allow_overflow=True`."
            )
        report.cast.append(lost)
        return narrow

    return Dataset(deferred.Deferred(array, dtype.name, dataset.shape), dataset.variable)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> tuple[np.ndarray, Cast]:
    """The array in a narrower type, and what that costs."""
    flat = np.ascontiguousarray(array).reshape(-1)
    narrow = np.empty(flat.size, dtype)
    lost = Cast(name, array.dtype.name, dtype.name)
    tiny = np.finfo(array.dtype).smallest_subnormal
    for start in range(0, flat.size, _BLOCK):
        wide = flat[start : start + _BLOCK]
        part = narrow[start : start + _BLOCK]
        with np.errstate(all="ignore"):
            part[:] = wide
            back = part.astype(wide.dtype)
            size = np.abs(wide)
            error = np.abs(wide - back)
            most = float(error.max())
            if not np.isfinite(most):  # something was not finite, or is not any more
                fine = np.isfinite(wide)
                lost.infinite += int(np.count_nonzero(fine & ~np.isfinite(back)))
                fine &= np.isfinite(back)
                error = np.where(fine, error, 0)
                most = float(error.max())
            lost.max_abs = max(lost.max_abs, most)
            lost.max_rel = max(lost.max_rel, float((error / np.maximum(size, tiny)).max()))
            if not back.all():
                lost.zeros += int(np.count_nonzero((back == 0) & (wide != 0)))
    return narrow.reshape(array.shape), lost
