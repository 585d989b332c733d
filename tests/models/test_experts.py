"""Experts: each one's statistics are of the tokens that came to it, and one that none came to is rounded to nearest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fewbit
from fewbit.blocks import FloatBlock, embed
from fewbit.checkpoint import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.methods import Target, rtn
from fewbit.models import find_model
from fewbit.passes import collect, propagate
from fewbit.runtime.cache import Sequence
from fewbit.sensitivity import Probe
from fewbit.source import open_source
from tests.models.decoders import config_of, transformers_model, written

CPU = torch.device("cpu")
LENGTH = 12
WINDOWS = torch.randint(256, (5, LENGTH), generator=torch.Generator().manual_seed(1))
MODELS = ("mixtral", "qwen3_moe")
FEW: dict[str, Any] = {"num_hidden_layers": 2}


def routed(folder: Path, block: int, windows: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers' experts are given [tokens, d], and which of them each token takes [tokens, used]."""
    model = transformers_model(folder)
    found: dict[str, Tensor] = {}
    mixture = model.model.layers[block].mlp
    mixture.register_forward_pre_hook(lambda _, args: found.__setitem__("x", args[0].flatten(0, 1)))
    mixture.gate.register_forward_hook(lambda _, __, output: found.__setitem__("chosen", output[2]))
    with torch.inference_mode():
        model(windows)
    return found["x"], found["chosen"]


