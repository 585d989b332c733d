"""Packed weights over memory of someone else: the same products, and no description that leads out of that memory."""

from __future__ import annotations

import json
import mmap
from typing import Any

import pytest
import torch

from tests.kernels.conftest import fitting

SPECS = ["int2g32", "int3g64a", "int4g64", "int4g64a", "int5", "int6g32a", "int7g32", "int8a", "gguf:q4_1", "gguf:q8_0"]
SPECS += ["int6g16", "gguf:q2_k", "gguf:q4_k", "gguf:q6_k", "gguf:iq4_xs", "gguf:iq2_xs"]


def kept(native, tensors, before: int = 64) -> tuple[mmap.mmap, dict[str, Any], int]:
    """Tensors packed into a mapping `before` bytes from its start: the mapping, their description, their size."""
    memory = mmap.mmap(-1, before + (1 << 20))
    sizes = []

    def room(count: int) -> tuple[mmap.mmap, int]:
        sizes.append(count)
        return memory, before

    packed = native.prepare(tensors, room)
    assert sizes == [packed.nbytes]
    return memory, json.loads(json.dumps(native.describe(packed))), packed.nbytes


@pytest.mark.parametrize("spec", SPECS)
def test_kept_weights_multiply_as_those_just_packed(native, make_tensor, random, spec):
    for rows, columns in [(1, 32), (17, 64), (50, 576), (37, 33)]:
        columns = fitting(spec, columns)
        if "g16" in spec and columns % 32:
            continue
        # the second is of another kind: a block of its own
        tensors = [make_tensor(spec, rows, columns), make_tensor("int8g32a", 5, columns)]
        own = native.prepare(tensors)
        memory, description, count = kept(native, tensors)
        # the bytes alone count, not where they lie
        moved = mmap.mmap(-1, 128 + count)
        moved[128:] = memory[64 : 64 + count]
        for buffer, offset in ((memory, 64), (moved, 128)):
            packed = native.restore(description, buffer, offset, count)
            assert (packed.shape, packed.splits, packed.nbytes) == (own.shape, own.splits, own.nbytes)
            for tokens in (1, 9):
                x = random(tokens, columns)
                assert torch.equal(native.matmul(x, packed), native.matmul(x, own))
            ids = torch.arange(own.shape[0])
            assert torch.equal(native.rows(packed, ids), native.rows(own, ids))


def test_memory_is_held_as_long_as_its_weights(native, make_tensor, random):
    memory, description, count = kept(native, [make_tensor("int4g64", 16, 64)])
    packed = native.restore(description, memory, 64, count)
    with pytest.raises(BufferError):
        memory.close()
    del memory
    assert native.matmul(random(1, 64), packed).isfinite().all()


@pytest.mark.parametrize(
    ("offset", "more"), [(64, 1), (64, -1), (64, 64), (64, -64), (65, 0), (-64, 0), (1 << 62, 0), (1 << 20, 0)]
)
def test_bytes_must_fit_exactly(native, make_tensor, offset, more):
    memory, description, count = kept(native, [make_tensor("int4g64", 50, 576)])
    assert native.restore(description, memory, 64, count).shape == (50, 576)
    if offset == 1 << 20:
        # the range begins inside and ends outside
        offset = len(memory) - 64
    with pytest.raises(ValueError, match=r"memory does not fit|leaves the buffer"):
        native.restore(description, memory, offset, count + more)


