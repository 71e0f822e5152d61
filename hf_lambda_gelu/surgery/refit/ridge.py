"""Ridge regression from sums: what a linear map must gain so that its output moves by a wanted amount.

Rows come in piece by piece and only their sums are kept, so memory depends on the widths and not on the number of rows. All
of it is derived; the paper (arXiv 2603.21991) does not compensate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .pruned import solve_on

# tried in units of the mean diagonal of the features' covariance; the held-out part of the calibration set chooses
RIDGES = (0.001, 0.01, 0.1, 1.0)
# rows are multiplied in their own precision in pieces of so many and the products summed in fp64
_PIECE = 4096

Method = Literal["none", "bias", "least_squares"]


def wide_device(device: torch.device) -> torch.device:
    """The device, or the CPU in its place where it has no fp64."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass
class Moments:
    """Sums over rows of features r (d,) and wanted changes e (k,), in fp64.

    Attributes:
        count: number of rows.
        r, e: Σ r (d,) and Σ e (k,).
        rr, re: Σ rrᵀ (d, d) and Σ reᵀ (d, k).
        ee: Σ e² by component (k,).
        mass: Σ of the rows' weights, which all other sums have; the number of rows where they have none.
    """

    count: int
    r: Tensor
    e: Tensor
    rr: Tensor
    re: Tensor
    ee: Tensor
    mass: float = 0.0

    @classmethod
    def empty(cls, features: int, outputs: int, device: torch.device) -> Moments:
        device = wide_device(device)
        r, e, ee = (torch.zeros(n, dtype=torch.float64, device=device) for n in (features, outputs, outputs))
        rr, re = (torch.zeros(features, n, dtype=torch.float64, device=device) for n in (features, outputs))
        return cls(0, r, e, rr, re, ee)

    def add(self, features: Tensor, wanted: Tensor, weights: Tensor | None = None) -> None:
        """Take in rows: features (n, d) and wanted changes (n, k), with weights (n,)."""
        if not len(features):
            return
        for start in range(0, len(features), _PIECE):
            pieces = features[start : start + _PIECE], wanted[start : start + _PIECE]
            r, e = (t.to(self.r.device, torch.promote_types(t.dtype, torch.float32)) for t in pieces)
            self.count += len(r)
            if weights is not None:
                self._add_weighted(r, e, weights[start : start + _PIECE].to(r))
                continue
            self.mass += len(r)
            self.ee += e.double().square().sum(0)
            # products of what is left without the mean: beside a large mean, fp32 would lose the rest
            mean_r, mean_e = r.mean(0), e.mean(0)
            r, e = r - mean_r, e - mean_e
            self.rr += r.T @ r
            self.re += r.T @ e
            mean_r, mean_e = mean_r.double(), mean_e.double()
            rest_r, rest_e = r.sum(0, dtype=torch.float64), e.sum(0, dtype=torch.float64)  # 0 but for rounding
            sum_r = len(r) * mean_r + rest_r
            self.r += sum_r
            self.e += len(r) * mean_e + rest_e
            self.rr.addr_(sum_r, mean_r).addr_(mean_r, rest_r)
            self.re.addr_(sum_r, mean_e).addr_(mean_r, rest_e)

    def _add_weighted(self, r: Tensor, e: Tensor, weights: Tensor) -> None:
        """As above, each row by its weight; by its root in the products of two."""
        mass, column = float(weights.double().sum()), weights.unsqueeze(1)
        self.mass += mass
        self.ee += (e.double().square() * column).sum(0)
        mean_r, mean_e = (r * column).sum(0) / max(mass, 1e-30), (e * column).sum(0) / max(mass, 1e-30)
        r, e = r - mean_r, e - mean_e
        rest_r, rest_e = ((t * column).sum(0, dtype=torch.float64) for t in (r, e))
        r, e = (t * column.sqrt() for t in (r, e))
        self.rr += r.T @ r
        self.re += r.T @ e
        mean_r, mean_e = mean_r.double(), mean_e.double()
        sum_r = mass * mean_r + rest_r
        self.r += sum_r
        self.e += mass * mean_e + rest_e
        self.rr.addr_(sum_r, mean_r).addr_(mean_r, rest_r)
        self.re.addr_(sum_r, mean_e).addr_(mean_r, rest_e)

    def __add__(self, other: Moments) -> Moments:
        mine, theirs = vars(self).values(), vars(other).values()
        return Moments(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def error(self, correction: Correction, scale: Tensor | None = None) -> float:
        """Σ ‖scale ⊙ (e − r ΔW − c)‖² over the rows, exactly, from the sums."""
        squares = self.ee - 2.0 * correction.bias * self.e + self.mass * correction.bias.square()
        if correction.weight is not None:
            w = correction.weight
            squares = (
                squares + (w * (self.rr @ w)).sum(0) - 2.0 * (w * self.re).sum(0) + 2.0 * correction.bias * (self.r @ w)
            )
        if scale is not None:
            squares = squares * scale.to(squares).square()
        return max(float(squares.sum()), 0.0)  # in this order NaN stays NaN


@dataclass(frozen=True)
class Correction:
    """What a refit adds to a linear map: ΔW (d, k), None for no change, and c (k,).

    Attributes:
        indefinite: whether smaller ridges were of no use, as rounding had made the Gram matrix indefinite.
    """

    weight: Tensor | None
    bias: Tensor
    method: Method
    ridge: float | None = None
    indefinite: bool = False


def solve(
    moments: Moments, method: Method, *, biased: bool = True, ridge: float = RIDGES[1], kept: Tensor | None = None
) -> Correction:
    """The correction that minimises Σ ‖e − r ΔW − c‖² + ρ n ‖ΔW‖², ρ = `ridge` × the mean variance of the features.

    Args:
        method: "none" (no correction), "bias" (c alone) or "least_squares".
        kept: (d, k), False where ΔW must be 0, as the weight is pruned there; None for anywhere.
        biased: whether c is there; without it the features are not centred, and "bias" is no correction.
    """
    n, zero = moments.mass or 1.0, torch.zeros_like(moments.e)
    if method == "none" or (method == "bias" and not biased):
        return Correction(None, zero, "none")
    mean_r, mean_e = moments.r / n, moments.e / n
    if method == "bias":
        return Correction(None, mean_e, "bias")
    gram, cross = moments.rr, moments.re
    if biased:
        gram = gram - n * torch.outer(mean_r, mean_r)
        cross = cross - n * torch.outer(mean_r, mean_e)
    if kept is None:
        weight = torch.cholesky_solve(cross, _factor(gram, ridge))
    else:
        weight = solve_on(kept, _penalised(gram, ridge), cross)
    return Correction(weight, mean_e - mean_r @ weight if biased else zero, "least_squares", ridge)


def effective_rank(moments: Moments, ridge: float, biased: bool = True) -> float:
    """tr C (C + ρI)⁻¹, C the features' covariance: how many parameters an output of the ridge fit has in effect."""
    gram = moments.rr
    if biased:
        gram = gram - torch.outer(moments.r, moments.r) / (moments.mass or 1.0)
    penalty = _penalty(gram, ridge)
    return len(gram) - penalty * float(torch.cholesky_inverse(_factor(gram, ridge)).diagonal().sum())


def _penalty(gram: Tensor, ridge: float) -> float:
    mean = float(gram.diagonal().mean())
    return ridge * mean if mean > 0.0 else 1.0  # features that never fire: any penalty gives ΔW = 0


def _factor(gram: Tensor, ridge: float) -> Tensor:
    factor: Tensor = torch.linalg.cholesky(_penalised(gram, ridge))
    return factor


def _penalised(gram: Tensor, ridge: float) -> Tensor:
    return gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * _penalty(gram, ridge)
