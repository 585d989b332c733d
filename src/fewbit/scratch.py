"""Large tensors that may lie on disk while they are needed and leave nothing there, or be within a card's reach."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
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


def pin(memory: Tensor, device: torch.device) -> Callable[[], None]:
    """Let a card copy to and from this host memory by itself, until the function given back is called, which waits for
    it. On the CPU nothing happens.

    Torch's own pinned memory is handed out in powers of two and never given back. Where the driver refuses, nothing
    changes: copies then go through a buffer of its own.
    """
    if device.type != "cuda" or not memory.nbytes:
        return lambda: None
    runtime = torch.cuda.cudart()
    # a new thread's current card is the first one
    with torch.cuda.device(device):
        refused = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if refused:
        with suppress(RuntimeError):
            # the driver's last error would be taken for that of the next kernel
            torch.zeros(1, device=device)
        return lambda: None

    def free() -> None:
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)
        runtime.cudaHostUnregister(memory.data_ptr())

    return free
