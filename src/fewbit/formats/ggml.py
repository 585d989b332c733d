"""The block types of ggml as GGUF files hold them: `gguf:q4_0`, `gguf:q6_k`, `gguf:iq2_xxs` and all others.

What they share is in `_ggml_block`; each type is a small class with its layout drawn above what takes it apart:
`_ggml_plain` (one or two halves a block), `_ggml_k` (the K-quants: scales of two levels), `_ggml_iq4` (four bits that
pick one of 16 uneven levels), `_ggml_grid` (two to three bits: points of a lattice) and `_ggml_ternary`.
Layouts after ggml's `ggml-common.h`.
"""

from __future__ import annotations

from typing import Final

from fewbit.formats import Format
from fewbit.formats._ggml_block import GgmlFormat
from fewbit.formats._ggml_grid import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from fewbit.formats._ggml_iq4 import IQ4_NL, IQ4_XS, MXFP4, NVFP4
from fewbit.formats._ggml_k import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from fewbit.formats._ggml_plain import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from fewbit.formats._ggml_ternary import TQ1_0, TQ2_0

TYPES: Final[tuple[type[GgmlFormat], ...]] = (
    *(Q4_0, Q4_1, Q5_0, Q5_1, Q8_0),
    *(Q2_K, Q3_K, Q4_K, Q5_K, Q6_K),
    *(IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S),
    *(IQ4_NL, IQ4_XS, MXFP4, NVFP4),
    *(TQ1_0, TQ2_0),
)
_BY_SPEC: Final = {kind.spec: kind() for kind in TYPES}


def parse(spec: str) -> Format | None:
    """The format `spec` names, or None where it is none of these."""
    return _BY_SPEC.get(spec)
