"""What `auto` stands for at each effort: round to nearest, GPTQ, or tuned rounding.

One choice for all widths so far, by int3g64 and int4g64; AWQ and both together were not measured beside them yet.
"""

from __future__ import annotations

# by effort 0 to 3; figures in docs/benchmarks.md
BY_EFFORT = ("rtn", "gptq", "gptq", "tuned")


def chosen(bits: int, effort: int) -> str:
    """The method for a width in bits."""
    # at 8 bits tuning has nothing left to gain
    return "gptq" if bits >= 8 and effort else BY_EFFORT[effort]
