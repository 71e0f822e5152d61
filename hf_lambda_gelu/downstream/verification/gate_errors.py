"""How far a smooth gate is from ReLU, for what enters it in an interval.

With z what enters a gate, t = |z|: ReLU(z) − f(z; λ) = t gate(−λt), for every base, since gate(−u) = 1 − gate(u). It is ≥ 0,
rises up to the peak sup_error / λ and falls from there, since t ↦ log(t gate(−λt)) is concave. [derived]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from ...activation.bases import get_base
from .bounds import Box
from .network import Array

_EXACT = 2.0**-48  # what torch's erf and sigmoid in float64 may err by, and the steps around them: far above what they do


@dataclass(frozen=True)
class Gate:
    """f(z; λ) = z · gate(λz), of a base."""

    base: str
    hardness: Array  # λ, of shape (1,)


def gate_error(gate: Gate | None, pre: Box) -> Box:
    """Bounds on ReLU(z) − f(z; λ) for z in `pre`."""
    if gate is None:
        return Box(np.zeros_like(pre.lower), np.zeros_like(pre.lower))
    base = get_base(gate.base)
    most = pre.magnitude
    least = np.where((pre.lower <= 0.0) & (pre.upper >= 0.0), 0.0, np.minimum(np.abs(pre.lower), np.abs(pre.upper)))
    top = base.sup_error / gate.hardness * (1.0 + 2.0**-40)
    ends = [_error(gate, t) for t in (least, most)]
    peak = _peak(gate.base) / gate.hardness
    within = (least <= peak * (1.0 + 1e-6)) & (most >= peak * (1.0 - 1e-6))
    slack = _EXACT * np.minimum(most, 1e3 * top)  # where t is large, what it multiplies is far below that
    upper = np.where(within, top, np.minimum(np.maximum(*ends) + slack, top))
    return Box(np.maximum(np.minimum(*ends) - slack, 0.0), upper)


def _error(gate: Gate, t: Array) -> Array:
    """t gate(−λt) in float64."""
    inside = np.minimum(t, 1e300 / gate.hardness)
    found: Array = (torch.from_numpy(inside) * get_base(gate.base).gate(torch.from_numpy(-inside * gate.hardness))).numpy()
    return found


@cache
def _peak(base: str) -> float:
    """Where u gate(−u) is largest, to 1e-8: by thirds, as it rises and then falls."""
    low, high = 0.0, 4.0
    gate = Gate(base, np.ones(1))
    while high - low > 1e-8:
        first, second = low + (high - low) / 3.0, high - (high - low) / 3.0
        if _error(gate, np.array([first]))[0] < _error(gate, np.array([second]))[0]:
            low = first
        else:
            high = second
    return (low + high) / 2.0
