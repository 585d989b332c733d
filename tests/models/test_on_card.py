"""Whole models on a card: recorded steps are the eager ones, and the card says what the CPU says."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fewbit
from fewbit import FewbitError, walk
from fewbit.kernels import _nvrtc
from fewbit.runtime.cache import Sequence
from fewbit.runtime.engine import LanguageModel
from fewbit.runtime.sampler import Sampling
from tests.conftest import CONFIG, random_weights, write_folder


@pytest.fixture
def card() -> str:
    """The first card's name."""
    if reason := _nvrtc.missing():
        pytest.skip(reason)
    return "cuda:0"


@pytest.fixture(params=["bf16", "int4g32"])
def folder(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path) -> Path:
    if request.param == "bf16":
        return tiny_folder
    out = tmp_path / "quantized"
    fewbit.quantize(tiny_folder, out, format=request.param, head=request.param, method="rtn")
    return out


def steps(model: LanguageModel, prompts: list[list[int]], count: int) -> torch.Tensor:
    """Logits [count + 1, S, vocab] of prompts that run together, then greedy tokens."""
    sequences = [Sequence() for _ in prompts]
    found = [model.forward(list(zip(sequences, prompts, strict=True)))]
    for _ in range(count):
        new = found[-1].argmax(-1).tolist()
        found.append(model.forward([(s, [t]) for s, t in zip(sequences, new, strict=True)]))
    for s in sequences:
        model.allocator.truncate(s, 0)
    return torch.stack([f.cpu() for f in found])


def test_recorded_steps_are_the_eager_ones(card: str, folder: Path) -> None:
    model = fewbit.load(folder, device=card)
    assert model._graphs is not None
    for prompts in ([[5, 6, 7]], [[1, 2], [3, 4, 5], [6] * 70]):
        recorded = steps(model, prompts, 5)
        graphs, model._graphs = model._graphs, None
        # eager steps of the same bucket's size: products may depend on how many run together
        filled = prompts + [[9]] * ((1, 2, 4, 4)[len(prompts) - 1] - len(prompts))
        assert torch.equal(steps(model, filled, 5)[:, : len(prompts)], recorded)
        model._graphs = graphs


def test_the_card_says_what_the_cpu_says(card: str, folder: Path) -> None:
    prompts = [[5, 6, 7, 200, 31], list(range(100))]
    here = steps(fewbit.load(folder, device="cpu"), prompts, 12)
    there = steps(fewbit.load(folder, device=card), prompts, 12)
    kl = torch.nn.functional.kl_div(there.log_softmax(-1), here.log_softmax(-1), reduction="none", log_target=True)
    assert float(kl.sum(-1).mean()) < 0.01


def test_exact_runs_on_the_card_too(card: str, tiny_folder: Path) -> None:
    prompts = [[5, 6, 7, 200, 31]]
    here = steps(fewbit.load(tiny_folder, exact=True, device="cpu"), prompts, 3)
    there = steps(fewbit.load(tiny_folder, exact=True, device=card), prompts, 3)
    assert torch.allclose(here, there, atol=1e-4)


def test_answers_are_repeatable(card: str, tiny_folder: Path) -> None:
    model = fewbit.load(tiny_folder, device=card)
    for sampling in (Sampling(), Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=3, repetition_penalty=1.1)):
        one, two = ("".join(model.generate("hello", max_tokens=20, sampling=sampling)) for _ in range(2))
        assert one == two


def test_quantizing_on_a_card_asks_not_where_activations_lie(
    card: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the card, or in pinned host memory where it has no room: the same bytes."""
    options = {"format": "int3g32", "method": "gptq", "windows": 12, "length": 64, "drift": 0.25, "device": card}
    fewbit.quantize(tiny_folder, tmp_path / "card", **options)
    places: list[torch.device] = []
    place = walk.Walk._place

    def noted(*args: Any) -> torch.device:
        places.append(place(*args))
        return places[-1]

    monkeypatch.setattr(walk.Walk, "_place", noted)
    monkeypatch.setattr(walk, "card_free", lambda _: 0)
    fewbit.quantize(tiny_folder, tmp_path / "host", **options)
    assert [p.type for p in places] == ["cpu"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("card", "host"))
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_broken_weight_is_named_on_a_card(card: str, tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    folder = write_folder(tmp_path / "broken", weights)
    with pytest.raises(FewbitError, match=r"layers\.1\.mlp\.up_proj") as caught:
        fewbit.quantize(folder, tmp_path / "out", format="int4g32", method="gptq", windows=4, length=32, device=card)
    assert "[3, 4]" in caught.value.facts


def test_memory_that_ran_out_is_told_and_the_process_lives_on(card: str, tiny_folder: Path) -> None:
    before = "".join(fewbit.load(tiny_folder, device=card).generate("a", max_tokens=3))
    gc.collect()
    torch.cuda.empty_cache()
    held, threads = torch.cuda.memory_allocated(), threading.active_count()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(FewbitError, match="card has no memory left") as caught:
            fewbit.load(tiny_folder, device=card, context=1024)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    assert torch.cuda.memory_allocated() == held
    assert threading.active_count() == threads
    assert "weights" in caught.value.facts
    assert "workspace" in caught.value.facts
    assert "free now" in caught.value.facts
    assert "".join(fewbit.load(tiny_folder, device=card).generate("a", max_tokens=3)) == before
