"""KerasHub's presets: a small model from a config, whole and in shards. Runs where `keras_hub` is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import hornbeam
from support.helpers import saved

keras_hub = pytest.importorskip("keras_hub", reason="KerasHub is not installed")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_preset_comes_back(sharded: bool, tmp_path: Path) -> None:
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=50, num_layers=2, num_heads=2, hidden_dim=8, intermediate_dim=16, max_sequence_length=6
    )
    preset = str(tmp_path / "preset")
    with hornbeam.installed():
        backbone.save_to_preset(preset, **({"max_shard_size": 2e-6} if sharded else {}))
        loaded = keras_hub.models.BertBackbone.from_preset(preset)
    assert (hornbeam.stats().saves, hornbeam.stats().loads, hornbeam.stats().handovers) == (1, 1, {})
    names = {path.name for path in Path(preset).iterdir()}
    assert names >= {"config.json", "metadata.json"}
    shards = {name for name in names if name.endswith(".weights.h5")}
    assert len(shards) > 1 if sharded else shards == {"model.weights.h5"}
    if sharded:
        index = json.loads((Path(preset) / "model.weights.json").read_text())
        assert shards == {n for v in index["weight_map"].values() for n in ([v] if isinstance(v, str) else v)}
    assert saved(loaded) == saved(backbone)
    x = {
        "token_ids": np.ones((2, 6), "int32"),
        "segment_ids": np.zeros((2, 6), "int32"),
        "padding_mask": np.ones((2, 6), "int32"),
    }
    for ours, expected in zip(loaded(x).values(), backbone(x).values(), strict=True):
        np.testing.assert_array_equal(ours, expected)
    stock = keras_hub.models.BertBackbone.from_preset(preset)
    assert saved(stock) == saved(backbone)
