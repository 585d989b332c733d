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


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """Mean squared change of the outputs, summed over rows, for weights that differ by `difference` [out, in]."""
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


def damped(hessian: Tensor, damp: float = DAMP) -> Tensor:
    """H + damp * mean diagonal * I [in, in]; inputs that never occur (a zero diagonal) get the mean diagonal, so that
    their weights are rounded to nearest and take no part in anyone's correction.
    """
    h = hessian.clone()
    diagonal = h.diagonal()
    mean = diagonal.mean()
    # a hessian of zeros: every weight is as good as another
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal += torch.where(diagonal <= 0, mean, damp * mean)
    return h


def inverse_factor(hessian: Tensor, note: Callable[[str], None]) -> Tensor:
    """Upper triangular U with U^T U = (damped H)^-1, float32 [in, in].

    Where the factorization fails, damping grows tenfold at a time; the last resort is the diagonal alone, which makes
    a method that uses it round to nearest. Both are told through `note`.
    """
    damp = DAMP
    for _ in range(TRIES):
        h = damped(hessian, damp)
        factor, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and bool(upper.isfinite().all()):
                if damp != DAMP:
                    note(f"the Hessian is nearly singular: damped by {damp:g} of its mean diagonal")
                found: Tensor = upper
                return found
        damp *= 10
    note("the Hessian can't be factored: rounded to nearest without correction")
    return torch.diag(damped(hessian, damp).diagonal().rsqrt())


def drift_corrected(w: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """Weights that, on the inputs x the quantized prefix hands on, give what `w` gives on the true inputs y.

    The least squares solution of W' x = W y is W C H^-1 with C = mean y x^T (GPTAQ, Li et al. 2025, section 3; Qronos,
    Zhang et al. 2025), here W + W (C - H) (H + damping)^-1, which is W where nothing drifted.
    """
    h = damped(hessian)
    factor, failed = torch.linalg.cholesky_ex(h)
    if failed:
        return w
    # solved from the right: X h = A  <=>  h X^T = A^T
    change = torch.cholesky_solve((w @ (cross - hessian)).t().contiguous(), factor).t()
    corrected: Tensor = w + change
    return corrected
