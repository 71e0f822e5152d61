"""What held-out rows decide: which rows these are, and which correction of a linear map does best on them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ...measurement.places import Places
from .ridge import RIDGES, Correction, Method, Moments, Ridge, solve

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
    rows = torch.arange(seen.count, device="cpu") if seen.row is None else seen.row
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
    correction, before, after, _ = _chosen(fit, held_out, method, biased, scale, kept)
    return correction, before, after


def _chosen(
    fit: Moments, held_out: Moments, method: Method, biased: bool, scale: Tensor | None, kept: Tensor | None
) -> tuple[Correction, float, float, float | None]:
    """What `choose` returns, and of a least squares fit the features' effective rank."""
    simple: tuple[Method, ...] = ("none",) if method == "none" else ("none", "bias")
    errors = [held_out.error(solve(fit, name, biased=biased), scale) for name in simple]
    if method == "least_squares":
        fitted = Ridge(fit, biased, kept)
        errors += [_error(fitted, ridge, held_out, scale) for ridge in RIDGES]
        del fitted  # its memory is free before there is another one
    best = min(range(len(errors)), key=errors.__getitem__)
    every = fit + held_out
    if best < len(simple):
        return solve(every, simple[best], biased=biased), errors[0], errors[best], None
    first = best - len(simple)
    chosen, indefinite = Ridge(every, biased, kept), math.inf in errors
    for ridge in RIDGES[first:]:  # a larger ridge, where this one does not do with all rows
        try:
            correction = dataclasses.replace(chosen.solve(ridge), indefinite=indefinite or ridge != RIDGES[first])
            return correction, errors[0], errors[best], chosen.effective_rank(ridge)
        except LinAlgError:
            continue
    return solve(every, "none"), errors[0], errors[0], None


def _error(fitted: Ridge, ridge: float, held_out: Moments, scale: Tensor | None) -> float:
    """inf where the Gram matrix of nearly dependent features is indefinite by rounding."""
    try:
        return held_out.error(fitted.solve(ridge), scale)
    except LinAlgError:
        return math.inf


def decide(
    fit: Moments, held_out: Moments, method: Method, *, biased: bool, scale: Tensor | None, kept: Tensor | None = None
) -> tuple[Correction, Verdict]:
    """The correction of one map, and what it is worth; none where rows are lacking. `kept` as in `solve`."""
    rows = fit.count + held_out.count
    if not fit.count or not held_out.count:
        none = solve(held_out, "none")
        error = held_out.error(none)
        return none, Verdict("none", rows, error, error, starved=True)
    correction, before, after, rank = _chosen(fit, held_out, method, biased, scale, kept)
    pruned = 0.0 if kept is None or correction.weight is None else 1.0 - float(kept.double().mean())
    indefinite = correction.indefinite
    return correction, Verdict(correction.method, rows, before, after, rank, pruned=pruned, indefinite=indefinite)


def summary(methods: Iterable[str]) -> str:
    """The method, or of several maps (experts) how many got which."""
    counts = Counter(methods)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{name} × {count}" for name, count in counts.items())
