"""Llama against transformers on tiny random configs; cached = uncached, batched = single, chunked = whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.errors import FewbitError
from fewbit.rotary import Rope, RopeArgs
from fewbit.runtime.cache import Sequence
from fewbit.runtime.engine import LanguageModel
from tests.conftest import CONFIG, random_weights, write_folder

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "one key-value head": {"num_key_value_heads": 1},
    "all heads": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "float32": {"dtype": "float32"},
}
IDS = torch.randint(256, (70,), generator=torch.Generator().manual_seed(3)).tolist()


def logits(model: LanguageModel, ids: list[int], chunk: int = 1000) -> torch.Tensor:
    sequence, found = Sequence(), []
    for i in range(0, len(ids), chunk):
        new = ids[i : i + chunk]
        found.append(model.forward([(sequence, new)], wanted=list(range(len(new)))))
    model.allocator.truncate(sequence, 0)
    return torch.cat(found)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_folder(tmp_path / "m", **changes)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS])).logits[0]
    got = logits(fewbit.load(folder, exact=True), IDS)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_cached_equals_uncached(tiny_folder: Path, chunk: int) -> None:
    model = fewbit.load(tiny_folder, exact=True)
    torch.testing.assert_close(logits(model, IDS, chunk), logits(model, IDS), rtol=1e-4, atol=1e-4)


def test_batched_equals_single_with_scattered_pages(tiny_folder: Path) -> None:
    model = fewbit.load(tiny_folder, exact=True)
    texts = [IDS[:30], IDS[10:11], IDS[20:70] * 6]
    expected = [logits(model, ids)[-1] for ids in texts]
    model.allocator.free.reverse()
    model.allocator.free[0], model.allocator.free[-1] = model.allocator.free[-1], model.allocator.free[0]
    sequences = [Sequence() for _ in texts]
    # the first step leaves one token of the longer ones, the second mixes prefill and decode
    model.forward([(s, ids[:-1]) for s, ids in zip(sequences, texts, strict=True) if len(ids) > 1])
    steps = [(s, ids[-1:]) for s, ids in zip(sequences, texts, strict=True)]
    torch.testing.assert_close(model.forward(steps), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_default_kernels_stay_near_the_definition(tiny_folder: Path) -> None:
    exact, default = (logits(fewbit.load(tiny_folder, exact=e), IDS).log_softmax(-1) for e in (True, False))
    kl = (exact.exp() * (exact - default)).sum(-1).mean()
    assert 0 <= kl < 0.01


def test_a_quantized_model_runs_its_layers_in_one_call(tiny_folder: Path, tmp_path: Path) -> None:
    from fewbit.kernels._cpu_ops import NativeStack
    from fewbit.kernels.ops import Stack

    fewbit.quantize(tiny_folder, tmp_path / "q", format="int4g32", head="int4g32", method="rtn")
    model, plain = (fewbit.load(tmp_path / "q") for _ in range(2))
    assert isinstance(model.model.stack, NativeStack)
    plain.model.stack = Stack(plain.model.stack.ops, plain.model.stack.layers)
    plain.model.allocate(1024, torch.float16)
    ids, whole = IDS * 5, logits(model, IDS * 5)
    assert torch.equal(whole, logits(plain, ids))
    # an answer does not depend on how its prompt was cut
    for chunk in (1, 5, 64):
        assert torch.equal(whole, logits(model, ids, chunk))


def test_greedy_text_equals_transformers(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = fewbit.load(tiny_folder, exact=True)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    prompt = torch.tensor([IDS[:20]])
    # without the mask, transformers takes tokens that equal the padding's id for padding
    out = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=257,
        pad_token_id=0,
    )
    generation = model.generate(IDS[:20], max_tokens=24)
    assert "".join(generation) == model.tokenizer.decode(out[0, 20:].tolist())
    assert generation.stats.finish_reason == ("stop" if out[0, -1] == 257 else "length")


def test_a_chat_reuses_what_it_has_cached(tiny_folder: Path) -> None:
    model, fresh = (fewbit.load(tiny_folder, exact=True) for _ in range(2))
    messages = [{"role": "user", "content": "one two three"}]
    first = model.chat(messages, max_tokens=8)
    answer = "".join(first)
    assert first.stats.cached_tokens == 0
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "four"}]
    second = model.chat(messages, max_tokens=8)
    assert "".join(second) == "".join(fresh.chat(messages, max_tokens=8))
    assert second.stats.cached_tokens >= 30


def test_context_overflow_says_the_numbers(tiny_folder: Path) -> None:
    model = fewbit.load(tiny_folder, context=16)
    with pytest.raises(FewbitError, match=r"16 tokens; the context holds 16"):
        model.generate(IDS[:16])
    generation = model.generate(IDS[:10])
    list(generation)
    assert generation.stats.new_tokens == 6
    assert generation.stats.finish_reason == "length"
    with pytest.raises(FewbitError, match=r"at most 1,024"):
        fewbit.load(tiny_folder, context=4096)


def test_a_newer_answer_ends_an_older_one(tiny_folder: Path) -> None:
    model = fewbit.load(tiny_folder, exact=True)
    first = model.generate(IDS[:9], max_tokens=40)
    next(first)
    expected = "".join(model.generate(IDS[9:19], max_tokens=5))
    with pytest.raises(FewbitError, match="newer"):
        list(first)
    assert "".join(model.generate(IDS[9:19], max_tokens=5)) == expected


def test_an_interrupt_inside_a_step_leaves_a_usable_conversation(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fewbit.load(tiny_folder, exact=True)
    expected = "".join(model.generate(IDS[:30], max_tokens=6))
    fresh = fewbit.load(tiny_folder, exact=True)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        # the first layer's keys and values are written by then
        m.setattr(fresh.model.stack.ops, "attend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(fresh.generate(IDS[:30], max_tokens=6))
    again = fresh.generate(IDS[:30], max_tokens=6)
    assert "".join(again) == expected
    assert again.stats.cached_tokens == 0


def test_threads_that_share_a_model_get_whole_answers_or_an_error(tiny_folder: Path) -> None:
    model = fewbit.load(tiny_folder, exact=True)
    prompts = [IDS[:12], IDS[20:45]]
    expected = ["".join(model.generate(p, max_tokens=10)) for p in prompts]

    def ask(i: int) -> bool:
        try:
            return "".join(model.generate(prompts[i % 2], max_tokens=10)) == expected[i % 2]
        except FewbitError as e:
            return "newer" in e.what

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(60)))
    assert "".join(model.generate(prompts[0], max_tokens=10)) == expected[0]


def test_a_model_that_yields_nan_says_so(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    model = fewbit.load(write_folder(tmp_path / "m", weights))
    with pytest.raises(FewbitError, match="not a number"):
        list(model.generate(IDS[:5]))


def test_impossible_threads_are_an_error(tiny_folder: Path) -> None:
    for threads in (0, -1, 100_000):
        with pytest.raises(FewbitError, match="threads"):
            fewbit.load(tiny_folder, threads=threads)


def test_the_reference_never_takes_over_in_silence(tiny_folder: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny_folder, tmp_path / "odd", format="int4g48", method="rtn")
    fewbit.quantize(tiny_folder, tmp_path / "even", format="int4g32", method="rtn")
    assert "48" in " ".join(fewbit.load(tmp_path / "odd").notes)
    assert fewbit.load(tmp_path / "even").notes == []
    assert fewbit.load(tmp_path / "odd", exact=True).notes == []


def test_float16_weights_take_activations_beyond_float16(tmp_path: Path) -> None:
    from fewbit.kernels.dense import backend
    from fewbit.qtensor import QTensor

    packed = backend().prepare([QTensor("f16", (3, 4), {"weight": torch.full((3, 4), 0.5, dtype=torch.float16)})])
    assert backend().matmul(torch.full((2, 4), 1e6), packed).tolist() == [[2e6] * 3] * 2


def test_bad_token_ids_and_empty_prompts_are_errors(tiny_folder: Path) -> None:
    model = fewbit.load(tiny_folder)
    for ids in ([320], [-1], []):
        with pytest.raises(FewbitError):
            model.generate(ids)


@pytest.mark.parametrize("width", [2, 30, 64])
def test_a_positions_angles_are_the_same_bits_whenever_they_are_asked_for(width: int) -> None:
    args = RopeArgs(1e4)
    slow, fast = Rope(args, width), Rope(args, width)
    everything = torch.arange(1500)
    cos, sin = fast(everything)
    angle = everything.double()[:, None] * args.frequencies(width).double()
    # float32 positions times float32 frequencies are off by half a step of 1500
    torch.testing.assert_close(cos.double(), angle.cos(), rtol=0, atol=2e-4)
    torch.testing.assert_close(sin.double(), angle.sin(), rtol=0, atol=2e-4)
    for positions in ([0], [3, 1, 3], [255, 256], [1030], [700, 0], []):
        chosen = torch.tensor(positions, dtype=torch.int64)
        for got, whole in zip(slow(chosen), (cos, sin), strict=True):
            assert got.is_contiguous()
            assert torch.equal(got, whole[chosen])


def test_unknown_rope_scaling_is_an_error() -> None:
    with pytest.raises(FewbitError, match="spiral"):
        RopeArgs.from_config({"rope_scaling": {"type": "spiral", "factor": 4.0}, "rope_theta": 1e4})


def test_old_spelling_of_rope_means_the_same() -> None:
    new = RopeArgs.from_config({"rope_parameters": LLAMA3})
    old = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert RopeArgs.from_config({"rope_theta": 10000.0, "rope_scaling": old}) == new
