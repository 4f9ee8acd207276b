"""The SavedModel format: a TensorFlow SavedModel for serving and, in its `assets.extra/`, the whole model.

TensorFlow leaves `assets.extra/` to whoever writes a SavedModel; what Keras loads is the `.keras` archive in there.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import keras
from keras.src.export import saved_model as stock_export
from keras.src.saving import serialization_lib
from keras.src.utils import io_utils
from keras.src.utils.module_utils import tensorflow as tf

from hornbeam.base.reports import LoadReport, SaveReport
from hornbeam.base.savedmodel_parts import FINGERPRINT, WHOLE
from hornbeam.errors import InvalidError, UnsupportedError
from hornbeam.flows import loads, saves
from hornbeam.flows.requests import LoadRequest, SaveRequest
from hornbeam.formats import exports
from hornbeam.seam import entry


def save_model(request: SaveRequest, *, overwrite: bool = True) -> SaveReport | None:
    """Writes a SavedModel that holds the whole model as well.

    Returns:
        What was saved; `None` where the user keeps the old directory.

    Raises:
        ValueError: For a model that is not built, another backend, a directory that holds other files.
        ImportError: Without TensorFlow.
    """
    filepath, model = request.target, request.model
    target = os.fsdecode(filepath)
    request.refuse_writer("a SavedModel")
    if request.dtype is not None:
        raise UnsupportedError(f"A SavedModel is saved in the types of the model. Received: filepath={filepath}")
    if keras.backend.backend() not in ("tensorflow", "jax"):
        raise UnsupportedError(
            f"A SavedModel can be written from the TensorFlow and JAX backends, not from {keras.backend.backend()}. "
            f"Save to a `.keras` file instead. Received: filepath={filepath}"
        )
    if not tf.available:
        raise ImportError(
            "A SavedModel is written by TensorFlow, which is not installed: `pip install tensorflow`, or save to a "
            f"`.keras` file instead. Received: filepath={filepath}"
        )
    if not isinstance(model, keras.Model):
        raise InvalidError(f"Only models can be saved as a SavedModel. Received: {model!r} (of type {type(model)})")
    with entry.scope():  # the errors of Keras' exports say which layer
        signature = stock_export.get_input_signature(model)
        if os.path.exists(target) and not overwrite and not io_utils.ask_to_proceed_with_overwrite(filepath):
            return None
        reports: list[SaveReport] = []

        def whole(root: Path) -> None:
            (root / WHOLE).parent.mkdir(exist_ok=True)
            saved = saves.save_archive(dataclasses.replace(request, target=str(root / WHOLE)))
            assert isinstance(saved, SaveReport)
            reports.append(saved)

        archive = stock_export.ExportArchive()
        archive.track_and_add_endpoint(stock_export.DEFAULT_ENDPOINT_NAME, model, signature)
        written = exports.write(archive, target, exports.ExportRequest(extra=whole, foreign=False), verbose=False)
    reports[0].path = written.path  # it was written under another name
    return reports[0]


def load_model(request: LoadRequest) -> tuple[Any, LoadReport]:
    """The whole model, or a model for inference around a SavedModel of somebody else's."""
    filepath = request.source
    whole = os.path.join(os.fsdecode(filepath), WHOLE)
    if os.path.exists(whole):
        _check_fingerprint(Path(os.fsdecode(filepath)))
        return loads.load_archive(dataclasses.replace(request, source=whole))
    known = serialization_lib.in_safe_mode()
    if request.safe_mode if known is None else known:
        raise ValueError(
            f"'{filepath}' is a SavedModel without a Keras model in it ('{WHOLE}'). Its graph can run any TensorFlow "
            "operation, file access included, so it is not loaded by default. If you trust its source, pass "
            "`safe_mode=False` for a model that can only predict; without Keras: `tf.saved_model.load`."
        )
    if keras.backend.backend() != "tensorflow":
        raise UnsupportedError(
            f"'{filepath}' is a SavedModel without a Keras model in it ('{WHOLE}'), and such a one becomes a layer "
            f"only with the TensorFlow backend. The backend is {keras.backend.backend()}."
        )
    if request.strict:
        raise UnsupportedError(
            f"'{filepath}' is a SavedModel without a Keras model in it ('{WHOLE}'): TensorFlow loads it, and does not "
            "say what."
        )
    return _inference_model(os.fsdecode(filepath)), LoadReport(os.fsdecode(filepath))


def _check_fingerprint(root: Path) -> None:
    """Refuses a SavedModel that was written over since by something that left our archive where it was."""
    of_graph, of_archive = root / FINGERPRINT, (root / WHOLE).with_name(FINGERPRINT)
    if of_graph.exists() and of_archive.exists() and of_graph.read_bytes() != of_archive.read_bytes():
        raise InvalidError(
            f"The SavedModel '{root}' was written over since the model in it was saved, so they differ. Save the "
            f"model again; the one that was saved is still there, to be loaded as '{root / WHOLE}'."
        )


def _inference_model(path: str) -> Any:
    """A functional model around one signature."""
    signatures = tf.saved_model.load(path).signatures
    name = next((n for n in ("serving_default", "serve") if n in signatures), next(iter(signatures), None))
    if name is None:
        raise UnsupportedError(f"The SavedModel '{path}' has no signature to call.")
    _, specs = signatures[name].structured_input_signature
    unknown = [key for key, spec in specs.items() if spec.shape.rank is None or spec.shape.rank == 0]
    if unknown:
        raise UnsupportedError(f"Signature '{name}' of '{path}' has inputs without a batch dimension: {unknown}")
    inputs = {
        key: keras.Input(batch_shape=tuple(spec.shape.as_list()), dtype=spec.dtype.name, name=key)
        for key, spec in specs.items()
    }
    layer = _Signature(path, call_endpoint=name, trainable=False, name="saved_model")
    outputs = layer(inputs)
    whole = next(iter(inputs.values())) if len(inputs) == 1 else inputs
    return keras.Model(whole, next(iter(outputs.values())) if len(outputs) == 1 else outputs)


class _Signature(keras.layers.TFSMLayer):
    """`TFSMLayer` over a signature: inputs and outputs are dicts, as many as there are."""

    def call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        return self._reloaded_obj.signatures[self.call_endpoint](**inputs)
