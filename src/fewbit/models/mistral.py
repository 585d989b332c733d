"""Mistral 7B and its kin (Jiang et al. 2023): Llama with a sliding window in the first of them."""

from __future__ import annotations

from typing import Any

from fewbit.models._decoder import SHARED, Args, common, layer_count, windows

BLOCK, Block, Model, feeds, producers, rope, weights = SHARED


def args(config: dict[str, Any]) -> Args:
    """Checked facts of a config.json; FewbitError names the key that is off."""
    # configs leave out what equals this; null is none
    config = {"sliding_window": 4096} | config
    slides = [True] * layer_count(config)
    return common(config, windows=windows(config, slides))
