"""Slices of rows searched side by side, one thread each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from fewbit.formats import Params

# rows are searched in slices that stay in a core's cache
SLICE_WEIGHTS = 1 << 17
# a GPU wants few large operations; the search holds about ten copies of a slice
GPU_SLICE_WEIGHTS = 1 << 24


def on_all_cores(work: Callable[[int], Params], starts: range, device: torch.device) -> list[Params]:
    """One thread a slice, torch single-threaded in each: hundreds of small operations that each wait for all cores
    are many times slower once another process wants one of them.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(starts) == 1:
        return [work(start) for start in starts]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, starts))
    finally:
        # the workers' setting is also the default of threads to come
        torch.set_num_threads(threads)
