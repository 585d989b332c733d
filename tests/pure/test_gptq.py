"""GPTQ against optimal brain quantization as a plain loop that inverts the free columns' Hessian for each of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit.formats import Params, parse
from fewbit.methods import Target, _second_order, gptq
from fewbit.methods._second_order import damped, drift_corrected, inverse_factor, output_error
from fewbit.methods.gptq import importance
from tests.pure._textbook import (
    WIDTHS,
    Array,
    array,
    case,
    cost,
    dampened,
    falling,
    gram,
    grid,
    inputs,
    integer,
    obq,
    spec,
)

Tell = Callable[[str], None]


def unheard(text: str) -> None:
    """A fallback where none should be."""
    raise AssertionError(text)


def one_shot(note: Tell = unheard, dtype: torch.dtype = torch.bfloat16, search: bool = True) -> Target:
    """Without refinement: what the loop says must come out."""
    return Target(dtype, search=search, effort=0, note=note)


def agrees(
    w: Tensor, h: Tensor, bits: int, group: int | None, asymmetric: bool, target: Target, share: float = 0.01
) -> Params:
    """Quantizes by GPTQ and by the loop; gives the parameters. Every value is the loop's to 1e-5."""
    fmt = parse(spec(bits, group, asymmetric))
    q = gptq.quantize(w.clone(), fmt, {"hessian": h.clone()}, target)
    params = fmt.unpack(q)[1]
    planned = fmt.fit(w, importance(h), target.dtype, target.search)
    assert planned.keys() == params.keys()
    assert all(torch.equal(planned[name], params[name]) for name in params)
    found, g = array(fmt.dequantize(q)), grid(params, bits, group, w.shape[1])
    hessian = array(h)
    wanted = obq(array(w), dampened(hessian, share), g, falling(np.diag(hessian)), found)
    assert np.abs(found - wanted).max() <= 1e-5
    # the loop may follow the package only where nothing depends on it
    assert g.ties <= max(2, 0.01 * w.numel())
    return params


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_gptq_is_the_textbook_loop(bits: int, asymmetric: bool, group: int | None, seed: int) -> None:
    w, h = case(16, 64, seed)
    agrees(w, h, bits, group, asymmetric, one_shot())


@pytest.mark.parametrize(("dtype", "search"), [(torch.float32, True), (torch.float16, False)])
def test_gptq_is_the_textbook_loop_whatever_the_scales(dtype: torch.dtype, search: bool) -> None:
    w, h = case(16, 64, 5)
    assert agrees(w, h, 3, 32, False, one_shot(dtype=dtype, search=search))["scale"].dtype == dtype
    assert agrees(w, h, 3, 32, True, one_shot(dtype=dtype, search=search))["scale"].dtype == dtype


@pytest.mark.parametrize("group", [32, 128, None])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_more_columns_than_are_corrected_at_once(bits: int, asymmetric: bool, group: int | None) -> None:
    # 160 columns: a whole lazy block of 128 and part of one; groups of 128 end raggedly
    w, h = case(8, 160, 2)
    assert w.shape[1] > gptq.LAZY
    agrees(w, h, bits, group, asymmetric, one_shot())


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2), (2, 33)])
def test_shapes_that_fill_no_group(shape: tuple[int, int]) -> None:
    w, h = case(*shape, seed=18)
    agrees(w, h, 4, 32, False, one_shot())
    agrees(w, h, 3, 2, True, one_shot())


@pytest.mark.parametrize("lazy", [1, 7, 16, 64])
def test_the_lazy_block_changes_nothing(monkeypatch: pytest.MonkeyPatch, lazy: int) -> None:
    monkeypatch.setattr(gptq, "LAZY", lazy)
    w, h = case(16, 64, 3)
    agrees(w, h, 3, 32, False, one_shot())
    agrees(w, h, 4, 64, True, one_shot())


def test_dead_columns_are_rounded_to_nearest_and_correct_nobody() -> None:
    w, h = case(16, 64, 4)
    dead = [0, 7, 40, 63]
    h[dead], h[:, dead] = 0, 0
    params = agrees(w, h, 4, 32, False, one_shot())
    agrees(w, h, 3, 64, True, one_shot())
    fmt = parse("int4g32")
    found = array(fmt.dequantize(gptq.quantize(w, fmt, {"hessian": h}, one_shot())))
    g = grid(params, 4, 32, 64)
    for c in dead:
        assert np.abs(found[:, c] - g.nearest(array(w)[:, c], c)).max() <= 1e-6
    # what lies in dead columns changes no other column, as long as their scales stay
    alive = [c for c in range(64) if c not in dead]
    other = w.clone()
    other[:, dead] *= 0.5
    planned = fmt.fit(w, importance(h))
    order = h.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(h, unheard, order)
    codes = [gptq.rounded(x, fmt, planned, order, factor) for x in (w, other)]
    assert torch.equal(codes[0][:, alive], codes[1][:, alive])
    assert not torch.equal(codes[0], codes[1])


