"""The modules of Keras whose functions are replaced."""

from __future__ import annotations

SAVING_LIB = "keras.src.saving.saving_lib"


SAVING_API = "keras.src.saving.saving_api"


LEGACY_H5 = "keras.src.legacy.saving.legacy_h5_format"


MODEL = "keras.src.models.model"


EXPORTS = "keras.src.export.saved_model"


MODULES = (SAVING_LIB, SAVING_API, LEGACY_H5, MODEL, EXPORTS)
