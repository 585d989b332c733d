"""The parts of a decoder layer, by name: what the operations run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Product(Protocol):
    """What multiplies by one or several stacked matrices: x [T, in] -> [T, out]."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


def no_product(x: Tensor, /) -> Tensor:  # noqa: ARG001
    """In the place of a product that a layer does not have."""
    raise ValueError("this layer has no such product")


@dataclass(frozen=True)
class Experts:
    """Gated products of which each token takes the `used` that its router's logits are largest for, weighted by their
    probabilities (Shazeer et al. 2017, section 2; Jiang et al. 2024, section 2.1).

    router      float32 [experts, d]
    gate_up     d -> 2n, and `down`, n -> d: one for each expert
    normalized  whether the weights of the experts taken are made to sum to one
    """

    router: Tensor
    gate_up: Sequence[Product]
    down: Sequence[Product]
    used: int
    normalized: bool


@dataclass(frozen=True)
class Layer:
    """The parts of one decoder layer over a hidden state of width d. What has a default is Llama's.

    qkv [d -> (heads + 2 kv_heads) * width], o [heads * width -> d], gate_up [d -> 2n], down [n -> d]
    attention_norm, mlp_norm    [d], of what a branch is given; None: it is given x itself
    attention_after, mlp_after  [d], of what a branch gives, before it is added to x
    q_norm, k_norm              [width], of each head, or [heads * width], [kv_heads * width], of all together
    scale     of scores; None: width^-0.5
    soft_cap  scores become cap * tanh(score / cap); 0: they stay
    window    tokens that a token sees, itself included; 0: all before it
    rotation  which of the model's rotations turns q and k
    turned    numbers of a head that are turned, its first ones; None: all
    experts   instead of gate_up and down
    """

    attention_norm: Tensor | None
    mlp_norm: Tensor | None
    eps: float
    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    heads: int
    kv_heads: int
    width: int
    activation: str
    attention_after: Tensor | None = None
    mlp_after: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    scale: float | None = None
    soft_cap: float = 0.0
    window: int = 0
    rotation: int = 0
    turned: int | None = None
    experts: Experts | None = None

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by."""
        return self.width**-0.5 if self.scale is None else self.scale

    @property
    def norm(self) -> Tensor:
        """A norm over the hidden state, of which there is always one: where the layer lies, and how wide it is."""
        found = self.attention_norm if self.attention_norm is not None else self.attention_after
        if found is None:
            raise ValueError("a layer needs a norm before or after attention")
        return found

    @property
    def is_plain(self) -> bool:
        """Whether it has no more parts than Llama's."""
        extras = (self.attention_after, self.mlp_after, self.q_norm, self.k_norm, self.scale, self.turned, self.experts)
        nothing = self.soft_cap == 0 and self.window == 0 and self.rotation == 0
        normed = self.attention_norm is not None and self.mlp_norm is not None
        return nothing and normed and all(extra is None for extra in extras)
