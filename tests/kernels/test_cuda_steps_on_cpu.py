"""The kernels around the products themselves, compiled for the CPU with a stand-in for what only a card has."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.kernels._cuda_ops import MOST_SPLITS, TILE, sharing
from fewbit.kernels._nvrtc import SOURCES
from fewbit.kernels.ops import Ops
from tests.kernels.stand_in import compiled

PAGE = 256
RUN = """
#include "steps.cu"
typedef long long i64;
extern "C" void norm(int tokens, int threads, float* x, const float* delta, const float* weight, float* out,
                     u16* halves, float* scales, int n, float eps) {
    launch({tokens, 1, 1}, threads, [=] { add_norm(x, delta, weight, out, halves, scales, n, eps); });
}
extern "C" void attend(int x, int y, int z, const float* qkv, const float* c, const float* s, const i64* slots,
                       const i64* lengths, const i64* pages, int each, int size, u16* keys, u16* values, int heads,
                       int kv, float scale, float* partial, float2* stats, u32* counters, float* out, u16* halves,
                       int tokens) {
    launch({x, y, z}, kAttendThreads, [=] {
        attend_one(qkv, c, s, slots, lengths, pages, each, size, keys, values, heads, kv, scale, partial, stats,
                   counters, out, halves, tokens, 0);
    });
}
"""


def library(folder: Path, width: int, shared: int) -> ctypes.CDLL:
    """steps.cu for heads of a width."""
    shutil.copy(SOURCES / "steps.cu", folder)
    shutil.copy(Path(__file__).with_name("steps_on_cpu.h"), folder / "pieces.cuh")
    (folder / "run.cpp").write_text(RUN)
    return compiled(folder, {"WIDTH": width, "SHARING": shared})


def at(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def unpacked(halves: Tensor, columns: int) -> Tensor:
    """[columns / 32, tokens, 32] -> float32 [tokens, columns]; zeros behind them."""
    flat = halves.float().transpose(0, 1).flatten(1)
    assert not flat[:, columns:].any()
    return flat[:, :columns]


def test_norm(tmp_path: Path) -> None:
    norm = library(tmp_path, 16, 1).norm
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


@pytest.mark.parametrize(("heads", "kv", "width"), [(9, 3, 64), (8, 1, 128)])
def test_attention_of_one_token(tmp_path: Path, heads: int, kv: int, width: int) -> None:
    shared = sharing(heads, kv, width)
    attend = library(tmp_path, width, shared).attend
    g = torch.Generator().manual_seed(heads)
    lengths = torch.tensor([1, TILE, 0, 2 * TILE + 7])
    count, each = len(lengths), 2
    pages = torch.tensor([[3, 0], [5, 1], [0, 0], [2, 6]])
    last = (lengths - 1).clamp(min=0)
    slots = pages.gather(1, last[:, None] // PAGE)[:, 0] * PAGE + last % PAGE
    angles = torch.rand(count, width // 2, generator=g) * 6
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(count, (heads + 2 * kv) * width, generator=g) * 2
    keys, values = ((torch.randn(7 * PAGE, kv, width, generator=g) * 2).half() for _ in range(2))
    expected_keys, expected_values = keys.clone(), values.clone()
    q, k, v = qkv.unflatten(1, (-1, width)).split((heads, kv, kv), dim=1)
    there = lengths > 0
    q = Ops().rotate_append(q, k, v, cos, sin, slots, keys.clone(), values.clone())
    rotated = (t[there] for t in (qkv.unflatten(1, (-1, width))[:, :heads], k, v, cos, sin, slots))
    Ops().rotate_append(*rotated, expected_keys, expected_values)
    partial = torch.full((count, heads, MOST_SPLITS, width), torch.nan)
    stats = torch.full((count, heads, MOST_SPLITS, 2), torch.nan)
    counters = torch.zeros(count, heads // shared, dtype=torch.int32)
    columns = heads * width
    out = torch.full((count, columns), torch.nan)
    halves = torch.full((-(-columns // 128) * 4, count, 32), torch.nan, dtype=torch.float16)
    for to, packed in ((out, None), (None, halves)):
        tables = [at(t) for t in (qkv, cos, sin, slots, lengths, pages)]
        args = [*tables, each, PAGE, at(keys), at(values), heads, kv, ctypes.c_float(width**-0.5)]
        args += [at(partial), at(stats), at(counters), at(to), at(packed), count]
        attend(heads // shared, count, 4, *args)
        assert not counters.any()
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
    for s, length in enumerate(lengths.tolist()):
        rows = (pages[s].repeat_interleave(PAGE) * PAGE + torch.arange(each * PAGE) % PAGE)[:length]
        kk, vv = (c[rows].double().repeat_interleave(heads // kv, dim=1) for c in (keys, values))
        p = (torch.einsum("hd,lhd->hl", q[s].double(), kk) * width**-0.5).softmax(-1)
        expected = torch.einsum("hl,lhd->hd", p, vv).flatten()
        assert torch.allclose(out[s].double(), expected, rtol=1e-4, atol=1e-4), length
    assert torch.equal(unpacked(halves, columns), out.half().float())
