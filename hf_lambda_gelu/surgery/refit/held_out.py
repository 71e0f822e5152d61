"""What held-out rows decide: which rows these are, and which correction of a linear map does best on them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...measurement.places import Places
from .ridge import RIDGES, Correction, Method, Moments, effective_rank, solve

# one example in so many is held out to judge by
_HELD_OUT = 5


@dataclass(frozen=True)
class Examples:
    """The examples of one batch.

    Attributes:
        first: the number of the first of them in the calibration set.
        only: whether the calibration set has no other example.
    """

    first: int
    only: bool


@dataclass(frozen=True)
class Verdict:
    """What was decided for one map.

    Attributes:
        method: what did best on the held-out rows.
        rows: all rows that the map got, held out or not.
        before, after: Σ‖wanted − given‖² on the held-out rows, with the map as it is, and as the fitting rows alone say.
        rank: the features' effective rank at the ridge that was chosen.
        starved: whether there was nothing to fit, or nothing to judge by.
        pruned: which part of the weight is 0 and was kept so by the fit; 0.0 of a weight that is not pruned.
        indefinite: as in `Correction`.
    """

    method: Method
    rows: int
    before: float
    after: float
    rank: float | None = None
    starved: bool = False
    pruned: float = 0.0
    indefinite: bool = False


def split(seen: Places, examples: Examples) -> tuple[Tensor, Tensor]:
    """Which rows are fitted on, and which are held out: (n,) and (n,), bool. Padding is neither.

    Where it cannot be told which example a row belongs to, each row counts as an example.
    """
    rows = torch.arange(seen.count) if seen.row is None else seen.row
    keep = torch.ones_like(rows, dtype=torch.bool) if seen.token is None else seen.token.to(rows.device)
    part = rows if seen.example is None else seen.example
    if examples.only:
        part = rows // -(-seen.total // _HELD_OUT)  # a single example is judged by a part of itself
    held = (examples.first + part) % _HELD_OUT == 0
    return keep & ~held, keep & held


def choose(
    fit: Moments,
    held_out: Moments,
    method: Method,
    *,
    biased: bool = True,
    scale: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Correction, float, float]:
    """The best correction up to `method` by its error on the held-out rows, then solved again from all rows.

    Returns:
        The correction; the held-out error Σ‖…‖² without it, and with what the fitting rows alone gave. "none" is among the
        candidates, so the second is never above the first.
    """
    candidates: list[tuple[Method, float]] = [("none", RIDGES[0])]
    if method != "none":
        candidates.append(("bias", RIDGES[0]))
    if method == "least_squares":
        candidates += [("least_squares", ridge) for ridge in RIDGES]

    def solved(moments: Moments, name: Method, ridge: float) -> Correction | None:
        try:
            return solve(moments, name, biased=biased, ridge=ridge, kept=kept)
        except RuntimeError:  # LinAlgError: by rounding, the Gram matrix of nearly dependent features is indefinite
            return None

    tried = [solved(fit, name, ridge) for name, ridge in candidates]
    errors = [math.inf if correction is None else held_out.error(correction, scale) for correction in tried]
    best = min(range(len(candidates)), key=errors.__getitem__)
    both = fit + held_out
    for name, ridge in candidates[best:]:  # a larger ridge, where this one does not do with all rows
        correction = solved(both, name, ridge)
        if correction is not None:
            indefinite = None in tried or ridge != candidates[best][1]
            return dataclasses.replace(correction, indefinite=indefinite), errors[0], errors[best]
    return solve(both, "none"), errors[0], errors[0]


def decide(
    fit: Moments, held_out: Moments, method: Method, *, biased: bool, scale: Tensor | None, kept: Tensor | None = None
) -> tuple[Correction, Verdict]:
    """The correction of one map, and what it is worth; none where rows are lacking. `kept` as in `solve`."""
    rows = fit.count + held_out.count
    if not fit.count or not held_out.count:
        none = solve(held_out, "none")
        error = held_out.error(none)
        return none, Verdict("none", rows, error, error, starved=True)
    correction, before, after = choose(fit, held_out, method, biased=biased, scale=scale, kept=kept)
    rank = None if correction.ridge is None else effective_rank(fit + held_out, correction.ridge, biased)
    pruned = 0.0 if kept is None or correction.weight is None else 1.0 - float(kept.double().mean())
    indefinite = correction.indefinite
    return correction, Verdict(correction.method, rows, before, after, rank, pruned=pruned, indefinite=indefinite)


def summary(methods: Iterable[str]) -> str:
    """The method, or of several maps (experts) how many got which."""
    counts = Counter(methods)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{name} × {count}" for name, count in counts.items())
