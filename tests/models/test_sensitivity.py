"""What positions and channels count equals gradients through transformers, and reaches the sums it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fewbit
from fewbit import sensitivity, walk
from fewbit.calibration import collect as collect_windows
from fewbit.checkpoint import open_checkpoint
from fewbit.methods import gptq, tuned
from fewbit.sensitivity import Probe, Sensitivity, by_octave, mean_one
from fewbit.source import open_source
from fewbit.tokenizer import Tokenizer
from tests.models.test_blocks import CPU, LENGTH, WINDOWS, seen_by, transformers_model, written

STACKS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
CHANGES: list[dict[str, Any]] = [{}, {"tie_word_embeddings": False, "attention_bias": True}]


@pytest.fixture(autouse=True)
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in several parts, logits a few tokens at a time, matrices multiplied in float32."""
    monkeypatch.setattr(sensitivity, "LOGITS", 2000)
    monkeypatch.setattr(sensitivity, "HEAD_ROWS", 100)
    monkeypatch.setattr(walk, "fast_product", lambda *_: torch.float32)


def drawn(logits: Tensor, window: int) -> Tensor:
    """Labels [length] of one window by inversion, a loop over tokens."""
    draws = torch.rand(len(logits), generator=torch.Generator().manual_seed(window))
    labels = []
    for p, u in zip(logits.double().softmax(-1), draws, strict=True):
        total, label = 0.0, 0
        while label < len(p) - 1 and (total := total + float(p[label])) < float(u):
            label += 1
        labels.append(label)
    return torch.tensor(labels)


def by_autograd(folder: Path, windows: Tensor) -> Sensitivity:
    """One backward pass through transformers for each window; octaves by a loop over positions."""
    model = transformers_model(folder)
    blocks, length = model.config.num_hidden_layers, windows.shape[1]
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, __, output: outputs.__setitem__(name, output)

    for name, module in model.named_modules():
        if name.endswith(("_proj", "embed_tokens")) or name.rpartition(".")[0].endswith("layers"):
            module.register_forward_hook(keep(name))
    tokens = torch.zeros(blocks, len(STACKS), length)
    channels = torch.zeros(blocks, model.config.hidden_size)
    entrances = torch.zeros(length, model.config.hidden_size)
    averaged = torch.empty_like(entrances)
    for number, window in enumerate(windows):
        logits = model(window[None]).logits[0]
        loss = F.cross_entropy(logits, drawn(logits.detach(), number), reduction="sum")
        names = sorted(outputs)
        found = dict(zip(names, torch.autograd.grad(loss, [outputs[n] for n in names]), strict=True))
        entrances += found["model.embed_tokens"].reshape(length, -1).square()
        for i in range(blocks):
            channels[i] += found[f"model.layers.{i}"].reshape(length, -1).square().sum(0)
            for j, stack in enumerate(STACKS):
                part = "self_attn" if j < 2 else "mlp"
                rows = torch.cat([found[f"model.layers.{i}.{part}.{n}"][0] for n in stack], -1)
                tokens[i, j] += rows.square().mean(-1)
    positions = torch.empty_like(tokens)
    for t in range(length):
        same = [u for u in range(length) if u.bit_length() == t.bit_length()]
        positions[:, :, t] = tokens[:, :, same].mean(-1)
    entrance = entrances / len(windows)
    for t in range(length):
        same = [u for u in range(length) if u.bit_length() == t.bit_length()]
        averaged[t] = entrance[same].mean(0)
    return Sensitivity(
        list(positions / positions.mean(-1, keepdim=True)),
        channels / channels.mean(-1, keepdim=True),
        list(positions.mean(-1) / len(windows)),
        averaged,
    )


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_gradients_equal_transformers(tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "PROBES", 4)
    folder = written(tmp_path, **changes)
    expected = by_autograd(folder, WINDOWS[:4])
    found = Probe(open_source(folder), CPU, torch.float32, lambda *_: None).measure(WINDOWS, tmp_path)
    # blocks' inputs are kept in 16 bits until the way back
    torch.testing.assert_close(torch.stack(found.positions), torch.stack(expected.positions), rtol=0.02, atol=1e-4)
    torch.testing.assert_close(found.channels, expected.channels, rtol=0.02, atol=1e-4)
    torch.testing.assert_close(torch.stack(found.scales), torch.stack(expected.scales), rtol=0.02, atol=0)
    torch.testing.assert_close(found.entrance, expected.entrance, rtol=0.05, atol=1e-6)
    assert torch.stack(expected.positions).std() > 0.2
    # the scratch file is gone
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_octaves_of_any_length() -> None:
    assert by_octave(torch.tensor([5.0])).tolist() == [5]
    assert by_octave(torch.tensor([[1.0, 2, 3, 5, 8, 10]])).tolist() == [[1, 2, 4, 4, 9, 9]]


