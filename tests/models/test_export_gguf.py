"""Every architecture as a GGUF file: the file is the same model, or it is refused and says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.runtime.cache import Sequence
from fewbit.source import open_source
from tests.models.decoders import CASE_NAMES, CASES, rope, written

IDS = torch.randint(256, (40,), generator=torch.Generator().manual_seed(3)).tolist()
# what ggml has no key for, and what the error names
REFUSED = {
    "llama: dynamic": "stretched by 'dynamic'",
    "llama: longrope, long": "ropes",
    "llama: longrope, short": "ropes",
    "llama: yarn, its own temperature": "ropes",
    "qwen2: windows above": "windows",
    "qwen3: windows": "windows",
    "qwen3_moe: some layers plain": "sparse",
    "qwen3_moe: every second layer": "qkv_bias",
    "gemma2": "scale",
    "gemma2: no caps": "scale",
    "gemma2: low caps": "qkv_bias|scale",
    "gemma3_text": "scale",
    "gemma3_text: pattern": "windows|rotations|scale",
    "gemma3_text: as written before": "windows|rotations|scale",
    "smollm3: no positions in two": "rotations",
    "smollm3: windows": "rotations",
    "olmo2": "output matrix of its own",
    "olmo2: biases, all heads": "bias",
    "qwen3: biases": "bias",
}


# what GGUF can say of the models whose tiny configs are none that it can
SAYABLE = {
    "gemma2, sayable": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3_text, sayable": ("gemma3_text", {"query_pre_attn_scalar": 16, "num_hidden_layers": 7}),
    "gemma3_text, stretched": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        },
    ),
    "olmo2, untied": ("olmo2", {"tie_word_embeddings": False}),
    "llama, untied and llama3": (
        "llama",
        {"tie_word_embeddings": False}
        | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    ),
}


def with_merges(folder: Path) -> Path:
    """GGUF's readers want at least one merge."""
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text())
    document["model"]["vocab"] |= {"he": 258, "\u0120t": 259}
    document["model"]["merges"] = [["h", "e"], ["\u0120", "t"]]
    file.write_text(json.dumps(document))
    return folder


def logits(path: Path) -> torch.Tensor:
    model = fewbit.load(path, exact=True)
    return model.forward([(Sequence(), IDS)], wanted=list(range(len(IDS))))


def cases() -> list[Any]:
    known = dict(zip(CASE_NAMES, CASES, strict=True)) | SAYABLE
    return [pytest.param(name, *case, id=name) for name, case in known.items()]


@pytest.mark.parametrize(("name", "model", "changes"), cases())
def test_the_file_is_the_same_model(tmp_path: Path, name: str, model: str, changes: dict[str, Any]) -> None:
    folder = with_merges(written(tmp_path / "m", model, changes))
    out = tmp_path / "m.gguf"
    if name in REFUSED:
        with pytest.raises(FewbitError, match=REFUSED[name]) as caught:
            fewbit.export(folder, out, to="gguf", type="f32")
        assert "GGUF" in caught.value.what
        assert not out.exists()
        return
    summary = fewbit.export(folder, out, to="gguf", type="f32")
    assert summary.exact
    count = len(IDS)
    if model in ("mistral", "mixtral") and changes.get("sliding_window"):
        # told by the context's length
        count = changes["sliding_window"]
        assert "the window's 8 tokens" in summary.notes[0]
        assert fewbit.load(out, exact=True).context == count
    torch.testing.assert_close(logits(out)[:count], logits(folder)[:count], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["llama", "mixtral", "qwen3_moe", "phi3"])
def test_codes_are_kept_in_every_place(tmp_path: Path, model: str) -> None:
    """Permuted rows, stacks of experts, fused matrices: what was quantized stays as it is."""
    folder = with_merges(written(tmp_path / "m", model, {}))
    fewbit.quantize(folder, tmp_path / "q", format="int4g32", method="rtn")
    summary = fewbit.export(tmp_path / "q", tmp_path / "q.gguf", to="gguf")
    assert (summary.format, summary.exact) == ("q4_0", True)
    before, after = open_source(tmp_path / "q"), open_source(tmp_path / "q.gguf")
    for w in before.weights:
        first, second = (parse(s.spec(w.name)).dequantize(s.read(w.name)) for s in (before, after))
        assert torch.equal(first, second), w.name
