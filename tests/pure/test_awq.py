"""AWQ against a plain search on the inputs themselves; and a block that computes what it computed after the rewrite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import passes
from fewbit.blocks import FloatBlock
from fewbit.calibrated import BlockSolver
from fewbit.formats import parse
from fewbit.methods import Feed, Target, awq
from fewbit.passes import collect
from fewbit.source import open_source
from tests.conftest import CONFIG, random_weights, write_folder
from tests.pure._textbook import WIDTHS, Array, Grid, array, inputs, integer, spec

TARGET = Target(torch.float32)
CPU = torch.device("cpu")


# the ratio


def minmax(w: Array, bits: int, group: int | None, asymmetric: bool) -> Array:
    """Round to nearest with the textbook's scales, group by group."""
    out, width, top = np.empty_like(w), group or w.shape[1], 2.0**bits - 1
    for first in range(0, w.shape[1], width):
        part = w[:, first : first + width]
        if asymmetric:
            low, high = part.min(1).clip(max=0), part.max(1).clip(min=0)
            scale = (high - low) / top
            zero = np.round(-low / scale).clip(0, top)
        else:
            scale = np.abs(part).max(1) / (2 ** (bits - 1) - 1)
            zero = np.full(len(w), 2.0 ** (bits - 1))
        g = Grid(scale[:, None], zero[:, None], bits, w.shape[1])
        for c in range(part.shape[1]):
            out[:, first + c] = g.nearest(part[:, c], c)
    return out


def candidates(x: Array) -> list[Array]:
    """Factors of each ratio 0, 1/20 .. 19/20: the root mean square of each channel to that power, over their geometric
    mean.
    """
    size = np.sqrt((x**2).mean(0))
    found = [np.ones(len(size))]
    for i in range(1, 20):
        s = size ** (i / 20)
        found.append(s / np.exp(np.log(s).mean()))
    return found


def damage(x: Array, matrices: list[Array], s: Array, bits: int, group: int | None, asymmetric: bool) -> float:
    """Mean squared change of the outputs on inputs x [n, in], with channels scaled up by s before rounding."""
    return sum(
        float((((x / s) @ minmax(w * s, bits, group, asymmetric).T - x @ w.T) ** 2).sum()) / len(x) for w in matrices
    )


def fed(seed: int) -> tuple[Tensor, list[Tensor]]:
    """Inputs [300, 64] with a few large channels, and two matrices that read them."""
    random = torch.Generator().manual_seed(seed)
    x = inputs(300, 64, seed)
    x[:, torch.randperm(64, generator=random)[:4]] *= 12
    return x, [torch.randn(rows, 64, generator=random) * 0.05 for rows in (16, 24)]


@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_ratio_is_the_one_a_plain_search_finds(bits: int, asymmetric: bool, group: int | None) -> None:
    x, matrices = fed(bits)
    h = x.t() @ x / len(x)
    plain = [array(w) for w in matrices]
    errors = [damage(array(x), plain, s, bits, group, asymmetric) for s in candidates(array(x))]
    asked: list[Tensor] = []

    def divide(s: Tensor) -> Tensor:
        asked.append(s)
        return s

    stats = {"hessian": h.clone(), "cross": 0.5 * h}
    awq.prepare([Feed(matrices, stats, lambda s: s, divide)], parse(spec(bits, group, asymmetric)), TARGET)
    assert len(asked) == 1
    s = array(asked[0])
    chosen = int(np.argmin([np.abs(s / c - 1).max() for c in candidates(array(x))]))
    assert np.abs(s / candidates(array(x))[chosen] - 1).max() < 1e-4
    assert chosen > 0
    assert errors[chosen] <= min(errors) * (1 + 1e-4)
    assert errors[chosen] < 0.98 * errors[0]
    # what the producer divides by, the readers and their statistics carry
    for w, before in zip(matrices, plain, strict=True):
        assert np.abs(array(w) - before * s).max() <= 1e-6
    smaller = array(x) / s
    again = smaller.T @ smaller / len(x)
    assert np.abs(array(stats["hessian"]) - again).max() <= 1e-5 * np.abs(again).max()
    assert np.abs(array(stats["cross"]) - 0.5 * again).max() <= 1e-5 * np.abs(again).max()


