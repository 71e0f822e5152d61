"""The targets, bounds, ramps and the schedule of hardening, against mpmath, exact fractions and definitions written here."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import mpmath as mp
import numpy as np
import pytest
import torch
from support.references import NUMPY_GATES

import hf_lambda_gelu as hlg
from hf_lambda_gelu import HardeningSchedule
from hf_lambda_gelu.training.schedule import RAMP_SHAPES, ramp

MP_GATES: dict[str, Callable[[mp.mpf], mp.mpf]] = {
    "gelu": mp.ncdf,
    "gelu_tanh": lambda u: (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (u + mp.mpf("0.044715") * u**3))) / 2,
    "quick_gelu": lambda u: 1 / (1 + mp.exp(-mp.mpf("1.702") * u)),
    "silu": lambda u: 1 / (1 + mp.exp(-u)),
}
each_base = pytest.mark.parametrize("base", list(MP_GATES))
each_shape = pytest.mark.parametrize("shape", ["geometric", "linear", "cosine", "reciprocal"])


@each_base
@pytest.mark.parametrize("tolerance", [0.5, 0.05, 0.005, 1e-4])
def test_target_hardness(base: str, tolerance: float) -> None:
    """mpmath integrates the hardened gate's distance to the step at the λ returned: the integral is the tolerance."""
    hardness = hlg.target_hardness(tolerance, base)
    with mp.workdps(25):
        bends = [mp.mpf(k) / hardness for k in (2, 5, 20)]
        left = mp.quad(lambda x: MP_GATES[base](hardness * x), [-mp.inf, *(-b for b in reversed(bends)), 0])
        right = mp.quad(lambda x: 1 - MP_GATES[base](hardness * x), [0, *bends, mp.inf])
        assert float(left + right) == pytest.approx(tolerance, rel=1e-13, abs=0.0)


def test_target_of_the_paper() -> None:
    """2 / (ε√(2π)) in mpmath's digits: ε = 0.005 is the default and gives 159.577; λ is never below 1."""
    with mp.workdps(30):
        expected = float(2 / (mp.mpf("0.005") * mp.sqrt(2 * mp.pi)))
    assert hlg.target_hardness() == hlg.target_hardness(0.005) == pytest.approx(expected, rel=1e-15, abs=0.0)
    assert expected == pytest.approx(159.577, abs=5e-4)
    assert hlg.target_hardness(50.0) == hlg.target_hardness(0.8) == 1.0


@each_base
@pytest.mark.parametrize("hardness", [1.0, 1.7, 10.0, 159.577, 1e4])
def test_sup_error_bounds_and_is_attained(base: str, hardness: float) -> None:
    """|f − ReLU| on a fine grid, f from scipy and from the package: below the bound everywhere, and at it somewhere."""
    u = np.linspace(-12, 12, 40_001)
    x = u / hardness
    bound = hlg.sup_error(hardness, base)
    largest = np.abs(x * NUMPY_GATES[base](u) - np.maximum(x, 0)).max()
    assert bound * (1 - 1e-6) < largest <= bound * (1 + 1e-14)
    z = torch.from_numpy(np.concatenate([x, [0.0, 1.0, -1.0, 1e4, -1e4]])).float()
    gap = (hlg.lambda_gelu(z, hardness, base) - z.relu()).abs()
    assert (gap <= bound + 2e-7 * z.abs()).all()


DEFINITIONS: dict[str, Callable[[float, float, float], float]] = {
    "geometric": lambda p, a, b: math.exp((1 - p) * math.log(a) + p * math.log(b)),
    "linear": lambda p, a, b: (1 - p) * a + p * b,
    "cosine": lambda p, a, b: (a + b) / 2 - (b - a) / 2 * math.cos(math.pi * p),
    "reciprocal": lambda p, a, b: a * b / ((1 - p) * b + p * a),
}


@each_shape
@pytest.mark.parametrize(("start", "end"), [(1.0, 159.577), (1.6931, 160.0), (1.11, 1e6)])
def test_ramp_follows_its_definition(shape: str, start: float, end: float) -> None:
    """A closed form of each shape, written otherwise than in the package; exact ends, nothing beyond them."""
    progress = [k / 1000 for k in range(1001)]
    values = [ramp(p, start, end, shape) for p in progress]
    assert values == pytest.approx([DEFINITIONS[shape](p, start, end) for p in progress], rel=1e-9)
    assert (values[0], values[-1]) == (start, end)
    assert (ramp(-0.5, start, end, shape), ramp(1.5, start, end, shape)) == (start, end)
    assert all(a < b for a, b in pairwise(values))
    midway = {"geometric": math.sqrt(start * end), "reciprocal": 2 / (1 / start + 1 / end)}
    assert ramp(0.5, start, end, shape) == pytest.approx(midway.get(shape, (start + end) / 2), rel=1e-12)


