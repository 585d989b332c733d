"""Plain floating formats: what goes in comes out, but for one rounding to the dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.formats import Format, parse

SPECS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [(7,), (3, 5), (2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
def test_the_only_loss_is_one_rounding(spec: str, shape: tuple[int, ...]) -> None:
    form = parse(spec)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    params = form.fit(w)
    q = form.pack(form.round(w, params), params)
    assert (q.spec, q.shape) == (spec, shape)
    assert {name: (p.dtype, tuple(p.shape)) for name, p in q.parts.items()} == form.layout(shape, torch.float16)
    assert q.nbytes == form.nbytes(shape, torch.float16)
    got = form.dequantize(q)
    assert got.dtype == torch.float32
    assert torch.equal(got, w.to(SPECS[spec]).float())


@settings(deadline=None)
@given(value=st.floats(width=32), spec=st.sampled_from(sorted(SPECS)))
def test_any_number_rounds_as_the_dtype_does(value: float, spec: str) -> None:
    form = parse(spec)
    w = torch.tensor([[value]])
    got = form.dequantize(form.pack(form.round(w, {}), {}))
    torch.testing.assert_close(got, w.to(SPECS[spec]).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
def test_take_indexes_rows_in_the_order_given(spec: str, shape: tuple[int, ...]) -> None:
    form = parse(spec)
    w = torch.randn(shape).to(SPECS[spec])
    rows = torch.tensor([shape[0] - 1, 0, 0, 1])
    taken = form.take(form.pack(w, {}), rows)
    assert taken.shape == (4, *shape[1:])
    assert torch.equal(form.dequantize(taken), w[rows].float())


def test_unpacking_copies_nothing() -> None:
    form: Format = parse("f16")
    w = torch.randn(4, 4).half()
    codes, params = form.unpack(form.pack(w, {}))
    assert params == {}
    assert codes.data_ptr() == w.data_ptr()
