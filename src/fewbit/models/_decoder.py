"""What the decoders of this package share: Llama's layer with options. A module of the package says which it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit.config_values import flag, number, real, shown
from fewbit.errors import FewbitError
from fewbit.kernels.ops import Batch, Experts, Layer, Product, no_product, rotation
from fewbit.layers import RMSNorm, Weights
from fewbit.models import WeightInfo
from fewbit.rotary import Rope, RopeArgs

# far above any model there is; a config's word is bounded before lists and tensors are made of it
MOST_LAYERS, MOST_HEADS, MOST_WIDTH, MOST_TOKENS, MOST_EXPERTS = 4096, 1 << 14, 1 << 20, 1 << 24, 4096
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# where a block's tensors lie
BLOCK = "model.layers.{}."


@dataclass(frozen=True)
class Names:
    """What a block's tensors are called; an empty name is of a norm that the architecture does not have."""

    attention_norm: str = "input_layernorm"
    attention_after: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_after: str = ""
    q_norm: str = ""
    k_norm: str = ""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    # of one expert, whose number stands in the braces
    expert_gate: str = "mlp.experts.{}.gate_proj"
    expert_up: str = "mlp.experts.{}.up_proj"
    expert_down: str = "mlp.experts.{}.down_proj"


@dataclass(frozen=True)
class Args:
    """The facts of config.json that shape the model. What has a default is Llama's.

    ropes, rotations   the model's rotations, and which of them each layer takes (empty: the first)
    windows            tokens that each layer's tokens see, 0 for all (empty: all layers see all)
    qk_norm_whole      q's and k's norm is over all heads together, not over each
    norm_offset        what is added to every norm's weight
    sparse             which layers have experts (empty: none), `expert_size` wide; a token takes `experts_used` of them
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    ropes: tuple[RopeArgs, ...]
    names: Names = field(default_factory=Names)
    activation: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm_whole: bool = False
    rotations: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    scale: float | None = None
    soft_cap: float = 0.0
    final_soft_cap: float = 0.0
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    sparse: tuple[bool, ...] = ()
    experts: int = 0
    experts_used: int = 0
    expert_size: int = 0
    experts_normalized: bool = True

    @property
    def rope(self) -> RopeArgs:
        """The first rotation, for most models the only one."""
        return self.ropes[0]

    def has_experts(self, block: int) -> bool:
        """Whether a block's feed-forward part is a mixture of experts."""
        return bool(self.sparse) and self.sparse[block]


def common(config: dict[str, Any], **changes: Any) -> Args:
    """Checked facts of a config.json that all architectures have, and `changes`, an architecture's own.

    FewbitError names the key that is off.
    """
    heads = number(config, "num_attention_heads", most=MOST_HEADS)
    kv_heads = number(config, "num_key_value_heads", heads, MOST_HEADS)
    width = head_width(config)
    activation = config.get("hidden_activation") or config.get("hidden_act", "silu")
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
    found: dict[str, Any] = {
        "hidden_size": number(config, "hidden_size", most=MOST_WIDTH),
        "intermediate_size": number(config, "intermediate_size", most=MOST_WIDTH),
        "num_hidden_layers": layer_count(config),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "vocab_size": number(config, "vocab_size", most=MOST_TOKENS),
        "rms_norm_eps": real(config, "rms_norm_eps", 1e-6, 0.0, 1.0),
        "activation": ACTIVATIONS[activation],
        "tie_word_embeddings": flag(config, "tie_word_embeddings"),
    }
    if "ropes" not in changes:
        found["ropes"] = (RopeArgs.from_config(config),)
    made = found | changes
    context = number(config, "max_position_embeddings", 2048)
    _check_rotations(made["ropes"], width)
    return Args(max_position_embeddings=max(r.reach(context) for r in made["ropes"]), **made)


