"""How many hinges are asked for, checked before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .minimax import KNOWN
from .placement import MOST


@dataclass(frozen=True)
class Wanted:
    """How wide the layers shall be.

    Attributes:
        hinges: so many per neuron; 1 where a budget is given.
        budget: the width over the width before; None for `hinges` per neuron.
        measured: whether calibration data say where the hinges lie; minimax over all x does otherwise.
    """

    hinges: int = 1
    budget: float | None = None
    measured: bool = True

    @property
    def factor(self) -> float:
        """The width over the width before."""
        return float(self.hinges) if self.budget is None else self.budget

    @property
    def most(self) -> int:
        """How many hinges a neuron may have."""
        return self.hinges if self.budget is None else MOST

    def allows(self, before: int, units: int) -> bool:
        """Whether a layer of so many units can have so many: those of each neuron are given, those of a budget about."""
        if self.budget is None:
            return units == self.hinges * before
        return abs(units - self.budget * before) <= 1 and before <= units <= MOST * before


def check_hinges(hinges: object, budget: object, measured: bool) -> Wanted | None:
    """What is asked for; None for one ReLU per neuron, where the gate had its bend.

    Raises:
        ValueError, TypeError: numbers out of range, both, or a budget without data to spend it by.
    """
    if isinstance(hinges, bool) or not isinstance(hinges, int):
        raise TypeError(f"hinges must be an integer >= 1, got {type(hinges).__name__}: {hinges!r}")
    if not 1 <= hinges <= (MOST if measured else max(KNOWN)):
        raise ValueError(
            f"hinges must be from 1 to {MOST} with compensate, from 1 to {max(KNOWN)} without, got {hinges}: 1 is one ReLU "
            "per neuron, as wide as before"
        )
    if not measured and hinges > 1 and hinges not in KNOWN:
        raise ValueError(
            f"without data {hinges} hinges follow a gate no better than one ReLU and a constant: take {KNOWN[0]} to "
            f"{KNOWN[-1]}, or pass calibration=… and compensate='least_squares', by which two do well"
        )
    if budget is None:
        return Wanted(hinges, measured=measured) if hinges > 1 else None
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"budget must be a number >= 1, got {type(budget).__name__}: {budget!r}")
    if hinges != 1:
        raise ValueError(
            f"hinges={hinges} and budget={budget} are alternatives: hinges gives each neuron so many, budget spends so "
            "much width where it helps. Pass one of them"
        )
    if not (math.isfinite(budget) and 1.0 <= budget <= MOST):
        raise ValueError(
            f"budget must be a finite number from 1 to {MOST}, the width over the width before (1.5 is half as wide "
            f"again), got {budget}"
        )
    if not measured:
        raise ValueError(
            f"budget={budget} is spent where the data say that it helps: pass calibration=… and "
            "compensate='least_squares', or hinges=…, which needs no data"
        )
    return Wanted(1, float(budget))
