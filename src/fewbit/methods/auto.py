"""What measured best at each effort: round to nearest, GPTQ, or GPTQ and tuned rounding."""

from __future__ import annotations

# by effort 0 to 3; SmolLM2-135M, windows 65-128 of the protocol (docs/benchmarks.md)
BY_EFFORT = ("rtn", "gptq", "gptq", "tuned")


def chosen(bits: int, effort: int) -> str:
    """The method for a width in bits."""
    # at 8 bits tuning has nothing left to gain
    return "gptq" if bits >= 8 and effort else BY_EFFORT[effort]
