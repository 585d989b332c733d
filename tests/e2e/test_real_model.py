"""The embedded default model, SmolLM2-135M-Instruct, against transformers and against itself in fewer bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fewbit
from fewbit import store
from fewbit.runtime.cache import Sequence
from fewbit.runtime.engine import LanguageModel

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived",
    "Q: If a train travels 60 miles in 45 minutes, how fast is it going?\nA:",
]
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def gguf() -> Path:
    """Fetched into the cache by its hash at first use."""
    return store.locate("smollm2")


@pytest.fixture(scope="module")
def theirs(gguf: Path) -> Any:
    """transformers' own reading of the file, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()


def agree(model: LanguageModel, theirs: Any) -> tuple[float, float]:
    """Teacher-forced on their greedy tokens: mean KL, and the largest gap of our choice below their top, in nats."""
    kls, gaps = [], []
    for prompt in PROMPTS:
        ids = model.tokenizer.encode(prompt)
        with torch.inference_mode():
            step, rows = theirs(torch.tensor([ids]), use_cache=True), []
            for _ in range(32):
                rows.append(step.logits[0, -1].log_softmax(-1))
                ids.append(int(rows[-1].argmax()))
                step = theirs(torch.tensor([ids[-1:]]), past_key_values=step.past_key_values, use_cache=True)
            expected = torch.stack(rows)
        sequence = Sequence()
        # the prompt at once, then token by token, as generation runs
        found = [model.prefill(sequence, ids[:-32])]
        found += [model.forward([(sequence, [i])])[0] for i in ids[-32:-1]]
        model.allocator.truncate(sequence, 0)
        got = torch.stack(found).log_softmax(-1)
        kls.append((expected.exp() * (expected - got)).sum(-1))
        choice = got.argmax(-1, keepdim=True)
        gaps.append((expected.amax(-1, keepdim=True) - expected.gather(1, choice)).squeeze(1))
    return float(torch.cat(kls).mean()), float(torch.cat(gaps).max())


def save(theirs: Any, folder: Path, tokenizer: str) -> Path:
    """Their float32 weights as a folder; transformers itself does not save what it read from a GGUF file."""
    folder.mkdir()
    weights = {k: v.contiguous() for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors")
    config = {k: v for k, v in theirs.config.to_diff_dict().items() if k != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def test_gguf_and_safetensors_agree_with_transformers(gguf: Path, theirs: Any, tmp_path: Path) -> None:
    model = fewbit.load(gguf, exact=True)
    kl, gap = agree(model, theirs)
    assert kl <= 1e-4
    assert gap <= 0.1
    folder = save(theirs, tmp_path / "folder", model.tokenizer.data.json)
    kl, gap = agree(fewbit.load(folder, exact=True), theirs)
    assert kl <= 1e-4
    assert gap <= 0.1


def test_default_kernels_agree_within_activation_rounding(gguf: Path, theirs: Any) -> None:
    # measured: 0.0034 and 0.22; activations in 8 bits turn some near ties of so small a model
    kl, gap = agree(fewbit.load(gguf), theirs)
    assert kl <= 0.01
    assert gap <= 0.4


def test_int4g32_keeps_paris_and_streams_it(gguf: Path, tmp_path: Path) -> None:
    summary = fewbit.quantize(gguf, tmp_path / "q", format="int4g32", method="rtn")
    assert summary.float16_bytes / summary.weight_bytes > 3
    model = fewbit.load(tmp_path / "q")
    answer = model.chat(QUESTION, max_tokens=32)
    pieces = list(answer)
    assert "Paris" in "".join(pieces)
    assert len(pieces) > 3
    assert answer.stats.finish_reason == "stop"


def test_the_tokenizer_splits_digits_one_by_one(gguf: Path) -> None:
    tokenizer = fewbit.load(gguf).tokenizer
    ids = tokenizer.encode("In 1984 there were 365 days.")
    assert [tokenizer.decode([i]) for i in ids if tokenizer.decode([i]).strip().isdigit()] == list("1984365")
