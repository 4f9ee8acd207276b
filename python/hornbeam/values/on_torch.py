"""Values of torch's tensors."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from hornbeam.base.deferred import Deferred, copied
from hornbeam.base.dtypes import extended_dtype


def view(value: Any) -> np.ndarray | Deferred | None:
    """Host memory of a value; `None` where Keras has to convert it."""
    import torch

    if not isinstance(value, torch.Tensor):
        return None
    into = functools.partial(_fill_torch, value)  # also from a GPU, whose driver copies in pieces
    return Deferred(lambda: _copy_torch(value), str(value.dtype).removeprefix("torch."), value.shape, into)


def _fill_torch(value: Any, memory: np.ndarray) -> None:
    import torch

    torch.frombuffer(memory, dtype=value.dtype).view(value.shape).copy_(value.detach())


def _copy_torch(value: Any) -> np.ndarray:
    import torch

    host = value.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        return copied(host.view(torch.uint16).numpy()).view(extended_dtype("bfloat16"))
    return copied(host.numpy())


def processes() -> tuple[int, int] | None:
    """The number of this process, and how many there are, where torch knows of several."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return None
