"""Where hinges lie: f(x) ≈ Σᵢ aᵢ relu(x − tᵢ) (+ c) by weighted least squares under what each neuron gets. No model here.

A gate is nearly piecewise linear, so that a few ReLUs follow it closely where a neuron's pre-activations are. Per neuron the
weight of each x is measured (a `Histogram`); candidates for the places of hinges are spread by the density (w f″²)^(1/5),
which is where knots of a piecewise linear fit belong as their number grows; the best one, pair and triple of them are found
by trying all, further ones one by one with exchanges. All of it is derived, not the paper's (arXiv 2603.21991).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# at most so many hinges a neuron
MOST = 4
# bins are even in asinh(λx), so that they are narrow where a gate bends and wide in its tails: ±1100 in units of 1/λ
_BINS, _REACH = 384, 7.7
# candidates for the place of a hinge, per neuron
_CANDIDATES = 22
# candidates of every neuron, in units of 1/λ: far to the left a hinge is always active, an affine function
_FIXED = (-12.0, -6.0, -3.0, -1.0, 0.0)
# of a neuron's weight, spread evenly over the bins up to ±8: calibration has not seen everything
_TAIL = 0.0003
_TAIL_REACH = 8.0
# added to the normal equations' diagonal, relative: without it two near hinges take large weights that cancel
_DAMPING = 1e-6


def nodes(device: torch.device | str = "cpu") -> Tensor:
    """(bins,) the middles of the bins, in units of 1/λ, fp64."""
    edges = torch.linspace(-_REACH, _REACH, _BINS + 1, dtype=torch.float64, device=device)
    return torch.sinh((edges[1:] + edges[:-1]) / 2)


@dataclass
class Histogram:
    """How much weight each neuron's pre-activations have in each bin of λx.

    Attributes:
        hardness: λ, a number or (d,).
        weight: (d, bins), fp64.
        rows: how many were added.
    """

    neurons: int
    hardness: Tensor | float
    device: torch.device
    weight: Tensor = field(init=False)
    rows: int = 0

    def __post_init__(self) -> None:
        self.weight = torch.zeros(self.neurons, _BINS, dtype=torch.float64, device=self.device)

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Take in pre-activations (rows, d), with weights of the same shape, or one each (rows, 1); None for 1."""
        x = x.to(self.device, torch.float32)
        place = torch.asinh(x * self.hardness).mul_(_BINS / (2 * _REACH)).add_(_BINS / 2).clamp_(0, _BINS - 1).long()
        place += torch.arange(self.neurons, device=self.device) * _BINS
        weights = None if weight is None else weight.to(self.device, torch.float32).expand_as(x).reshape(-1)
        counts = torch.bincount(place.reshape(-1), weights, minlength=self.neurons * _BINS)
        self.weight += counts.view(self.neurons, _BINS).double()
        self.rows += len(x)


@dataclass(frozen=True)
class Places:
    """The best hinges by their number: for each number n up to `most`, n per neuron.

    Attributes:
        at, weights: n → (d, n), tᵢ in units of x, and aᵢ; fp64.
        shift: n → (d,), c; zeros where there was none to choose.
        errors: n → (d,), Σ weight (f − Σ)², relative to the neuron's whole weight times 1/λ².
    """

    at: dict[int, Tensor]
    weights: dict[int, Tensor]
    shift: dict[int, Tensor]
    errors: dict[int, Tensor]


