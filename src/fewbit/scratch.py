"""Large tensors that may lie on disk while they are needed, and leave nothing there."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


def mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of undefined values in `file`, which loses its name at once: the tensor keeps the bytes alive.

    OSError where the disk is full: now, since writing to a mapping without blocks behind it would kill the process.
    """
    size = torch.Size(shape).numel()
    with file.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, dtype.itemsize * size)
    held = torch.from_file(str(file), shared=True, size=size, dtype=dtype)
    file.unlink()
    return held.reshape(shape)
