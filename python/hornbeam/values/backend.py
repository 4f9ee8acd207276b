"""Which backend Keras runs on."""

from __future__ import annotations

import functools


@functools.cache
def _backend() -> str:
    import keras

    return keras.backend.backend()
