"""Every method at every width: it runs, its tensor is well formed, and it pays beside round to nearest."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from fewbit.formats import parse
from fewbit.methods import Target, awq, gptq, rtn, tuned
from tests.pure._textbook import WIDTHS, array, case, cost, spec

# the most of round to nearest's error that a method may leave
LEAVES = {gptq: 0.7, tuned: 0.7, awq: 0.95}


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("method", LEAVES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_method_beats_round_to_nearest(
    method: ModuleType, bits: int, asymmetric: bool, group: int | None
) -> None:
    w, h = case(32, 128, 20 + bits, spread=2.0)
    fmt, target = parse(spec(bits, group, asymmetric)), Target(torch.bfloat16, effort=1)
    errors = []
    for m in (method, rtn):
        q = m.quantize(w, fmt, {"hessian": h}, target)
        assert {name: (p.dtype, tuple(p.shape)) for name, p in q.parts.items()} == fmt.layout((32, 128), torch.bfloat16)
        values = array(fmt.dequantize(q))
        assert np.isfinite(values).all()
        errors.append(cost(values - array(w), array(h)).sum())
    assert errors[0] <= LEAVES[method] * errors[1]
