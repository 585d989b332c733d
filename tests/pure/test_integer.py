"""Integer formats: the textbook map by hand, packing, and properties that hold for every width."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.formats._bitstream import pack_rows, unpack_rows, words

SPECS = ["int4g64", "int4g64a", "int8", "int8a", "int3g32", "int2g16a", "int5g50", "int6g7a", "int7"]


def random_matrix(rows: int = 37, columns: int = 100, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_textbook_range_at_8_and_4_bits() -> None:
    # scale = 5.7 / 255 = 0.0223529, zero = round(2.5 / scale) = round(111.84) = 112;
    # 0.7 / scale = 31.3 -> 31 + 112 = 143;  1.0 / scale = 44.7 -> 45 + 112 = 157
    w = torch.tensor([[-2.5, 0.0, 0.7, 1.0, 3.2]])
    eight, four = parse("int8a"), parse("int4a")
    params = eight.fit(w, search=False)
    assert params["scale"].item() == pytest.approx(5.7 / 255)
    assert params["zero"].item() == 112
    assert eight.round(w, params).tolist() == [[0, 112, 143, 157, 255]]
    # scale = 5.7 / 15 = 0.38, zero = round(6.58) = 7; 0.7 / 0.38 = 1.84 -> 9; 1.0 / 0.38 = 2.63 -> 10; 3.2 / 0.38 -> 15
    params = four.fit(w, search=False)
    assert params["scale"].item() == pytest.approx(0.38)
    assert params["zero"].item() == 7
    assert four.round(w, params).tolist() == [[0, 7, 9, 10, 15]]
    assert four.value(four.round(w, params), params)[0].tolist() == pytest.approx([-2.66, 0, 0.76, 1.14, 3.04])


def test_textbook_symmetric_scale() -> None:
    w = torch.tensor([[-1.4, 0.6, 0.1]])
    fmt = parse("int4")
    params = fmt.fit(w, search=False)
    assert params["scale"].item() == pytest.approx(0.2)
    # codes are stored as value + 8
    assert (fmt.round(w, params).int() - 8).tolist() == [[-7, 3, 0]]


@pytest.mark.parametrize("spec", SPECS)
def test_parts_are_what_layout_says_and_unpack_inverts_pack(spec: str) -> None:
    fmt, w = parse(spec), random_matrix()
    params = fmt.fit(w, dtype=torch.bfloat16)
    codes = fmt.round(w, params)
    q = fmt.pack(codes, params)
    layout = fmt.layout(tuple(w.shape), torch.bfloat16)
    assert {name: (p.dtype, tuple(p.shape)) for name, p in q.parts.items()} == layout
    assert q.nbytes == fmt.nbytes(tuple(w.shape), torch.bfloat16)
    again, same = fmt.unpack(q)
    assert torch.equal(again, codes)
    assert all(torch.equal(same[name], p) for name, p in params.items())
    assert torch.equal(fmt.dequantize(q), fmt.value(codes, params))


@pytest.mark.parametrize("spec", SPECS)
def test_value_equals_a_loop(spec: str) -> None:
    fmt, w = parse(spec), random_matrix(3, 70)
    params = fmt.fit(w, dtype=torch.float16)
    codes, got = fmt.round(w, params), fmt.value(fmt.round(w, params), params)
    span = -(-70 // params["scale"].shape[1]) if "g" not in spec else int(spec.split("g")[1].rstrip("a"))
    for i, j in itertools.product(range(3), range(70)):
        scale = params["scale"][i, j // span].item()
        zero = params["zero"][i, j // span].item() if "zero" in params else 2 ** (int(spec[3]) - 1)
        assert got[i, j].item() == pytest.approx((codes[i, j].item() - zero) * scale, rel=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_affine_is_the_same_matrix(spec: str) -> None:
    fmt, w = parse(spec), random_matrix()
    params = fmt.fit(w, dtype=torch.bfloat16)
    q = fmt.pack(fmt.round(w, params), params)
    a = fmt.affine(q)
    assert a is not None
    scale = a.scale.float().repeat_interleave(a.span, 1)[:, :100]
    offset = -scale * a.zero if a.offset is None else a.offset.repeat_interleave(a.span, 1)[:, :100]
    torch.testing.assert_close(scale * a.codes + offset, fmt.dequantize(q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_take_takes_rows(spec: str) -> None:
    fmt, w = parse(spec), random_matrix()
    params = fmt.fit(w)
    q = fmt.pack(fmt.round(w, params), params)
    rows = torch.tensor([5, 0, 36, 5])
    assert torch.equal(fmt.dequantize(fmt.take(q, rows)), fmt.dequantize(q)[rows])


@given(
    bits=st.integers(2, 8), group=st.sampled_from([None, 1, 5, 32, 64]), asymmetric=st.booleans(),
    rows=st.integers(1, 9), columns=st.integers(1, 80), size=st.floats(1e-3, 1e3), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_minmax_error_is_at_most_half_a_step_and_zeros_are_exact(
    bits: int, group: int | None, asymmetric: bool, rows: int, columns: int, size: float, seed: int
) -> None:
    fmt = parse(f"int{bits}{f'g{group}' if group else ''}{'a' if asymmetric else ''}")
    w = random_matrix(rows, columns, seed) * size
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = 0
    params = fmt.fit(w, search=False)
    got = fmt.value(fmt.round(w, params), params)
    scale = params["scale"].repeat_interleave(min(group or columns, columns), 1)[:, :columns]
    # an integer zero point can move the range by half a step, which its ends then lack
    step = 1.0 if asymmetric else 0.5
    assert ((got - w).abs() <= scale * step * (1 + 1e-4)).all()
    assert (got[w == 0] == 0).all()


@given(bits=st.integers(2, 8), asymmetric=st.booleans(), seed=st.integers(0, 99), weigh=st.booleans())
@settings(max_examples=60, deadline=None)
def test_search_is_never_worse_than_minmax(bits: int, asymmetric: bool, seed: int, weigh: bool) -> None:
    fmt = parse(f"int{bits}g32{'a' if asymmetric else ''}")
    w = random_matrix(6, 64, seed) ** 3
    h = torch.rand(64, generator=torch.Generator().manual_seed(seed)) if weigh else None

    def error(search: bool) -> torch.Tensor:
        params = fmt.fit(w, h, torch.bfloat16, search)
        squares = (fmt.value(fmt.round(w, params), params) - w) ** 2 * (1 if h is None else h)
        return squares.reshape(6, 2, 32).sum(-1)

    assert (error(True) <= error(False) * (1 + 1e-3) + 1e-9).all()


@pytest.mark.parametrize("weigh", [False, True])
def test_symmetric_search_is_near_the_brute_force_optimum(weigh: bool) -> None:
    w = random_matrix(40, 32, 3)
    h = torch.rand(32, generator=torch.Generator().manual_seed(1)) if weigh else torch.ones(32)
    fmt = parse("int3g32")
    params = fmt.fit(w, h if weigh else None)
    found = ((fmt.value(fmt.round(w, params), params) - w) ** 2 * h).sum(1)
    absmax = w.abs().amax(1, keepdim=True)
    best = torch.full((40,), torch.inf)
    for fraction in np.linspace(0.05, 0.6, 800):
        for sign in (-1, 1):
            scale = absmax * float(fraction) * sign
            q = (w / scale).round().clamp(-4, 3)
            best = torch.minimum(best, ((q * scale - w) ** 2 * h).sum(1))
    assert (found <= best * 1.02 + 1e-9).all()
    assert found.sum() <= best.sum() * 1.005


@pytest.mark.parametrize("spec", ["int4g8", "int4g8a"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_tiny_huge_and_one_sided_groups(spec: str, dtype: torch.dtype) -> None:
    rows = torch.stack(
        [torch.zeros(8), torch.full((8,), 1e-30), torch.full((8,), 3e4), torch.arange(8.0), -torch.arange(8.0)]
    )
    for search in (True, False):
        fmt = parse(spec)
        params = fmt.fit(rows, dtype=dtype, search=search)
        got = fmt.value(fmt.round(rows, params), params)
        assert params["scale"].isfinite().all()
        assert (params["scale"] != 0).all()
        assert (got[0] == 0).all()
        torch.testing.assert_close(got[2:], rows[2:], rtol=0.02, atol=0.3)


def test_small_weights_keep_their_precision_in_f16_scales() -> None:
    w = random_matrix(8, 64, 2) * 1e-4
    fmt = parse("int8")
    for dtype in (torch.float16, torch.bfloat16):
        params = fmt.fit(w, dtype=dtype)
        error = (fmt.value(fmt.round(w, params), params) - w).norm() / w.norm()
        assert error < 0.02


def test_codes_are_chosen_after_the_scale_is_rounded() -> None:
    w = random_matrix(64, 64, 5)
    fmt = parse("int8")
    params = fmt.fit(w, dtype=torch.bfloat16)
    scale = params["scale"].float()
    q = (w / scale).round().clamp(-128, 127)
    assert torch.equal(fmt.round(w, params).float() - 128, q)


@given(bits=st.integers(2, 8), rows=st.integers(1, 5), count=st.integers(1, 70), seed=st.integers(0, 999))
@settings(max_examples=150, deadline=None)
def test_bitstream_is_a_little_endian_stream_of_bits(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, words(count, bits))
    assert torch.equal(unpack_rows(packed, bits, count), codes)
    for row, stream in zip(codes.tolist(), packed.numpy().view(np.uint8), strict=True):
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        assert int.from_bytes(stream.tobytes(), "little") == whole


@pytest.mark.parametrize("spec", ["int1", "int9", "int4g0", "int", "int4g", "int4ga", "float4", "", "int4g64b"])
def test_what_is_not_a_format_is_said_to_be_none(spec: str) -> None:
    with pytest.raises(FewbitError, match="is not a format"):
        parse(spec)


def test_spec_round_trips_and_vectors_are_refused() -> None:
    assert all(parse(spec).spec == spec for spec in SPECS)
    assert parse("int4").accepts((4,)) is not None
    assert parse("int4").accepts((4, 4)) is None
