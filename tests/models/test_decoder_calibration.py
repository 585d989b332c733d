"""Every architecture calibrated: rewrites that change nothing, gradients, a whole quantization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fewbit
from fewbit import sensitivity
from fewbit.blocks import FloatBlock
from fewbit.feeds import feeds_of
from fewbit.passes import collect
from fewbit.runtime.cache import Sequence
from fewbit.sensitivity import Probe
from fewbit.source import open_source
from tests.models.decoders import MODELS, transformers_model, written
from tests.models.test_sensitivity import drawn

CPU = torch.device("cpu")
LENGTH = 20
WINDOWS = torch.randint(256, (4, LENGTH), generator=torch.Generator().manual_seed(1))
FEW: dict[str, Any] = {"num_hidden_layers": 2}
# one with biases where the architecture can have them
VARIANTS: dict[str, dict[str, Any]] = {model: {} for model in MODELS}
VARIANTS |= {model: {"attention_bias": True} for model in ("llama", "qwen3", "gemma3_text", "olmo2", "smollm3")}


@pytest.mark.parametrize("model", MODELS)
def test_dividing_what_feeds_a_linear_changes_nothing(tmp_path: Path, model: str) -> None:
    source = open_source(written(tmp_path / "m", model, FEW | VARIANTS[model]))
    block = FloatBlock(source, 1, LENGTH, CPU)
    random = torch.Generator().manual_seed(2)
    x = torch.randn(4, LENGTH, 64, generator=random)
    stats = collect(block, x, x)
    before = block(x)
    feeds = feeds_of(source, block, stats, source.spec)
    fed = {id(w) for feed in feeds for w in feed.linears}
    # all but the attention and gate inputs of a model without norms before them
    assert {id(linear.weight) for linear in block.linears} - fed == (
        {id(linear.weight) for linear in block.linears if linear.names[0].endswith(("q_proj", "gate_proj"))}
        if model == "olmo2"
        else set()
    )
    old = [linear.weight.clone() for linear in block.linears]
    for feed in feeds:
        columns = feed.linears[0].shape[1]
        applied = feed.divide(feed.share((0.5 * torch.randn(columns, generator=random)).exp()))
        for w in feed.linears:
            w *= applied
        for key in ("hessian", "cross"):
            if key in feed.stats:
                feed.stats[key] = feed.stats[key] / (applied[:, None] * applied)
    after = block(x)
    assert float((after - before).norm() / (before - x).norm()) < 1e-5
    changed = [float((linear.weight - w).abs().max()) > 0.05 for linear, w in zip(block.linears, old, strict=True)]
    assert sum(changed) >= len(changed) - (2 if model == "olmo2" else 0)
    # the statistics went along
    for found, again in zip(stats, collect(block, x, x), strict=True):
        assert found.keys() == again.keys()
        for name in found.keys() - {"tokens"}:
            assert float((found[name] - again[name]).norm() / again[name].norm()) < 1e-4


def channels_by_autograd(folder: Path, windows: Tensor) -> Tensor:
    """Mean squared gradients of blocks' outputs, of mean 1, by one backward pass through transformers a window."""
    model = transformers_model(folder)
    blocks = model.config.num_hidden_layers
    outputs: list[Tensor] = [torch.empty(0)] * blocks

    def keep(i: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            outputs[i] = output[0] if isinstance(output, tuple) else output

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep(i))
    total = torch.zeros(blocks, model.config.hidden_size)
    for number, window in enumerate(windows):
        logits = model(window[None]).logits[0]
        loss = F.cross_entropy(logits, drawn(logits.detach(), number), reduction="sum")
        for i, gradient in enumerate(torch.autograd.grad(loss, outputs)):
            total[i] += gradient.reshape(-1, total.shape[1]).square().sum(0)
    return total / total.mean(-1, keepdim=True)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_equal_transformers(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "HEAD_ROWS", 100)
    # a cap that bends what it holds
    capped = {"final_logit_softcapping": 1.5} if model == "gemma2" else {}
    folder = written(tmp_path / "m", model, FEW | capped)
    expected = channels_by_autograd(folder, WINDOWS[:2])
    found = Probe(open_source(folder), CPU, torch.float32, lambda *_: None).measure(WINDOWS[:2], tmp_path)
    # blocks' inputs are kept in 16 bits until the way back
    torch.testing.assert_close(found.channels, expected, rtol=0.05, atol=2e-3)
    assert float((found.channels - expected).norm() / (expected - 1).norm()) < 0.02


def mean_kl(model: Path, reference: Path, ids: list[int]) -> float:
    p, q = (
        fewbit.load(m, exact=True).forward([(Sequence(), list(ids))], wanted=list(range(len(ids)))).log_softmax(-1)
        for m in (reference, model)
    )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("model", MODELS)
def test_a_quantized_model_says_nearly_the_same(tmp_path: Path, model: str) -> None:
    folder = written(tmp_path / "m", model, FEW | VARIANTS[model], torch.bfloat16)
    settings = {"windows": 4, "length": LENGTH, "weighting": "loss" if model == "qwen3_moe" else "even"}
    fewbit.quantize(folder, tmp_path / "q", format="int8g32", head="16bit", method="awq+gptq", **settings)
    # a token between two experts may go to the other
    assert 0 < mean_kl(tmp_path / "q", folder, WINDOWS[0].tolist()) < 0.02
