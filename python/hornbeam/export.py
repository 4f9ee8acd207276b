"""`keras.export`, name by name: artifacts are written atomically, and compared with the model if asked to."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from os import PathLike
from typing import Any

import keras
import keras.export as _stock

from hornbeam.base.reports import ExportReport, last_report, remember
from hornbeam.errors import UnsupportedError
from hornbeam.formats import exports
from hornbeam.seam import entry, keras_names

__all__ = ["ExportArchive", "ExportReport", "export"]
_EXPORTS = "hornbeam.formats.exports"
_Archive: Any = keras_names.backend_archive_class()


def export(
    model: keras.Model,
    filepath: str | PathLike[str],
    format: str = "tf_saved_model",
    verbose: bool | None = None,
    input_signature: Any = None,
    *,
    verify: bool = False,
    tolerance: float | None = None,
    **kwargs: Any,
) -> ExportReport | None:
    """`model.export`: the forward pass alone, as an artifact that needs no Keras.

    An old artifact stays as it was until the new one is complete.

    Args:
        model: The model; it must have been called, or built.
        filepath: The directory.
        format: `"tf_saved_model"`; the others are Keras' own.
        verbose: Print the endpoints.
        input_signature: Shapes and dtypes of the inputs, where Keras cannot tell.
        verify: Reload the artifact before it takes its place, and compare its answers to random inputs with the
            model's. With `install()`, `model.export(path, verify=True)` does the same.
        tolerance: How large a difference may be. Without it 1e-4, and 2e-2 of 16-bit numbers, relative to the
            largest number of the output, if that is above 1; integers must be equal.
        **kwargs: As `keras.Model.export`.

    Returns:
        Endpoints and differences; `None` for other formats.

    Raises:
        ValueError: For a model that is not built, another backend, or a difference (`VerificationError`).
        OSError: When the directory cannot be written.
    """
    if format != "tf_saved_model":
        if verify:
            raise UnsupportedError(f"Only SavedModels can be verified. Received: format={format!r}")
        model.export(filepath, format=format, verbose=verbose, input_signature=input_signature, **kwargs)
        return None
    compared = {"verify": verify, "tolerance": tolerance} if verify else {}
    before = last_report("export")
    with entry.scope():
        model.export(filepath, format=format, verbose=verbose, input_signature=input_signature, **compared, **kwargs)
    report = last_report("export")
    return None if report is before else report  # stock Keras makes none


class ExportArchive(_Archive):
    """`keras.export.ExportArchive`: a SavedModel of the endpoints you choose.

    Args:
        format: `"saved_model"`; what else Keras knows is Keras' own.
        **kwargs: As `keras.export.ExportArchive`.
    """

    def __new__(cls, format: str = "saved_model", **kwargs: Any) -> Any:
        """Another format is another class of Keras'."""
        if format != "saved_model":
            return _stock.ExportArchive(format=format, **kwargs)
        return super().__new__(cls)

    def __init__(self, format: str = "saved_model", **kwargs: Any) -> None:
        super().__init__()

    def track(self, resource: Any) -> None:
        """Tracks the variables of a layer or model, and tables.

        Args:
            resource: A layer or model that is built, or something of TensorFlow's that it can track.

        Raises:
            ValueError: For anything else; says which layer is not built, and what in it.
        """
        entry.run("export", f"{_EXPORTS}:track", functools.partial(super().track, resource), self, resource)

    def add_endpoint(self, name: str, fn: Any, input_signature: Any = None, **kwargs: Any) -> Any:
        """Adds a function that the artifact will have.

        Args:
            name: Its name; none may come twice.
            fn: What it does: a method of a layer, a `tf.function`, …
            input_signature: Shape and dtype of every argument; a `tf.function` that was called needs none.
            **kwargs: As `keras.export.ExportArchive.add_endpoint`, and `verify`: compare it when it is written.

        Returns:
            The `tf.function` that was added.

        Raises:
            ValueError: For a name that is taken or a missing signature.
        """
        stock = functools.partial(super().add_endpoint, name, fn, input_signature, **kwargs)
        return entry.run("export", f"{_EXPORTS}:add_endpoint", stock, self, name, fn, input_signature, **kwargs)

    def track_and_add_endpoint(self, name: str, resource: Any, input_signature: Any, **kwargs: Any) -> Any:
        """`track` and `add_endpoint` of the layer's `__call__`.

        Args:
            name: Its name.
            resource: A layer or model that is built.
            input_signature: Shape and dtype of every argument.
            **kwargs: As `add_endpoint`.

        Returns:
            The `tf.function` that was added.

        Raises:
            ValueError: As `track` and `add_endpoint`.
        """
        return super().track_and_add_endpoint(name, resource, input_signature, **kwargs)

    def add_variable_collection(self, name: str, variables: Sequence[Any]) -> None:
        """Adds variables that the reloaded artifact will have under this name; this archive has them, too.

        Args:
            name: The attribute's name.
            variables: The variables.

        Raises:
            ValueError: For a name that is taken, or what are no variables.
        """
        stock = functools.partial(super().add_variable_collection, name, variables)
        entry.run("export", f"{_EXPORTS}:add_variable_collection", stock, self, name, variables)

    def write_out(
        self,
        filepath: str | PathLike[str],
        options: Any = None,
        verbose: bool = True,
        *,
        verify: bool = False,
        tolerance: float | None = None,
    ) -> ExportReport | None:
        """Writes the artifact; an old one stays as it was until the new one is complete.

        Args:
            filepath: The directory.
            options: `tf.saved_model.SaveOptions`.
            verbose: Print the endpoints.
            verify: Reload it before it takes its place, and compare every endpoint with what it was made of.
            tolerance: As `export`.

        Returns:
            Endpoints and differences.

        Raises:
            ValueError: Without endpoints, for a signature that does not fit, or a difference (`VerificationError`).
            OSError: When the directory cannot be written.
        """
        request = exports.ExportRequest(verify=verify, tolerance=tolerance)
        stock = functools.partial(super().write_out, filepath, options, verbose)
        report: ExportReport | None = entry.run(
            "export", f"{_EXPORTS}:write", stock, self, filepath, request, options, verbose=verbose
        )
        if report is not None:  # stock Keras makes none
            remember(report)
        return report


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)


def __dir__() -> list[str]:
    return sorted({*dir(_stock), *__all__})