def test_the_largest_ratio_is_tried_too() -> None:
    # weights are the smaller the larger their input: only when both are made equal do they round well
    x, (w, _) = fed(7)
    size = array(x.square().mean(0).sqrt())
    w /= torch.from_numpy(size).float()
    before = array(w)
    errors = [damage(array(x), [before], s, 4, 64, False) for s in candidates(array(x))]
    awq.prepare([Feed([w], {"hessian": x.t() @ x / len(x)}, lambda s: s, lambda s: s)], parse("int4g64"), TARGET)
    assert int(np.argmin(errors)) == 19
    assert np.abs(array(w) / (before * candidates(array(x))[19]) - 1).max() < 1e-4


def test_equal_channels_and_silent_ones_are_left_alone() -> None:
    _, matrices = fed(1)
    before = [w.clone() for w in matrices]

    def divide(s: Tensor) -> Tensor:
        raise AssertionError("nothing is to be gained")

    for h in (torch.eye(64), torch.zeros(64, 64)):
        awq.prepare([Feed(matrices, {"hessian": h}, lambda s: s, divide)], parse("int4g32"), TARGET)
    assert all(torch.equal(w, b) for w, b in zip(matrices, before, strict=True))


def test_factors_stay_storable() -> None:
    x, _ = fed(2)
    h = x.t() @ x / len(x)
    h[5] *= 1e6
    h[:, 5] *= 1e6
    h[9], h[:, 9] = 0, 0
    s = awq.factors(h, 0.95)
    assert float(s.max()) <= awq.SPREAD**0.5 * (1 + 1e-6)
    assert float(s.min()) >= awq.SPREAD**-0.5 * (1 - 1e-6)
    assert int(s.argmax()) == 5
    # a channel that carries nothing is left alone, and neither it nor a huge one flattens the others
    assert abs(float(s[9]) - 1) < 1e-5
    ordinary = s[[i for i in range(64) if i not in (5, 9)]]
    assert len(ordinary.unique()) == 62


def test_what_the_producer_could_not_apply_the_readers_do_not_carry() -> None:
    x, matrices = fed(3)
    before = [w.clone() for w in matrices]
    stats = {"hessian": x.t() @ x / len(x)}
    h = stats["hessian"].clone()
    applied = torch.linspace(0.5, 2, 64)

    def divide(s: Tensor) -> Tensor:
        assert not torch.allclose(s, applied)
        return applied

    awq.prepare([Feed(matrices, stats, lambda s: s, divide)], parse("int3g32"), TARGET)
    assert all(torch.equal(w, b * applied) for w, b in zip(matrices, before, strict=True))
    assert torch.allclose(stats["hessian"] * applied[:, None] * applied, h, rtol=1e-5)


# the rewrite


def walked(tmp_path: Path, silent: bool = False, **changes: Any) -> tuple[FloatBlock, BlockSolver, Tensor]:
    """A block of a tiny model whose channels differ in size, its solver, and inputs [12, 20, 64]."""
    config = CONFIG | changes
    weights = random_weights(config, seed=5)
    random = torch.Generator().manual_seed(6)
    prefix = "model.layers.0."
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = weights[f"{prefix}{name}.weight"]
        norm *= (1.2 * torch.randn(len(norm), generator=random)).exp()
        if silent:
            norm[7] = 0
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        rows = weights[f"{prefix}{name}.weight"]
        rows *= (1.2 * torch.randn(len(rows), 1, generator=random)).exp()
    source = open_source(write_folder(tmp_path / "model", weights, **changes))
    block = FloatBlock(source, 0, 20, CPU)

    def planned(name: str) -> str:
        return "int3g32" if name.endswith("_proj.weight") else source.spec(name)

    solver = BlockSolver(source, [awq], Target(torch.bfloat16), planned)
    return block, solver, torch.randn(12, 20, 64, generator=random)


