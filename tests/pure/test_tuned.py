"""Tuned rounding: gradients as the straight-through definition has them, and never a block worse than GPTQ's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit.blocks import FloatBlock
from fewbit.calibrated import BlockSolver, Goals, Solved
from fewbit.formats import Format, parse
from fewbit.formats.integer import IntegerFormat
from fewbit.methods import BlockPart, Target, gptq, tuned
from fewbit.methods.tuned import CELL, Levels
from fewbit.passes import collect
from fewbit.qtensor import QTensor
from fewbit.source import open_source
from tests.conftest import write_folder
from tests.pure._textbook import array, case, grid, integer, levels_of

SPECS = ("int2g32", "int3g32a", "int4", "int4g64a", "int8g32")
CPU = torch.device("cpu")


def started(name: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[IntegerFormat, Tensor, QTensor, Levels]:
    """Weights [16, 80], GPTQ's tensor of them, and the levels tuning starts from."""
    w, h = case(16, 80, seed)
    fmt = integer(name)
    q = gptq.quantize(w, fmt, {"hessian": h}, Target(dtype, effort=1))
    return fmt, w, q, Levels(fmt, q, w)


def disturb(free: Levels, seed: int) -> None:
    """Move levels by up to two codes and scales by up to a tenth, as steps would."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        free.level += 4 * torch.rand(free.level.shape, generator=random) - 2
        free.change += 0.2 * torch.rand(free.change.shape, generator=random) - 0.1


@pytest.mark.parametrize("name", SPECS)
def test_tuning_starts_from_gptq(name: str) -> None:
    fmt, w, q, free = started(name, 1)
    codes, params = fmt.unpack(q)
    assert torch.allclose(free.weight(), fmt.dequantize(q), rtol=1e-6, atol=0)
    assert torch.equal(fmt.unpack(free.stored())[0], codes)
    # a level lies where the weight lies, within its cell
    scale = np.repeat(array(params["scale"]), fmt.span(80), 1)[:, :80]
    rounded, level = levels_of(fmt, codes, params), array(free.level)
    wanted = rounded + (array(w) / scale - rounded).clip(-CELL, CELL)
    assert np.abs(level - wanted).max() < 1e-4
    assert np.array_equal(np.round(level), rounded)


def by_hand(free: Levels, fmt: IntegerFormat, pull: Tensor, zero: np.ndarray) -> tuple[np.ndarray, ...]:
    """Loops: weights, and the derivatives of sum(pull * weights) by level and by change; the fourth marks levels that
    round to an end of their range, where half the derivative is a subgradient as well.
    """
    level, change, base = array(free.level), array(free.change), array(free.base)
    top, span = 2**fmt.bits - 1, fmt.span(level.shape[1])
    weight, by_level, by_change = np.zeros_like(level), np.zeros_like(level), np.zeros_like(change)
    at_end = np.zeros(level.shape, bool)
    for r in range(level.shape[0]):
        for c in range(level.shape[1]):
            g = c // span
            low, high = -zero[r, g], top - zero[r, g]
            whole = float(np.round(level[r, c]))
            code, scale = min(max(whole, low), high), base[r, g] * (1 + change[r, g])
            weight[r, c] = code * scale
            by_change[r, g] += float(pull[r, c]) * code * base[r, g]
            # d round(x) / dx is taken to be 1, d clip(x) / dx is 1 within the range and 0 outside
            by_level[r, c] = float(pull[r, c]) * scale if low <= whole <= high else 0.0
            at_end[r, c] = whole in (low, high)
    return weight, by_level, by_change, at_end


@pytest.mark.parametrize("name", SPECS)
def test_gradients_pass_rounding_and_stop_at_clipping(name: str) -> None:
    fmt, _, q, free = started(name, 2)
    disturb(free, 2)
    pull = torch.randn(free.level.shape, generator=torch.Generator().manual_seed(3))
    with torch.enable_grad():
        weight = free.weight()
        (weight * pull).sum().backward()
    zero = grid(fmt.unpack(q)[1], fmt.bits, fmt.group, 80).zero
    wanted, by_level, by_change, at_end = by_hand(free, fmt, pull, zero)
    assert free.level.grad is not None
    assert free.change.grad is not None
    assert np.abs(array(weight) - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert np.abs(array(free.change.grad) - by_change).max() <= 1e-4 * np.abs(by_change).max()
    found = array(free.level.grad)
    close = 1e-5 * np.abs(by_level) + 1e-12
    assert (np.abs(found - by_level)[~at_end] <= close[~at_end]).all()
    share = found[at_end] / by_level[at_end]
    assert ((share > 0.99) & (share < 1.01)).all()
    outside = by_level == 0
    # all three kinds occur where there are few codes
    assert fmt.bits > 4 or (outside.any() and at_end.any())
    assert (~outside & ~at_end).mean() > 0.1
    # weights are linear in the scales: differences of any size are the derivative
    with torch.no_grad():
        for r, g in ((0, 0), (5, free.change.shape[1] - 1)):
            old = float(free.change[r, g])
            free.change[r, g] = old + 0.125
            more = (free.weight() * pull).double().sum()
            free.change[r, g] = old - 0.125
            less = (free.weight() * pull).double().sum()
            free.change[r, g] = old
            assert float(more - less) / 0.25 == pytest.approx(by_change[r, g], rel=1e-3, abs=1e-4)


def test_levels_are_kept_where_a_gradient_brings_them_back() -> None:
    _, _, _, free = started("int2g32", 4)
    with torch.no_grad():
        free.level[:, ::2] += 100
        free.level[:, 1::2] -= 100
    free.clip()
    level = array(free.level)
    assert np.abs(level[:, ::2] - (1 + CELL)).max() < 1e-6
    assert np.abs(level[:, 1::2] - (-2 - CELL)).max() < 1e-6
    with torch.enable_grad():
        free.weight().sum().backward()
    assert free.level.grad is not None
    assert bool((free.level.grad != 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SPECS)
def test_what_is_stored_is_what_the_forward_pass_had(name: str, dtype: torch.dtype) -> None:
    fmt, _, q, free = started(name, 5, dtype)
    disturb(free, 5)
    stored = free.stored()
    assert {part: (p.dtype, tuple(p.shape)) for part, p in stored.parts.items()} == fmt.layout((16, 80), dtype)
    forward, back = array(free.weight()), array(fmt.dequantize(stored))
    # nothing but the rounding of scales lies between
    precision = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    assert (np.abs(back - forward) <= precision * np.abs(forward)).all()
    wanted = free.base * (1 + free.change)
    assert torch.equal(stored.parts["scale"], wanted.detach().to(dtype))
    # zero points stay; codes moved
    assert all(torch.equal(stored.parts[part], q.parts[part]) for part in q.parts.keys() & {"zero"})
    assert not torch.equal(stored.parts["packed"], q.parts["packed"])


# whole blocks


class Walk:
    """A tiny block with windows of 24 tokens, what it should give, and methods to solve it by."""

    def __init__(self, path: Path, spec: str, windows: int = 8) -> None:
        self.source = open_source(write_folder(path / "model"))
        self.spec = spec
        random = torch.Generator().manual_seed(8)
        goals_in = torch.randn(windows, 24, 64, generator=random) * torch.linspace(0.2, 2, 64)
        # what the quantized prefix hands on has drifted
        self.hidden = goals_in + 0.02 * torch.randn(goals_in.shape, generator=random)
        with torch.no_grad():
            self.goals = self.block()(goals_in)
        self.channels = torch.ones(64)

    def block(self) -> FloatBlock:
        """A fresh one, in full precision."""
        return FloatBlock(self.source, 0, 24, CPU)

    def _planned(self, name: str) -> str:
        return self.spec if name.endswith("_proj.weight") else self.source.spec(name)

    def solve(self, method: ModuleType, effort: int) -> tuple[FloatBlock, Solved]:
        """The block with the method's weights, and its tensors."""
        block = self.block()
        target = Target(torch.bfloat16, effort=effort)
        solver = BlockSolver(self.source, [method], target, self._planned)
        with torch.no_grad():
            stats = collect(block, self.hidden, None)
            solved = solver.solve(block, stats, self.hidden, Goals(self.goals, self.channels), lambda *_: None)
        return block, solved

    def loss(self, run: Callable[[Tensor], Tensor]) -> float:
        """Mean square of what the block's outputs lack, over every window."""
        with torch.no_grad():
            return float((run(self.hidden) - self.goals).double().square().mean())

    def part(self, notes: list[str] | None = None, spec: str | None = None) -> tuple[BlockPart, FloatBlock]:
        """A block solved by GPTQ (or stored as `spec`), as tuning gets it."""
        block, fmt = self.block(), parse(spec or self.spec)
        originals, solved = [], []
        for linear, stats in zip(block.linears, collect(block, self.hidden, None), strict=True):
            originals.append(linear.weight.clone())
            if spec is None:
                q = gptq.quantize(linear.weight, fmt, stats, Target(torch.bfloat16, effort=1))
            else:
                q = fmt.pack(fmt.round(linear.weight, {}), {})
            solved.append((fmt, q))
            linear.weight = fmt.dequantize(q)

        def batches(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
            pick = torch.randperm(len(self.hidden), generator=random)[:count]
            return self.hidden[pick], self.goals[pick]

        return BlockPart(
            block, block.linears, originals, solved, batches, self.channels, len(self.hidden), lambda *_: None
        ), block


def load(block: FloatBlock, part: BlockPart, found: list[QTensor]) -> None:
    """Give the block the weights that tuning chose."""
    for linear, (fmt, _), q in zip(block.linears, part.solved, found, strict=True):
        linear.weight = fmt.dequantize(q)


def test_tuning_beats_gptq_on_its_block(tmp_path: Path) -> None:
    walk = Walk(tmp_path, "int3g32", windows=16)
    before = walk.loss(walk.solve(gptq, 1)[0])
    block, solved = walk.solve(tuned, 0)
    assert walk.loss(block) < 0.8 * before
    # what the folder gets is what the block ran with
    for linear in block.linears:
        stored = torch.cat([parse(q.spec).dequantize(q) for q in (solved.tensors[f"{n}.weight"] for n in linear.names)])
        assert torch.equal(linear.weight, stored)


@pytest.mark.parametrize("spec", ["int2g32", "int3g32a", "int4"])
def test_tuning_never_makes_a_block_worse(tmp_path: Path, spec: str) -> None:
    walk = Walk(tmp_path, spec)
    part, block = walk.part()
    before = walk.loss(block)
    found = tuned.tune(part, Target(torch.bfloat16, effort=0))
    load(block, part, found)
    assert walk.loss(block) < before


@pytest.mark.parametrize(("name", "rate"), [("LEVEL_REACH", 5000.0), ("SCALE_REACH", 50.0)])
def test_steps_that_lead_astray_are_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rate: float
) -> None:
    walk = Walk(tmp_path, "int4g32")
    part, block = walk.part()
    before = walk.loss(block)
    monkeypatch.setattr(tuned, name, rate)
    found = tuned.tune(part, Target(torch.bfloat16, effort=0))
    # the steps did lead astray: the weights they left are worse
    assert walk.loss(block) > before
    assert all(q is kept for q, (_, kept) in zip(found, part.solved, strict=True))
    load(block, part, found)
    assert walk.loss(block) == pytest.approx(before, rel=1e-6)


