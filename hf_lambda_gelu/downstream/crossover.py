"""From how many zeros on the sparse kernel is faster than torch's dense product: measured, on the weights themselves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 7
_MAPS = 8  # of one shape that take turns, so that each finds the cache as it is in a model: full of the others
FIRING = (0.1, 0.5)  # the shares of units at which the kernel is timed


@dataclass(frozen=True)
class Crossover:
    """Times of one row, of maps of one shape.

    Attributes:
        dense: of torch's own product, microseconds.
        at_tenth: of the kernel where a tenth of the units fires, microseconds.
        most: the largest share of firing units with which the kernel is faster: 1 if it always is, 0 if it never is.
    """

    dense: float
    at_tenth: float
    most: float


def crossover(dense: Sequence[Callable[[], Tensor]], sparse: Sequence[Callable[[float], Tensor | None]]) -> Crossover:
    """Time both, taking turns.

    Args:
        dense: for each map, runs it on one row.
        sparse: for each map, runs the kernel on a row of which this share of the units fires, not always the same ones.

    The kernel's time is taken to be a line over the share: it reads so much memory.
    """
    times: dict[float, list[float]] = {share: [] for share in (1.0, *FIRING)}
    for _ in range(ROUNDS):
        for one, other in zip(dense[:_MAPS], sparse[:_MAPS], strict=True):
            times[1.0].append(_timed(one))
            for share in FIRING:
                times[share].append(_timed(lambda share=share, run=other: run(share)))  # type: ignore[misc]
    whole, (low, high) = statistics.median(times[1.0]), (statistics.median(times[share]) for share in FIRING)
    slope = (high - low) / (FIRING[1] - FIRING[0])
    at_zero = low - slope * FIRING[0]
    most = (whole - at_zero) / slope if slope > 0 else float(whole > high)
    return Crossover(whole * 1e6, low * 1e6, min(1.0, max(0.0, most)))


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def firing(units: int, share: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A row (1, units) of which about this share is not 0."""
    drawn = torch.rand(1, units, generator=generator, device="cpu")
    return torch.where(drawn < share, drawn + 0.5, 0.0).to(dtype)
