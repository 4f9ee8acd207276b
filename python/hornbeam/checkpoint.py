"""A directory of numbered checkpoints: model, optimizer, random state, and whatever else a training wants to keep."""

from __future__ import annotations

from hornbeam.training.manager import Checkpoint, CheckpointManager

__all__ = ["Checkpoint", "CheckpointManager"]