BLOCK = [50, 64, 4, 2, 8, 0, 0, 0, []]
# scales and offsets of two levels, and a table
TWO = [50, 32, 4, 4, 8, 4, 128, 1, []]
TABLE = [50, 32, 3, 2, 0, 0, 0, 0, list(range(-8, 0))]
HOSTILE: list[dict[str, Any]] = [
    {"blocks": []},
    {"splits": []},
    {"splits": [49]},
    {"splits": [100, -50]},
    {"splits": [0, 50]},
    {"splits": 50},
    {"columns": -576},
    {"columns": 0},
    {"columns": 1 << 62},
    {"columns": "576"},
    {"columns": None},
    *(
        {"blocks": [[*BLOCK[:i], bad, *BLOCK[i + 1 :]]]}
        for i in range(8)
        for bad in (-1, 1 << 40, 1 << 63, 1 << 70, "4")
    ),
    {"blocks": [BLOCK[:8]]},
    {"blocks": [[*BLOCK, 0]]},
    *(
        {"blocks": [[*BLOCK[:i], bad, *BLOCK[i + 1 :]]]}
        for i, bad in ((1, 33), (2, 7), (2, 8), (6, 64), (7, 1), (8, [1]))
    ),
    *({"blocks": [[*BLOCK[:5], offsets, *BLOCK[6:]]]} for offsets in (1, 2, 3, 4, 5)),
    *({"blocks": [[*TWO[:i], bad, *TWO[i + 1 :]]]} for i, bad in ((1, 16), (1, 17), (2, 5), (6, 0), (6, 96), (6, 16))),
    *({"blocks": [[*TWO[:i], bad, *TWO[i + 1 :]]]} for i, bad in ((6, 1 << 40), (7, 2), (7, -1), (3, 5), (8, [1]))),
    *({"blocks": [[*TABLE[:8], bad]]} for bad in ([128], [-128], [0] * 9, ["1"], [1 << 40], 7, [0.5])),
    {"blocks": [[*TABLE[:4], 8, *TABLE[5:]]]},
    {"blocks": [[*TABLE[:2], 2, *TABLE[3:]]]},
    {"blocks": [BLOCK, BLOCK], "splits": [50, 50]},
    {"blocks": [[1 << 31, 1 << 31, 8, 0, 0, 1, 0, 0, []]] * 9, "columns": 1 << 31, "splits": [9 << 31]},
]


def test_what_the_hostile_descriptions_are_made_of_is_good(native):
    for block in (BLOCK, TWO, TABLE):
        matrix = native.native.Matrix(576)
        matrix.add_block(*block)
        assert list(matrix.blocks()[0]) == block


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_hostile_descriptions_are_refused(native, make_tensor, change):
    memory, description, count = kept(native, [make_tensor("int4g64", 50, 576)])
    assert description == {"columns": 576, "splits": [50], "blocks": [BLOCK]}
    with pytest.raises((ValueError, TypeError, KeyError)):
        native.restore(description | change, memory, 64, count)
    with pytest.raises(KeyError):
        native.restore({k: v for k, v in description.items() if k not in change}, memory, 64, count)


def test_a_matrix_has_memory_once_and_only_its_own_is_written(native, make_tensor):
    memory, description, count = kept(native, [make_tensor("int4g64", 50, 576)])
    packed = native.restore(description, memory, 64, count)
    x, y = torch.zeros(50, 576), torch.empty(50, 576)
    with pytest.raises(ValueError, match="no memory to fill"):
        packed.data.fill(0, 0, 1, x.data_ptr(), x.data_ptr(), 0, 0, 0)
    for again in (
        packed.data.allocate,
        lambda: packed.data.place(memory, 64, count),
        lambda: packed.data.add_block(*BLOCK),
    ):
        with pytest.raises(ValueError, match="memory"):
            again()
    bare = native.native.Matrix(576)
    bare.add_block(*BLOCK)
    for use in (
        lambda: bare.multiply(x.data_ptr(), 1, y.data_ptr()),
        lambda: bare.rows(torch.zeros(1, dtype=torch.int64).data_ptr(), 1, y.data_ptr()),
    ):
        with pytest.raises(ValueError, match="no memory yet"):
            use()
    # what may not be written is refused, not written to
    with pytest.raises(TypeError):
        bare.place_new(bytes(count), 0, count)


def test_sums_tell_every_changed_byte(native):
    random = torch.Generator().manual_seed(0)
    for count in (0, 1, 7, 64, 65, 200, (1 << 20) + 3, (2 << 20) + 64):
        data = bytearray(torch.randint(0, 256, (count,), dtype=torch.uint8, generator=random).numpy().tobytes())
        whole = native.checksum(data, 0, count)
        places = range(count) if count <= 200 else [0, 63, 64, (1 << 20) - 1, 1 << 20, count - 1]
        for i in places:
            data[i] ^= 128
            assert native.checksum(data, 0, count) != whole
            data[i] ^= 128
        native.set_threads(1)
        assert native.checksum(data, 0, count) == whole
        native.set_threads(2)
    # order, length and where zeros are count too
    assert len({native.checksum(bytes(n), 0, n) for n in range(130)}) == 130
    swapped = bytes(range(64)) + bytes(64)
    assert native.checksum(swapped, 0, 128) != native.checksum(swapped[64:] + swapped[:64], 0, 128)
    pieces = bytes(1 << 20) + b"\x01" * (1 << 20)
    assert native.checksum(pieces, 0, 2 << 20) != native.checksum(pieces[1 << 20 :] + pieces[: 1 << 20], 0, 2 << 20)
    with pytest.raises(ValueError, match="leaves the buffer"):
        native.checksum(bytes(8), 4, 5)
