"""Weights as a card reads them: the order, every bit of it, and what is built from stored tensors. Needs no card."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.formats import parse
from fewbit.kernels import _cuda_layout as layout
from fewbit.kernels import _cuda_matrix as matrix
from fewbit.kernels._cuda_shapes import room, shape_for, tile_for
from fewbit.kernels._nvrtc import SOURCES

BITS = sorted(layout.FIELDS)
SPECS = ["int2g32", "int3g64", "int4g128", "int5g64", "int6g32", "int7g96", "int8", "int8a", "int4a", "int4g64a"]
SPECS += ["int3g32a", "int2g128a", "int8g256", "gguf:q4_0", "gguf:q4_1", "gguf:q8_0"]


@pytest.mark.parametrize("bits", BITS)
def test_fields_use_every_bit_once(bits):
    used = set()
    for fields in layout.FIELDS[bits]:
        taken = sorted(first + i for _, _, first, count in fields for i in range(count))
        assert taken == list(range(bits))
        used |= {(word, at + i) for word, at, _, count in fields for i in range(count)}
    assert used == {(word, bit) for word in range(bits) for bit in range(16)}


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_packing_is_undone_by_unpacking(bits, blocks, tiles, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (32 * blocks, 128 * tiles), generator=g, dtype=torch.uint8)
    packed = layout.pack_codes(codes, bits)
    assert packed.shape == (blocks, tiles, bits, 32, 4)
    assert torch.equal(layout.unpack_codes(packed), codes)


def pair_codes(words: Tensor, fields: list[layout.Field], half: int) -> int:
    """One code of a pair, bit by bit."""
    return sum(
        (int(words[word]) >> (16 * half + at + i) & 1) << (first + i)
        for word, at, first, count in fields
        for i in range(count)
    )


@pytest.mark.parametrize("bits", BITS)
def test_a_tile_is_operand_a_of_the_matrix_unit(bits):
    """mma.m16n8k16 with its fragments as the PTX manual gives them, thread by thread, makes the product."""
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (32, 128), generator=g, dtype=torch.uint8)
    x = torch.randint(-9, 10, (128,), generator=g)
    packed = layout.pack_codes(codes, bits)[0, 0].long() & 0xFFFFFFFF
    out = torch.zeros(32, dtype=torch.int64)
    for thread in range(32):
        group, lane = thread // 4, thread % 4
        words = packed[:, thread].reshape(-1)
        for j in range(4):
            for pair, fields in enumerate(layout.FIELDS[bits]):
                rows16, product, register = pair // 8, pair // 4 % 2, pair % 4
                row = 16 * rows16 + group + 8 * (register % 2)
                for half in range(2):
                    # k of operand A's register; operand B holds the thread's own eight neighbours of x in that order
                    k = 2 * lane + half + 8 * (register // 2)
                    column = 32 * j + 8 * (k % 8 // 2) + 4 * product + 2 * (k // 8) + k % 2
                    out[row] += pair_codes(words[bits * j : bits * (j + 1)], fields, half) * int(x[column])
    assert torch.equal(out, codes.long() @ x)


# what codes.cuh wants of CUDA
HOST = """
#include <cstring>
#define __device__
#define __forceinline__ inline
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned n = selector >> 4 * i & 7;
        result |= ((n < 4 ? a >> 8 * n : b >> 8 * (n - 4)) & 255) << 8 * i;
    }
    return result;
}
static float __uint_as_float(unsigned u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
#include "codes.cuh"
extern "C" void unpack(int bits, const u32* w, u32* p, int* at) { %s }
"""


def host_unpacking(folder: Path) -> ctypes.CDLL:
    """codes.cuh compiled for the CPU."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    cases = "".join(
        f"if (bits == {b}) {{ Codes<{b}>::unpack(w, p); for (int f = 0; f < 4; ++f) at[f] = Codes<{b}>::at(f); }}"
        for b in BITS
    )
    source = folder / "unpack.cpp"
    source.write_text(HOST % cases, encoding="utf-8")
    library = folder / "unpack.so"
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def test_the_kernels_find_the_codes_where_the_layout_puts_them(tmp_path):
    library = host_unpacking(tmp_path)
    g = torch.Generator().manual_seed(0)
    for bits in BITS:
        for _ in range(8):
            words = torch.randint(0, 2**32, (bits,), generator=g)
            pairs, raised = (ctypes.c_uint32 * 16)(), (ctypes.c_int * 4)()
            library.unpack(bits, (ctypes.c_uint32 * bits)(*words.tolist()), pairs, raised)
            for pair, fields in enumerate(layout.FIELDS[bits]):
                by = raised[pair // 8 * 2 + pair % 2]
                assert bits + by <= 10, "more than the mantissa of a half"
                for half in range(2):
                    assert pairs[pair] >> (16 * half) & 0xFFFF == pair_codes(words, fields, half) << by


def weights(part: matrix.Part) -> Tensor:
    """What a part stands for, in the order of its rows."""

    def spread(values: Tensor) -> Tensor:
        rows = values.float().permute(0, 3, 2, 1).reshape(part.blocks * 32, -1)
        return rows if part.kind.span == 0 else rows.repeat_interleave(part.kind.span, 1)

    w = layout.unpack_codes(part.codes).float() - 2 ** (part.kind.bits - 1)
    if part.shifts is not None and part.kind.shifts == 1:
        w = w + spread(part.shifts)
    w = w * spread(part.scales)
    if part.shifts is not None and part.kind.shifts == 2:
        w = w + spread(part.shifts)
    if part.pair:
        turns = w.view(-1, 2, 16, w.shape[1])
        w = torch.cat([turns[:, i].reshape(-1, w.shape[1])[: part.pair] for i in range(2)])
    return w[: part.rows, : part.columns]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spec", SPECS)
def test_parts_stand_for_the_stored_weights(make_tensor, monkeypatch, spec, dtype):
    # several slices of rows each
    monkeypatch.setattr(matrix, "SLICE_WEIGHTS", 1 << 13)
    for shapes in ([(32, 128)], [(50, 576)], [(17, 96), (40, 96), (7, 96)], [(48, 320), (48, 320)]):
        stored = [make_tensor(spec, *shape, dtype) for shape in shapes]
        parts = matrix.build(stored, [matrix.kind(q) for q in stored], torch.device("cpu"))
        assert len(parts) == 1
        assert parts[0].pair == (48 if len(shapes) == 2 else 0)
        expected = torch.cat([parse(q.spec).dequantize(q) for q in stored])
        torch.testing.assert_close(weights(parts[0]), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_tensors_of_different_kinds_become_parts(make_tensor):
    stored = [make_tensor("int4g64", 40, 256), make_tensor("int4g64", 8, 256), make_tensor("int8", 24, 256)]
    parts = matrix.build(stored, [matrix.kind(q) for q in stored], torch.device("cpu"))
    assert [(p.first, p.rows) for p in parts] == [(0, 48), (48, 24)]
    expected = torch.cat([parse(q.spec).dequantize(q) for q in stored])
    torch.testing.assert_close(torch.cat([weights(p) for p in parts]), expected)


def test_offsets_that_stop_being_whole_are_kept_as_floats(make_tensor, monkeypatch):
    monkeypatch.setattr(matrix, "SLICE_WEIGHTS", 1 << 12)
    q = make_tensor("gguf:q4_1", 128, 128)
    # the first rows' minima are whole numbers of their scales
    halves = q.parts["blocks"][:8].view(8, -1, 20)[..., :4].clone().view(torch.float16)
    halves[..., 1] = halves[..., 0] * -4
    q.parts["blocks"][:8].view(8, -1, 20)[..., :4] = halves.view(torch.uint8)
    assert matrix.kind(q).shifts == 1
    (part,) = matrix.build([q], [matrix.kind(q)], torch.device("cpu"))
    assert part.kind.shifts == 2
    torch.testing.assert_close(weights(part), parse(q.spec).dequantize(q))


def test_what_is_refused_is_said_in_words(make_tensor):
    assert "groups of 48 columns" in matrix.kind(make_tensor("int4g48", 8, 96))
    assert "not scale times code" in matrix.kind(make_tensor("bf16", 8, 96))
    q = make_tensor("int4g32", 8, 96)
    q.parts["g_idx"] = torch.arange(96) // 32
    assert "scattered" in matrix.kind(q)


def test_tiny_and_huge_weights_are_brought_to_where_halves_hold_them(make_tensor):
    for scale in (1e-12, 1e9):
        q = make_tensor("int4", 8, 96, torch.float32)
        q.parts["scale"].mul_(scale)
        (part,) = matrix.build([q], [matrix.kind(q)], torch.device("cpu"))
        largest = float(parse(q.spec).dequantize(q).abs().max())
        assert 1 <= largest * part.factor < 2**15
        assert torch.tensor(part.factor).log2().frac() == 0


@pytest.mark.parametrize("most", [99 << 10, 227 << 10])
@pytest.mark.parametrize("bits", BITS)
def test_every_shape_fits_a_card(bits, most):
    for span in (0, 32, 64, 128):
        for blocks in (1, 18, 128, 192, 256, 896):
            for tiles in (1, 5, 32, 64, 224):
                for wide in (1, 2):
                    kind = layout.Kind(bits, span, 0, 2)
                    shape = shape_for(kind, blocks, tiles, wide, most)
                    assert shape.shared(kind) <= most
                    assert 1 <= shape.warps <= 32
                    assert shape.column_warps < 2 * tiles


@pytest.mark.parametrize("most", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("bits", BITS)
def test_every_tile_fits_a_card(bits, most):
    for span, shifts in ((0, 2), (32, 2), (32, 1), (64, 0), (128, 0)):
        kind = layout.Kind(bits, span, 0, shifts)
        for blocks, tiles in ((1, 1), (18, 5), (128, 32), (192, 64), (256, 224), (896, 64)):
            for tokens in (9, 16, 17, 40, 64, 65, 128, 1000):
                tile, _ = tile_for(kind, blocks, tiles, tokens, most, 132)
                assert tile.shared(kind) <= most
                assert tile.warps <= 32
                # what many.cu asserts
                assert tile.x_rounds & (tile.x_rounds - 1) == 0
                assert tile.x_rounds * (tile.x_stages - 1) >= tile.stages - 1 > 0
                # 64K registers, 8 * wide * row_blocks * (sums and a group's, or more) of a thread
                sums = tile.row_blocks * tile.wide * 8
                assert 32 * tile.warps * tile.blocks * (2 * sums + 40) <= 65536


@pytest.mark.parametrize("processors", [28, 132, 170])
def test_columns_are_parted_without_rest_and_within_the_room(processors):
    for blocks, tiles in ((1, 1), (2, 224), (18, 5), (128, 32), (192, 64), (256, 224), (4000, 64)):
        for tokens in (9, 64, 100, 1000):
            tile, count = tile_for(layout.Kind(4, 128, 2, 0), blocks, tiles, tokens, 227 << 10, processors)
            each = -(-tiles // count)
            assert 0 <= tiles - (count - 1) * each - 1 < each
            grid = -(-blocks // tile.tall) * -(-tokens // (8 * tile.wide))
            floats, counts = room(processors)
            assert count == 1 or (grid <= counts and grid * count * tile.sums <= floats)
    # a matrix of few rows and many columns is not left to a few multiprocessors
    assert tile_for(layout.Kind(4, 128, 2, 0), 8, 224, 17, 227 << 10, processors)[1] > 4
