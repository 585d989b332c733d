"""What GGUF files of the decoders have in common: tensor names, metadata, rotations.

Names and keys after gguf-py's constants and llama.cpp's converters; each module says what its architecture adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbit.config_values import number, real, shown
from fewbit.errors import FewbitError
from fewbit.models._decoder import MOST_HEADS, MOST_WIDTH, Args, Names
from fewbit.rotary import RopeArgs

Read = Callable[[str], Tensor]


def table(names: Names, sparse: bool = False) -> dict[str, str]:
    """GGUF name -> canonical name; the first {} is the block's number, a second one an expert's: ggml stacks them."""
    vectors = {
        "attn_norm": names.attention_norm,
        "post_attention_norm": names.attention_after,
        "ffn_norm": names.mlp_norm,
        "post_ffw_norm": names.mlp_after,
        "attn_q_norm": names.q_norm,
        "attn_k_norm": names.k_norm,
    }
    fused = len(names.qkv) == 1
    matrices = dict(zip(("attn_qkv",) if fused else ("attn_q", "attn_k", "attn_v"), names.qkv, strict=True))
    # gate and up in one are ggml's `ffn_up`
    ups = ("ffn_up",) if len(names.gate_up) == 1 else ("ffn_gate", "ffn_up")
    matrices |= {"attn_output": names.o, "ffn_down": names.down} | dict(zip(ups, names.gate_up, strict=True))
    found = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    found |= {
        f"blk.{{}}.{theirs}.weight": f"model.layers.{{}}.{ours}.weight" for theirs, ours in vectors.items() if ours
    }
    for part in ("weight", "bias"):
        found |= {f"blk.{{}}.{theirs}.{part}": f"model.layers.{{}}.{ours}.{part}" for theirs, ours in matrices.items()}
    if sparse:
        stacked = {"gate": names.expert_gate, "up": names.expert_up, "down": names.expert_down}
        found["blk.{}.ffn_gate_inp.weight"] = f"model.layers.{{}}.{names.router}.weight"
        found |= {f"blk.{{}}.ffn_{x}_exps.weight": f"model.layers.{{}}.{ours}.weight" for x, ours in stacked.items()}
    return found


def metadata_of(metadata: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The keys of an architecture, without its name."""
    prefix = f"{architecture}."
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def config_of(theirs: dict[str, Any], names: set[str], model_type: str, written_as: str) -> dict[str, Any]:
    """The keys of config.json that every architecture has; None where the file does not say."""
    config: dict[str, Any] = {
        "architectures": [written_as],
        "model_type": model_type,
        "hidden_size": theirs.get("embedding_length"),
        "intermediate_size": theirs.get("feed_forward_length"),
        "num_hidden_layers": theirs.get("block_count"),
        "num_attention_heads": theirs.get("attention.head_count"),
        "num_key_value_heads": theirs.get("attention.head_count_kv", theirs.get("attention.head_count")),
        "max_position_embeddings": theirs.get("context_length"),
        "rms_norm_eps": theirs.get("attention.layer_norm_rms_epsilon", 1e-5),
        "vocab_size": theirs.get("vocab_size"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in names,
    }
    width = theirs.get("attention.key_length", theirs.get("rope.dimension_count"))
    if width is not None:
        config["head_dim"] = width
    return config


def said(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that the file says nothing of."""
    return {key: value for key, value in config.items() if value is not None}


def head_width(config: dict[str, Any]) -> int:
    """Numbers of a head, before the rest of the config is checked."""
    hidden = number(config, "hidden_size", most=MOST_WIDTH)
    heads = number(config, "num_attention_heads", most=MOST_HEADS)
    return number(config, "head_dim", max(1, hidden // heads), MOST_WIDTH)


def rope_of(theirs: dict[str, Any], names: set[str], read: Read, width: int, theta: float = 1e4) -> dict[str, Any]:
    """`rope_parameters` of a file, for heads of which `width` numbers are turned."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": real(theirs, "rope.freq_base", theta, 1.0, 1e15)}
    if "rope_freqs.weight" in names:
        return rope | _llama3(read("rope_freqs.weight"), rope["rope_theta"], width)
    kind = theirs.get("rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise _unknown_stretch(f"rope.scaling.type is {shown(kind)}; fewbit knows linear and yarn here.")
    rope |= {"rope_type": kind, "factor": real(theirs, "rope.scaling.factor", 1.0, 1e-3, 1e6)}
    if kind == "yarn":
        keys = {"original_max_position_embeddings": "original_context_length"}
        keys |= {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "attn_factor"}
        rope |= said({ours: theirs.get(f"rope.scaling.{key}") for ours, key in keys.items()})
    return rope


def _llama3(factors: Tensor, theta: float, width: int) -> dict[str, Any]:
    """The file holds Llama 3.1's stretch as one divisor a frequency; the parameters it was computed from."""
    if factors.shape != (width // 2,):
        raise _unknown_stretch(f"rope_freqs.weight has the shape {tuple(factors.shape)}; a head is {width} wide.")
    if not len(factors) or not (factors.isfinite() & (factors > 0)).all():
        raise _unknown_stretch("rope_freqs.weight is not one positive factor for each frequency.")
    found = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0}
    found |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    plain = RopeArgs(theta).frequencies(width)
    stretched = RopeArgs.from_config({"rope_parameters": found | {"rope_theta": theta}}).frequencies(width)
    if not torch.allclose(plain / stretched, factors, rtol=1e-3):
        raise _unknown_stretch(
            f"rope_freqs.weight has factors from {factors.min():g} to {factors.max():g}, not Llama 3.1's."
        )
    return found


def longrope_of(theirs: dict[str, Any], names: set[str], read: Read, width: int) -> dict[str, Any]:
    """`rope_parameters` of a file with two sets of divisors, as Phi's are; plain ones where it has none."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": real(theirs, "rope.freq_base", 1e4, 1.0, 1e15)}
    found = [f"rope_factors_{which}.weight" in names for which in ("short", "long")]
    if not any(found):
        return rope
    if not all(found):
        raise _unknown_stretch("It has rope_factors for short contexts or for long ones, not for both.")
    for which in ("short", "long"):
        factors = read(f"rope_factors_{which}.weight")
        if factors.shape != (width // 2,):
            raise _unknown_stretch(f"rope_factors_{which} has the shape {tuple(factors.shape)}; {width} numbers turn.")
        rope[f"{which}_factor"] = factors.tolist()
    rope["rope_type"] = "longrope"
    return rope | said({"attention_factor": theirs.get("rope.scaling.attn_factor")})


def _unknown_stretch(facts: str) -> FewbitError:
    return FewbitError(
        "This GGUF file stretches its rotary frequencies in a way fewbit does not know.",
        facts,
        "Use the model's safetensors folder instead.",
    )


def interleaved(name: str, args: Args) -> Tensor | None:
    """Row order that undoes llama.cpp's for architectures whose rotation it pairs neighbours in: it stores the two
    halves of a head of q and k interleaved. None: the rows are as they are.
    """
    heads = {"q_proj": args.num_attention_heads, "k_proj": args.num_key_value_heads}
    layer = name.rpartition(".")[0].rpartition(".")[2]
    if layer not in heads:
        return None
    theirs = torch.arange(heads[layer] * args.head_dim).reshape(heads[layer], args.head_dim // 2, 2)
    return theirs.transpose(1, 2).reshape(-1)


def as_they_are(name: str, args: Args) -> None:
    """The row order of architectures that llama.cpp stores as they come."""
