"""Codes as a stream of bits along a row: code 0 in the lowest bits of the first 32-bit word, no gaps.

    word 0                            word 1
    bit 31 ... 8 | 7 ... 4 | 3 ... 0  ...          (4-bit codes: the eighth code ends the word)

For 2, 4 and 8 bits this is the packing of compressed-tensors and GPTQ; other widths run across word borders.
"""

from __future__ import annotations

import torch
from torch import Tensor


def words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * bits // 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n, k] below 2**bits -> int32 [n, words(k, bits)]."""
    n, k = codes.shape
    width = words(k, bits) * 4
    if bits == 8:
        stream = codes
    elif 8 % bits == 0:
        parts = _pad(codes, 8 // bits).unflatten(1, (-1, 8 // bits))
        stream = parts[..., 0].clone()
        for i in range(1, 8 // bits):
            stream |= parts[..., i] << (bits * i)
    else:
        # eight codes fill `bits` whole bytes; they are put together in one 64-bit integer
        parts = _pad(codes, 8).unflatten(1, (-1, 8))
        whole = torch.zeros(parts.shape[:2], dtype=torch.int64, device=codes.device)
        for i in range(8):
            whole |= parts[..., i].to(torch.int64) << (bits * i)
        stream = whole.view(torch.uint8).unflatten(1, (-1, 8))[..., :bits].flatten(1)
    out = torch.zeros(n, width, dtype=torch.uint8, device=codes.device)
    used = min(width, stream.shape[1])
    out[:, :used] = stream[:, :used]
    return out.view(torch.int32)


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [n, words(count, bits)] -> uint8 codes [n, count]; the inverse of `pack_rows`."""
    stream = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return stream[:, :count]
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        codes = torch.empty(*stream.shape, 8 // bits, dtype=torch.uint8, device=stream.device)
        for i in range(8 // bits):
            torch.bitwise_right_shift(stream, bits * i, out=codes[..., i])
        codes &= mask
    else:
        eights = -(-count // 8)
        padded = torch.zeros(len(packed), eights, 8, dtype=torch.uint8, device=packed.device)
        have = _pad(stream, bits)[:, : eights * bits].unflatten(1, (-1, bits))
        padded[..., :bits][:, : have.shape[1]] = have
        whole = padded.view(torch.int64).squeeze(-1)
        codes = torch.stack([((whole >> (bits * i)) & mask).to(torch.uint8) for i in range(8)], dim=-1)
    return codes.flatten(1)[:, :count]


def _pad(x: Tensor, multiple: int) -> Tensor:
    """`x` [n, k] with zero columns up to a multiple."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % multiple))
