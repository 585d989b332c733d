"""Llama 1 to 3.x and its kin (SmolLM2): grouped-query attention, rotary positions, RMSNorm, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.config_values import flag, number, real, shown
from fewbit.errors import FewbitError
from fewbit.kernels.ops import Batch, Layer
from fewbit.layers import RMSNorm, Rope, RopeArgs, Weights
from fewbit.models import WeightInfo

# far above any model there is; a config's word is bounded before lists and tensors are made of it
MOST_LAYERS, MOST_HEADS, MOST_WIDTH, MOST_TOKENS = 4096, 1 << 14, 1 << 20, 1 << 24
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Args:
    """The facts of config.json that shape the model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeArgs
    activation: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Args:
        """Checked facts of a config.json; FewbitError names the key that is off."""
        heads = number(config, "num_attention_heads", most=MOST_HEADS)
        kv_heads = number(config, "num_key_value_heads", heads, MOST_HEADS)
        width = _head_width(config)
        activation = config.get("hidden_act", "silu")
        if not isinstance(activation, str):
            activation = shown(activation)
        if heads % kv_heads or width % 2 or activation not in ACTIVATIONS:
            raise FewbitError(
                "The model's config describes a layer that fewbit can't build.",
                f"{heads} heads over {kv_heads} key-value heads of width {width}, activation {shown(activation)}; "
                f"heads must be a multiple of key-value heads, the width even, the activation one of "
                f"{', '.join(ACTIVATIONS)}.",
                "Check config.json against the original model's.",
            )
        return cls(
            hidden_size=number(config, "hidden_size", most=MOST_WIDTH),
            intermediate_size=number(config, "intermediate_size", most=MOST_WIDTH),
            num_hidden_layers=number(config, "num_hidden_layers", most=MOST_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=width,
            vocab_size=number(config, "vocab_size", most=MOST_TOKENS),
            max_position_embeddings=number(config, "max_position_embeddings", 2048),
            rms_norm_eps=real(config, "rms_norm_eps", 1e-6, 0.0, 1.0),
            rope=RopeArgs.from_config(config),
            activation=ACTIVATIONS[activation],
            tie_word_embeddings=flag(config, "tie_word_embeddings"),
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
        )


def _head_width(config: dict[str, Any]) -> int:
    hidden = number(config, "hidden_size", most=MOST_WIDTH)
    heads = number(config, "num_attention_heads", most=MOST_HEADS)
    return number(config, "head_dim", max(1, hidden // heads), MOST_WIDTH)


def weights(args: Args) -> list[WeightInfo]:
    """Every tensor of the model, in the order of the walk: embedding, blocks, final norm, head."""
    d, inner = args.hidden_size, args.intermediate_size
    q, kv = args.num_attention_heads * args.head_dim, args.num_key_value_heads * args.head_dim
    linears = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (inner, d),
        "mlp.up_proj": (inner, d),
        "mlp.down_proj": (d, inner),
    }
    found = [WeightInfo("model.embed_tokens.weight", (args.vocab_size, d), "embedding")]
    for i in range(args.num_hidden_layers):
        prefix = BLOCK.format(i)
        found.append(WeightInfo(f"{prefix}input_layernorm.weight", (d,), "norm", i))
        found.append(WeightInfo(f"{prefix}post_attention_layernorm.weight", (d,), "norm", i))
        for name, shape in linears.items():
            found.append(WeightInfo(f"{prefix}{name}.weight", shape, "linear", i))
            if args.attention_bias if name.startswith("self_attn") else args.mlp_bias:
                found.append(WeightInfo(f"{prefix}{name}.bias", shape[:1], "bias", i))
    found.append(WeightInfo("model.norm.weight", (d,), "norm"))
    if not args.tie_word_embeddings:
        found.append(WeightInfo("lm_head.weight", (args.vocab_size, d), "head"))
    return found


# where a block's tensors lie
BLOCK = "model.layers.{}."


# the first linear of those that share an input -> the norm or linear whose channels that input is
FEEDS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}


def producers(args: Args, linear: str) -> Tensor:
    """The channel of FEEDS[linear] behind each input of `linear`, int64 [in]: query heads share a value head."""
    if linear != "self_attn.o_proj":
        return torch.arange(args.intermediate_size if linear == "mlp.down_proj" else args.hidden_size)
    heads, kv = args.num_attention_heads, args.num_key_value_heads
    value_head = torch.arange(heads) // (heads // kv)
    return (value_head[:, None] * args.head_dim + torch.arange(args.head_dim)).reshape(-1)


def rope(args: Args) -> Rope:
    """Angles of positions, the same in every block."""
    return Rope(args.rope, args.head_dim)


class Block:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, args: Args, w: Weights, prefix: str) -> None:
        self.ops = w.ops
        self.layer = Layer(
            attention_norm=w.dense(f"{prefix}input_layernorm.weight"),
            mlp_norm=w.dense(f"{prefix}post_attention_layernorm.weight"),
            eps=args.rms_norm_eps,
            qkv=w.linear(*(f"{prefix}self_attn.{n}_proj" for n in "qkv")),
            o=w.linear(f"{prefix}self_attn.o_proj"),
            gate_up=w.linear(f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"),
            down=w.linear(f"{prefix}mlp.down_proj"),
            heads=args.num_attention_heads,
            kv_heads=args.num_key_value_heads,
            width=args.head_dim,
            activation=args.activation,
        )

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """The block alone, where `ops` needs no cache."""
        return self.ops.layer(x, self.layer, (_NO_CACHE, _NO_CACHE), cos, sin, batch)


_NO_CACHE = torch.empty(0)


class Model:
    """ids int64 [T], positions int64 [T], batch -> logits float32 [W, vocab] of the wanted tokens."""

    def __init__(self, args: Args, w: Weights) -> None:
        self.args = args
        self.embedding = w.linear("model.embed_tokens")
        layers = [Block(args, w, BLOCK.format(i)).layer for i in range(args.num_hidden_layers)]
        self.stack = w.ops.stack(layers)
        self.norm = RMSNorm(w.dense("model.norm.weight"), args.rms_norm_eps, w.ops)
        self.head = self.embedding if args.tie_word_embeddings else w.linear("lm_head")
        self.rope = rope(args)
        self.device = w.device

    def allocate(self, rows: int, dtype: torch.dtype) -> None:
        """Cache room for `rows` tokens in every layer."""
        self.stack.allocate(rows, dtype)
        if self.device.type != "cpu":
            self.rope.place(rows, self.device)

    def __call__(self, ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        x = self.stack(self.embedding.rows(ids), *self.rope(positions), batch)
        if batch.wanted is not None:
            x = x[batch.wanted]
        return self.head(self.norm(x))


# GGUF name -> canonical name; {} is the block's number
GGUF = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    **{
        f"blk.{{}}.{theirs}.{part}": f"model.layers.{{}}.{ours}.{part}"
        for theirs, ours in {
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items()
        for part in ("weight", "bias")
    },
}


def gguf_config(metadata: dict[str, Any], names: set[str], read: Callable[[str], Tensor]) -> dict[str, Any]:
    """config.json of a GGUF file: its metadata, the tensor names it has, and a reader for small tensors."""
    theirs = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }
    if "rope.dimension_count" in theirs:
        config["head_dim"] = theirs["rope.dimension_count"]
    factors = read("rope_freqs.weight") if "rope_freqs.weight" in names else None
    if factors is not None and factors.shape != (_head_width(config) // 2,):
        raise _unknown_stretch(
            f"rope_freqs.weight has the shape {tuple(factors.shape)}; a head is {_head_width(config)} wide."
        )
    config["rope_parameters"] = _gguf_rope(theirs, factors)
    return {key: value for key, value in config.items() if value is not None}


def _gguf_rope(theirs: dict[str, Any], factors: Tensor | None) -> dict[str, Any]:
    theta = real(theirs, "rope.freq_base", 10000.0, 1.0, 1e15)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = theirs.get("rope.scaling.type", "none")
    if factors is not None:
        if not len(factors) or not (factors.isfinite() & (factors > 0)).all():
            raise _unknown_stretch("rope_freqs.weight is not one positive factor for each frequency.")
        # the file holds Llama 3.1's stretch as one divisor a frequency; find the parameters it was computed from
        found = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0}
        found |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        rope |= found
        plain = RopeArgs(theta).frequencies(2 * len(factors))
        stretched = RopeArgs.from_config({"rope_parameters": rope}).frequencies(2 * len(factors))
        if not torch.allclose(plain / stretched, factors, rtol=1e-3):
            raise _unknown_stretch(
                f"rope_freqs.weight has factors from {factors.min():g} to {factors.max():g}, not Llama 3.1's."
            )
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": real(theirs, "rope.scaling.factor", 1.0, 1e-3, 1e6)}
    elif kind != "none":
        rope["rope_type"] = kind
    return rope


def _unknown_stretch(facts: str) -> FewbitError:
    return FewbitError(
        "This GGUF file stretches its rotary frequencies in a way fewbit does not know.",
        facts,
        "Use the model's safetensors folder instead.",
    )


def gguf_rows(name: str, args: Args) -> Tensor | None:
    """Row order that undoes llama.cpp's: it stores the two halves of a rotated head interleaved; None: as it is."""
    heads = {"q_proj": args.num_attention_heads, "k_proj": args.num_key_value_heads}
    layer = name.rpartition(".")[0].rpartition(".")[2]
    if layer not in heads:
        return None
    theirs = torch.arange(heads[layer] * args.head_dim).reshape(heads[layer], args.head_dim // 2, 2)
    return theirs.transpose(1, 2).reshape(-1)
