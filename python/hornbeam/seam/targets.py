"""The modules of Keras whose functions are replaced."""

from __future__ import annotations

from hornbeam.seam.patches import Users

SAVING_LIB = "keras.src.saving.saving_lib"
SAVING_API = "keras.src.saving.saving_api"
LEGACY_H5 = "keras.src.legacy.saving.legacy_h5_format"
MODEL = "keras.src.models.model"
EXPORTS = "keras.src.export.saved_model"
MODULES = (SAVING_LIB, SAVING_API, LEGACY_H5, MODEL, EXPORTS)


class Installation:
    """Whether hornbeam stands in for Keras' functions in the whole process.

    Attributes:
        forever: Between `install()` and `uninstall()`.
        blocks: `with installed()` blocks in force.
    """

    def __init__(self) -> None:
        self.forever = False
        self.blocks = Users()

    def __bool__(self) -> bool:
        return self.forever or bool(self.blocks)


installation = Installation()
