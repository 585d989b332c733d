"""A model's facts as GGUF's metadata: the inverse of each architecture's `gguf_config`.

Keys after gguf-py's constants and llama.cpp's converters. What is written is read back, and must describe the same
model; what GGUF has no key for is refused.
"""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint._gguf_writer import Value
from fewbit.errors import FewbitError
from fewbit.models import find_gguf_model
from fewbit.rotary import RopeArgs
from fewbit.source import Source

# model_type -> general.architecture, where they differ
ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
# llama.cpp wants `output.weight` of these
UNTIED = ("olmo2",)


def architecture(source: Source) -> str:
    """ggml's word for the model's; FewbitError where llama.cpp has none that fewbit knows."""
    kind = str(source.config.get("model_type"))
    name = ARCHITECTURES.get(kind, kind)
    if kind not in ARCHITECTURES and not hasattr(source.module, "GGUF"):
        raise FewbitError(
            f"fewbit writes no GGUF files of the architecture {kind!r}.",
            "It has no table of ggml's tensor names for it.",
            "Export to compressed-tensors.",
        )
    return name


def describe(source: Source) -> tuple[dict[str, Value], dict[str, Tensor], list[str]]:
    """Metadata of the model itself, the small tensors that belong to it (rotary factors), and notes.

    FewbitError where a file with these would be another model.
    """
    args, config, arch = source.args, source.config, architecture(source)
    notes: list[str] = []
    context = int(config.get("max_position_embeddings") or args.max_position_embeddings)
    windows = set(args.windows)
    if config.get("model_type") in ("mistral", "mixtral") and len(windows - {0}) == 1:
        context = min(context, *windows)
        notes.append(f"ggml's llama has no sliding window: the context is given as the window's {context:,} tokens")
    if arch == "phi3" and any(windows):
        notes.append(f"llama.cpp sees all tokens where the model has a window of {max(windows):,}")
    if arch in UNTIED and args.tie_word_embeddings:
        raise _unsayable(f"ggml's {arch} has an output matrix of its own, and the model's is its embedding")
    rope: RopeArgs = args.rope
    found: dict[str, Value] = {
        "block_count": args.num_hidden_layers,
        "context_length": context,
        "embedding_length": args.hidden_size,
        "feed_forward_length": args.intermediate_size,
        "attention.head_count": args.num_attention_heads,
        "attention.head_count_kv": args.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(args.rms_norm_eps),
        "attention.key_length": args.head_dim,
        "attention.value_length": args.head_dim,
        "rope.dimension_count": rope.width(args.head_dim),
        "rope.freq_base": float(rope.theta),
        "vocab_size": args.vocab_size,
    }
    stretch, tensors = _stretch(rope, args.head_dim)
    found |= stretch
    if arch == "phi3":
        found["rope.scaling.original_context_length"] = int(config.get("original_max_position_embeddings") or 4096)
    if arch in ("gemma2", "gemma3", "phi3") and (windows - {0} or arch == "phi3"):
        found["attention.sliding_window"] = max(windows, default=0)
    if len(args.ropes) > 1 and args.ropes[1].kind == "default":
        found["rope.freq_base_swa"] = float(args.ropes[1].theta)
    if args.soft_cap:
        found["attn_logit_softcapping"] = float(args.soft_cap)
    if args.final_soft_cap:
        found["final_logit_softcapping"] = float(args.final_soft_cap)
    if any(args.sparse):
        found |= {"expert_count": args.experts, "expert_used_count": args.experts_used}
        if arch != "llama":
            found["expert_feed_forward_length"] = args.expert_size
    metadata: dict[str, Value] = {"general.architecture": arch}
    metadata |= {f"{arch}.{key}": value for key, value in found.items()}
    _check(source, metadata, tensors)
    return metadata, tensors, notes


def _stretch(rope: RopeArgs, head: int) -> tuple[dict[str, Value], dict[str, Tensor]]:
    """Metadata and tensors of a stretched rotation; FewbitError for a kind that files can't tell."""
    if rope.kind == "default":
        return {}, {}
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}, {}
    width = rope.width(head)
    if rope.kind == "llama3":
        plain = RopeArgs(rope.theta).frequencies(width)
        return {}, {"rope_freqs.weight": plain / rope.frequencies(width)}
    if rope.kind == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope.factor),
            "rope.scaling.original_context_length": rope.original_context,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }, {}
    if rope.kind == "longrope":
        factors = {"short": rope.short_factor, "long": rope.long_factor}
        tensors = {f"rope_factors_{which}.weight": torch.tensor(f) for which, f in factors.items()}
        return {"rope.scaling.attn_factor": float(rope.strength)}, tensors
    raise _unsayable(f"its rotation is stretched by {rope.kind!r}")


def _check(source: Source, metadata: dict[str, Value], tensors: dict[str, Tensor]) -> None:
    """Read back what will be written: it must be the same model."""
    module = find_gguf_model(dict(metadata))
    names = set(tensors)
    if not source.args.tie_word_embeddings:
        names.add("output.weight")
    canonical = {theirs.replace("{}", "0", 1): ours.replace("{}", "0", 1) for theirs, ours in module.GGUF.items()}
    names |= {theirs for theirs, ours in canonical.items() if source.has(ours)}
    config = module.gguf_config(dict(metadata), names, lambda name: tensors[name])
    config.setdefault("vocab_size", source.args.vocab_size)
    again, first = module.args(config), source.args
    known_differences = {"max_position_embeddings"}
    if source.config.get("model_type") in ("mistral", "mixtral"):
        # told by the context's length
        known_differences.add("windows")
    for field in fields(first):
        ours, theirs = getattr(first, field.name), getattr(again, field.name)
        if field.name not in known_differences and not _alike(ours, theirs, first.head_dim):
            raise _unsayable(f"{field.name} is {ours!r} and would be read as {theirs!r}"[:300])


def _alike(ours: Any, theirs: Any, head: int) -> bool:
    """Equal, floats to the precision they are stored in, rotations by the angles they give."""
    if isinstance(ours, float) or isinstance(theirs, float):
        both_numbers = isinstance(ours, float | int) and isinstance(theirs, float | int)
        return both_numbers and math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-12)
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        return all(_alike(a, b, head) for a, b in zip(ours, theirs, strict=True))
    if isinstance(ours, RopeArgs) and isinstance(theirs, RopeArgs):
        if ours.width(head) != theirs.width(head) or not math.isclose(ours.strength, theirs.strength, rel_tol=1e-5):
            return False
        # a short context, and one beyond what the model was trained for
        return all(
            torch.allclose(ours.frequencies(ours.width(head), n), theirs.frequencies(ours.width(head), n), rtol=1e-4)
            for n in (1, 1 << 24)
        )
    if is_dataclass(ours) and type(ours) is type(theirs):
        return bool(ours == theirs)
    return bool(ours == theirs)


def _unsayable(facts: str) -> FewbitError:
    return FewbitError(
        "A GGUF file can't say what this model is.",
        f"{facts}.",
        "Export to compressed-tensors, gptq or awq, which keep config.json.",
    )
