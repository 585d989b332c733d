"""What second-order methods share: a damped Hessian, its factor, and the error it measures.

With H = mean x x^T over the inputs x of a linear, replacing its weights W by Q changes its outputs by
E H E^T summed over rows, E = Q - W, in mean squares (Frantar et al. 2022, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# share of the mean diagonal that is added to the diagonal. More of it (0.15 to 0.4) lowers the error under the Hessian
# of other text by a tenth, and yet the model's KL rises by as much
DAMP = 0.01
# a Hessian that is not positive definite is damped ten times as much, up to this many times
TRIES = 5
# rows or columns of a large matrix that are worked on at a time
STRIP = 1024


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """Mean squared change of the outputs, summed over rows, for weights that differ by `difference` [out, in]."""
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


def damped(hessian: Tensor, damp: float = DAMP) -> Tensor:
    """H + damp * mean diagonal * I [in, in]; inputs that never occur (a zero diagonal) get the mean diagonal, so that
    their weights are rounded to nearest and take no part in anyone's correction.
    """
    return _add_damping(hessian.clone(), damp)


def _add_damping(h: Tensor, damp: float) -> Tensor:
    diagonal = h.diagonal()
    mean = diagonal.mean()
    # a hessian of zeros: every weight is as good as another
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal += torch.where(diagonal <= 0, mean, damp * mean)
    return h


def in_order(hessian: Tensor, order: Tensor) -> Tensor:
    """hessian[order][:, order], with no second copy on the way: one of 28672 columns takes 3.3 GB."""
    found = torch.empty_like(hessian)
    for start in range(0, len(order), STRIP):
        found[start : start + STRIP] = hessian[order[start : start + STRIP]][:, order]
    return found


def inverse_factor(hessian: Tensor, note: Callable[[str], None], order: Tensor | None = None) -> Tensor:
    """Upper triangular U with U^T U = (damped H)^-1, float32 [in, in], rows and columns of H in `order`.

    With the columns in reverse H = L L^T, and U is L^-1 in reverse; besides H there are never more than two such
    matrices. Where the factorization fails, damping grows tenfold at a time; the last resort is the diagonal alone,
    which makes a method that uses it round to nearest. Both are told through `note`.
    """
    if order is None:
        order = torch.arange(len(hessian), device=hessian.device)
    damp = DAMP
    for _ in range(TRIES):
        lower = _factored(_add_damping(in_order(hessian, order.flip(0)), damp))
        if lower is not None:
            upper = _inverted(lower).flip(0, 1)
            if bool(torch.stack(upper.aminmax()).isfinite().all()):
                if damp != DAMP:
                    note(f"the Hessian is nearly singular: damped by {damp:g} of its mean diagonal")
                return upper
        damp *= 10
    note("the Hessian can't be factored: rounded to nearest without correction")
    return torch.diag(damped(hessian, damp).diagonal()[order].rsqrt())


def _factored(h: Tensor) -> Tensor | None:
    """The lower Cholesky factor of a symmetric h, in its place; None where it has none."""
    # column by column, as the library wants it, or it works on a copy
    lower, failed = h.mT, torch.empty((), dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return None if bool(failed) else lower


def _inverted(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix in its place, by block columns from the last (LAPACK's trtri)."""
    size = len(lower)
    for stop in range(size, 0, -STRIP):
        start = max(0, stop - STRIP)
        corner, below = lower[start:stop, start:stop], lower[stop:, start:stop]
        inverse = torch.linalg.solve_triangular(corner, torch.eye(stop - start, device=lower.device), upper=False)
        below.copy_((lower[stop:, stop:] @ below) @ -inverse)
        corner.copy_(inverse)
    return lower


def drift_corrected(w: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """Weights that, on the inputs x the quantized prefix hands on, give what `w` gives on the true inputs y.

    The least squares solution of W' x = W y is W C H^-1 with C = mean y x^T (GPTAQ, Li et al. 2025, section 3; Qronos,
    Zhang et al. 2025), here W + W (C - H) (H + damping)^-1, which is W where nothing drifted.
    """
    lower = _factored(damped(hessian))
    if lower is None:
        return w
    change = torch.empty_like(w)
    for start in range(0, w.shape[1], STRIP):
        part = slice(start, start + STRIP)
        change[:, part] = w @ (cross[:, part] - hessian[:, part])
    # X L L^T = change
    change = torch.linalg.solve_triangular(lower.mT, change, upper=True, left=False)
    change = torch.linalg.solve_triangular(lower, change, upper=False, left=False)
    corrected: Tensor = w + change
    return corrected
