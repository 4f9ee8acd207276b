"""Which backend Keras runs on."""

from __future__ import annotations

import functools


@functools.cache
def backend_name() -> str:
    """Its name: `"tensorflow"`, say."""
    import keras

    return keras.backend.backend()
