"""Attention's kernels themselves, compiled for the CPU with a stand-in for what only a card has."""

from __future__ import annotations

import ctypes
import shutil
from ctypes import c_float
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewbit.kernels._cuda_attention import (
    BITS,
    MOST_SPLITS,
    TILE,
    _addresses,
    _Caches,
    _New,
    _Places,
    _Result,
    blocks,
)
from fewbit.kernels._nvrtc import SOURCES
from fewbit.kernels.ops import INT4, Ops, cached, cached_width, heads_apart, spread, uncached
from tests.kernels.stand_in import compiled

PAGE = 256
Shape = tuple[int, int, int, torch.dtype, ctypes.CDLL]
RUN = """
#include "attend.cu"
#include "append.cu"
typedef long long i64;
extern "C" void attend(int x, int y, int z, New made, Places places, Caches caches, Result result, float scale) {
    launch({x, y, z}, kAttendThreads, [=] { attend_one(made, places, caches, result, scale); });
}
extern "C" void append(int tokens, New made, const i64* slots, u16* queries, Caches caches) {
    launch({tokens, 1, 1}, 64, [=] { rotate_append(made, slots, queries, caches); });
}
extern "C" void expand(int blocks, const u8* cache, const i64* pages, int size, int length, int kv, int values,
                       u16* out) {
    launch({blocks, 1, 1}, 64, [=] { expand_rows(cache, pages, size, length, kv, values, out); });
}
"""


SHAPES = [(9, 3, 64, torch.float16), (4, 2, 16, torch.int8), (8, 1, 128, torch.int8), (20, 2, 128, INT4)]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shape:
    """Heads, key-value heads, their width, the cache's dtype; attend.cu and append.cu for them."""
    folder, (heads, kv, width, dtype) = tmp_path_factory.mktemp("attention"), request.param
    for name in ("attend.cu", "append.cu", "heads.cuh", "operands.cuh", "ranges.cuh", "warps.cuh"):
        shutil.copy(SOURCES / name, folder)
    for name in ("pieces.cuh", "pairs.cuh", "units.cuh"):
        shutil.copy(Path(__file__).with_name("steps_on_cpu.h"), folder / name)
    (folder / "run.cpp").write_text(RUN)
    return heads, kv, width, dtype, compiled(folder, {"WIDTH": width, "CACHE": BITS[dtype]})


def unpacked(halves: Tensor, columns: int) -> Tensor:
    """[columns / 32, tokens, 32] -> float32 [tokens, columns]; zeros behind them."""
    flat = halves.float().transpose(0, 1).flatten(1)
    assert not flat[:, columns:].any()
    return flat[:, :columns]


def random_caches(rows: int, kv: int, width: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, ...]:
    """Keys and values as the card has them."""
    found = []
    for _ in range(2):
        whole = torch.empty(rows, kv, heads_apart(width, dtype, "cuda"), dtype=dtype)
        cache = whole[..., : cached_width(width, dtype)]
        cache[:] = cached(torch.randn(rows, kv, width, generator=g) * 2, dtype)
        found.append(cache)
    return tuple(found)


