"""How hard is hard enough, and the deterministic way there.

Everything here is a pure function of numbers, so a resumed run cannot differ from an uninterrupted one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

RampShape = Literal["geometric", "linear", "cosine", "reciprocal"]
RAMP_SHAPES: tuple[str, ...] = ("geometric", "linear", "cosine", "reciprocal")


def ramp(progress: float, start: float, end: float, shape: str = "geometric") -> float:
    """λ between `start` (progress 0) and `end` (progress 1); monotone, and exact at both ends.

    geometric: linear in log λ. linear: in λ. cosine: in λ, with flat ends. reciprocal: linear in 1/λ, so in the sup error.
    The paper's shape is not known to us; all four are derived.

    Raises:
        ValueError: unknown shape.
    """
    if shape not in RAMP_SHAPES:
        raise ValueError(f"unknown ramp shape {shape!r}: expected one of {', '.join(RAMP_SHAPES)}")
    if progress <= 0.0:
        return start
    if progress >= 1.0:
        return end
    if shape == "geometric":
        value: float = start * (end / start) ** progress
    elif shape == "reciprocal":
        value = 1.0 / ((1.0 - progress) / start + progress / end)
    else:
        if shape == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        value = start + (end - start) * progress
    return min(max(value, min(start, end)), max(start, end))  # rounding may step over an end by a unit


@dataclass(frozen=True)
class HardeningSchedule:
    """Says what λ is at each step of a training run: learned, then ramped to the target, then held there. [derived]

    Attributes:
        max_steps: optimizer steps of the whole run.
        switch_point: fraction of the run after which learning ends and the ramp begins, in [0, 1]. 0.25 is the paper's
            heuristic (as reported; whether of elapsed training is not known).
        hold: fraction at the end during which λ stays at the target; `switch_point + hold` ≤ 1.
        shape: see `ramp`.

    Steps count completed optimizer steps: λ at step k is what the model has after its k-th update.

    Raises:
        ValueError: a fraction outside [0, 1], fractions that leave no room for the ramp, an unknown shape.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> schedule = hlg.HardeningSchedule(max_steps=100, switch_point=0.25, hold=0.15)
        >>> schedule.switch_step, schedule.hold_step, schedule.learning(24)
        (25, 85, True)
        >>> [round(schedule.hardness(step, at_switch=1.0, target=100.0), 1) for step in (25, 55, 85, 100)]
        [1.0, 10.0, 100.0, 100.0]
    """

    max_steps: int
    switch_point: float = 0.25
    hold: float = 0.1
    shape: str = "geometric"

    def __post_init__(self) -> None:
        check_schedule(self.switch_point, self.hold, self.shape)

    @property
    def switch_step(self) -> int:
        """The first step at which λ is not learned any more."""
        return math.ceil(_steps(self.switch_point * self.max_steps))

    @property
    def hold_step(self) -> int:
        """The first step at which λ is at its target."""
        return max(self.switch_step, math.floor(_steps((1.0 - self.hold) * self.max_steps)))

    def learning(self, step: int) -> bool:
        """Whether λ is still learned after `step` updates."""
        return step < self.switch_step

    def hardness(self, step: int, at_switch: float, target: float) -> float:
        """λ after `step` ≥ `switch_step` updates, from `at_switch` to `target`; never below `at_switch`."""
        span = self.hold_step - self.switch_step
        progress = 1.0 if step >= self.hold_step else max(0, step - self.switch_step) / max(1, span)
        return ramp(progress, at_switch, max(at_switch, target), self.shape)


def _steps(product: float) -> float:
    return round(product, 6)  # 0.07 · 100 is 7.000000000000001 in floating point, which is 7 steps


def check_schedule(switch_point: float, hold: float, shape: str) -> None:
    """Raises ValueError, with the offending value, unless the fractions lie in [0, 1] and leave room for each other."""
    for name, value in (("switch point", switch_point), ("hold fraction", hold)):
        if not (0.0 <= value <= 1.0):
            raise ValueError(f"the {name} is a fraction of training and must lie in [0, 1], got {value}")
    if switch_point + hold > 1.0:
        raise ValueError(
            f"switch point {switch_point} + hold fraction {hold} = {switch_point + hold:g} leaves no room for the ramp: "
            "their sum must not exceed 1"
        )
    if shape not in RAMP_SHAPES:
        raise ValueError(f"unknown ramp shape {shape!r}: expected one of {', '.join(RAMP_SHAPES)}")