def place(
    histogram: Histogram, gate: Callable[[Tensor], Tensor], most: int, *, shifted: bool = False, activity: float = 0.0
) -> Places:
    """The best 1, 2, … `most` hinges of each neuron.

    Args:
        gate: x → f(x; 1), elementwise, in fp64. f(x; λ) = f(λx; 1) / λ, so that places scale by 1/λ.
        most: up to `MOST`.
        shifted: whether a constant c comes for nothing: the map after an ungated site has a bias.
        activity: penalty on Σᵢ P(x > tᵢ), as a fraction of the error that one hinge at 0 leaves.
    """
    if not 1 <= most <= MOST:
        raise ValueError(f"from 1 to {MOST} hinges are placed, got {most}")
    x = nodes(histogram.device)
    f = gate(x)
    weight = _weight(histogram.weight, x)
    candidates = _candidates(weight, x, f)
    problem = _Problem.of(weight, x, f, candidates, shifted, activity)
    chosen = _chosen(problem, most)
    scale = torch.as_tensor(histogram.hardness, dtype=torch.float64, device=histogram.device).reshape(-1, 1)
    at, weights, shift, errors = {}, {}, {}, {}
    for number, subset in chosen.items():
        a, error = problem.solved(subset)
        at[number] = candidates.gather(1, subset) / scale
        weights[number] = a
        mean = problem.mean_f - (a * problem.mean.gather(1, subset)).sum(1)
        shift[number] = (mean if shifted else torch.zeros_like(mean)) / scale[:, 0]
        errors[number] = error
    return Places(at, weights, shift, errors)


def _weight(measured: Tensor, x: Tensor) -> Tensor:
    """(d, bins) that sum to 1: what was measured, and a little everywhere near 0."""
    total = measured.sum(1, keepdim=True)
    tail = (x.abs() <= _TAIL_REACH).double()
    tail = tail / tail.sum()
    return torch.where(total > 0, (1 - _TAIL) * measured / total.clamp(min=1e-300) + _TAIL * tail, tail)


def _candidates(weight: Tensor, x: Tensor, f: Tensor) -> Tensor:
    """(d, candidates), increasing: even quantiles of (w f″²)^(1/5), one left of nearly all the weight, and fixed ones."""
    step = x.diff()
    slope = f.diff() / step
    bend = torch.zeros_like(x)
    bend[1:-1] = slope.diff() / ((step[1:] + step[:-1]) / 2)
    width = torch.zeros_like(x)
    width[1:-1] = (step[1:] + step[:-1]) / 2
    density = ((weight / width.clamp(min=1e-12)) * bend.square()).pow(0.2) * width
    density[:, width == 0] = 0.0
    cumulative = density.cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    count = _CANDIDATES - 1 - len(_FIXED)
    wanted = (torch.arange(count, dtype=x.dtype, device=x.device) + 0.5) / count
    index = torch.searchsorted(cumulative, wanted.expand(len(weight), -1).contiguous()).clamp(max=len(x) - 1)
    left = torch.searchsorted(weight.cumsum(1), torch.full((len(weight), 1), 2e-3, dtype=x.dtype, device=x.device))
    outermost = torch.minimum(x[left.clamp(max=len(x) - 1)], x[index[:, :1]]) - 0.1
    fixed = torch.tensor(_FIXED, dtype=x.dtype, device=x.device).expand(len(weight), -1)
    return torch.cat([outermost, x[index], fixed], dim=1).sort(1).values


