"""The mark of a file that holds a part of a model, and what such a file does not replace."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from typing import Any

from hornbeam import _core
from hornbeam.base import file_objects
from hornbeam.base.file_objects import Stream
from hornbeam.errors import HornbeamError, InvalidError
from hornbeam.flows.requests import SaveRequest

#: Attribute of the root, or entry of the metadata: the patterns, as JSON.
MARK = "hornbeam_partial"


def is_part(opened: Iterable[tuple[str, _core.Weights]]) -> bool:
    """Whether files say that they hold a part of a model."""
    return any(name == MARK for _, weights in opened for name, _ in weights.attributes)


def refuse_complete(request: SaveRequest, places: Iterable[str | os.PathLike[str] | Stream]) -> None:
    """Refuses to write a part of a model over what is not known to be one; nothing was touched.

    Raises:
        InvalidError: Then.
    """
    if not request.partial or request.replace_complete:
        return
    for place in places:
        found = _content(place)
        if found is not None:
            error = InvalidError(
                f"'{place}' holds {found}, and would be replaced by a part of a model. Save to another path, or pass "
                "`replace_complete=True`."
            )
            error.path = file_objects.path_of(place)
            error.expected, error.found = "no file, or one that holds a part", found
            raise error


def _content(place: str | os.PathLike[str] | Stream) -> str | None:
    """What stands at a place, if that is anything but a part of a model."""
    from hornbeam.base import model_file  # only here: it is not needed for other saves

    if isinstance(place, Stream):
        with file_objects.rewound(place) as file:
            try:
                empty = file is None or not file.read(1)
            except io.UnsupportedOperation:  # it can only be written to
                empty = True
            return None if empty else _holds(model_file, file)
    path = os.fspath(place)
    return _holds(model_file, path) if os.path.isfile(path) and os.path.getsize(path) else None


def _holds(model_file: Any, place: Any) -> str | None:
    try:
        with model_file.open(place) as file:
            return None if MARK in file.attributes() else "complete weights"
    except (HornbeamError, OSError):
        return "something else than weights"