def test_weights_have_mean_one_and_what_is_unusable_counts_the_same() -> None:
    found = mean_one(torch.stack([torch.arange(4.0), torch.zeros(4), torch.tensor([1.0, torch.inf, 0, 0])]))
    assert torch.equal(found[0], torch.arange(4.0) / 1.5)
    assert torch.equal(found[1:], torch.ones(2, 4))


def test_the_walk_weighs_tokens_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path)
    seen = []
    quantize = gptq.quantize
    monkeypatch.setattr(
        gptq, "quantize", lambda w, fmt, stats, target: (seen.append(stats), quantize(w, fmt, stats, target))[1]
    )
    options: dict[str, Any] = {"format": "int8", "head": "16bit", "method": "gptq", "device": "cpu"}
    fewbit.quantize(folder, tmp_path / "q", windows=6, length=LENGTH, **options)
    windows = collect_windows(None, Tokenizer(open_checkpoint(folder).tokenizer()), 6, LENGTH).windows
    weights = by_autograd(folder, windows).positions[0].double()
    inputs = seen_by(transformers_model(folder), windows)
    for j, (name, stats) in enumerate(zip(("q_proj", "o_proj", "gate_proj", "down_proj"), seen[1:5], strict=True)):
        x = inputs[f"model.layers.0.{'self_attn' if j < 2 else 'mlp'}.{name}"].double()
        expected = ((x.t() * weights[j].repeat(6)) @ x / len(x)).float()
        plain = (x.t() @ x / len(x)).float()
        off = (stats["hessian"] - expected).norm()
        assert off < 0.01 * expected.norm()
        assert off < 0.2 * (plain - expected).norm()


def test_tuning_is_told_what_channels_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path)
    told = []
    monkeypatch.setattr(tuned, "tune", lambda part, _: (told.append(part.channels), [q for _, q in part.solved])[1])
    options: dict[str, Any] = {"format": "int4g32", "method": "tuned", "windows": 6, "length": LENGTH, "device": "cpu"}
    fewbit.quantize(folder, tmp_path / "q", **options)
    fewbit.quantize(folder, tmp_path / "even", weighting="even", **options)
    windows = collect_windows(None, Tokenizer(open_checkpoint(folder).tokenizer()), 6, LENGTH).windows
    expected = by_autograd(folder, windows).channels
    torch.testing.assert_close(torch.stack(told[:3]), expected, rtol=0.02, atol=1e-4)
    assert torch.equal(torch.stack(told[3:]), torch.ones_like(expected))


def test_it_is_measured_once_and_gone_from_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path)
    measured = []
    measure = Probe.measure
    monkeypatch.setattr(Probe, "measure", lambda *args: (measured.append(1), measure(*args))[1])
    options: dict[str, Any] = {"format": "int4g32", "method": "gptq", "windows": 6, "length": LENGTH, "device": "cpu"}
    quantize = gptq.quantize
    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return quantize(*args)

    monkeypatch.setattr(gptq, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fewbit.quantize(folder, tmp_path / "q", **options)
    fewbit.quantize(folder, tmp_path / "q", **options)
    assert measured == [1]
    fewbit.quantize(folder, tmp_path / "whole", **options)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("q", "whole")]
    assert files[0] == files[1]
    assert walk.SENSITIVITY not in files[0]
