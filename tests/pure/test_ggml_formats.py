"""ggml block types against gguf-py's reference decoder, bit for bit, on bytes no quantizer wrote."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import _type_traits, dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import FewbitError
from fewbit.formats import Affine, Format, Tabled, parse
from fewbit.formats._ggml_points import LISTS, points
from fewbit.formats.ggml import TYPES
from fewbit.qtensor import QTensor

SPECS = sorted(kind.spec for kind in TYPES)


def random_tensor(spec: str, rows: int, blocks: int, seed: int) -> QTensor:
    """Random bytes: scales of both signs, infinite and NaN included."""
    width, size = GGML_QUANT_SIZES[ggml_type(spec)]
    data = np.random.default_rng(seed).integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    return QTensor(spec, (rows, blocks * width), {"blocks": torch.from_numpy(data)})


def ggml_type(spec: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[spec.removeprefix("gguf:").upper()]


def reference(q: QTensor) -> torch.Tensor:
    # infinite scales times zero are NaN, as they should be
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return torch.from_numpy(dequantize(q.parts["blocks"].numpy(), ggml_type(q.spec)))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits everywhere, or NaN in both."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(bits(a.nan_to_num(7.0)), bits(b.nan_to_num(7.0)))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


tensors = st.builds(random_tensor, st.sampled_from(SPECS), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))


@pytest.mark.parametrize("spec", SPECS)
@settings(deadline=None, max_examples=8)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_values_are_bit_equal_to_the_reference_decoder(spec: str, rows: int, blocks: int, seed: int) -> None:
    q = random_tensor(spec, rows, blocks, seed)
    assert same_bits(parse(spec).dequantize(q), reference(q))


def test_every_byte_in_every_place_is_read_as_the_reference_does() -> None:
    """A bit that is taken from the wrong place shows in a block that is zero but for one byte."""
    for spec in SPECS:
        width, size = GGML_QUANT_SIZES[ggml_type(spec)]
        data = np.full((size, size), 0x3C, dtype=np.uint8)
        np.fill_diagonal(data, 0xA5)
        q = QTensor(spec, (size, width), {"blocks": torch.from_numpy(data)})
        assert same_bits(parse(spec).dequantize(q), reference(q)), spec


def test_every_type_that_gguf_dequantizes_is_here() -> None:
    assert {spec.removeprefix("gguf:").upper() for spec in SPECS} == {
        kind.name for kind in _type_traits if kind.name != "BF16"
    }


@settings(deadline=None)
@given(tensors)
def test_what_kernels_multiply_by_says_the_same_numbers(q: QTensor) -> None:
    form = parse(q.spec)
    affine, tabled = form.affine(q), form.tabled(q)
    found = affine or tabled
    assert (affine is None) != (tabled is None)
    assert found is not None
    assert found.codes.dtype == torch.uint8
    assert found.codes.shape == q.shape
    assert int(found.codes.max()) < 2**found.bits
    spread = [s.float().repeat_interleave(found.span, 1) for s in both_scales(found)]
    for scale in spread:
        if tabled is not None:
            assert max(map(abs, tabled.levels)) <= 127
            got = scale * torch.tensor(tabled.levels).float()[tabled.codes.int()]
        elif affine is not None and affine.zero is not None:
            assert affine.offset is None
            got = scale * (affine.codes.float() - affine.zero)
        else:
            assert affine is not None
            assert affine.offset is not None
            assert affine.offset.dtype in (torch.float32, torch.float16)
            got = scale * affine.codes.float() + affine.offset.repeat_interleave(affine.span, 1)
        assert same_bits(got, reference(q))


def both_scales(found: Affine | Tabled) -> list[torch.Tensor]:
    """The scales, and what their two levels make, where they have two."""
    two = found.two_level
    if two is None:
        return [found.scale]
    per = two.steps.shape[1] // two.scale.shape[1]
    by_hand = two.scale.float().repeat_interleave(per, 1) * two.steps.float()
    if isinstance(found, Affine) and found.offset is not None:
        assert two.minimum is not None
        assert two.minimum_steps is not None
        offset = -(two.minimum.float().repeat_interleave(per, 1) * two.minimum_steps.float())
        assert same_bits(offset, found.offset)
    return [found.scale, by_hand]


@settings(deadline=None)
@given(tensors, st.data())
def test_take_is_rows_of_the_whole(q: QTensor, data: st.DataObject) -> None:
    rows = torch.tensor(data.draw(st.lists(st.integers(0, q.shape[0] - 1), min_size=1, max_size=6)))
    form = parse(q.spec)
    taken = form.take(q, rows)
    assert taken.shape == (len(rows), q.shape[1])
    assert same_bits(form.dequantize(taken), reference(q)[rows])


@pytest.mark.parametrize("spec", SPECS)
def test_layout_agrees_with_the_stored_parts(spec: str) -> None:
    q = random_tensor(spec, 3, 2, seed=0)
    form = parse(spec)
    assert form.layout(q.shape, torch.float32) == {"blocks": (torch.uint8, tuple(q.parts["blocks"].shape))}
    assert form.nbytes(q.shape, torch.bfloat16) == q.nbytes


@pytest.mark.parametrize("spec", SPECS)
def test_stacked_experts_decode_like_their_rows(spec: str) -> None:
    flat = random_tensor(spec, 6, 2, seed=3)
    stacked = QTensor(spec, (2, 3, flat.shape[1]), {"blocks": flat.parts["blocks"].reshape(2, 3, -1)})
    form = parse(spec)
    assert {"blocks": (torch.uint8, tuple(stacked.parts["blocks"].shape))} == form.layout(stacked.shape, torch.float32)
    assert same_bits(form.dequantize(stacked), form.dequantize(flat).reshape(stacked.shape))
    assert same_bits(form.dequantize(form.take(stacked, torch.tensor([1]))), form.dequantize(stacked)[1:])


@pytest.mark.parametrize("spec", SPECS)
def test_a_strided_view_of_blocks_decodes_the_same(spec: str) -> None:
    q = random_tensor(spec, 4, 3, seed=5)
    wide = torch.cat((q.parts["blocks"], q.parts["blocks"]), dim=1)
    view = QTensor(spec, q.shape, {"blocks": wide[:, : q.parts["blocks"].shape[1]]})
    assert same_bits(parse(spec).dequantize(view), parse(spec).dequantize(q))


# the largest error on normal weights; the ternary types keep only 0 and the largest
WRITTEN = {"q4_0": 0.5, "q4_1": 0.5, "q5_0": 0.25, "q5_1": 0.25, "q8_0": 0.02, "mxfp4": 0.75, "tq1_0": 2, "tq2_0": 2}


@pytest.mark.parametrize("name", WRITTEN)
def test_blocks_written_by_gguf_come_back_within_a_step(name: str) -> None:
    w = np.random.default_rng(7).standard_normal((4, 512)).astype(np.float32)
    spec = f"gguf:{name}"
    blocks = quantize(w, ggml_type(spec))
    got = parse(spec).dequantize(QTensor(spec, w.shape, {"blocks": torch.from_numpy(blocks)}))
    assert np.abs(got.numpy() - w).max() < WRITTEN[name]


@pytest.mark.parametrize("name", LISTS)
def test_points_are_those_of_the_reference(name: str) -> None:
    other = {"iq1": "IQ1_S"}.get(name, name.upper())
    kind = _type_traits[GGMLQuantizationType[other]]
    kind.init_grid()
    assert kind.grid is not None
    expected = np.searchsorted(kind.grid_map, kind.grid[0, 0])
    found = points(name)
    assert found.dtype == torch.uint8
    assert len(found) == LISTS[name][2]
    assert np.array_equal(found.numpy(), expected)
    with pytest.raises(KeyError):
        points("iq9")


@pytest.mark.parametrize("spec", SPECS)
def test_ragged_rows_are_refused_in_words(spec: str) -> None:
    form: Format = parse(spec)
    width = GGML_QUANT_SIZES[ggml_type(spec)][0]
    assert form.accepts((3, 2 * width)) is None
    assert f"multiple of {width}" in str(form.accepts((3, width + 16)))


def test_types_that_are_not_here_are_not_formats() -> None:
    with pytest.raises(FewbitError, match="gguf:q9_9"):
        parse("gguf:q9_9")
    with pytest.raises(FewbitError, match="does not write"):
        parse("gguf:iq2_xs").fit(torch.ones(1, 256))
