"""A small training for the tests of checkpoints: its model, its data, callbacks that say or do something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
from keras import layers

from support.helpers import saved
from support.zoo import chain, floats


class Scores(keras.callbacks.Callback):
    """Says what `val_loss` was, and notes the state of the model, at the end of every epoch."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores
        self.states: dict[int, Any] = {}

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs["val_loss"] = self.scores[epoch]
        self.states[epoch + 1] = saved(self.model)


class At(keras.callbacks.Callback):
    """Does something after one batch, counted through all epochs."""

    def __init__(self, batch: int, action: Callable[[], Any]) -> None:
        super().__init__()
        self.left, self.action = batch, action

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.left == 0:
            self.state = saved(self.model)
            self.action()
        self.left -= 1


def model(**arguments: Any) -> Any:
    made = chain(layers.Dense(8), layers.Dense(1))
    made.compile("adam", "mse", **arguments)
    return made


def fit(made: Any, *callbacks: Any, epochs: int = 1) -> Any:
    return made.fit(floats(32, 6), floats(32, 1), batch_size=8, epochs=epochs, verbose=0, callbacks=list(callbacks))


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if not p.name.startswith("."))


def hidden(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.name.startswith("."))
