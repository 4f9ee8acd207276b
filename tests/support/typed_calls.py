"""What type checkers make of public calls. `make check` runs mypy over this file, nobody calls what is in it.

A `type: ignore` says that mypy must find an error in that line: one that it does not find is an error itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any, assert_type

import hornbeam
from hornbeam import Checkpoint, CheckpointManager, ExportReport, Handle, LoadReport, SaveReport, models
from hornbeam.saving import load_weights, save_model, save_weights


def saves(model: Any, path: Path, file: IO[bytes], flag: bool) -> None:
    assert_type(save_model(model, path), None)
    assert_type(save_model(model, file, True, False, asynchronous=False, dtype="float16"), None)
    assert_type(save_model(model, path, asynchronous=True), Handle)
    assert_type(models.save_model(model, path, False, asynchronous=True, progress=print), Handle)
    assert_type(save_model(model, path, asynchronous=flag), Handle | None)
    assert_type(save_weights(model, path), None)
    assert_type(save_weights(model, path, True, 0.5, only="encoder", replace_complete=True), None)
    assert_type(save_weights(model, path, asynchronous=True, skip=["head"], compression="gzip"), Handle)
    assert_type(save_weights(model, path, asynchronous=flag), Handle | None)
    assert_type(save_model(model, path, asynchronous=True).result(timeout=1.5), str)


def mistakes(model: Any, path: Path) -> None:
    save_model(model, path, nonsense=1)  # type: ignore[call-overload]
    save_model(model, path, only="encoder")  # type: ignore[call-overload]
    save_model(model, path, dtype=16)  # type: ignore[call-overload]
    save_weights(model, path, asynchronous=True, nonsense=1)  # type: ignore[call-overload]
    save_model(model, path).result()  # type: ignore[attr-defined]
    hornbeam.last_report("saves")  # type: ignore[call-overload]


def reports(model: Any, path: Path) -> None:
    assert_type(load_weights(model, path), LoadReport)
    assert_type(hornbeam.last_report("load"), LoadReport | None)
    assert_type(hornbeam.last_report("save"), SaveReport | None)
    assert_type(hornbeam.last_report("export"), ExportReport | None)
    assert_type(save_model(model, path, asynchronous=True).report, SaveReport | None)
    assert_type(hornbeam.export.export(model, path), ExportReport | None)
    with CheckpointManager(path) as manager:
        assert_type(manager.save(0, model), Checkpoint | None)
        assert_type(manager.restore(model), int)
