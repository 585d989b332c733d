"""Where a model goes: by the arithmetic of what it takes and what a card has free, in words where it goes nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import FewbitError
from fewbit.cli import main
from fewbit.formats import parse
from fewbit.kernels import _nvrtc, triton
from fewbit.random_models import random_model
from fewbit.runtime import placement
from fewbit.runtime.graphs import bucket
from fewbit.runtime.placement import Card, out_of_memory, place, plan

GIB = 1 << 30
HALF = torch.float16


def card(index: int = 0, free: float = 80, capability: tuple[int, int] = (9, 0)) -> Card:
    return Card(index, f"Card {index}", int(free * GIB), 80 * GIB, capability)


AUTOMATIC = placement._automatic


@pytest.fixture
def have(monkeypatch: pytest.MonkeyPatch) -> Any:
    """have(*cards): these are the machine's, and kernels can be compiled."""

    def pretend(*cards: Card, missing: str | None = None, without: str | None = "triton is not there") -> None:
        monkeypatch.setattr(placement, "_automatic", AUTOMATIC)
        monkeypatch.setattr(placement, "cards", lambda: list(cards))
        monkeypatch.setattr(placement, "_sees_cards", lambda: bool(cards))
        monkeypatch.setattr(_nvrtc, "missing", lambda: missing)
        monkeypatch.setattr(triton, "missing", lambda: without)

    return pretend


@pytest.fixture
def source() -> Any:
    return random_model("llama-2-70b", "int4g128")


def test_a_plan_counts_what_is_stored_and_cached(source: Any) -> None:
    found = plan(source, 4096, False, HALF)
    linears = 80 * (8192 * (8192 + 2 * 1024 + 8192) + 3 * 8192 * 28672)
    ends = 2 * 32000 * 8192
    assert found.weights == (linears + ends) * 33 // 64 + 4 * 161 * 8192
    assert found.cache == 2 * 80 * 4096 * 1024 * 2
    # with 4k of context in 40 GB, everything counted
    assert 36e9 < found.total < 40e9
    assert plan(source, 8192, False, HALF).cache == 2 * found.cache
    exact = plan(source, 4096, True, torch.float32)
    assert exact.weights == 4 * (linears + ends + 161 * 8192)
    assert exact.cache == 2 * found.cache
    # a card's heads in 8 bits begin at multiples of 8 bytes
    assert plan(source, 4096, False, torch.int8).cache == found.cache * 136 // 256
    assert plan(source, 4096, False, torch.int8, on_card=False).cache == found.cache * 130 // 256
    int4 = plan(source, 4096, False, torch.uint8)
    assert int4.cache == found.cache * (64 + 4 * 4) // 256
    # a layer's keys and values are read back for a prompt
    assert int4.workspace == found.workspace + 2 * 4096 * 1024 * 2
    # prompts run in smaller pieces on a CPU
    assert plan(source, 4096, False, HALF, on_card=False).workspace < found.workspace
    assert str(found).startswith("It takes 3")
    assert all(word in str(found) for word in ("weights", "cache", "workspace", "GiB"))


