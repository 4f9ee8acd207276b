"""Training data whose position can be saved, so that training goes on at the very next batch."""

from __future__ import annotations

from typing import Any

from hornbeam.training import resumable as _resumable
from hornbeam.training.resumable import Resumable

__all__ = ["Resumable", "resumable"]


def resumable(
    source: Any, *, batch_size: int | None = None, shuffle: bool = False, seed: int | None = None
) -> Resumable:
    """Data for `fit`, or for a loop of one's own, whose position a checkpoint can hold.

    Pass it to `fit` as `x`, together with `hornbeam.callbacks.BackupAndRestore`; or iterate over it and pass it to
    `CheckpointManager.save` and `restore` in `extra`. One iteration is one epoch, or what is left of it.

    Args:
        source: A `tf.data.Dataset`, whose iterators are saved, shuffle buffers included; a `keras.utils.PyDataset`
            whose batches are functions of their index; or arrays: `x`, `(x, y)` or `(x, y, sample_weight)`.
        batch_size: Of arrays; 32 otherwise.
        shuffle: Of arrays and `PyDataset`: another order in each epoch, a function of `seed` and the epoch.
        seed: For `shuffle`.

    Returns:
        The data, with `get_state` and `set_state`.

    Raises:
        ValueError: For other sources, and arguments that do not fit them. `UnsupportedError` for a `tf.data.Dataset`
            that shuffles without a seed: after a restart its order would be another one.
    """
    return _resumable.make(source, batch_size=batch_size, shuffle=shuffle, seed=seed)
