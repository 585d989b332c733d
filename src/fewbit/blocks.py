"""A model's blocks one at a time, in floating point: what calibration runs, watches and differentiates through."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.fetching import Fetcher, Stored
from fewbit.formats import parse
from fewbit.kernels.ops import Batch, Experts, Ops, attention, rotate, visible
from fewbit.layers import Weights
from fewbit.qtensor import QTensor
from fewbit.source import Source

# what a watcher is shown: the linear, and its input [T, in] before the product or its output [T, out] after it
Watcher = Callable[["FloatLinear", Tensor], None]
Reader = Callable[[str], QTensor]
# cards from here on multiply bfloat16
BF16_CAPABILITY = (8, 0)
CPUINFO = Path("/proc/cpuinfo")
_NUMBER = re.compile(r"\.experts\.\d+\.")


class WindowOps(Ops):
    """Attention among the tokens of equal windows that know nothing of each other; no cache, differentiable.

    product  the type queries, keys and values are multiplied in; cards have fast kernels for 16 bits only
    tokens   which tokens of the step the products are given that run now; None: all
    """

    def __init__(self, length: int, product: torch.dtype = torch.float32) -> None:
        self.length, self.product = length, product
        self._keys = self._values = torch.empty(0)
        self.tokens: Tensor | None = None
        # the experts that tokens took, and whether the next ones take the same
        self._chosen: Tensor | None = None
        self._follows = False

    def rotate_append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        """Rotates like the definition, and keeps k and v for `attend` instead of a cache."""
        self._keys, self._values = rotate(k, cos, sin), v
        return rotate(q, cos, sin)

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: Batch,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> Tensor:
        """q [T, H, D] with T a whole number of windows -> [T, H * D]."""
        # the fast kernels' gradients are not the same twice; held scores have no fast kernel
        product = torch.float32 if q.requires_grad or soft_cap else self.product
        parts = (x.to(product) for x in (q, self._keys, self._values))
        q, k, v = (x.unflatten(0, (-1, self.length)).transpose(1, 2) for x in parts)
        self._keys = self._values = torch.empty(0)
        if soft_cap or 0 < window < self.length:
            y = attention(q, k, v, visible(self.length, self.length, window, q.device), scale, soft_cap)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return y.transpose(1, 2).flatten(0, 1).flatten(1).float()

    def route(self, x: Tensor, experts: Experts, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As the definition, or the experts that the step before took."""
        self._chosen, weights = super().route(x, experts, self._chosen if self._follows else chosen)
        return self._chosen, weights

    def expert(self, x: Tensor, experts: Experts, e: int, tokens: Tensor, activation: str) -> Tensor:
        """As the definition; whoever watches its products finds their tokens in `tokens`."""
        self.tokens = tokens
        try:
            return super().expert(x, experts, e, tokens, activation)
        finally:
            self.tokens = None

    @contextmanager
    def following(self) -> Iterator[None]:
        """Tokens take the experts inside that they took in the step before."""
        self._follows = True
        try:
            yield
        finally:
            self._follows = False


