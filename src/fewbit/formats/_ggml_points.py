"""The lists of points that the IQ types pick from (iq2xxs_grid and so on in ggml's ggml-common.h).

A point has four or eight digits, each a number of a magnitude. Every list is in rising order of the number its digits
spell, lowest digit first, so a bit for every number there could be says it all: `ggml_points.bin` holds these bits,
lowest first, one list after the other in the order of LISTS.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Final

import torch
from torch import Tensor

# name -> (digits of a point, values of a digit, points)
LISTS: Final[dict[str, tuple[int, int, int]]] = {
    "iq2_xxs": (8, 3, 256),
    "iq2_xs": (8, 3, 512),
    "iq2_s": (8, 3, 1024),
    "iq3_xxs": (4, 8, 256),
    "iq3_s": (4, 8, 512),
    "iq1": (8, 3, 2048),
}


@cache
def points(name: str) -> Tensor:
    """uint8 [points, digits]: each digit is the number of a magnitude."""
    data, at = resources.files(__package__).joinpath("ggml_points.bin").read_bytes(), 0
    for other, (digits, base, _) in LISTS.items():
        size = (base**digits + 7) // 8
        if other == name:
            number = _ones(data[at : at + size])
            return torch.stack([number // base**i % base for i in range(digits)], 1).to(torch.uint8)
        at += size
    raise KeyError(name)


def _ones(data: bytes) -> Tensor:
    """Where the bits are set, int64."""
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().nonzero().flatten()
