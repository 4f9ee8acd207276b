"""Smaller files: what a save leaves out, and weights in half precision, cast while they are written."""

from __future__ import annotations

from hornbeam.base import dtypes
from hornbeam.base.reports import SaveReport
from hornbeam.flows.recording import RecordStore
from hornbeam.flows.requests import SaveRequest


def narrow(store: RecordStore, request: SaveRequest) -> SaveReport:
    """Leaves out of a recorded save what it is not to hold, and has the core cast the rest while it writes.

    Cast are the weights of the model (`model.weights`) in wider floating-point types. What belongs to metrics and
    optimizers stays: counts overflow, and second moments vanish, in half precision. So do the weights of a layer that
    holds quantised ones, whose scales would no longer fit them.

    Returns:
        The report, to which `RecordStore.note_casts` adds what was cast.
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
        dataset.narrow(dtype, path, allow_overflow=request.allow_overflow)
    return report


def _quantised(store: RecordStore) -> set[str]:
    """The groups with integers and their scales."""
    integers = {path.rpartition("/")[0] for path, d in store.datasets.items() if d.name in ("int8", "uint8")}
    scaled = {p.rpartition("/")[0] for p, d in store.datasets.items() if "scale" in getattr(d.variable, "name", "")}
    return integers & scaled