class FloatLinear:
    """One product for matrices of the same input, in float32; `weight` [sum of outs, in] may be replaced."""

    def __init__(
        self,
        names: tuple[str, ...],
        weight: Tensor,
        splits: tuple[int, ...],
        bias: Tensor | None,
        product: torch.dtype = torch.float32,
    ) -> None:
        self.names, self.weight, self.splits, self.bias, self.product = names, weight, splits, bias, product
        self.before: Watcher | None = None
        self.after: Watcher | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, sum of outs]."""
        if self.before is not None:
            self.before(self, x)
        y = F.linear(x.to(self.product), self.weight.to(self.product)).float()
        if self.bias is not None:
            y = y + self.bias
        if self.after is not None:
            self.after(self, y)
        return y


@dataclass(frozen=True)
class FloatWeights(Weights):
    """Hands a block its matrices as FloatLinear and remembers what it handed out, under the names without `.weight`."""

    product: torch.dtype = torch.float32
    linears: list[FloatLinear] = field(default_factory=list)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)

    def dense(self, name: str) -> Tensor:
        """A small tensor in float32, kept by name: rewrites change it in place."""
        self.vectors[name] = super().dense(name).clone()
        return self.vectors[name]

    def norm(self, name: str, offset: float = 0.0) -> Tensor:
        """As it runs; what was added is remembered, as it is not stored."""
        self.vectors[name] = super().norm(name, offset)
        self.offsets[name] = offset
        return self.vectors[name]

    def linear(self, *names: str) -> FloatLinear:  # type: ignore[override]
        """The stacked matrices, dequantized."""
        tensors = [self.read(f"{name}.weight") for name in names]
        splits = tuple(q.shape[0] for q in tensors)
        weight = torch.empty(sum(splits), tensors[0].shape[1], device=self.device)
        for part, q in zip(weight.split(splits), tensors, strict=True):
            part.copy_(parse(q.spec).dequantize(q))
        biases = [
            self.dense(f"{name}.bias") if self.has(f"{name}.bias") else torch.zeros(rows, device=self.device)
            for name, rows in zip(names, splits, strict=True)
        ]
        bias = torch.cat(biases) if any(self.has(f"{name}.bias") for name in names) else None
        made = FloatLinear(names, weight, splits, bias, self.product)
        self.linears.append(made)
        return made


class FloatBlock:
    """Block `index` of a model, every window of `length` tokens run alone.

    linears  FloatLinear in the order they were asked for
    vectors  norms, biases and the router by full name, as they run; offsets: what was added to a norm for that
    product  the type matrices are multiplied in: float32, or bfloat16 where that is much faster and enough
    """

    def __init__(
        self,
        source: Source,
        index: int,
        length: int,
        device: torch.device,
        read: Reader | None = None,
        product: torch.dtype = torch.float32,
    ) -> None:
        self.index, self.length, self.device = index, length, device
        self.ops = WindowOps(length, product)
        weights = FloatWeights(
            read or source.read, source.has, (), self.ops, [], device=device, context=length, product=product
        )
        self.prefix = source.module.BLOCK.format(index)
        self.inner = source.module.Block(source.args, weights, index)
        self.linears, self.vectors, self.offsets = weights.linears, weights.vectors, weights.offsets
        # the same place for all experts' matrices of a kind, and each other linear its own
        self.kinds = [_NUMBER.sub(".experts.", linear.names[0]) for linear in self.linears]
        self.has_experts: bool = source.args.has_experts(index)
        # angles of one window: the same for all
        cos, sin = source.module.rope(source.args, length)(torch.arange(length))
        self.cos, self.sin = cos.to(device), sin.to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, length, d] -> the same shape."""
        n = len(x)
        cos, sin = (torch.cat([t.to(x.dtype)] * n, dim=-2) for t in (self.cos, self.sin))
        return self.inner(x.flatten(0, 1), cos, sin, _NO_CACHE).unflatten(0, (n, self.length))  # type: ignore[no-any-return]

    @contextmanager
    def watched(self, before: Watcher | None = None, after: Watcher | None = None) -> Iterator[None]:
        """Shows `before` the input and `after` the output of every linear that runs inside."""
        for linear in self.linears:
            linear.before, linear.after = before, after
        try:
            yield
        finally:
            for linear in self.linears:
                linear.before = linear.after = None


def load_block(
    source: Source,
    index: int,
    length: int,
    device: torch.device,
    product: torch.dtype = torch.float32,
    stored: Stored | None = None,
) -> FloatBlock:
    """A block of the source, or of what is stored elsewhere under its names; to a card its bytes come as they are."""
    stored = stored or source
    if device.type != "cuda":
        return FloatBlock(source, index, length, device, stored.read, product)
    with Fetcher(stored, [w.name for w in source.weights if w.block == index], device) as fetcher:
        return FloatBlock(source, index, length, device, fetcher.read, product)


def fast_product(source: Source, device: torch.device) -> torch.dtype:
    """bfloat16 for a bf16 model where it is multiplied natively: calibration needs no more than what the model was made
    in. float32 everywhere else.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    else:
        native = device.type == "cpu" and CPUINFO.exists() and "avx512_bf16" in CPUINFO.read_text()
    stored = {source.spec(w.name) for w in source.weights if w.role == "linear"}
    return torch.bfloat16 if native and stored == {"bf16"} else torch.float32


_NONE = torch.empty(0, dtype=torch.int64)
_NO_CACHE = Batch(_NONE, _NONE, _NONE, _NONE, 1)


def embed(source: Source, windows: Tensor, slice_windows: int = 8, read: Reader | None = None) -> Iterator[Tensor]:
    """Embedded tokens float32 [n, length, d] of windows int64 [N, length], a few windows at a time.

    Only the rows that occur are read where the tensor is stored in floating point.
    """
    name = next(w.name for w in source.weights if w.role == "embedding")
    q = (read or source.read)(name)
    fmt = parse(q.spec)
    for part in windows.split(slice_windows):
        ids, back = part.flatten().unique(return_inverse=True)
        rows = fmt.dequantize(fmt.take(q, ids))
        if source.args.embedding_scale != 1:
            rows = rows * source.args.embedding_scale
        yield rows[back].unflatten(0, tuple(part.shape))
