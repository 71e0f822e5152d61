"""Ridge regression from sums: what a linear map must gain so that its output moves by a wanted amount.

Rows come in piece by piece and only their sums are kept, so memory depends on the widths and not on the number of rows. All
of it is derived; the paper (arXiv 2603.21991) does not compensate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .pruned import solve_on

# tried in units of the mean diagonal of the features' covariance; the held-out part of the calibration set chooses
RIDGES = (0.001, 0.01, 0.1, 1.0)
# rows are multiplied in their own precision in pieces of so many and the products summed in fp64
PIECE = 4096
# fewer rows are multiplied in fp64: it costs little, and a fit to few rows shows rounding most
FEW = 256
# columns of a symmetric product that are multiplied at a time: of each block and its mirror image one is computed
_PANEL = 256

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

    def add(self, features: Tensor, wanted: Tensor, weights: Tensor | None = None, consume: bool = False) -> None:
        """Take in rows: features (n, d) and wanted changes (n, k), with weights (n,); `consume`: they may be overwritten."""
        if not len(features):
            return
        for start in range(0, len(features), PIECE):
            pieces = features[start : start + PIECE], wanted[start : start + PIECE]
            least = torch.float64 if len(pieces[0]) < FEW else torch.float32
            r, e = (t.to(self.r.device, torch.promote_types(t.dtype, least)) for t in pieces)
            self.count += len(r)
            if weights is not None:
                self._add_weighted(r, e, weights[start : start + PIECE].to(r))
                continue
            self.mass += len(r)
            self.ee += e.double().square().sum(0)
            # products of what is left without the mean: beside a large mean, fp32 would lose the rest
            mean_r, mean_e = r.mean(0), e.mean(0)
            r, e = (r.sub_(mean_r), e.sub_(mean_e)) if consume else (r - mean_r, e - mean_e)
            self.rr += _symmetric_product(r)
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
        self.rr += _symmetric_product(r)
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


class Pieces:
    """Rows that wait until they make up a piece: each piece costs a pass over the sums, however few rows it has.

    Attributes:
        moments: the sums of the rows, once `finish` was called.
    """

    def __init__(self, moments: Moments, rows: int = PIECE) -> None:
        """
        Args:
            rows: how many make up a piece.
        """
        self.moments, self._rows = moments, rows
        self._waiting: list[tuple[Tensor, ...]] = []
        self._count = 0

    def add(self, features: Tensor, wanted: Tensor, weights: Tensor | None = None) -> None:
        """Take in rows, as `Moments.add`, all with weights or none; they are not copied."""
        if len(features):
            self._waiting.append((features, wanted) if weights is None else (features, wanted, weights))
            self._count += len(features)
        if self._count >= self._rows:
            self._hand_on(self._count - self._count % self._rows)

    def finish(self) -> None:
        """Let the rows that wait be part of the sums."""
        if self._count:
            self._hand_on(self._count)

    def _hand_on(self, count: int) -> None:
        first = self._waiting[0]
        joined = tuple(part.new_empty(self._count, *part.shape[1:]) for part in first)
        start = 0
        for parts in _drained(self._waiting):
            end = start + len(parts[0])
            for whole, part in zip(joined, parts, strict=True):
                whole[start:end] = part
            start = end
        self._count -= count
        if self._count:  # copies, so that the rows that are summed are not kept in memory by those that wait
            self._waiting.append(tuple(whole[count:].clone() for whole in joined))
        features, wanted = (whole[:count] for whole in joined[:2])
        self.moments.add(features, wanted, joined[2][:count] if len(joined) > 2 else None, consume=True)


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


class Ridge:
    """The corrections that sums of rows give, one ridge after the other: what they have in common is computed once."""

    def __init__(self, moments: Moments, biased: bool = True, kept: Tensor | None = None) -> None:
        """
        Args:
            biased, kept: as for `solve`.
        """
        n = moments.mass or 1.0
        self.biased, self.kept = biased, kept
        self.mean_r, self.mean_e = moments.r / n, moments.e / n
        self.gram, self.cross = moments.rr, moments.re
        if biased:
            self.gram = torch.addr(self.gram, self.mean_r, self.mean_r, alpha=-n)
            self.cross = torch.addr(self.cross, self.mean_r, self.mean_e, alpha=-n)
        self._mean = float(self.gram.diagonal().mean())
        self._factor: tuple[float, Tensor] | None = None

    def solve(self, ridge: float) -> Correction:
        """The correction of that ridge, "least_squares"."""
        if self.kept is None:
            weight = torch.cholesky_solve(self.cross, self._factorised(ridge))
        else:
            weight = solve_on(self.kept, self._penalised(ridge), self.cross)
        bias = self.mean_e - self.mean_r @ weight if self.biased else torch.zeros_like(self.mean_e)
        return Correction(weight, bias, "least_squares", ridge)

    def effective_rank(self, ridge: float) -> float:
        """tr C (C + ρI)⁻¹ = d − ρ ‖L⁻¹‖² with C + ρI = LLᵀ, C the features' covariance."""
        factor = self._factorised(ridge)
        size = len(factor)
        squares = torch.zeros((), dtype=factor.dtype, device=factor.device)
        for start in range(0, size, _PANEL):  # columns of L⁻¹, which are 0 above the diagonal
            width = min(_PANEL, size - start)
            unit = torch.eye(size - start, width, dtype=factor.dtype, device=factor.device)
            squares += torch.linalg.solve_triangular(factor[start:, start:], unit, upper=False).square().sum()
        return size - self._penalty(ridge) * float(squares)

    def _factorised(self, ridge: float) -> Tensor:
        if self._factor is None or self._factor[0] != ridge:
            self._factor = None  # its memory is free before there is another one
            self._factor = ridge, torch.linalg.cholesky(self._penalised(ridge))
        return self._factor[1]

    def _penalised(self, ridge: float) -> Tensor:
        gram = self.gram.clone()
        gram.diagonal().add_(self._penalty(ridge))
        return gram

    def _penalty(self, ridge: float) -> float:
        return ridge * self._mean if self._mean > 0.0 else 1.0  # features that never fire: any penalty gives ΔW = 0


