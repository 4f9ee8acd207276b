"""What Keras 2 wrote and Keras 3 calls differently. Used only where Keras 3 does not find a name itself."""

from __future__ import annotations

from typing import Any


def legacy_config(config: Any) -> Any:
    return config


def wrapped_function(config: Any) -> Any:
    """The function in a loss or metric of a class that Keras 3 does not have."""
    return config["config"]["name"]


def optimizer_config(config: Any) -> Any:
    return config


def slots(optimizer: Any, found: list[tuple[str, int]]) -> list[tuple[Any, int]] | None:
    return None
