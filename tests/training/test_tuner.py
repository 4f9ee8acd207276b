"""A search by KerasTuner, which copies callbacks for each trial, under `install()`."""

from __future__ import annotations

from pathlib import Path

import keras
import pytest

from support.helpers import script

SEARCH = """
import sys, types
from pathlib import Path

if sys.argv[2] == "tensorflow":  # KerasTuner imports it there, for a callback that this search has not
    for name in ("tensorboard", "tensorboard.plugins", "tensorboard.plugins.hparams"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["tensorboard.plugins.hparams"].api = None

import keras, keras_tuner
import numpy as np
import hornbeam
from hornbeam import CheckpointManager
from hornbeam.callbacks import BackupAndRestore, ModelCheckpoint, best_checkpoint

root, seen = Path(sys.argv[1]), []
hornbeam.install()
keras.utils.set_random_seed(0)


class Notes(keras.callbacks.Callback):
    "What the copies see goes into one list."
    def on_epoch_begin(self, epoch, logs=None):
        found = CheckpointManager(root / "backup").latest()
        assert (found and found.step) == (epoch - 1 if epoch else None), (epoch, found)

    def on_train_end(self, logs=None):
        seen.append((self.model.count_params(), self.model.get_weights()))


def build(hp):
    units = hp.Choice("units", [3, 8])
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model


tuner = keras_tuner.RandomSearch(build, "loss", max_trials=2, seed=1, directory=root, project_name="search")
ours = ModelCheckpoint(root / "best.keras", "loss", save_best_only=True, asynchronous=True, keep_best=1)
backup = BackupAndRestore(root / "backup", seed=3)
x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
tuner.search(x, x[:, :1], epochs=3, verbose=0, callbacks=[ours, backup, Notes()])

assert sorted(size for size, _ in seen) == [3 * 5 + 4, 8 * 5 + 9], seen
assert not (root / "backup").exists()
assert ours.history == [] and ours.model is None and backup.model is None

# A loss falls with every epoch: the best weights are the last ones of the better trial.
best = tuner.get_best_models(1)[0]
trial = tuner.oracle.get_best_trials(1)[0]
weights = best.get_weights()
(trained,) = (w for size, w in seen if size == best.count_params())
stored = root / "search" / f"trial_{trial.trial_id}" / "checkpoint.weights.h5"
with hornbeam.open(stored) as file:
    held = [file[f"layers/{layer}/vars/{i}"] for layer in ("dense", "dense_1") for i in (0, 1)]
model = keras.saving.load_model(best_checkpoint(root))
for found in (trained, held, model.get_weights()):
    for a, b in zip(found, weights, strict=True):
        np.testing.assert_array_equal(a, b)
stats = hornbeam.stats()
assert stats.handovers == {} and stats.saves >= 6 and stats.loads >= 2, stats
print("done")
"""


@pytest.mark.backend("tensorflow", "jax", reason="KerasTuner is installed where these are")
def test_a_search_copies_callbacks_and_finds_the_best_model(tmp_path: Path) -> None:
    done = script(SEARCH, tmp_path, keras.backend.backend())
    assert done.stdout.endswith("done\n"), done.stderr
