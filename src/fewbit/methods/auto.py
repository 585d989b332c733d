"""What is chosen where nothing was asked for: the method by effort, and the share of the drift to make good.

Chosen on other windows of WikiText than docs/benchmarks.md reports, where the figures are. AWQ before GPTQ gains less
than the error of its measurement at 4 bits, and loses at 3; tuning at effort 2 would take an hour without a GPU.
"""

from __future__ import annotations

# by effort 0 to 3
BY_EFFORT = ("rtn", "gptq", "gptq", "tuned")
# all of it ruins small models
DRIFT = 0.25
# what can make good what the quantized prefix changed
CORRECTING = ("gptq", "tuned")


def chosen(bits: int, effort: int) -> str:
    """The method for a width in bits."""
    # at 8 bits tuning has nothing left to gain
    return "gptq" if bits >= 8 and effort else BY_EFFORT[effort]


def drift(bits: int, method: str) -> float:
    """The share of what the quantized prefix changed that each linear makes good, for `method` at a width in bits.

    From 4 bits up it changes nothing that can be measured; tuning at 2 bits mends by itself what it would mend.
    """
    last = method.split("+")[-1]
    helps = bits == 3 or (bits == 2 and last != "tuned")
    return DRIFT if helps and last in CORRECTING else 0.0
