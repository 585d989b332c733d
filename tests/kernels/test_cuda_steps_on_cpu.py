"""The kernels around the products themselves, compiled for the CPU with a stand-in for what only a card has."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.kernels._nvrtc import SOURCES
from tests.kernels.stand_in import compiled

RUN = """
#include "steps.cu"
extern "C" void norm(int tokens, int threads, float* x, const float* delta, const float* weight, float* out,
                     u16* halves, float* scales, int n, float eps) {
    launch({tokens, 1, 1}, threads, [=] { add_norm(x, delta, weight, out, halves, scales, n, eps); });
}
"""


def library(folder: Path) -> ctypes.CDLL:
    """steps.cu on the CPU."""
    for name in ("steps.cu", "warps.cuh"):
        shutil.copy(SOURCES / name, folder)
    shutil.copy(Path(__file__).with_name("steps_on_cpu.h"), folder / "pieces.cuh")
    (folder / "run.cpp").write_text(RUN)
    return compiled(folder, {})


def at(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def unpacked(halves: Tensor, columns: int) -> Tensor:
    """[columns / 32, tokens, 32] -> float32 [tokens, columns]; zeros behind them."""
    flat = halves.float().transpose(0, 1).flatten(1)
    assert not flat[:, columns:].any()
    return flat[:, :columns]


def test_norm(tmp_path: Path) -> None:
    norm = library(tmp_path).norm
    g = torch.Generator().manual_seed(0)
    tokens, n = 2, 192
    x, delta, weight = (torch.randn(s, generator=g) for s in ((tokens, n), (tokens, n), (n,)))
    x[1] *= 1e6
    whole = x + delta
    expected = F.rms_norm(whole.double(), (n,), weight.double(), 1e-5)
    out = torch.full((tokens, n), torch.nan)
    norm(tokens, 64, at(x), at(delta), at(weight), at(out), at(None), at(None), n, ctypes.c_float(1e-5))
    assert torch.equal(x, whole)
    assert torch.allclose(out.double(), expected, rtol=1e-5)
    for size in (1.0, 1e-6, 1e6):
        halves = torch.full((8, tokens, 32), torch.nan, dtype=torch.float16)
        scales = torch.full((tokens,), torch.nan)
        by = weight * size
        norm(tokens, 64, at(x), at(None), at(by), at(None), at(halves), at(scales), n, ctypes.c_float(1e-5))
        assert torch.equal(scales.log2().round().exp2(), scales)
        assert (scales == 1).all() == (size == 1.0)
        found = unpacked(halves, n) * scales[:, None]
        assert torch.allclose(found.double(), expected * size, rtol=2e-3, atol=2e-7 * size)