def test_a_group_of_dead_columns_still_gets_a_scale_that_fits() -> None:
    w, h = case(16, 64, 6)
    h[32:], h[:, 32:] = 0, 0
    for name in ("int4g32", "int3g32a"):
        fmt = parse(name)
        q = gptq.quantize(w, fmt, {"hessian": h}, one_shot())
        step = array(q.parts["scale"])[:, 1:]
        assert (np.abs(array(fmt.dequantize(q)) - array(w))[:, 32:] <= 0.51 * np.abs(step)).all()


def test_constant_columns_and_constant_inputs() -> None:
    x = inputs(256, 64, 7)
    # an input that never changes, two that are always equal, and columns of equal weights
    x[:, 3] = 2.0
    x[:, 20] = x[:, 21]
    w, _ = case(16, 64, 7)
    w[:, 9], w[:, 33] = 0.03, 0.0
    h = x.t() @ x / len(x)
    for bits in (2, 4, 8):
        agrees(w, h, bits, 32, False, one_shot())
        agrees(w, h, bits, None, True, one_shot())


def test_inputs_of_few_directions_need_no_fallback() -> None:
    x = inputs(4, 64, 8)
    w, _ = case(16, 64, 8)
    agrees(w, x.t() @ x / len(x), 4, 32, False, one_shot())


def indefinite(shift: float) -> tuple[Tensor, Tensor]:
    """A case whose Hessian has eigenvalues of -shift of its mean diagonal, as rounding can leave it."""
    w, _ = case(16, 64, 9)
    x = inputs(24, 64, 9)
    x /= x.square().mean(0).sqrt()
    return w, x.t() @ x / len(x) - shift * torch.eye(64)


def test_a_hessian_that_is_not_positive_is_damped_more_and_that_is_told() -> None:
    w, h = indefinite(0.05)
    assert bool((h.diagonal() > 0).all())
    told: list[str] = []
    agrees(w, h, 4, 32, False, one_shot(told.append), share=0.1)
    assert len(told) == 1
    assert "damped by 0.1 " in told[0]


def test_a_hopeless_hessian_rounds_to_nearest_and_that_is_told() -> None:
    w, h = case(16, 64, 10)
    h = h.diagonal().diag() + 1e6 * (1 - torch.eye(64))
    told: list[str] = []
    fmt = parse("int4g32")
    q = gptq.quantize(w, fmt, {"hessian": h}, one_shot(told.append))
    assert len(told) == 1
    assert "without correction" in told[0]
    g = grid(fmt.unpack(q)[1], 4, 32, 64)
    found = array(fmt.dequantize(q))
    wanted = np.stack([g.nearest(array(w)[:, c], c, found[:, c]) for c in range(64)], 1)
    assert np.abs(found - wanted).max() <= 1e-6


@pytest.mark.parametrize("effort", [0, 1, 3])
@pytest.mark.parametrize("name", ["int4g32", "int3a"])
def test_no_inputs_at_all_is_round_to_nearest(name: str, effort: int) -> None:
    w, _ = case(16, 64, 11)
    fmt = integer(name)
    target = Target(torch.float32, effort=effort, note=unheard)
    q = gptq.quantize(w, fmt, {"hessian": torch.zeros(64, 64)}, target)
    params = fmt.unpack(q)[1]
    g = grid(params, fmt.bits, fmt.group, 64)
    found = array(fmt.dequantize(q))
    wanted = np.stack([g.nearest(array(w)[:, c], c, found[:, c]) for c in range(64)], 1)
    assert np.abs(found - wanted).max() <= 1e-6
    if effort == 0:
        planned = fmt.fit(w, torch.ones(64))
        assert all(torch.equal(planned[part], params[part]) for part in params)


def test_more_effort_never_costs_accuracy() -> None:
    for seed, name in enumerate(("int2g32", "int3", "int4g64a")):
        w, h = case(16, 128, seed)
        fmt = parse(name)
        errors = []
        for effort in range(4):
            q = gptq.quantize(w, fmt, {"hessian": h}, Target(torch.bfloat16, effort=effort, note=unheard))
            errors.append(float(cost(array(fmt.dequantize(q) - w), array(damped(h))).sum()))
        assert errors[1] == errors[0]
        assert errors[2] < 0.99 * errors[1]
        assert errors[3] <= errors[2] * 1.0001


