"""A directory of numbered checkpoints: model, optimizer, random state, and whatever else a training wants to keep."""

from __future__ import annotations

from hornbeam.training.accounts import Checkpoint
from hornbeam.training.manager import CheckpointManager

__all__ = ["Checkpoint", "CheckpointManager"]