VARIANTS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one value head": {"num_key_value_heads": 1},
    "as many value heads": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "silent channels": {"silent": True},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_prepared_block_computes_what_it_did(tmp_path: Path, changes: dict[str, Any]) -> None:
    block, solver, x = walked(tmp_path, **changes)
    with torch.no_grad():
        before = block(x)
        parts = {
            "input norm": block.vectors["model.layers.0.input_layernorm.weight"].clone(),
            "mlp norm": block.vectors["model.layers.0.post_attention_layernorm.weight"].clone(),
        }
        matrices = [linear.weight.clone() for linear in block.linears]
        reference = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
        stats = collect(block, x, reference)
        solver._prepare(block, stats)
        after = block(x)
    moved = (after - x) - (before - x)
    # biases are stored in 16 bits, and what runs is what will be stored
    most = 5e-3 if changes.get("mlp_bias") else 1e-5
    assert float(moved.norm() / (before - x).norm()) < most
    # every linear was scaled, by far more than rounding
    for linear, old in zip(block.linears, matrices, strict=True):
        assert float((linear.weight - old).abs().max()) > 0.05 * float(old.abs().max())
    for name, old in zip(("input_layernorm", "post_attention_layernorm"), parts.values(), strict=True):
        norm = block.vectors[f"model.layers.0.{name}.weight"]
        assert float((norm - old).abs().max()) > 0.1
        # stored without loss: what its rounding lost, the linears made good
        assert torch.equal(norm, norm.to(torch.bfloat16).float())
        assert bool(((norm == 0) == (old == 0)).all())
    # the statistics are those of the rewritten block
    for found, again in zip(stats, collect(block, x, reference), strict=True):
        for name in ("hessian", "cross"):
            assert float((found[name] - again[name]).norm() / again[name].norm()) < 1e-4


def test_statistics_are_means_over_the_inputs_of_each_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # several batches, the last one shorter
    monkeypatch.setattr(passes, "BATCH_TOKENS", 100)
    block, _, x = walked(tmp_path)
    reference = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    seen: list[list[Array]] = []
    for hidden in (x, reference):
        seen.append([])
        with torch.no_grad(), block.watched(lambda _, given: seen[-1].append(array(given))):
            block(hidden)
    stats = collect(block, x, reference)
    assert len(stats) == len(block.linears) == len(seen[0])
    for found, ours, true in zip(stats, *seen, strict=True):
        hessian, cross = ours.T @ ours / len(ours), true.T @ ours / len(ours)
        assert np.abs(array(found["hessian"]) - hessian).max() <= 1e-5 * np.abs(hessian).max()
        assert torch.equal(found["hessian"], found["hessian"].t())
        assert np.abs(array(found["cross"]) - cross).max() <= 1e-5 * np.abs(cross).max()
    for alone, both in zip(collect(block, x, None), stats, strict=True):
        assert alone.keys() == {"hessian"}
        assert torch.equal(alone["hessian"], both["hessian"])


def test_rewriting_pays(tmp_path: Path) -> None:
    block, solver, x = walked(tmp_path)
    fmt = parse("int3g32")
    with torch.no_grad():
        wanted = block(x)

        def lost() -> float:
            kept = [linear.weight for linear in block.linears]
            for linear, found in zip(block.linears, collect(block, x, None), strict=True):
                linear.weight = fmt.dequantize(awq.quantize(linear.weight, fmt, found, solver.target))
            error = float((block(x) - wanted).square().mean())
            for linear, w in zip(block.linears, kept, strict=True):
                linear.weight = w
            return error

        before = lost()
        solver._prepare(block, collect(block, x, None))
        assert lost() < 0.99 * before


def test_quantize_is_nearest_with_scales_searched_by_the_inputs() -> None:
    x, (w, _) = fed(4)
    h = x.t() @ x / len(x)
    for name in ("int3g32", "int4a", "int8g64"):
        fmt = integer(name)
        q = awq.quantize(w, fmt, {"hessian": h}, TARGET)
        params = fmt.fit(w, h.diagonal(), torch.float32)
        assert torch.equal(fmt.dequantize(q), fmt.value(fmt.round(w, params), params))
        # clipping: no textbook scale is as good by the objective it searches
        weighted = array(h).diagonal()
        plain = minmax(array(w), fmt.bits, fmt.group, fmt.asymmetric)
        found = array(fmt.dequantize(q))
        assert (((found - array(w)) ** 2) @ weighted <= ((plain - array(w)) ** 2) @ weighted * (1 + 1e-5)).all()