def expert_inputs(folder: Path, block: int, e: int, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs of an expert's first matrices, and of its last, from the stored weights."""
    source = open_source(folder)
    names, prefix = source.args.names, source.module.BLOCK.format(block)
    gate, up = (
        source.read(f"{prefix}{n.format(e)}.weight").parts["weight"] for n in (names.expert_gate, names.expert_up)
    )
    mine = x[(chosen == e).any(1)]
    return mine, F.silu(mine @ gate.t()) * (mine @ up.t())


@pytest.mark.parametrize("model", MODELS)
def test_statistics_are_of_the_tokens_that_came(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbit.passes.BATCH_TOKENS", 2 * LENGTH)
    folder = written(tmp_path / "m", model, FEW)
    source = open_source(folder)
    windows = WINDOWS[:, :3] if model == "qwen3_moe" else WINDOWS
    x, chosen = routed(folder, 1, windows)
    length = windows.shape[1]
    hidden = torch.cat(list(embed(source, windows)))
    propagate(FloatBlock(source, 0, length, CPU), hidden)
    block = FloatBlock(source, 1, length, CPU)
    stats = collect(block, hidden, hidden)
    assert len(stats) == 2 + 2 * source.args.experts
    for e in range(source.args.experts):
        wanted = expert_inputs(folder, 1, e, x, chosen)
        # all experts' first matrices, then all their last ones
        for found, inputs in zip((stats[2 + e], stats[2 + source.args.experts + e]), wanted, strict=True):
            if not len(inputs):
                assert not found
                continue
            assert float(found["tokens"]) == len(inputs)
            torch.testing.assert_close(found["hessian"], inputs.t() @ inputs / len(inputs), rtol=1e-4, atol=1e-5)
            # of one model and itself the two are the same
            torch.testing.assert_close(found["cross"], found["hessian"], rtol=1e-4, atol=1e-6)


def test_what_two_models_give_an_expert_is_compared_for_the_same_tokens(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", "qwen3_moe", FEW)
    source = open_source(folder)
    block = FloatBlock(source, 0, LENGTH, CPU)
    random = torch.Generator().manual_seed(5)
    ours = torch.randn(5, LENGTH, 64, generator=random)
    # so far away that the router alone would send most tokens elsewhere
    theirs = torch.randn(5, LENGTH, 64, generator=random)
    for i, (stats, alone) in enumerate(zip(collect(block, ours, theirs), collect(block, ours, None), strict=True)):
        assert stats.keys() - alone.keys() == {"cross"}, i
        torch.testing.assert_close(stats["hessian"], alone["hessian"], rtol=1e-5, atol=1e-6)
    # and the next pass is free again
    again = collect(block, theirs, None)
    counts = [float(stats.get("tokens", torch.tensor(0.0))) for stats in again[2:8]]
    assert counts != [float(stats["tokens"]) for stats in collect(block, ours, None)[2:8]]


def test_positions_count_by_all_experts_of_a_kind(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", "qwen3_moe", FEW | {"mlp_only_layers": [0]})
    source = open_source(folder)
    positions = Probe(source, CPU, torch.float32, lambda *_: None).measure(WINDOWS, tmp_path).positions
    assert [len(p) for p in positions] == [4, 2 + 2 * 6]
    for kind in (positions[1][2:8], positions[1][8:]):
        assert torch.equal(kind, kind[:1].expand_as(kind))
        torch.testing.assert_close(kind.mean(-1), torch.ones(6))
    assert not torch.allclose(positions[1][2], positions[1][8], rtol=1e-2)


def test_experts_without_calibration_are_named_and_rounded_to_nearest(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", "qwen3_moe", FEW, torch.bfloat16)
    said: list[str] = []
    out, log = tmp_path / "q", tmp_path / "log"
    (tmp_path / "text").write_text("No.")
    options: dict[str, Any] = {"format": "int4g32", "method": "gptq", "windows": 1, "length": 2, "weighting": "even"}
    options["calibration"] = str(tmp_path / "text")
    summary = fewbit.quantize(folder, out, note=said.append, log=log, **options)
    # two tokens take at most four of six experts
    blocks = [
        {name.split(".experts.")[1].split(".")[0] for name in summary.unseen if f"layers.{i}." in name} for i in (0, 1)
    ]
    assert all(2 <= len(unseen) <= 4 for unseen in blocks)
    assert len(summary.unseen) == 3 * sum(map(len, blocks))
    for i, unseen in enumerate(blocks):
        numbers = ", ".join(sorted(unseen, key=int))
        line = f"block {i + 1} of 2: {len(unseen)} of 6 experts saw no calibration token"
        assert any(text.startswith(line) and text.endswith(f": {numbers}") for text in said), said
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    assert {f"model.layers.{x['block']}.{x['name']}" for x in lines if not x["calibrated"]} == set(summary.unseen)
    source, written_one = open_source(folder), open_checkpoint(out)
    for w in source.weights:
        if ".experts." not in w.name:
            continue
        q = source.read(w.name)
        nearest = rtn.quantize(parse(q.spec).dequantize(q), parse("int4g32"), {}, Target(torch.bfloat16))
        found = written_one.read(w.name)
        same = torch.equal(parse(found.spec).dequantize(found), parse("int4g32").dequantize(nearest))
        assert same == (w.name.removesuffix(".weight") in summary.unseen), w.name
    # the router stays as it was
    router = "model.layers.1.mlp.gate.weight"
    assert torch.equal(written_one.read(router).parts["weight"], source.read(router).parts["weight"])


def test_tuning_takes_experts_without_tokens(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", "mixtral", FEW | {"num_local_experts": 8}, torch.bfloat16)
    summary = fewbit.quantize(
        folder, tmp_path / "q", format="int4g32", method="tuned", effort=0, windows=2, length=2, weighting="even"
    )
    assert summary.unseen
    logits = fewbit.load(tmp_path / "q").forward([(Sequence(), [1, 2, 3])])
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_experts": 2**40}, "num_experts"),
        ({"num_experts": "many"}, "num_experts"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"mlp_only_layers": "none"}, "mlp_only_layers"),
        ({"decoder_sparse_step": 0.5}, "decoder_sparse_step"),
    ],
)
def test_configs_of_experts_are_checked(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(FewbitError, match=key):
        find_model("qwen3_moe").args(config_of("qwen3_moe", changes))
