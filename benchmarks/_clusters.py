"""The error of a mean over the tokens of several windows. Nothing of fewbit is imported: the peers' figures use it too.

Tokens of one window share a text and so resemble one another; windows are taken as independent (cluster-robust standard
error of a mean, with the correction G / (G - 1)).
"""

from __future__ import annotations

import numpy as np

# scored predictions of a window of 512 tokens
SCORED = 255


def by_window(values: np.ndarray) -> np.ndarray:
    """[G * SCORED] values -> the means of G windows: all that comparing rows on the same tokens needs."""
    return values.astype(np.float64).reshape(-1, SCORED).mean(1)


def clustered_error(values: np.ndarray, size: int = SCORED) -> float:
    """Standard error of the mean of [G * size] values, window by window; over values where there is one window."""
    x = values.astype(np.float64)
    if len(x) % size:
        raise ValueError(f"{len(x)} values are no whole windows of {size}")
    groups = len(x) // size
    if groups < 2:
        return float(x.std(ddof=1) / len(x) ** 0.5)
    sums = (x - x.mean()).reshape(groups, size).sum(1)
    return float(np.sqrt(groups / (groups - 1) * np.square(sums).sum()) / len(x))