@pytest.mark.parametrize(
    "shape",
    [
        "geometric",
        "linear",
        "cosine",
        "reciprocal",
    ],
)
def test_ramp_between_equal_or_near_ends(shape: str) -> None:
    """Within the ends to the last bit where they are equal or neighbours: λ never falls below its start."""
    pairs = [(30.557366384664704, 30.557366384664704), (706.574234323439, 706.57423432344), (2.5, 2.5 + 4e-16)]
    for start, end in pairs:
        values = [ramp(k / 50, start, end, shape) for k in range(51)]
        assert start <= min(values)
        assert max(values) <= end


FRACTIONS = [
    ("0.25", "0.1"),
    ("0", "0"),
    ("0", "1"),
    ("1", "0"),
    ("0.5", "0.5"),
    ("0.3", "0"),
    ("0.33", "0.3"),
    ("0.9", "0.1"),
]


@each_shape
@pytest.mark.parametrize(("switch_point", "hold"), FRACTIONS)
def test_schedule_phases(shape: str, switch_point: str, hold: str) -> None:
    """Every step of a run against phases counted in exact fractions of it, and λ against the ramp's closed form."""
    start, target = 1.37, 159.577
    for max_steps in (1, 2, 3, 4, 10, 97, 1000):
        schedule = HardeningSchedule(max_steps, float(switch_point), float(hold), shape)
        switch = math.ceil(Fraction(switch_point) * max_steps)
        held = max(switch, max_steps - math.ceil(Fraction(hold) * max_steps))  # whole steps: at least the fraction
        assert [step for step in range(max_steps + 1) if schedule.learning(step)] == list(range(switch))
        values = {step: schedule.hardness(step, start, target) for step in range(switch, max_steps + 1)}
        assert values[max_steps] == target
        assert all(a <= b for a, b in pairwise(values.values()))
        assert all(schedule.hardness(step, 200.0, target) == pytest.approx(200.0, rel=1e-15) for step in values)
        for step, value in values.items():
            if step >= held:
                assert value == target
            else:
                progress = (step - switch) / (held - switch)
                assert start <= value == pytest.approx(DEFINITIONS[shape](progress, start, target), rel=1e-9)


@pytest.mark.parametrize(
    "hundredths",
    [10, 25, 30, *(7, 34, 55)],
)
def test_phases_of_decimal_fractions(hundredths: int) -> None:
    """Hundredths of 100 steps, as users write them: the phases begin at just these steps in exact arithmetic."""
    fraction = float(Fraction(hundredths, 100))
    assert HardeningSchedule(100, fraction).switch_step == hundredths
    assert HardeningSchedule(100, 0.0, fraction).hold_step == 100 - hundredths


def test_schedule_is_pure() -> None:
    """Any order of calls, on any instance, also one rebuilt from JSON as after a resume: the same bits."""
    schedule = HardeningSchedule(200, 0.2, 0.15, "cosine")
    forward = {step: schedule.hardness(step, 1.7, 160.0) for step in range(40, 201)}
    shuffled = random.Random(0).sample(sorted(forward), len(forward))
    rebuilt = HardeningSchedule(**json.loads(json.dumps(dataclasses.asdict(schedule))))
    assert {step: rebuilt.hardness(step, 1.7, 160.0) for step in shuffled} == forward
    assert rebuilt == schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.max_steps = 3


def test_every_pair_that_adds_up_to_one_is_accepted() -> None:
    """Hundredths whose decimal sum is 1: the rounding of their float sum is not held against the user."""
    for k in range(101):
        schedule = HardeningSchedule(100, float(Fraction(k, 100)), float(Fraction(100 - k, 100)))
        assert schedule.hardness(100, 1.5, 160.0) == 160.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda e=e: hlg.target_hardness(e), f"finite number > 0 .* got {e}") for e in (0.0, -1.0, math.nan, math.inf)),
        (lambda: hlg.target_hardness(0.005, "relu"), "unknown base 'relu'"),
        (lambda: hlg.sup_error(2.0, "relu"), "unknown base 'relu'"),
        (lambda: ramp(0.5, 1.0, 2.0, "step"), f"unknown ramp shape 'step': expected one of {', '.join(RAMP_SHAPES)}"),
        (lambda: HardeningSchedule(10, shape="step"), "unknown ramp shape 'step'"),
        *((lambda p=p: HardeningSchedule(10, p), rf"switch point .* \[0, 1\], got {p}") for p in (-0.1, 1.1, math.nan)),
        *(
            (lambda h=h: HardeningSchedule(10, 0.0, h), rf"hold fraction .* \[0, 1\], got {h}")
            for h in (-0.1, 1.1, math.nan)
        ),
        (lambda: HardeningSchedule(10, 0.7, 0.4), r"0.7 \+ hold fraction 0.4 = 1.1 leaves no room"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    """Each message names the value and the range."""
    with pytest.raises(ValueError, match=message):
        call()
