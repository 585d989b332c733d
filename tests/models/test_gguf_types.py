"""Models whose matrices are K-quants and IQ types: the kernels' logits beside those of the dequantized weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants

import fewbit
from fewbit.kernels import cpu
from fewbit.runtime.speed import read_bytes
from tests.kernels.conftest import HALVES
from tests.models import test_gguf_models
from tests.models.test_gguf_models import logits, mean_kl, pair

# rows of whole blocks of 256
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "tie_word_embeddings": False}


def random_blocks(w: np.ndarray, kind: Kind) -> np.ndarray:
    """Random codes with scales that give weights of a deviation of 0.05: gguf-py writes none of these types."""
    if kind == Kind.F32:
        return w
    _, size = quants.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(w.size)
    blocks = rng.integers(0, 256, (len(w), w.shape[1] // 256, size), dtype=np.uint8)

    def scaled(scale: float) -> np.ndarray:
        for at in HALVES[kind.name.lower()]:
            blocks[..., at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8)
        return blocks.reshape(len(w), -1)

    return scaled(0.05 / quants.dequantize(scaled(1.0), kind).std())


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q4_K, Kind.Q6_K, Kind.IQ4_XS, Kind.IQ2_XS, Kind.TQ2_0])
def test_the_kernels_run_the_type_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    if cpu.backend() is None:
        pytest.skip("fewbit._cpu is not built")
    whole = quants.quantize
    monkeypatch.setattr(test_gguf_models.quants, "quantize", random_blocks)
    file, folder, _ = pair(tmp_path, kind, **WIDE)
    monkeypatch.setattr(test_gguf_models.quants, "quantize", whole)
    exact = logits(file)
    torch.testing.assert_close(exact, logits(folder), rtol=1e-6, atol=1e-6)
    assert exact.std() > 0.05
    # activations in 8 bits, and nothing else
    assert mean_kl(exact, logits(file, exact=False)) < 0.002
    # held in about the file's bytes, not expanded
    loaded = fewbit.load(file)
    checkpoint = loaded.source.checkpoint
    stored = sum(checkpoint.read(n).nbytes for n in checkpoint.names() if n != "token_embd.weight")
    assert read_bytes(loaded) < 1.6 * stored
