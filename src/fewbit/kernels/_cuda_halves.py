"""Activations as the products on a card take them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Halves:
    """Activations as the product takes them.

    values  float16 [padded / 32, tokens, 32]: column c of a token at [c // 32, token, c % 32]; zeros from `columns` up
            to `padded`, the next multiple of 128
    scales  float32 [tokens] that the products are multiplied by, or None where all are 1
    """

    values: Tensor
    scales: Tensor | None
    columns: int

    @property
    def tokens(self) -> int:
        """How many there are."""
        return int(self.values.shape[1])