@dataclass
class _Problem:
    """Normal equations of all candidates: pick some, and the error of their best weights is in them.

    Attributes:
        gram, cross, square: (d, m, m), (d, m) and (d,), centred where a shift is free.
        mean, mean_f: (d, m) and (d,), the means of the candidates' ReLUs and of f.
        price: (d, m), of taking a candidate, beside the error.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    mean: Tensor
    mean_f: Tensor
    price: Tensor

    @classmethod
    def of(cls, weight: Tensor, x: Tensor, f: Tensor, candidates: Tensor, shifted: bool, activity: float) -> _Problem:
        relu = (x - candidates.unsqueeze(2)).clamp(min=0.0)  # (d, m, bins)
        weighted = relu * weight.unsqueeze(1)
        gram, cross = weighted @ relu.mT, weighted @ f
        square, mean, mean_f = weight @ f.square(), weighted.sum(2), weight @ f
        if shifted:
            gram = gram - mean.unsqueeze(2) * mean.unsqueeze(1)
            cross = cross - mean * mean_f.unsqueeze(1)
            square = square - mean_f.square()
        gram.diagonal(dim1=1, dim2=2).mul_(1.0 + _DAMPING).add_(1e-12)
        active = ((x > candidates.unsqueeze(2)) * weight.unsqueeze(1)).sum(2)
        single = (weight * (f - x.clamp(min=0.0)).square()).sum(1, keepdim=True)
        return cls(gram, cross, square, mean, mean_f, activity * single * active)

    @property
    def size(self) -> int:
        return self.cross.shape[1]

    def solved(self, subset: Tensor) -> tuple[Tensor, Tensor]:
        """The weights (d, n) of the candidates in `subset` (d, n), and the error (d,)."""
        n = subset.shape[1]
        rows = self.gram.gather(1, subset.unsqueeze(2).expand(-1, -1, self.size))
        gram = rows.gather(2, subset.unsqueeze(1).expand(-1, n, -1))
        cross = self.cross.gather(1, subset)
        a = torch.linalg.solve(gram, cross)
        return a, (self.square - (a * cross).sum(1)).clamp(min=0.0)

    def best_next(self, subset: Tensor) -> tuple[Tensor, Tensor]:
        """The best further candidate beside those in `subset` (d, n), n ≥ 0: its index (d,), and the cost (d,) with it."""
        n = subset.shape[1]
        cost = self.price.gather(1, subset).sum(1) if n else torch.zeros_like(self.square)
        residual, diagonal, left = self.cross, self.gram.diagonal(dim1=1, dim2=2), self.square
        if n:
            rows = self.gram.gather(1, subset.unsqueeze(2).expand(-1, -1, self.size))  # (d, n, m)
            inner = rows.gather(2, subset.unsqueeze(1).expand(-1, n, -1))
            cross = self.cross.gather(1, subset).unsqueeze(2)
            both = torch.linalg.solve(inner, torch.cat([rows, cross], dim=2))
            residual = residual - (rows * both[:, :, -1:]).sum(1)
            diagonal = diagonal - (rows * both[:, :, :-1]).sum(1)
            left = left - (cross * both[:, :, -1:]).sum((1, 2))
        floor = 1e-9 * self.gram.diagonal(dim1=1, dim2=2)
        costs = (left + cost).unsqueeze(1) - residual.square() / diagonal.clamp(min=1e-300) + self.price
        costs = torch.where(diagonal > floor, costs, torch.inf)
        if n:
            costs = costs.scatter(1, subset, torch.inf)
        best = costs.min(1)
        return best.indices, best.values


def _chosen(problem: _Problem, most: int) -> dict[int, Tensor]:
    """n → the best n candidates (d, n): all ones, pairs and triples are tried, further ones by exchanges."""
    d, m = problem.cross.shape
    device = problem.cross.device
    none = torch.zeros(d, 0, dtype=torch.long, device=device)
    chosen = {1: problem.best_next(none)[0].unsqueeze(1)}
    for number in range(2, most + 1):
        if number <= 3:
            fixed = [torch.tensor(list(pick), device=device).expand(d, -1) for pick in _subsets(m, number - 1)]
        else:
            fixed = [chosen[number - 1]]
        cost = torch.full((d,), torch.inf, dtype=problem.cross.dtype, device=device)
        subset = torch.zeros(d, number, dtype=torch.long, device=device)
        for part in fixed:
            index, found = problem.best_next(part)
            better = found < cost
            cost = torch.where(better, found, cost)
            subset = torch.where(better.unsqueeze(1), torch.cat([part, index.unsqueeze(1)], dim=1), subset)
        if number > 3:
            subset = _exchanged(problem, subset)
        chosen[number] = subset.sort(1).values
    return chosen


def _subsets(count: int, size: int) -> list[tuple[int, ...]]:
    if size == 1:
        return [(i,) for i in range(count)]
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def _exchanged(problem: _Problem, subset: Tensor, rounds: int = 2) -> Tensor:
    """Each candidate in turn given up for the best in its place, a few times."""
    number = subset.shape[1]
    for _ in range(rounds):
        for place in range(number):
            rest = torch.cat([subset[:, :place], subset[:, place + 1 :]], dim=1)
            index, _ = problem.best_next(rest)
            subset = torch.cat([rest[:, :place], index.unsqueeze(1), rest[:, place:]], dim=1)
    return subset
