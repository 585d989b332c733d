"""Rotary positions (Su et al. 2021): how far the pairs of a head are turned, and how contexts are stretched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.config_values import flag, number, real, shown
from fewbit.errors import FewbitError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# other words for the same
SPELLINGS = {"su": "longrope", "mrope": "default"}
MOST_FACTORS = 1 << 12


@dataclass(frozen=True)
class RopeArgs:
    """Base frequency, how it is stretched to longer contexts, and how much of a head is turned.

    kind        one of KINDS, or `none`: nothing is turned
    part        share of a head's numbers that are turned, its first ones
    strength    what cosines and sines are multiplied by (yarn and longrope: a temperature of attention)
    original_context   tokens the model was first trained for
    short_factor, long_factor   longrope's divisors of the frequencies, up to the original context and beyond
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    part: float = 1.0
    strength: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @classmethod
    def from_config(cls, config: dict[str, Any], theta: float = 10000.0) -> RopeArgs:
        """From `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (before); `theta`: where neither
        says one.

        Raises FewbitError for a kind of scaling fewbit does not know, and for numbers that make no frequencies.
        """
        found = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(found, dict):
            raise FewbitError(
                "The model's config has no usable rotary parameters.",
                f"rope_parameters (or rope_scaling) is {shown(found)} where a JSON object belongs.",
                "Check config.json against the original model's.",
            )
        return cls.from_parameters(found, config, theta)

    @classmethod
    def from_parameters(cls, found: dict[str, Any], config: dict[str, Any], theta: float = 10000.0) -> RopeArgs:
        """From one rotation's parameters; what they leave out is looked for in the config."""
        kind = found.get("rope_type") or found.get("type") or "default"
        kind = SPELLINGS.get(kind, kind) if isinstance(kind, str) else kind
        if kind not in KINDS:
            raise FewbitError(
                f"Rotary scaling {shown(kind)} is not supported.",
                f"fewbit knows {', '.join(KINDS)}.",
                "Use a checkpoint of the same model without that scaling.",
            )
        theta = real(found if "rope_theta" in found else config, "rope_theta", theta, 1.0, 1e15)
        source = found if "partial_rotary_factor" in found else config
        plain = cls(theta, part=real(source, "partial_rotary_factor", 1.0, 1e-3, 1.0))
        return plain if kind == "default" else _stretched(plain, kind, found, config)

    def reach(self, context: int) -> int:
        """Tokens that a model with a context of `context` can have when its rotation is stretched like this."""
        stretched = int(self.original_context * self.factor)
        return max(context, stretched) if self.kind in ("dynamic", "yarn") else context

    def width(self, head: int) -> int:
        """How many numbers of a head are turned."""
        # a share that was a quotient may lie a hair below
        return int(head * self.part + 1e-6)

    def frequencies(self, width: int, context: int = 0) -> Tensor:
        """Angle a position, float32 [width / 2], in a context of at most `context` tokens.

        Su et al. 2021, section 3.4.2; llama3: Llama 3.1 model card code; dynamic: the base of the longest context;
        yarn: Peng et al. 2023, section 3.2; longrope: Ding et al. 2024, section 3.3. Engines that choose by the tokens
        a sequence has at the moment turn one sequence in two ways.
        """
        if self.kind == "none":
            return torch.zeros(width // 2)
        theta = self.theta
        if self.kind == "dynamic" and context > self.original_context:
            longer = self.factor * context / self.original_context - (self.factor - 1)
            theta *= longer ** (width / (width - 2))
        freq = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
        if self.kind == "linear":
            return freq / self.factor
        if self.kind == "llama3":
            # long waves are stretched, short ones kept, those between blended
            turns = self.original_context * freq / (2 * math.pi)
            blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            blend = blend.clamp(0, 1)
            return freq * (blend + (1 - blend) / self.factor)
        if self.kind == "yarn":
            kept = 1 - self._ramp(width)
            return freq * (kept + (1 - kept) / self.factor)
        if self.kind == "longrope":
            factors = self.long_factor if context > self.original_context else self.short_factor
            return freq / torch.tensor(factors)
        return freq

    def _ramp(self, width: int) -> Tensor:
        """yarn: 0 for pairs that turn fast, 1 for those that turn slowly, a line between [width / 2]."""
        low, high = (
            width * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        return ((torch.arange(width // 2).float() - low) / max(high - low, 1e-3)).clamp(0, 1)


def _stretched(plain: RopeArgs, kind: str, found: dict[str, Any], config: dict[str, Any]) -> RopeArgs:
    """Of a kind, with its own parameters."""
    context = number(config, "max_position_embeddings", 8192)
    # phi3 has it beside the parameters
    outside = config.get("original_max_position_embeddings") is not None and kind == "longrope"
    default = 8192 if kind == "llama3" else context
    original = number(config if outside else found, "original_max_position_embeddings", default)
    made: dict[str, Any] = {"theta": plain.theta, "part": plain.part, "kind": kind}
    if kind == "longrope":
        stretch = context / original if found.get("factor") is None else real(found, "factor", None, 1e-3, 1e6)
        strength = math.sqrt(1 + math.log(stretch) / math.log(max(original, 2))) if stretch > 1 else 1.0
        return RopeArgs(
            **made,
            original_context=original,
            strength=_strength(found, strength),
            short_factor=_factors(found, "short_factor"),
            long_factor=_factors(found, "long_factor"),
        )
    made["factor"] = real(found, "factor", 1.0, 1e-3, 1e6)
    if kind == "linear":
        return RopeArgs(**made)
    if kind == "dynamic":
        # what the config says the model was made for; the stretch is for more
        return RopeArgs(**made, original_context=context)
    made["original_context"] = original
    if kind == "llama3":
        low = real(found, "low_freq_factor", 1.0, 0.0, 1e6)
        # the two bound a blend: it has no width where they are equal
        high = real(found, "high_freq_factor", 4.0, low + 1e-3, 2e6)
        return RopeArgs(**made, low_freq_factor=low, high_freq_factor=high)
    if plain.theta <= 1:
        raise FewbitError(
            "The model's config has no usable 'rope_theta'.",
            "yarn needs a base above 1.",
            "Check config.json against the original model's.",
        )
    return RopeArgs(
        **made,
        strength=_strength(found, _yarn_strength(found, made["factor"])),
        beta_fast=real(found, "beta_fast", 32.0, 1e-3, 1e6) if found.get("beta_fast") else 32.0,
        beta_slow=real(found, "beta_slow", 1.0, 1e-3, 1e6) if found.get("beta_slow") else 1.0,
        truncate=True if found.get("truncate") is None else flag(found, "truncate"),
    )


def _yarn_strength(found: dict[str, Any], factor: float) -> float:
    """Peng et al. 2023, equation 22; DeepSeek's two scales where both are given."""

    def scale(of: float) -> float:
        return 0.1 * of * math.log(factor) + 1 if factor > 1 else 1.0

    one, all_dims = (real(found, key, 0.0, 0.0, 1e3) for key in ("mscale", "mscale_all_dim"))
    return scale(one) / scale(all_dims) if one and all_dims else scale(1.0)


def _strength(found: dict[str, Any], default: float) -> float:
    return default if found.get("attention_factor") is None else real(found, "attention_factor", None, 1e-3, 1e3)


def _factors(found: dict[str, Any], key: str) -> tuple[float, ...]:
    values = found.get(key)
    if not isinstance(values, list) or not 0 < len(values) <= MOST_FACTORS:
        raise FewbitError(
            f"The model's config has no usable {key!r}.",
            f"Found {shown(values)} where a list of one divisor for each rotary frequency belongs.",
            "Check config.json against the original model's.",
        )
    return tuple(real({key: value}, key, None, 1e-6, 1e6) for value in values)


class Rope:
    """positions int64 [T] -> cos, sin float32 [T, turned / 2], from a table that grows with the positions asked for.

    Several rotations of one model give [rotations, T, turned / 2]. The table is made in pieces of equal size: a
    position's angles are the same bits whenever they are asked for.
    """

    PIECE = 256

    def __init__(self, args: RopeArgs | Sequence[RopeArgs], head: int, context: int = 0) -> None:
        """For heads of width `head` in a context of at most `context` tokens."""
        self._single = isinstance(args, RopeArgs)
        every = [args] if isinstance(args, RopeArgs) else list(args)
        self.freq = torch.stack([a.frequencies(a.width(head), context) for a in every])[:, None]
        self._strength = torch.tensor([a.strength for a in every])[:, None, None]
        self._table = (torch.empty(len(every), 0, self.freq.shape[-1]),) * 2
        self._placed = False

    def place(self, positions: int, device: torch.device) -> None:
        """Angles of the positions below `positions`, and no others from now on, on a device that is not asked."""
        self._grow(positions)
        cos, sin = self._table
        self._table = cos.to(device), sin.to(device)
        self._placed = True

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if not self._placed and positions.numel() and (last := int(positions.max())) >= self._table[0].shape[1]:
            self._grow(last + 1)
        cos, sin = (t.index_select(1, positions) for t in self._table)
        return (cos[0], sin[0]) if self._single else (cos, sin)

    def _grow(self, positions: int) -> None:
        """Room for `positions`, at least twice what there was."""
        have = self._table[0].shape[1]
        starts = range(have, max(positions, 2 * have), self.PIECE)
        angles = [torch.arange(i, i + self.PIECE).float()[:, None] * self.freq for i in starts]
        cos, sin = self._table
        self._table = (
            torch.cat([cos, *(a.cos() * self._strength for a in angles)], dim=1),
            torch.cat([sin, *(a.sin() * self._strength for a in angles)], dim=1),
        )