@pytest.mark.parametrize("with_triton", [False, True])
def test_a_plan_counts_what_the_reference_widens(with_triton: bool, have: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 48 columns are for no tile; scattered ones for no kernel at all."""
    have(card(), without=None if with_triton else "triton is not there")
    first = "model.layers.0.self_attn.q_proj.weight"
    narrow, whole = (
        random_model("smollm2-135m", f"{spec},o_proj={spec}", head="int8") for spec in ("int4g48", "int4g64")
    )
    linears = sum(torch.Size(w.shape).numel() for w in narrow.weights if w.role == "linear")
    stored = sum(
        parse(narrow.spec(w.name)).nbytes(w.shape, torch.bfloat16) for w in narrow.weights if w.role == "linear"
    )
    on_card, on_cpu = plan(narrow, 1024, False, HALF), plan(narrow, 1024, False, HALF, on_card=False)
    assert on_card.weights - on_cpu.weights == (0 if with_triton else 4 * linears - stored)
    same = plan(whole, 1024, False, HALF)
    head = plan(random_model("smollm2-135m", "int4g48"), 1024, False, HALF)
    # dequantized beside its place, the embedding is the largest
    assert head.workspace - same.workspace == (0 if with_triton else 3 * 49152 * 576)
    assert same.weights == plan(whole, 1024, False, HALF, on_card=False).weights
    # one scattered matrix takes those along that are stacked with it: q, k and v (and o, which is as wide)
    monkeypatch.setattr(type(whole.checkpoint), "scattered", lambda *asked: asked[-1] == first)
    more = plan(whole, 1024, False, HALF)
    attention = [w for w in whole.weights if w.block == 0 and "self_attn" in w.name]
    widened = sum(4 * torch.Size(w.shape).numel() for w in attention)
    assert more.weights - same.weights == widened - sum(
        parse(whole.spec(w.name)).nbytes(w.shape, torch.bfloat16) for w in attention
    )
    assert more.workspace >= same.workspace


def test_triton_stands_in_and_says_so(source: Any, have: Any) -> None:
    have(card(), missing="cuda-bindings can't be loaded", without=None)
    for found in (place("auto", source, 4096), place("cuda", source, 4096)):
        assert found.device.type == "cuda"
        assert str(found.note).count(".") == 1
        assert "Triton, more slowly" in str(found.note)
        assert "cuda-bindings can't be loaded; `pip install 'fewbit[cuda]'`" in str(found.note)
    assert place("cuda", random_model("smollm2-135m", "int4g64"), 64, exact=True, cached=torch.float32).note is None
    have(card(), missing="cuda-bindings can't be loaded", without="there is no C compiler")
    with pytest.raises(FewbitError, match="can't be used") as caught:
        place("cuda", source, 4096)
    assert "cuda-bindings can't be loaded; there is no C compiler" in caught.value.facts


def test_auto_takes_a_card_that_has_room_and_says_why_not(source: Any, have: Any) -> None:
    have(card(free=60))
    found = place("auto", source, 4096)
    assert (found.device, found.note) == (torch.device("cuda", 0), None)
    need = found.plan.total / GIB
    have(card(free=need + 0.01))
    assert place("auto", source, 4096).device.type == "cuda"
    have(card(free=need - 0.01))
    small = place("auto", source, 4096)
    assert small.device.type == "cpu"
    assert small.note is not None
    assert "The CPU is used" in small.note
    assert "weights" in small.note
    have(card(capability=(7, 5)))
    assert "compute capability 7.5; the kernels need 8.0" in str(place("auto", source, 4096).note)
    have(card(), missing="cuda-bindings can't be imported")
    assert "cuda-bindings can't be imported" in str(place("auto", source, 4096).note)
    with pytest.raises(FewbitError, match="cuda:0 can't be used"):
        place("cuda", source, 4096)
    have()
    assert place("cpu", source, 4096).note is None


def test_without_a_card_nothing_is_said_unless_a_driver_is_there(
    source: Any, have: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    have()
    monkeypatch.setattr(placement, "_DRIVER", tmp_path / "nvidia0")
    assert place("auto", source, 4096).note is None
    (tmp_path / "nvidia0").touch()
    assert "built without CUDA" in str(place("auto", source, 4096).note)


def test_several_cards_are_never_silently_ignored(source: Any, have: Any) -> None:
    have(card(0, free=20), card(1, free=70), card(2, free=79, capability=(7, 0)))
    with pytest.raises(FewbitError, match="several cards") as caught:
        place("cuda", source, 4096)
    assert "cuda:0 (Card 0), cuda:1 (Card 1)" in caught.value.facts
    found = place("auto", source, 4096)
    assert found.device == torch.device("cuda", 1)
    assert "One of 3 cards" in str(found.note)
    assert place("cuda:1", source, 4096).device.index == 1
    with pytest.raises(FewbitError, match="no card cuda:3"):
        place("cuda:3", source, 4096)
    with pytest.raises(FewbitError, match="cuda:2 can't be used"):
        place("cuda:2", source, 4096)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA", "", "cuda:1000"])
def test_names_that_are_no_device(source: Any, have: Any, name: str) -> None:
    have(card())
    with pytest.raises(FewbitError, match="is not a device"):
        place(name, source, 4096)


def test_what_does_not_fit_is_told_with_the_plans_numbers(
    source: Any, have: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(card(free=24))
    with pytest.raises(FewbitError, match="does not fit the card") as caught:
        place("cuda:0", source, 4096)
    facts = caught.value.facts
    assert all(
        word in facts for word in ("weights 3", "cache 1.25 GiB", "workspace", "24.00 GiB of 80.00 GiB are free")
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB, 24 * GIB))
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB"
    error = out_of_memory(plan(source, 4096, False, HALF), torch.device("cuda", 0), said)
    assert "1.00 GiB of 24.00 GiB are free now. CUDA out of memory." in error.facts
    assert "weights" in error.facts


def test_the_command_line_says_that_there_is_no_card(
    tiny_folder: Path, have: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    have()
    assert main(["run", str(tiny_folder), "hello", "--device", "cuda", "--max-tokens", "1"]) == 1
    assert "There is no card to run on." in capsys.readouterr().err
    assert main(["bench", str(tiny_folder), "--device", "cuda:0"]) == 1
    assert "There is no card to run on." in capsys.readouterr().err


def test_a_note_is_printed(tiny_folder: Path, have: Any, capsys: pytest.CaptureFixture[str]) -> None:
    have(card(free=0.001))
    assert main(["run", str(tiny_folder), "hello", "--max-tokens", "1"]) == 0
    assert "note: The CPU is used, not the card cuda:0." in capsys.readouterr().err
    assert fewbit.load(tiny_folder).device == torch.device("cpu")


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 9, 16, 17)] == [1, 2, 4, 4, 8, 16, 16, None]


SIZES = {
    "llama-2-7b": 6.74e9,
    "llama-2-13b": 13.0e9,
    "llama-2-70b": 69.0e9,
    "llama-3-8b": 8.03e9,
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.6e9,
    "llama-3.2-1b": 1.24e9,
    "llama-3.2-3b": 3.21e9,
    "smollm2-135m": 0.135e9,
    "smollm2-1.7b": 1.71e9,
}


@pytest.mark.parametrize("name", SIZES)
def test_shapes_have_as_many_weights_as_the_models_they_are_named_after(name: str) -> None:
    found = random_model(name, "int4g64")
    count = sum(torch.Size(w.shape).numel() for w in found.weights)
    assert count == pytest.approx(SIZES[name], rel=0.005)


def test_formats_go_by_the_ends_of_names() -> None:
    found = random_model("smollm2-135m", "int2g64,down_proj=int3g64,q_proj=int8", "int4g32")
    specs = {w.name: found.spec(w.name) for w in found.weights}
    assert specs["model.layers.3.mlp.down_proj.weight"] == "int3g64"
    assert specs["model.layers.0.self_attn.q_proj.weight"] == "int8"
    assert specs["model.layers.0.self_attn.k_proj.weight"] == "int2g64"
    assert specs["model.embed_tokens.weight"] == "int4g32"
    assert specs["model.norm.weight"] == "bf16"
    for formats, said in (
        ("int2g64,down=int3g64", "No linear of smollm2-135m is called 'down'"),
        ("int2g64,int3g64", "does not say which linears"),
        ("int9", "is not a format"),
    ):
        with pytest.raises(FewbitError, match=said):
            random_model("smollm2-135m", formats)
    with pytest.raises(FewbitError, match="no shape that fewbit knows"):
        random_model("llama-2-71b", "int4g64")


@pytest.mark.parametrize("spec", ["int2g64", "int3g32a", "int4g128", "int8", "bf16"])
def test_random_weights_are_of_their_format_and_spread(spec: str) -> None:
    found = random_model("smollm2-135m", spec)
    name = "model.layers.7.mlp.up_proj.weight"
    q, again = found.read(name), found.read(name)
    layout = parse(spec).layout((1536, 576), found.dtype)
    assert {n: (p.dtype, tuple(p.shape)) for n, p in q.parts.items()} == layout
    assert all(torch.equal(q.parts[n], again.parts[n]) for n in q.parts)
    w = parse(spec).dequantize(q)
    assert 0.5 < float(w.std()) * 576**0.5 < 2
    other = parse(spec).dequantize(found.read(name.replace("7", "8")))
    assert not torch.equal(w, other)
    part = found.read(name, (3, 9))
    assert torch.equal(parse(spec).dequantize(part), w[3:9])


def test_bench_runs_random_weights_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbit import random_models

    shape = random_models.SHAPES["smollm2-135m"] | {"num_hidden_layers": 1, "vocab_size": 512}
    monkeypatch.setitem(random_models.SHAPES, "smollm2-135m", shape)
    asked = [
        "bench",
        "--random",
        "smollm2-135m",
        "--format",
        "int4g64",
        "--prompt",
        "3",
        "--tokens",
        "2",
        "--rounds",
        "1",
    ]
    assert main([*asked, "--device", "cpu"]) == 0
    assert "smollm2-135m (random weights)" in capsys.readouterr().out
    for argv in (["bench"], ["bench", "model", "--random", "smollm2-135m"]):
        assert main(argv) == 2
        assert "One model is needed." in capsys.readouterr().err
    for option in ("--format", "--head"):
        assert main(["bench", "model", option, "int8"]) == 2
        assert f"{option} is for --random." in capsys.readouterr().err
