"""Ridge regression on the support of a pruned weight: what is 0 stays 0. [derived]

With G the penalised Gram matrix, C the right-hand sides and S_j the rows that output j may change, column j of ΔW solves
G[S_j, S_j] w = C[S_j, j]. Outputs with one support share a Cholesky factor. Where there are too many for one each, all columns
are solved at once by conjugate gradients within their supports. Their preconditioner is P G⁻¹ P, P the projection on the
support: the blocks that G⁻¹ has there are inverse Schur complements, so without pruning, one step is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...structure.linear_maps import LinearMap

# of the elements: fewer exact zeros are chance
_PRUNED_FROM = 0.01
# relative to the right-hand side, by column; what has not come so far is solved by a factor of its own
_ACCURACY = 1e-10
_STEPS = 200
# a step of conjugate gradients costs as much as so many rows of a factor, for each output
_STEP_IN_ROWS = 12


def support(linear: LinearMap) -> Tensor | None:
    """(d, k), False where the weight is pruned; None where it is not: under 1 % exact zeros, or nothing else."""
    place = linear.place.detach()
    weight = place if linear.transposed else place.reshape(len(place), -1).T
    kept = weight != 0
    zeros = 1.0 - float(kept.double().mean())
    return kept if _PRUNED_FROM <= zeros < 1.0 else None


def solve_on(kept: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """ΔW (d, k), 0 where `kept` is False, of G ΔW = C on each column's support.

    Args:
        kept: (d, k), bool.
        gram: G (d, d), fp64, symmetric and positive definite.
        cross: C (d, k), fp64.
    """
    kept = kept.to(gram.device)
    patterns, which = torch.unique(kept, dim=1, return_inverse=True)
    if patterns.shape[1] * len(gram) <= _STEP_IN_ROWS * _STEPS * cross.shape[1] // 4:
        return _by_factors(patterns, which, gram, cross)
    found, open_columns = _by_gradients(kept, gram, cross)
    if bool(open_columns.any()):
        patterns, which = torch.unique(kept[:, open_columns], dim=1, return_inverse=True)
        found[:, open_columns] = _by_factors(patterns, which, gram, cross[:, open_columns])
    return found


def _by_factors(patterns: Tensor, which: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """A Cholesky factor for each pattern (d, number of patterns); `which` (k,) is each column's."""
    found = torch.zeros_like(cross)
    for number in range(patterns.shape[1]):
        rows, columns = patterns[:, number].nonzero()[:, 0], (which == number).nonzero()[:, 0]
        if len(rows):
            factor = torch.linalg.cholesky(gram[rows][:, rows])
            found[rows[:, None], columns] = torch.cholesky_solve(cross[rows][:, columns], factor)
    return found


def _by_gradients(kept: Tensor, gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """Preconditioned conjugate gradients on all columns at once; the solution, and which columns have not come to it."""
    factor, mask = torch.linalg.cholesky(gram), kept.to(gram.dtype)
    goal = _ACCURACY * (cross * mask).norm(dim=0)
    found = torch.cholesky_solve(cross, factor) * mask  # without pruning, the solution
    residual = (cross - gram @ found) * mask
    better = torch.cholesky_solve(residual, factor) * mask
    direction, power = better, (residual * better).sum(0)
    for _ in range(_STEPS):
        if bool((residual.norm(dim=0) <= goal).all()):
            break
        image = (gram @ direction) * mask
        step = _ratio(power, (direction * image).sum(0))
        found, residual = found + step * direction, residual - step * image
        better = torch.cholesky_solve(residual, factor) * mask
        before, power = power, (residual * better).sum(0)
        direction = better + _ratio(power, before) * direction
    return found, ~((cross - gram @ found) * mask).norm(dim=0).le(10 * goal)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)  # a column that is solved has nothing left to divide by