def head_width(config: dict[str, Any]) -> int:
    """Numbers of a head."""
    hidden = number(config, "hidden_size", most=MOST_WIDTH)
    heads = number(config, "num_attention_heads", most=MOST_HEADS)
    return number(config, "head_dim", max(1, hidden // heads), MOST_WIDTH)


def layer_count(config: dict[str, Any]) -> int:
    """Of the blocks."""
    return number(config, "num_hidden_layers", most=MOST_LAYERS)


def sliding(config: dict[str, Any], default: list[bool]) -> list[bool]:
    """Which layers see a window only: what `layer_types` says, or else `default`; FewbitError for other kinds."""
    types = config.get("layer_types")
    if types is None:
        return default
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != layer_count(config) or any(t not in known for t in types):
        raise FewbitError(
            "The model's config has no usable 'layer_types'.",
            f"Found {shown(types)} where {layer_count(config)} of {' and '.join(known)} belong.",
            "Check config.json against the original model's.",
        )
    return [t == "sliding_attention" for t in types]


def windows(config: dict[str, Any], which: list[bool]) -> tuple[int, ...]:
    """The window of each layer, 0 where it sees everything; empty where no layer has one."""
    size = number(config, "sliding_window") if any(which) and config.get("sliding_window") is not None else 0
    return tuple(size if slides else 0 for slides in which) if size else ()


def upper_windows(config: dict[str, Any]) -> tuple[int, ...]:
    """Qwen's: where `use_sliding_window` is true, layers from `max_window_layers` on have one."""
    if not flag(config, "use_sliding_window"):
        return ()
    # 0 is allowed: all layers
    first = config.get("max_window_layers") and number(config, "max_window_layers", 28)
    first = 28 if first is None else first
    return windows(config, sliding(config, [i >= first for i in range(layer_count(config))]))


def experts(config: dict[str, Any], key: str, count: int, used: int, normalized: bool = True) -> dict[str, Any]:
    """How many experts there are, by the config's `key`, and how many a token takes; FewbitError where that is more."""
    found = number(config, key, number(config, "num_experts", count, MOST_EXPERTS), MOST_EXPERTS)
    taken = number(config, "num_experts_per_tok", used, MOST_EXPERTS)
    if taken > found:
        raise FewbitError(
            "The model's config has no usable 'num_experts_per_tok'.",
            f"A token would take {taken} of {found} experts.",
            "Check config.json against the original model's.",
        )
    return {"experts": found, "experts_used": taken, "experts_normalized": normalized}


def causal_only(config: dict[str, Any]) -> None:
    """FewbitError for a model whose tokens see those behind them."""
    if flag(config, "use_bidirectional_attention"):
        raise FewbitError(
            "The model is no language model.",
            "use_bidirectional_attention is true in its config: its tokens see those behind them.",
            "Use a model that writes text.",
        )


def _check_rotations(ropes: tuple[RopeArgs, ...], head: int) -> None:
    for r in ropes:
        turned = r.width(head)
        wrong = [len(f) for f in (r.short_factor, r.long_factor) if f and len(f) != turned // 2]
        if turned < 2 or turned % 2 or wrong or (r.kind == "dynamic" and turned < 4):
            raise FewbitError(
                "The model's config has no usable rotary parameters.",
                f"{turned} of a head's {head} numbers are turned, with {wrong or 'no'} factors of another count.",
                "Check config.json against the original model's.",
            )


def _block_weights(args: Args, block: int) -> list[tuple[str, tuple[int, ...], str, bool]]:
    """(name, shape, role, whether it has a bias) of a block's tensors."""
    names, d, head = args.names, args.hidden_size, args.head_dim
    q, kv = args.num_attention_heads * head, args.num_key_value_heads * head
    norms = [(n, d) for n in (names.attention_norm, names.attention_after, names.mlp_norm, names.mlp_after)]
    norms += [(names.q_norm, q if args.qk_norm_whole else head), (names.k_norm, kv if args.qk_norm_whole else head)]
    found: list[tuple[str, tuple[int, ...], str, bool]] = [(n, (size,), "norm", False) for n, size in norms if n]
    outs = (q, kv, kv) if len(names.qkv) == 3 else (q + 2 * kv,)
    found += [(n, (out, d), "linear", args.qkv_bias) for n, out in zip(names.qkv, outs, strict=True)]
    found.append((names.o, (d, q), "linear", args.o_bias))
    if args.has_experts(block):
        inner = args.expert_size
        found.append((names.router, (args.experts, d), "router", False))
        for e in range(args.experts):
            found += [(n.format(e), (inner, d), "linear", False) for n in (names.expert_gate, names.expert_up)]
            found.append((names.expert_down.format(e), (d, inner), "linear", False))
        return found
    inner = args.intermediate_size * 2 // len(names.gate_up)
    found += [(n, (inner, d), "linear", args.mlp_bias) for n in names.gate_up]
    found.append((names.down, (d, args.intermediate_size), "linear", args.mlp_bias))
    return found


def weights(args: Args) -> list[WeightInfo]:
    """Every tensor of the model, in the order of the walk: embedding, blocks, final norm, head."""
    d = args.hidden_size
    found = [WeightInfo("model.embed_tokens.weight", (args.vocab_size, d), "embedding")]
    for i in range(args.num_hidden_layers):
        prefix = BLOCK.format(i)
        for name, shape, role, has_bias in _block_weights(args, i):
            found.append(WeightInfo(f"{prefix}{name}.weight", shape, role, i))  # type: ignore[arg-type]
            if has_bias:
                found.append(WeightInfo(f"{prefix}{name}.bias", shape[:1], "bias", i))
    found.append(WeightInfo("model.norm.weight", (d,), "norm"))
    if not args.tie_word_embeddings:
        found.append(WeightInfo("lm_head.weight", (args.vocab_size, d), "head"))
    return found


def feeds(args: Args, block: int) -> dict[str, str]:
    """The first linear of those that share an input -> the norm or linear whose channels that input is.

    An expert's input is the norm's output too, as is the router's: they are named all, and share one norm.
    """
    names = args.names
    found = {names.o: names.qkv[-1]}
    if names.attention_norm:
        found[names.qkv[0]] = names.attention_norm
    if not args.has_experts(block):
        found[names.down] = names.gate_up[-1]
        if names.mlp_norm:
            found[names.gate_up[0]] = names.mlp_norm
        return found
    for e in range(args.experts):
        found[names.expert_down.format(e)] = names.expert_up.format(e)
        if names.mlp_norm:
            found[names.expert_gate.format(e)] = names.mlp_norm
    return found


def producers(args: Args, linear: str) -> Tensor:
    """The channel of feeds()[linear] behind each input of `linear`, int64 [in]: query heads share a value head."""
    names, heads, kv, head = args.names, args.num_attention_heads, args.num_key_value_heads, args.head_dim
    if linear == names.o:
        value_head = torch.arange(heads) // (heads // kv)
        channel = (value_head[:, None] * head + torch.arange(head)).reshape(-1)
        # in a fused matrix, values come after queries and keys
        return channel if len(names.qkv) == 3 else channel + (heads + kv) * head
    if linear == names.down:
        channel = torch.arange(args.intermediate_size)
        return channel if len(names.gate_up) == 2 else channel + args.intermediate_size
    if args.experts and linear.rpartition(".")[2] == names.expert_down.rpartition(".")[2]:
        return torch.arange(args.expert_size)
    return torch.arange(args.hidden_size)


def rope(args: Args, context: int) -> Rope:
    """Angles of positions for every rotation of the model, in a context of at most `context` tokens."""
    return Rope(args.ropes if len(args.ropes) > 1 else args.ropes[0], args.head_dim, context)


class Block:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, args: Args, w: Weights, block: int) -> None:
        self.ops = w.ops
        names, prefix = args.names, BLOCK.format(block)

        def norm(name: str) -> Tensor | None:
            return w.norm(f"{prefix}{name}.weight", args.norm_offset) if name else None

        turned = args.ropes[0].width(args.head_dim)
        norms = {n: norm(getattr(names, n)) for n in ("attention_after", "mlp_after", "q_norm", "k_norm")}
        attention_norm, mlp_norm = norm(names.attention_norm), norm(names.mlp_norm)
        qkv, o = w.linear(*(prefix + n for n in names.qkv)), w.linear(prefix + names.o)
        experts = None
        gate_up: Product = no_product
        down: Product = no_product
        if args.has_experts(block):
            experts = self._experts(args, w, prefix)
        else:
            gate_up, down = w.linear(*(prefix + n for n in names.gate_up)), w.linear(prefix + names.down)
        self.layer = Layer(
            attention_norm=attention_norm,
            mlp_norm=mlp_norm,
            eps=args.rms_norm_eps,
            qkv=qkv,
            o=o,
            gate_up=gate_up,
            down=down,
            heads=args.num_attention_heads,
            kv_heads=args.num_key_value_heads,
            width=args.head_dim,
            activation=args.activation,
            **norms,
            scale=args.scale,
            soft_cap=args.soft_cap,
            window=args.windows[block] if args.windows else 0,
            rotation=args.rotations[block] if args.rotations else 0,
            turned=turned if turned != args.head_dim else None,
            experts=experts,
        )

    def _experts(self, args: Args, w: Weights, prefix: str) -> Experts:
        names, all_of_them = args.names, range(args.experts)
        return Experts(
            router=w.router(f"{prefix}{names.router}.weight"),
            gate_up=[
                w.linear(prefix + names.expert_gate.format(e), prefix + names.expert_up.format(e)) for e in all_of_them
            ],
            down=[w.linear(prefix + names.expert_down.format(e)) for e in all_of_them],
            used=args.experts_used,
            normalized=args.experts_normalized,
        )

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """The block alone, where `ops` needs no cache; angles as `rope` gives them."""
        angles = (rotation(cos, self.layer), rotation(sin, self.layer))
        return self.ops.layer(x, self.layer, (_NO_CACHE, _NO_CACHE), *angles, batch)


_NO_CACHE = torch.empty(0)


class Model:
    """ids int64 [T], positions int64 [T], batch -> logits float32 [W, vocab] of the wanted tokens."""

    def __init__(self, args: Args, w: Weights) -> None:
        self.args = args
        self.embedding = w.linear("model.embed_tokens")
        layers = [Block(args, w, i).layer for i in range(args.num_hidden_layers)]
        self.stack = w.ops.stack(layers)
        self.norm = RMSNorm(w.norm("model.norm.weight", args.norm_offset), args.rms_norm_eps, w.ops)
        self.head = self.embedding if args.tie_word_embeddings else w.linear("lm_head")
        self.rope = rope(args, w.context)
        self.device = w.device

    def allocate(self, rows: int, dtype: torch.dtype) -> None:
        """Cache room for `rows` tokens in every layer."""
        self.stack.allocate(rows, dtype)
        if self.device.type != "cpu":
            self.rope.place(rows, self.device)

    def __call__(self, ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        x = self.embedding.rows(ids)
        if self.args.embedding_scale != 1:
            x = x * self.args.embedding_scale
        x = self.stack(x, *self.rope(positions), batch)
        if batch.wanted is not None:
            x = x[batch.wanted]
        logits = self.head(self.norm(x))
        cap = self.args.final_soft_cap
        return (logits / cap).tanh_().mul_(cap) if cap else logits


# what every module of a decoder offers besides `args` and its GGUF names
SHARED = (BLOCK, Block, Model, feeds, producers, rope, weights)
