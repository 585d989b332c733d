"""Quantized matrices in ggml's blocks of 32 without choosing codes anew, where the block can say what they are.

A matrix w = scale * (code - zero) fits q4_0, q5_0 and q8_0 (w = d * (code - middle)) when its levels lie within theirs,
and q4_1 and q5_1 (w = d * code + m) when its codes do. Blocks keep scale and minimum in f16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.formats import Affine, Format, parse
from fewbit.formats.integer import IntegerFormat
from fewbit.qtensor import QTensor

CENTRED = {"gguf:q4_0": 4, "gguf:q5_0": 5, "gguf:q8_0": 8}
WITH_MINIMUM = {"gguf:q4_1": 4, "gguf:q5_1": 5}
BLOCK = 32


@dataclass(frozen=True)
class Mapped:
    """A matrix in blocks: `halves` numbers were stored in f16, `changed` of them are not what they were."""

    q: QTensor
    halves: int
    changed: int


def keeps_codes(stored: str, spec: str, columns: int) -> bool:
    """Whether a matrix of `columns` stored as one spec can be told in another with its codes as they are."""
    if stored == spec:
        return True
    fmt = parse(stored)
    bits, span, middle = _facts(fmt, columns)
    if span is None or columns % BLOCK or (span % BLOCK and span < columns):
        return False
    if spec in WITH_MINIMUM:
        return bits <= WITH_MINIMUM[spec]
    if spec in CENTRED:
        # with a zero point anywhere, levels reach from -(2^bits - 1) to 2^bits - 1
        return bits <= CENTRED[spec] if middle else bits < CENTRED[spec]
    return False


def _facts(fmt: Format, columns: int) -> tuple[int, int | None, bool]:
    """Bits, columns that share a scale (None: not known to be affine), and whether the middle code is zero."""
    if isinstance(fmt, IntegerFormat):
        return fmt.bits, fmt.span(columns), not fmt.asymmetric
    if fmt.spec in ("gguf:q4_0", "gguf:q5_0", "gguf:q8_0"):
        return CENTRED[fmt.spec], BLOCK, True
    return 0, None, False


def mapped(q: QTensor, spec: str) -> Mapped:
    """The matrix in blocks of `spec`; only where `keeps_codes` says so."""
    if q.spec == spec:
        return Mapped(q, 0, 0)
    found = parse(q.spec).affine(q)
    if found is None:
        raise ValueError(f"{q.spec} is not affine")
    scale, zero = _blocks(found, q.shape[1])
    d = _half(scale, q.spec, spec)
    changed = int((d.float() != scale).sum())
    fmt = parse(spec)
    if spec in CENTRED:
        codes = found.codes.to(torch.int16) - zero.repeat_interleave(BLOCK, 1).to(torch.int16)
        made = fmt.pack((codes + (1 << (CENTRED[spec] - 1))).to(torch.uint8), {"scale": d})
        return Mapped(made, d.numel(), changed)
    minimum = -scale * zero
    m = _half(minimum, q.spec, spec)
    changed += int((m.float() != minimum).sum())
    return Mapped(fmt.pack(found.codes, {"scale": d, "minimum": m}), 2 * d.numel(), changed)


def _blocks(found: Affine, columns: int) -> tuple[Tensor, Tensor]:
    """Scale and zero code of every block, float32 [out, columns / 32]."""
    group = torch.arange(0, columns, BLOCK) // found.span
    scale = found.scale.float()[:, group]
    if found.zero is not None:
        return scale, torch.full_like(scale, float(found.zero))
    if found.zeros is None:
        raise ValueError("a matrix without whole zero points")
    return scale, found.zeros.float()[:, group]


def _half(x: Tensor, stored: str, spec: str) -> Tensor:
    half = x.half()
    if not bool(half.isfinite().all()):
        raise FewbitError(
            "The model's scales are too large for a GGUF file.",
            f"A {stored} matrix has numbers up to {float(x.abs().max()):g}; {spec.removeprefix('gguf:')} keeps f16.",
            "Export with --type bf16.",
        )
    return half
