"""Which of several processes that train together writes the files."""

from __future__ import annotations

import json
import os

import keras


def is_chief() -> bool:
    """Whether this process is the one that writes: the first of JAX's, or the chief of `TF_CONFIG`."""
    if keras.backend.backend() == "jax":
        import jax

        return bool(jax.process_index() == 0)
    try:
        config = json.loads(os.environ.get("TF_CONFIG") or "{}")
        cluster, task = config.get("cluster", {}), config.get("task", {})
        kind, index = task.get("type"), int(task.get("index", 0))
    except (ValueError, AttributeError):
        return True  # TensorFlow refuses it itself
    if kind is None or kind in ("chief", "master"):
        return True
    return kind == "worker" and index == 0 and not {"chief", "master"} & set(cluster)
