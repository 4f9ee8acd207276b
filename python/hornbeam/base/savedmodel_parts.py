"""Names of what is in a SavedModel's directory."""

from __future__ import annotations

import os

#: One of them makes a directory a SavedModel.
GRAPHS = ("saved_model.pb", "saved_model.pbtxt", "saved_model.cpb")
#: What a SavedModel consists of; a directory with anything else in it is not replaced.
PARTS = (
    *GRAPHS,
    "fingerprint.pb",
    "keras_metadata.pb",  # Keras 2
    "variables",
    "assets",
    "assets.extra",
    "debug",
)
#: Where the whole model is, in a SavedModel that `save` wrote; beside it, a copy of the fingerprint it belongs to.
WHOLE = os.path.join("assets.extra", "model.keras")
FINGERPRINT = "fingerprint.pb"
#: What TensorFlow itself writes into `debug/`.
_DEBUG_INFO = os.path.join("debug", "saved_model_debug_info.pb")