def test_levels_stay_near_their_range_while_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = Walk(tmp_path, "int2g32")
    made: list[Levels] = []

    class Watched(Levels):
        def __init__(self, fmt: Format, q: QTensor, original: Tensor) -> None:
            super().__init__(fmt, q, original)
            made.append(self)

    monkeypatch.setattr(tuned, "Levels", Watched)
    monkeypatch.setattr(tuned, "LEVEL_REACH", 5.0)
    part, _ = walk.part()
    tuned.tune(part, Target(torch.bfloat16, effort=0))
    assert len(made) == len(part.linears)
    for free in made:
        level = array(free.level)
        assert level.max() <= 1 + CELL + 1e-6
        assert level.min() >= -2 - CELL - 1e-6


def test_tuning_is_the_same_each_time(tmp_path: Path) -> None:
    walk = Walk(tmp_path, "int3g32")
    first, second = (tuned.tune(walk.part()[0], Target(torch.bfloat16, effort=0)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a.parts[name], b.parts[name]) for name in a.parts)


def test_formats_without_scales_are_not_tuned_and_that_is_told(tmp_path: Path) -> None:
    walk = Walk(tmp_path, "int3g32")
    part, _ = walk.part(spec="bf16")
    told: list[str] = []
    found = tuned.tune(part, Target(torch.bfloat16, effort=0, note=told.append))
    assert all(q is kept for q, (_, kept) in zip(found, part.solved, strict=True))
    assert len(told) == 1
    assert "no scales" in told[0]


def test_before_tuning_the_codes_are_gptqs() -> None:
    w, h = case(16, 64, 9)
    fmt, target = parse("int3g32"), Target(torch.bfloat16, effort=2)
    one, other = (m.quantize(w, fmt, {"hessian": h}, target) for m in (gptq, tuned))
    assert all(torch.equal(one.parts[name], other.parts[name]) for name in one.parts)
