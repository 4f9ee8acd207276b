"""Names of data types, as NumPy, Keras and the core write them."""

from __future__ import annotations

import functools

import numpy as np


def extended_dtype(name: str) -> np.dtype:
    """NumPy's dtype of that name, or the extension's.

    Raises:
        ValueError: Neither has one; in Keras' words.
    """
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        found = getattr(ml_dtypes, name, None)
        if found is None:
            raise ValueError(f"Invalid dtype: {name}") from None
        return np.dtype(found)


@functools.cache
def dtype_name(dtype: np.dtype) -> str:
    """The name the Rust core knows a dtype by; `V{n}` for what HDF5 has no type for, as h5py stores it."""
    return dtype.name if dtype.name in _NUMBERS else f"V{dtype.itemsize}"


_NUMBERS = frozenset(
    [
        "float16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
        "complex64",
        "complex128",
    ]
)


def numpy_dtype(name: str, tag: object) -> np.dtype:
    """The NumPy dtype of a dataset: its own, or what Keras marks opaque bytes to be."""
    if tag == "bfloat16" and name == "V2":
        return extended_dtype(tag)
    return np.dtype(f"|{name}" if name.startswith("V") else name)


@functools.cache
def own_dtype(name: str, tag: str | None) -> np.dtype:
    """The NumPy dtype of a tensor in a format that has types for all of them."""
    return np.dtype(name) if tag is None else extended_dtype(tag)


@functools.cache
def name_of(dtype: np.dtype) -> str:
    """`dtype.name`, which NumPy works out every time."""
    return dtype.name
