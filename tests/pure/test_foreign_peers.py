"""The benchmarks' own reader of other tools' folders, against weights made from the formats' definitions."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pure.test_foreign_folders import across, gptq_parts, make

FILE = Path(__file__).parents[2] / "benchmarks" / "_peer_folders.py"


@pytest.fixture(scope="module")
def peers() -> Any:
    spec = importlib.util.spec_from_file_location("_peer_folders", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_zero_point_of_0_borrows_from_its_neighbours(peers: Any) -> None:
    """Four bits by hand: [0, 8, 8, 8] less one a field, the whole word at once."""
    word = 0x88888880 - 0x11111111
    stored = torch.tensor([[word]], dtype=torch.int32)
    assert peers.gptq_zeros(stored, 4, 8, 1).tolist() == [[0, 8, 8, 8, 8, 8, 8, 8]]
    assert peers.gptq_zeros(stored, 4, 8, 0).tolist() == [[15, 6, 7, 7, 7, 7, 7, 7]]


@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_means_code_zero_point_scale(peers: Any, bits: int, less_one: bool) -> None:
    m = make(32, 64, bits, 32, symmetric=False, shuffled=True)
    m.zeros[:, 1::3] = 0
    m.zeros[0, 0] = 0
    m.__post_init__()
    if not less_one:
        stored = across(m.zeros, bits)
    elif bits == 3:
        # fields run across words: each is counted for itself
        stored = across((m.zeros - 1) % 8, bits)
    else:
        ones = sum(1 << (bits * i) for i in range(32 // bits))
        stored = across(m.zeros, bits) - ones
    parts = gptq_parts(m, bits) | {"qzeros": stored}
    assert torch.equal(peers.gptq_weight(parts, bits, int(less_one)), m.weight)