def test_attention_of_one_token(shape: Shape) -> None:
    heads, kv, width, dtype, kernels = shape
    g = torch.Generator().manual_seed(heads)
    lengths = torch.tensor([1, TILE, 0, 2 * TILE + 7])
    count, each = len(lengths), 2
    pages = torch.tensor([[3, 0], [5, 1], [0, 0], [2, 6]])
    last = (lengths - 1).clamp(min=0)
    slots = pages.gather(1, last[:, None] // PAGE)[:, 0] * PAGE + last % PAGE
    angles = torch.rand(count, width // 2, generator=g) * 6
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(count, (heads + 2 * kv) * width, generator=g) * 2
    keys, values = random_caches(7 * PAGE, kv, width, dtype, g)
    expected_keys, expected_values = keys.clone(), values.clone()
    q, k, v = qkv.unflatten(1, (-1, width)).split((heads, kv, kv), dim=1)
    there = lengths > 0
    q = Ops().rotate_append(q, k, v, cos, sin, slots, keys.clone(), values.clone())
    rotated = (t[there] for t in (qkv.unflatten(1, (-1, width))[:, :heads], k, v, cos, sin, slots))
    Ops().rotate_append(*rotated, expected_keys, expected_values)
    partial = torch.full((count, heads, MOST_SPLITS, width), torch.nan)
    stats = torch.full((count, heads, MOST_SPLITS, 2), torch.nan)
    counters = torch.zeros(count, blocks(heads, kv), dtype=torch.int32)
    columns = heads * width
    out = torch.full((count, columns), torch.nan)
    halves = torch.full((-(-columns // 128) * 4, count, 32), torch.nan, dtype=torch.float16)
    made, caches = _New(*_addresses(qkv, cos, sin)), _Caches(*_addresses(keys, values), heads, kv)
    places = _Places(*_addresses(slots, lengths, pages), each, PAGE)
    for to, packed in ((out, None), (None, halves)):
        result = _Result(*_addresses(partial, stats, counters, to, packed), count, 0)
        kernels.attend(blocks(heads, kv), count, 4, made, places, caches, result, c_float(width**-0.5))
        assert not counters.any()
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
    for s, length in enumerate(lengths.tolist()):
        rows = (pages[s].repeat_interleave(PAGE) * PAGE + torch.arange(each * PAGE) % PAGE)[:length]
        kk, vv = (uncached(c[rows], torch.float64).repeat_interleave(heads // kv, dim=1) for c in (keys, values))
        p = (torch.einsum("hd,lhd->hl", q[s].double(), kk) * width**-0.5).softmax(-1)
        expected = torch.einsum("hl,lhd->hd", p, vv)
        expected = (spread(expected) if dtype is INT4 else expected).flatten()
        # what codes stand for is multiplied as halves
        bound = {torch.float16: 2e-5, torch.int8: 1e-3, INT4: 2e-3}[dtype]
        assert (out[s].double() - expected).norm() <= bound * expected.norm(), length
    assert torch.equal(unpacked(halves, columns), out.half().float())


def test_prompts_are_rotated_appended_and_read_back(shape: Shape) -> None:
    heads, kv, width, dtype, kernels = shape
    g = torch.Generator().manual_seed(kv)
    tokens, size, pages = 13, 4, torch.tensor([2, 0, 3, 1])
    angles = torch.rand(tokens, width // 2, generator=g) * 6
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(tokens, (heads + 2 * kv) * width, generator=g) * torch.rand(tokens, 1, generator=g) * 50
    q, k, v = qkv.unflatten(1, (-1, width)).split((heads, kv, kv), dim=1)
    # beyond halves, nothing at all, and not a number
    v[1, 0], k[2], v[3, kv - 1, 5] = 1e6, 0, torch.nan
    keys, values = random_caches(16, kv, width, dtype, g)
    expected = [keys.clone(), values.clone()]
    slots = torch.tensor([int(pages[p // size]) * size + p % size for p in range(tokens)])
    Ops().rotate_append(q, k, v, cos, sin, slots, *expected)
    queries = torch.full((tokens, heads, width), torch.nan, dtype=torch.float16)
    caches = _Caches(*_addresses(keys, values), heads, kv)
    kernels.append(tokens, _New(*_addresses(qkv, cos, sin)), *_places(slots, queries), caches)
    assert torch.equal(keys, expected[0])
    broken = torch.zeros(16, kv, dtype=torch.bool)
    broken[slots[3], kv - 1] = True
    assert torch.equal(values[~broken], expected[1][~broken])
    turns = {torch.float16: (False, False), torch.int8: (True, False), INT4: (True, True)}[dtype]
    for which, (cache, turned) in enumerate(zip((keys, values), turns, strict=True)):
        out = torch.full((tokens, kv, width), torch.nan, dtype=torch.float16)
        args = (*_places(cache, pages), size, tokens, kv, which, *_places(out))
        kernels.expand(-(-tokens * kv // 2), *args)
        rows = uncached(cache[slots], torch.float32)
        held = (spread(rows) if turned else rows).clamp(-65504, 65504)
        assert torch.equal(held.isnan(), out.isnan())
        if which:
            assert held[3, kv - 1].isnan().any()
        there = ~held.isnan()
        assert torch.allclose(out[there].float(), held[there], rtol=1e-3, atol=1e-3)
    # queries are never turned here: rows are turned back before they meet them
    plain = Ops().rotate_append(q, k, v, cos, sin, slots, *(torch.zeros(16, kv, width) for _ in range(2)))
    assert torch.allclose(queries.float(), plain, rtol=1e-3)


def _places(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]
