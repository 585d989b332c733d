"""Refinement against brute force: every code tried, every scale solved for on its own, and never a worse result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.formats import Params, Scaled, parse
from fewbit.formats.integer import IntegerFormat
from fewbit.methods import _refine
from fewbit.methods._refine import refine, rescaled, swept
from fewbit.methods._second_order import damped
from tests.pure._textbook import (
    WIDTHS,
    array,
    best_scale,
    case,
    cost,
    descended,
    falls,
    grid,
    integer,
    levels_of,
    spec,
)


def begun(
    bits: int, group: int | None, asymmetric: bool, seed: int, columns: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, IntegerFormat, Tensor, Params]:
    """Weights, a damped Hessian, and what round to nearest makes of them."""
    w, h = case(16, columns, seed)
    fmt = integer(spec(bits, group, asymmetric))
    params = fmt.fit(w, dtype=dtype)
    return w, damped(h), fmt, fmt.round(w, params), params


def falling_order(h: Tensor) -> Tensor:
    """Columns by falling diagonal."""
    return h.diagonal().argsort(descending=True, stable=True)


# codes


@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_sweep_is_coordinate_descent(bits: int, asymmetric: bool, group: int | None) -> None:
    w, h, fmt, codes, params = begun(bits, group, asymmetric, bits, dtype=torch.bfloat16)
    order, g = falling_order(h), grid(params, bits, group, 64)
    start = array(fmt.value(codes, params))
    found = array(fmt.value(swept(w, h, fmt, codes, params, order), params))
    wanted = descended(array(w), array(h), g, start, order.tolist(), found)
    assert np.abs(found - wanted).max() <= 1e-5
    assert g.ties <= 10
    assert falls([cost(start - array(w), array(h)), cost(found - array(w), array(h))])
    assert (found != start).mean() > 0.01


@pytest.mark.parametrize("lazy", [1, 7, 32])
def test_blocks_of_a_sweep_change_nothing(monkeypatch: pytest.MonkeyPatch, lazy: int) -> None:
    monkeypatch.setattr(_refine, "LAZY", lazy)
    test_a_sweep_is_coordinate_descent(3, False, 32)
    test_a_sweep_is_coordinate_descent(4, True, 64)


def test_a_sweep_over_more_columns_than_a_block_holds() -> None:
    w, h, fmt, codes, params = begun(3, 32, False, 30, columns=160)
    assert w.shape[1] > _refine.LAZY
    order, g = falling_order(h), grid(params, 3, 32, 160)
    found = array(fmt.value(swept(w, h, fmt, codes, params, order), params))
    wanted = descended(array(w), array(h), g, array(fmt.value(codes, params)), order.tolist(), found)
    assert np.abs(found - wanted).max() <= 1e-5
    assert g.ties <= 25


def test_a_sweep_that_has_converged_stays() -> None:
    w, h, fmt, codes, params = begun(4, 32, False, 31)
    order = falling_order(h)
    for _ in range(50):
        codes, before = swept(w, h, fmt, codes, params, order), codes
    assert torch.equal(codes, before)
    # no single code can be changed with profit: tried one by one
    g, q = grid(params, 4, 32, 64), array(fmt.value(codes, params))
    least = cost(q - array(w), array(h))
    for c in range(64):
        for value in g.values(c).T:
            e = q - array(w)
            e[:, c] = value - array(w)[:, c]
            assert (cost(e, array(h)) >= least * (1 - 1e-5)).all()


# scales


def spans(columns: int, group: int | None) -> list[np.ndarray]:
    """The columns of each group."""
    width = group or columns
    return [np.arange(first, min(first + width, columns)) for first in range(0, columns, width)]


@pytest.mark.parametrize(("group", "columns"), [(32, 64), (64, 64), (None, 64), (32, 80)])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_each_scale_is_the_least_squares_one(bits: int, asymmetric: bool, group: int | None, columns: int) -> None:
    w, h, fmt, codes, params = begun(bits, group, asymmetric, 40 + bits, columns)
    found = array(rescaled(w, h, fmt, codes, params)["scale"])
    whole, hessian, levels = array(w), array(h), levels_of(fmt, codes, params)
    scale = array(params["scale"])
    costs = [cost(array(fmt.value(codes, params)) - whole, hessian)]
    for g, columns_of in enumerate(spans(columns, group)):
        for row in range(len(whole)):
            spread = np.repeat(scale, group or columns, 1)[:, :columns]
            scale[row, g] = best_scale(whole, hessian, levels, spread[row], columns_of, row)
        costs.append(cost(levels * np.repeat(scale, group or columns, 1)[:, :columns] - whole, hessian))
    assert np.abs(found / scale - 1).max() <= 1e-5
    assert falls(costs)
    assert (costs[-1] < costs[0]).mean() > 0.9


def test_scales_in_16_bits_are_the_best_of_those_that_can_be_stored() -> None:
    kept = moved = 0
    for bits in (2, 3, 4, 6, 8):
        w, h, fmt, codes, params = begun(bits, 32, False, 50 + bits, dtype=torch.bfloat16)
        after = rescaled(w, h, fmt, codes, params)["scale"]
        assert after.dtype == torch.bfloat16
        whole, hessian, levels = array(w), array(h), levels_of(fmt, codes, params)
        scale, found = array(params["scale"]), array(after)
        for g, columns in enumerate(spans(64, 32)):
            for row in range(16):
                spread = np.repeat(scale[row], 32)
                best = best_scale(whole, hessian, levels, spread, columns, row)
                rounded = float(torch.tensor(best).to(torch.bfloat16))
                costs = []
                for candidate in (scale[row, g], rounded, found[row, g]):
                    spread[columns] = candidate
                    costs.append(float(cost((levels[row] * spread - whole[row])[None], hessian)[0]))
                assert costs[2] <= min(costs[:2]) * (1 + 1e-5)
                assert found[row, g] in (scale[row, g], rounded)
                kept += found[row, g] == scale[row, g]
                moved += found[row, g] != scale[row, g]
                scale[row, g] = found[row, g]
    assert kept
    assert moved


def test_a_scale_whose_best_value_cannot_be_stored_stays() -> None:
    # the best scale is zero, which is never stored
    fmt, w, codes = parse("int4g32"), torch.zeros(1, 32), torch.full((1, 32), 9, dtype=torch.uint8)
    params = {"scale": torch.tensor([[0.25]])}
    assert rescaled(w, torch.eye(32), fmt, codes, params)["scale"].item() == 0.25


def test_a_group_of_zero_levels_keeps_its_scale() -> None:
    w, h, fmt, codes, params = begun(4, 32, False, 60)
    codes[:, :32] = 8
    after = rescaled(w, h, fmt, codes, params)["scale"]
    assert torch.equal(after[:, 0], params["scale"][:, 0])
    assert not torch.equal(after[:, 1], params["scale"][:, 1])


# both in turn


def test_rounds_are_scales_then_codes_and_scales_at_the_end() -> None:
    w, h, fmt, codes, params = begun(3, 32, True, 70)
    order = falling_order(h)
    found_codes, found = refine(w, h, fmt, codes, params, order, 2)
    for _ in range(2):
        params = rescaled(w, h, fmt, codes, params)
        codes = swept(w, h, fmt, codes, params, order)
    params = rescaled(w, h, fmt, codes, params)
    assert torch.equal(found_codes, codes)
    assert torch.equal(found["scale"], params["scale"])


def test_no_rounds_change_nothing() -> None:
    w, h, fmt, codes, params = begun(3, 32, True, 71)
    same_codes, same = refine(w, h, fmt, codes, params, falling_order(h), 0)
    assert same_codes is codes
    assert same is params


class Joint(IntegerFormat):
    """Integers whose columns come in pairs, as a trellis' do."""

    step = (1, 2)


