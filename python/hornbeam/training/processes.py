"""Trainings of several processes: which of them writes, and whether the others wait for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras

from hornbeam.base.barrier import Group, Place
from hornbeam.errors import CheckpointError, UnsupportedError
from hornbeam.values import on_jax, on_torch, tensors


def current() -> Place:
    """Asks the backend; TensorFlow's `TF_CONFIG` where it is TensorFlow.

    Raises:
        CheckpointError: `TF_CONFIG` is malformed.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        return Place(*on_jax.processes())
    if backend == "torch":
        return Place(*(on_torch.processes() or (0, 1)))
    if backend == "tensorflow" and os.environ.get("TF_CONFIG"):
        return _from_tf_config(os.environ["TF_CONFIG"])
    return Place(0, 1)


def is_chief() -> bool:
    """Whether this process is the one that writes files."""
    return current().rank == 0


def _from_tf_config(text: str) -> Place:
    try:
        config = json.loads(text)
        cluster, task = config.get("cluster", {}), config.get("task", {})
        chiefs = len(cluster.get("chief", ())) + len(cluster.get("master", ()))
        workers = len(cluster.get("worker", ()))
        kind, index = task.get("type", "worker"), int(task.get("index", 0))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"TF_CONFIG is malformed: {error}. Received: {text!r}") from error
    if cluster.get("ps") and chiefs:  # with parameter servers one coordinates, and the workers only serve
        return Place(0 if kind in ("chief", "master") else -1, 1)
    if kind in ("evaluator", "ps"):
        return Place(-1, max(chiefs + workers, 1))
    return Place(index + (chiefs if kind == "worker" else 0), max(chiefs + workers, 1))


def refuse_remote(variables: Iterable[Any]) -> None:
    """Refuses arrays of which this process has only a part.

    Raises:
        UnsupportedError: With the names of all of them.
    """
    remote = [variable.path for variable in variables if not tensors.is_addressable(variable)]
    if remote:
        raise UnsupportedError(
            "These variables are spread over several processes, of which none has all of their values; checkpoints of "
            f"such models are not supported yet: {', '.join(remote)}"
        )


def assemble(directory: Path, timeout: float | None) -> Group | None:
    """Has the processes of a training meet, which may do so again and again in this directory.

    Args:
        directory: Shared by them, for this alone.
        timeout: Seconds to wait for each other; `None` for not at all.

    Returns:
        Their group; `None` where there is nobody to wait for.

    Raises:
        CheckpointError: Not all came in time.
    """
    place = current()
    if timeout is None or place.count == 1 or place.rank < 0:
        return None
    return Group(directory, place, timeout)