def solve(
    moments: Moments, method: Method, *, biased: bool = True, ridge: float = RIDGES[1], kept: Tensor | None = None
) -> Correction:
    """The correction that minimises Σ ‖e − r ΔW − c‖² + ρ n ‖ΔW‖², ρ = `ridge` × the mean variance of the features.

    Args:
        method: "none" (no correction), "bias" (c alone) or "least_squares".
        kept: (d, k), False where ΔW must be 0, as the weight is pruned there; None for anywhere.
        biased: whether c is there; without it the features are not centred, and "bias" is no correction.
    """
    if method == "least_squares":
        return Ridge(moments, biased, kept).solve(ridge)
    if method == "none" or not biased:
        return Correction(None, torch.zeros_like(moments.e), "none")
    return Correction(None, moments.e / (moments.mass or 1.0), "bias")


def effective_rank(moments: Moments, ridge: float, biased: bool = True) -> float:
    """tr C (C + ρI)⁻¹, C the features' covariance: how many parameters an output of the ridge fit has in effect."""
    return Ridge(moments, biased).effective_rank(ridge)


def _drained(waiting: list[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Its members, each of which the list has no more."""
    while waiting:
        yield waiting.pop(0)


def _symmetric_product(rows: Tensor) -> Tensor:
    """rowsᵀ rows, of which what lies below the diagonal is copied from above."""
    size = rows.shape[1]
    product = rows.new_empty(size, size)
    for start in range(0, size, _PANEL):
        end = min(size, start + _PANEL)
        torch.mm(rows[:, start:end].T, rows[:, start:], out=product[start:end, start:])
        product[end:, start:end] = product[start:end, end:].T
    return product