class Fixed(IntegerFormat):
    """Integers whose scales can't be moved."""

    def scaled(self, codes: Tensor, params: Params) -> Scaled | None:  # type: ignore[override]
        """Not linear in its scales."""
        return None


def test_formats_that_round_jointly_or_have_no_scales() -> None:
    w, h, _, codes, params = begun(3, 32, False, 72)
    order = falling_order(h)
    assert refine(w, h, Joint(3, 32), codes, params, order, 2) == (codes, params)
    assert rescaled(w, h, Fixed(3, 32), codes, params) is params
    found, same = refine(w, h, Fixed(3, 32), codes, params, order, 1)
    assert same is params
    assert torch.equal(found, swept(w, h, parse("int3g32"), codes, params, order))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    bits=st.integers(2, 8),
    group=st.sampled_from([1, 5, 16, 32, None]),
    asymmetric=st.booleans(),
    rounds=st.integers(1, 3),
    columns=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.floats(0, 4),
)
def test_refinement_never_raises_the_error(
    seed: int,
    bits: int,
    group: int | None,
    asymmetric: bool,
    rounds: int,
    columns: int,
    dtype: torch.dtype,
    spread: float,
) -> None:
    w, h = case(4, columns, seed, spread)
    h = damped(h)
    fmt = parse(spec(bits, group, asymmetric))
    params = fmt.fit(w, dtype=dtype)
    codes = fmt.round(w, params)
    before = cost(array(fmt.value(codes, params)) - array(w), array(h))
    codes, after_params = refine(w, h, fmt, codes, params, falling_order(h), rounds)
    after = cost(array(fmt.value(codes, after_params)) - array(w), array(h))
    # float32 cannot tell differences below this
    floor = 1e-6 * cost(array(w), array(h))
    assert (after <= before * (1 + 1e-5) + floor * 1e-3).all()
    assert bool(after_params["scale"].isfinite().all())
    assert bool((after_params["scale"] != 0).all())
    for name in params.keys() - {"scale"}:
        assert torch.equal(params[name], after_params[name])
