"""What a part is said to lose is what transformers' predictions do lose when that part alone is rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.formats import parse
from fewbit.methods import Target, gptq, rtn
from fewbit.rates import Meter, Part
from fewbit.source import open_source
from tests.models.test_blocks import CPU, LENGTH, transformers_model, written

SPECS = ("int4g32", "int6g32", "int8")
WINDOWS = torch.randint(256, (8, LENGTH), generator=torch.Generator().manual_seed(3))


def measured(folder: Path, tmp_path: Path) -> list[Part]:
    source = open_source(folder)
    meter = Meter(source, rtn, Target(source.dtype), CPU, torch.float32, lambda *_: None, SPECS)
    return meter.measure(WINDOWS, SPECS, tmp_path)[0]


def divergence(folder: Path, part: Part, spec: str) -> float:
    """Mean KL of transformers' predictions, with the tensors of `part` replaced by rounded ones."""
    source = open_source(folder)
    model = transformers_model(folder)
    with torch.inference_mode():
        exact = model(WINDOWS).logits.double().log_softmax(-1)
        for name in part.tensors:
            owner = model.get_parameter(name)
            w = source.read(name).parts["weight"].float()
            owner.copy_(parse(spec).dequantize(rtn.quantize(w, parse(spec), {}, Target(source.dtype))))
        moved = model(WINDOWS).logits.double().log_softmax(-1)
    return float((exact.exp() * (exact - moved)).sum(-1).mean())


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=str)
def test_losses_are_those_of_the_real_predictions(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = written(tmp_path, **changes)
    parts = measured(folder, tmp_path)
    assert [p.name for p in parts[:4]] == [
        f"model.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    assert [p.tensors for p in parts[12:]] == [("model.embed_tokens.weight",), ("lm_head.weight",)][: 1 + bool(changes)]
    ratios = []
    for part in parts:
        assert [c.spec for c in part.item.choices] == list(SPECS)
        # small enough for second order
        choice = part.item.choices[1]
        ratios.append(choice.loss / divergence(folder, part, choice.spec))
    logs = torch.tensor(ratios).log()
    assert logs.mean().abs() < 0.25, ratios
    assert logs.abs().max() < 1.2, ratios


def test_bytes_are_those_that_are_written(tmp_path: Path) -> None:
    folder = written(tmp_path)
    source = open_source(folder)
    shapes = {w.name: w.shape for w in source.weights}
    for part in measured(folder, tmp_path):
        for choice in part.item.choices:
            sizes = [parse(choice.spec).nbytes(shapes[name], source.dtype) for name in part.tensors]
            assert choice.nbytes == sum(sizes)


def test_every_matrix_of_the_model_is_in_one_part(tmp_path: Path) -> None:
    folder = written(tmp_path)
    names = [name for part in measured(folder, tmp_path) for name in part.tensors]
    assert sorted(names) == sorted(w.name for w in open_source(folder).weights if len(w.shape) == 2)


def test_a_head_in_slices_is_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path)
    whole = measured(folder, tmp_path)[-1]
    monkeypatch.setattr("fewbit.sensitivity.HEAD_ROWS", 100)
    monkeypatch.setattr("fewbit.sensitivity.LOGITS", 5000)
    monkeypatch.setattr("fewbit.walk.SLICE_WEIGHTS", 64 * 40)
    sliced = measured(folder, tmp_path)[-1]
    for a, b in zip(whole.item.choices, sliced.item.choices, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=str)
def test_configurations_are_judged_by_the_whole_rounded_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = written(tmp_path, **changes)
    source = open_source(folder)
    meter = Meter(source, rtn, Target(source.dtype), CPU, torch.float32, lambda *_: None, SPECS)
    held_out = torch.randint(256, (6, LENGTH), generator=torch.Generator().manual_seed(4))
    configs = [lambda _: "int4g32", lambda name: "int8" if "mlp" in name else "int4g32"]
    parts, joints = meter.measure(WINDOWS, SPECS, tmp_path, held_out, configs)
    for config, joint in zip(configs, joints, strict=True):
        assert joint.picks == {part.name: config(part.name) for part in parts}
        model = transformers_model(folder)
        with torch.inference_mode():
            exact = model(held_out).logits[:, LENGTH // 2 :].double().log_softmax(-1)
            for part in parts:
                fmt = parse(joint.picks[part.name])
                for name in part.tensors:
                    w = source.read(name).parts["weight"].float()
                    rounded = fmt.dequantize(rtn.quantize(w, fmt, {}, Target(source.dtype)))
                    model.get_parameter(name).copy_(rounded)
            moved = model(held_out).logits[:, LENGTH // 2 :].double().log_softmax(-1)
        expected = float((exact.exp() * (exact - moved)).sum(-1).mean())
        # rounded weights wait in 16 bits
        assert joint.kl == pytest.approx(expected, rel=0.03)


def test_specs_beside_the_anchors_are_inferred(tmp_path: Path) -> None:
    """GPTQ at one of three specs: the others follow plain rounding by what it gained there."""
    source = open_source(written(tmp_path))
    specs = ("int4g32", "int4g64", "int8")

    def losses(anchors: tuple[str, ...]) -> Tensor:
        meter = Meter(source, gptq, Target(source.dtype, effort=0), CPU, torch.float32, lambda *_: None, anchors)
        parts, _ = meter.measure(WINDOWS, specs, tmp_path)
        return torch.tensor([[c.loss for c in part.item.choices] for part in parts])

    exact, inferred = losses(specs), losses(specs[:1])
    assert torch.equal(exact[:, 0], inferred[:, 0])
    ratios = (inferred[:12, 1:] / exact[:12, 1:]).log()
    assert ratios.abs().mean() < 0.25
    assert not torch.equal(exact[:, 1], inferred[:, 1])
