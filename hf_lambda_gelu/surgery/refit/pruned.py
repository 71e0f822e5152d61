"""Ridge regression on the support of a pruned weight: what is 0 stays 0. [derived]

With G the penalised Gram matrix, C the right-hand sides and S the rows that output j may change, column j of ΔW solves
G[S, S] w = C[S, j]. With R the rows that are pruned and U = G⁻¹C, the same w is U[S, j] − G⁻¹[S, R] (G⁻¹[R, R])⁻¹ U[R, j].
The smaller of S and R is factorised, once for all outputs that share a support: n³ / 3 operations each, n ≤ d / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...structure.linear_maps import LinearMap

# of the elements: fewer exact zeros are chance
_PRUNED_FROM = 0.01


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
    patterns, which = torch.unique(kept.to(gram.device), dim=1, return_inverse=True)
    factor = torch.linalg.cholesky(gram)
    inverse, free = torch.cholesky_inverse(factor), torch.cholesky_solve(cross, factor)
    found = torch.zeros_like(cross)
    for number in range(patterns.shape[1]):
        rows, pruned = patterns[:, number].nonzero()[:, 0], (~patterns[:, number]).nonzero()[:, 0]
        columns = (which == number).nonzero()[:, 0]
        if len(rows) <= len(pruned):
            found[rows[:, None], columns] = _solve(gram[rows][:, rows], cross[rows][:, columns])
        else:
            excess = _solve(inverse[pruned][:, pruned], free[pruned][:, columns])
            found[rows[:, None], columns] = free[rows][:, columns] - inverse[rows][:, pruned] @ excess
    return found


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram)) if len(gram) else torch.zeros_like(cross)
