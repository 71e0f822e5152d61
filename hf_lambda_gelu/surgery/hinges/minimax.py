"""Hinges without data: Σᵢ aᵢ relu(x − tᵢ) with the least sup |f − Σ| over the whole line that was found. [derived]

f(x; 1) − relu(x) is even for all bases, and so is Σ − relu here: hinges lie at ±t, with the same weight on either side. Then
Σ aᵢ = 1 and Σ aᵢ tᵢ = 0, so that Σ is f's asymptote beyond the outermost hinges: the error is largest between them, and
bounded everywhere. Two hinges do no better than one, as left of the first one Σ is 0, and f is −0.17 somewhere (erf base).
Three do as well as one and a constant, if the outer ones go to infinity. So it takes four. The numbers were found by
`python -m scripts.tools.minimax`; tests/surgery/hinges/test_minimax.py proves the bounds by interval arithmetic.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ...activation.bases import QUICK_SCALE


@dataclass(frozen=True)
class Minimax:
    """Hinges for λ = 1; at λ places and bound are those over λ.

    Attributes:
        at, weights: tᵢ, increasing, and aᵢ.
        bound: sup over all x of |f − Σ| is no more than this.
    """

    at: tuple[float, ...]
    weights: tuple[float, ...]
    bound: float


# base → {k: (places t > 0, Σ − relu there but for the outermost, the same at 0 where a hinge is there, bound)}
_FOUND: dict[str, dict[int, tuple[tuple[float, ...], tuple[float, ...], float | None, float]]] = {
    "gelu": {
        4: ((0.3919, 3.197), (-0.1664,), None, 0.0302),
        5: ((0.5774, 2.7336), (-0.1784,), -0.0146, 0.0157),
        6: ((0.1889, 0.6673, 2.6252), (-0.0913, -0.1776), None, 0.0114),
    },
    "gelu_tanh": {
        4: ((0.392, 3.1946), (-0.1664,), None, 0.0302),
        5: ((0.5823, 2.7117), (-0.1788,), -0.0152, 0.0157),
        6: ((0.1825, 0.67, 2.6161), (-0.087, -0.1781), None, 0.0112),
    },
    "silu": {
        4: ((0.6211, 6.6747), (-0.2656,), None, 0.0486),
        5: ((0.9342, 5.4459), (-0.2887,), -0.0238, 0.0252),
        6: ((0.3071, 1.1221, 5.4577), (-0.1529, -0.2767), None, 0.0232),
    },
}
KNOWN = (4, 5, 6)


def minimax(base: str, hinges: int) -> Minimax:
    """The best k hinges that are known, k of `KNOWN`."""
    if base == "quick_gelu":  # silu(1.702 x) / 1.702
        silu = minimax("silu", hinges)
        return Minimax(tuple(t / QUICK_SCALE for t in silu.at), silu.weights, silu.bound / QUICK_SCALE)
    places, values, middle, bound = _FOUND[base][hinges]
    # Σ at the places, from left to right: its slope is 0 before them, 1 after them
    right = [(t, v + t) for t, v in zip(places, (*values, 0.0), strict=True)]
    left = [(-t, v - t) for t, v in reversed(right)]
    points = left + ([] if middle is None else [(0.0, middle)]) + right
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.pairwise(points)]
    weights = tuple(after - before for before, after in zip([0.0, *slopes], [*slopes, 1.0], strict=True))
    return Minimax(tuple(x for x, _ in points), weights, bound)
