"""Read the folders that other quantizers write, without their code: float32 weights from the bits on disk.

Three layouts, each a dense little-endian bit stream in int32 words:
GPTQ's        qweight [in x bits / 32, out] packed down, qzeros [groups, out x bits / 32] packed across and less one,
              scales [groups, out], g_idx [in] (the group of each input); AutoRound writes it without g_idx.
AWQ's         qweight [in, out x bits / 32] and qzeros both packed across, in the order of AWQ_ORDER; 4 bits; AutoRound
              writes it for asymmetric grids.
compressed-tensors' pack-quantized  weight_packed [out, in x bits / 32], weight_scale [out, groups], and, where
              asymmetric, weight_zero_point packed down [out x bits / 32, groups]; codes and zeros both lie 2^(bits-1)
              above their value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

# the output column that stands in each place of a word of eight
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
# a one in every field of a word
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
PACKED_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def unpack(words: Tensor, bits: int, axis: int, length: int) -> Tensor:
    """int32 words packed along `axis` -> unsigned codes int32, `length` of them along that axis."""
    lines = np.ascontiguousarray(words.movedim(axis, -1).numpy())
    stream = np.unpackbits(lines.view(np.uint8), axis=-1, bitorder="little")
    codes = stream[:, : length * bits].reshape(len(lines), length, bits)
    values = (codes * (1 << np.arange(bits, dtype=np.int32))).sum(-1, dtype=np.int32)
    return torch.from_numpy(values).movedim(-1, axis)


def gptq_zeros(qzeros: Tensor, bits: int, outputs: int, offset: int) -> Tensor:
    """GPTQ's qzeros -> zero points int32 [groups, out]; `offset` (0 or 1) is what the file took from each."""
    if offset and bits in ONES:
        # taken from whole words: a zero point of 0 borrowed from its neighbour
        return unpack(qzeros + ONES[bits], bits, 1, outputs)
    return (unpack(qzeros, bits, 1, outputs) + offset) % (1 << bits)


def gptq_weight(parts: dict[str, Tensor], bits: int, offset: int) -> Tensor:
    """One linear in GPTQ's layout -> weight float32 [out, in]; `offset` is what the file took from each zero."""
    groups, outputs = parts["scales"].shape
    inputs = parts["qweight"].shape[0] * 32 // bits
    codes = unpack(parts["qweight"], bits, 0, inputs)
    zeros = gptq_zeros(parts["qzeros"], bits, outputs, offset)
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // (inputs // groups)
    return ((codes - zeros[group]) * parts["scales"].float()[group]).T.contiguous()


def awq_weight(parts: dict[str, Tensor]) -> Tensor:
    """One linear in AWQ's layout -> weight float32 [out, in]."""
    groups, outputs = parts["scales"].shape
    order = torch.argsort(torch.tensor(AWQ_ORDER))
    codes, zeros = (
        unpack(parts[name], 4, 1, outputs).view(-1, outputs // 8, 8)[..., order].flatten(1)
        for name in ("qweight", "qzeros")
    )
    repeats = len(codes) // groups
    spread = [each.float().repeat_interleave(repeats, 0) for each in (zeros, parts["scales"])]
    return ((codes - spread[0]) * spread[1]).T.contiguous()


def packed_weight(parts: dict[str, Tensor], bits: int) -> Tensor:
    """One linear in compressed-tensors' pack-quantized layout -> weight float32 [out, in]."""
    outputs, inputs = parts["weight_shape"].tolist()
    scales = parts["weight_scale"].float()
    codes = unpack(parts["weight_packed"], bits, 1, inputs)
    zeros: Tensor | int = 1 << (bits - 1)
    if "weight_zero_point" in parts:
        zeros = unpack(parts["weight_zero_point"], bits, 0, outputs).repeat_interleave(inputs // scales.shape[1], 1)
    return (codes - zeros) * scales.repeat_interleave(inputs // scales.shape[1], 1)


def layout(folder: Path) -> tuple[tuple[str, ...], Callable[[dict[str, Tensor]], Tensor]]:
    """What the folder's config says -> the names of a packed linear's parts, and what turns them into its weight."""
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    if said["quant_method"] == "compressed-tensors":
        (group,) = said["config_groups"].values()
        return PACKED_PARTS, partial(packed_weight, bits=group["weights"]["num_bits"])
    packing = said.get("packing_format", said.get("checkpoint_format", "gptq"))
    if packing == "auto_round:auto_awq" and said["bits"] == 4:
        return GPTQ_PARTS, awq_weight
    if packing not in ("gptq", "gptq_v2", "auto_round:auto_gptq"):
        raise ValueError(f"{folder}: packing {packing!r} is not read here")
    return GPTQ_PARTS, partial(gptq_weight, bits=said["bits"], offset=0 if packing == "gptq_v2" else 1)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], list[str], int]:
    """A quantized folder -> every tensor in float32, the names of the quantized linears, the bytes of their parts."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    known, weight = layout(folder)
    linears: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in known:
            linears.setdefault(module, {})[part] = tensor
        else:
            weights[name] = tensor.float()
    weights |= {f"{module}.weight": weight(parts) for module, parts in linears.items()}
    stored = sum(part.nbytes for parts in linears.values() for part in parts.values())
    return weights, sorted(linears), stored