def test_the_weights_and_the_statistics_are_left_alone() -> None:
    w, h = case(16, 64, 12)
    before, stats = w.clone(), {"hessian": h.clone(), "cross": 1.1 * h}
    gptq.quantize(w, parse("int4g32"), stats, Target(torch.bfloat16, effort=1))
    assert torch.equal(w, before)
    assert torch.equal(stats["hessian"], h)
    assert torch.equal(stats["cross"], 1.1 * h)


# second-order pieces


@pytest.mark.parametrize("strip", [1024, 64, 24, 1])
def test_the_factor_is_the_inverse_hessians(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_second_order, "STRIP", strip)
    _, h = case(1, 64, 13)
    before = h.clone()
    for order in (None, torch.randperm(64, generator=torch.Generator().manual_seed(1))):
        u = array(inverse_factor(h, unheard, order))
        assert np.abs(np.tril(u, -1)).max() == 0
        wanted = dampened(array(h if order is None else h[order][:, order]))
        assert np.abs(u.T @ u @ wanted - np.eye(64)).max() < 1e-4
    assert torch.equal(h, before)


def test_damping_is_a_hundredth_of_the_mean_and_all_of_it_for_dead_inputs() -> None:
    h = torch.tensor([[2.0, 1.0, 0.0], [1.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    before = h.clone()
    assert damped(h).tolist() == [
        pytest.approx([2.02, 1.0, 0.0]),
        pytest.approx([1.0, 4.02, 0.0]),
        pytest.approx([0.0, 0.0, 2.0]),
    ]
    assert torch.equal(h, before)
    assert torch.equal(damped(torch.zeros(3, 3)), torch.eye(3))


def test_the_output_error_is_the_mean_square_of_the_outputs() -> None:
    x, w = inputs(300, 40, 14), torch.randn(6, 40, generator=torch.Generator().manual_seed(14))
    outputs = array(x) @ array(w).T
    assert output_error(w, x.t() @ x / 300) == pytest.approx((outputs**2).sum() / 300, rel=1e-5)


def ridge(w: Array, ours: Array, true: Array) -> Array:
    """W + D of least ||(W + D) ours - W true||, by least squares on the inputs themselves, with rows added for
    the damping that keeps D small.
    """
    n, columns = ours.shape
    weight = np.sqrt(np.diag(dampened(gram(ours)) - gram(ours)))
    known = np.concatenate([ours / np.sqrt(n), np.diag(weight)])
    wanted = np.concatenate([(true - ours) @ w.T / np.sqrt(n), np.zeros((columns, len(w)))])
    return w + np.linalg.lstsq(known, wanted, rcond=None)[0].T


def drifted(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of the quantized prefix and the true ones, which depend on them unevenly."""
    ours = inputs(400, 64, seed)
    random = torch.Generator().manual_seed(seed)
    turn = torch.eye(64) + 0.1 * torch.randn(64, 64, generator=random)
    return ours, ours @ turn + 0.2 * torch.randn(400, 64, generator=random)


@pytest.mark.parametrize("strip", [1024, 24])
def test_drift_is_corrected_by_least_squares(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_second_order, "STRIP", strip)
    ours, true = drifted(15)
    w, _ = case(16, 64, 15)
    found = drift_corrected(w, ours.t() @ ours / 400, true.t() @ ours / 400)
    wanted = ridge(array(w), array(ours), array(true))
    assert np.abs(array(found) - wanted).max() <= 1e-5 * np.abs(wanted).max()
    # and it is worth the trouble: the outputs come nearer to the true ones
    before, after = (array(ours) @ array(v).T - array(true) @ array(w).T for v in (w, found))
    assert (after**2).sum() < 0.5 * (before**2).sum()


def test_nothing_drifted_nothing_corrected() -> None:
    w, h = case(16, 64, 16)
    assert torch.equal(drift_corrected(w, h, h.clone()), w)


def test_gptq_starts_from_the_corrected_weights() -> None:
    ours, true = drifted(17)
    w, _ = case(16, 64, 17)
    h, cross = ours.t() @ ours / 400, true.t() @ ours / 400
    fmt = parse("int4g32")
    q = gptq.quantize(w, fmt, {"hessian": h, "cross": cross}, one_shot())
    g, found = grid(fmt.unpack(q)[1], 4, 32, 64), array(fmt.dequantize(q))
    start = ridge(array(w), array(ours), array(true))
    wanted = obq(start, dampened(array(h)), g, falling(np.diag(array(h))), found)
    assert np.abs(found - wanted).max() <= 1e-5
    assert g.ties <= 10
