"""ggml block types against gguf-py's reference decoder, bit for bit, on bytes no quantizer wrote."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import FewbitError
from fewbit.formats import Format, parse
from fewbit.qtensor import QTensor

TYPES = {"gguf:q4_0": "Q4_0", "gguf:q4_1": "Q4_1", "gguf:q8_0": "Q8_0"}
# bytes of each block that are f16 numbers
HALVES = {"gguf:q4_0": 2, "gguf:q4_1": 4, "gguf:q8_0": 2}


def random_tensor(spec: str, rows: int, blocks: int, seed: int) -> QTensor:
    """Random bytes whose f16 numbers are finite, of both signs, zero and subnormal included."""
    kind = GGMLQuantizationType[TYPES[spec]]
    width, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    halves = data[..., : HALVES[spec]].view(np.uint16)
    halves[(halves & 0x7C00) == 0x7C00] &= 0xBFFF
    return QTensor(spec, (rows, blocks * width), {"blocks": torch.from_numpy(data.reshape(rows, -1))})


def reference(q: QTensor) -> torch.Tensor:
    return torch.from_numpy(dequantize(q.parts["blocks"].numpy(), GGMLQuantizationType[TYPES[q.spec]]))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


tensors = st.builds(
    random_tensor, st.sampled_from(sorted(TYPES)), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32)
)


@settings(deadline=None)
@given(tensors)
def test_values_are_bit_equal_to_the_reference_decoder(q: QTensor) -> None:
    assert torch.equal(bits(parse(q.spec).dequantize(q)), bits(reference(q)))


@settings(deadline=None)
@given(tensors)
def test_affine_says_the_same_numbers(q: QTensor) -> None:
    form = parse(q.spec)
    affine = form.affine(q)
    assert affine is not None
    assert affine.codes.dtype == torch.uint8
    assert affine.codes.shape == q.shape
    assert int(affine.codes.max()) < 2**affine.bits
    scale = affine.scale.float().repeat_interleave(affine.span, 1)
    if affine.zero is None:
        assert affine.offset is not None
        assert affine.offset.dtype in (torch.float32, torch.float16)
        got = scale * affine.codes.float() + affine.offset.repeat_interleave(affine.span, 1)
    else:
        assert affine.offset is None
        got = scale * (affine.codes.float() - affine.zero)
    assert torch.equal(bits(got), bits(reference(q)))


@settings(deadline=None)
@given(tensors, st.data())
def test_take_is_rows_of_the_whole(q: QTensor, data: st.DataObject) -> None:
    rows = torch.tensor(data.draw(st.lists(st.integers(0, q.shape[0] - 1), min_size=1, max_size=6)))
    form = parse(q.spec)
    taken = form.take(q, rows)
    assert taken.shape == (len(rows), q.shape[1])
    assert torch.equal(bits(form.dequantize(taken)), bits(reference(q)[rows]))


@pytest.mark.parametrize("spec", TYPES)
def test_layout_agrees_with_the_stored_parts(spec: str) -> None:
    q = random_tensor(spec, 3, 2, seed=0)
    form = parse(spec)
    assert form.layout(q.shape, torch.float32) == {"blocks": (torch.uint8, tuple(q.parts["blocks"].shape))}
    assert form.nbytes(q.shape, torch.bfloat16) == q.nbytes


@pytest.mark.parametrize("spec", TYPES)
def test_stacked_experts_decode_like_their_rows(spec: str) -> None:
    flat = random_tensor(spec, 6, 2, seed=3)
    stacked = QTensor(spec, (2, 3, 64), {"blocks": flat.parts["blocks"].reshape(2, 3, -1)})
    form = parse(spec)
    assert {"blocks": (torch.uint8, tuple(stacked.parts["blocks"].shape))} == form.layout(stacked.shape, torch.float32)
    assert torch.equal(form.dequantize(stacked), form.dequantize(flat).reshape(2, 3, 64))
    assert torch.equal(form.dequantize(form.take(stacked, torch.tensor([1]))), form.dequantize(stacked)[1:])


@pytest.mark.parametrize("spec", TYPES)
def test_a_strided_view_of_blocks_decodes_the_same(spec: str) -> None:
    q = random_tensor(spec, 4, 3, seed=5)
    wide = torch.cat((q.parts["blocks"], q.parts["blocks"]), dim=1)
    view = QTensor(spec, q.shape, {"blocks": wide[:, : q.parts["blocks"].shape[1]]})
    assert torch.equal(parse(spec).dequantize(view), parse(spec).dequantize(q))


@pytest.mark.parametrize("spec", TYPES)
def test_blocks_written_by_gguf_come_back_within_a_step(spec: str) -> None:
    w = np.random.default_rng(7).standard_normal((4, 96)).astype(np.float32)
    blocks = quantize(w, GGMLQuantizationType[TYPES[spec]])
    got = parse(spec).dequantize(QTensor(spec, w.shape, {"blocks": torch.from_numpy(blocks)}))
    assert np.abs(got.numpy() - w).max() < (0.5 if spec != "gguf:q8_0" else 0.02)


@pytest.mark.parametrize("spec", TYPES)
def test_ragged_rows_are_refused_in_words(spec: str) -> None:
    form: Format = parse(spec)
    assert form.accepts((3, 64)) is None
    assert "multiple of 32" in str(form.accepts((3, 48)))


def test_types_that_are_not_here_are_not_formats() -> None:
    with pytest.raises(FewbitError, match="gguf:q9_9"):
        parse("gguf:q9_9")
    with pytest.raises(FewbitError, match="does not write"):
        parse("gguf:q4_0").fit(torch.ones(1, 32))
