"""Bounds contain what the network puts out, in real arithmetic: against samples and exact fractions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from support.verified import digits, digits_network, random_box, random_network

from hf_lambda_gelu.downstream.verification import bounds
from hf_lambda_gelu.downstream.verification.bounds import Box, interval_bounds, linear_bounds, minorant
from hf_lambda_gelu.downstream.verification.network import Array, Layer, read_network, values

Exact = list[Fraction]


def exactly(layers: list[Layer], x: Exact) -> list[Exact]:
    """Each layer's W h + b, without rounding."""
    found = []
    for layer in layers:
        z = [
            sum((Fraction(w) * h for w, h in zip(row, x, strict=True)), Fraction(b))
            for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        ]
        found.append(z)
        x = [max(v, Fraction(0)) for v in z] if layer.relu else z
    return found


def points(generator: np.random.Generator, box: Box, count: int) -> Array:
    """Corners and inner points of the box."""
    share = generator.random((count, len(box.lower)))
    share[: count // 2] = share[: count // 2].round()
    return np.clip(box.lower + share * (box.upper - box.lower), box.lower, box.upper)


def holds(found: list[Box], layers: list[Layer], x: Array) -> bool:
    """Whether the bounds contain what the layers put out for x, told by fractions."""
    for box, z in zip(found, exactly(layers, [Fraction(v) for v in x.tolist()]), strict=True):
        for low, value, high in zip(box.lower.tolist(), z, box.upper.tolist(), strict=True):
            if not Fraction(low) <= value <= Fraction(high):
                return False
    return True


@pytest.mark.parametrize("radius", [0.01, 0.3, 3.0])
def test_samples(radius: float) -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        layers, box = random_network(generator, 5, 12, 9, 12, 3), random_box(generator, 5, radius)
        by_interval = interval_bounds(layers, box)
        by_relaxation = linear_bounds(layers, box, by_interval)
        x = points(generator, box, 400)
        for depth, (wide, tight) in enumerate(zip(by_interval, by_relaxation, strict=True), 1):
            rows = layers[:depth]
            z = values([*rows[:-1], Layer(rows[-1].weight, rows[-1].bias, relu=False)], x)
            assert (tight.lower <= z).all()
            assert (z <= tight.upper).all()
            assert (wide.lower <= tight.lower).all()
            assert (tight.upper <= wide.upper).all()


def test_relaxation_is_much_tighter() -> None:
    images, _ = digits()
    layers = read_network(digits_network(16, 16))
    x = images[1500].double().numpy()
    box = Box(x - 0.02, x + 0.02)
    wide = interval_bounds(layers, box)
    tight = linear_bounds(layers, box, wide)
    ratio = (wide[-1].upper - wide[-1].lower) / (tight[-1].upper - tight[-1].lower)
    assert ratio.min() > 1.5


def test_relaxation_by_hand() -> None:
    """ReLU(x) − ReLU(−x) on [−1, 3]: ReLU(x) ≥ x and ReLU(−x) ≤ (3 − x)/4, so the difference is ≥ 1.25 x − 0.75."""
    layers = [Layer(np.array([[1.0], [-1.0]]), np.zeros(2), True)]
    box = Box(np.array([-1.0]), np.array([3.0]))
    rows, constants = minorant(layers, interval_bounds(layers, box), box, np.array([[1.0, -1.0]]), np.zeros(1))
    assert rows[0, 0] == pytest.approx(1.25)
    assert constants[0] == pytest.approx(-0.75)


def cancelling(generator: np.random.Generator) -> tuple[list[Layer], Box]:
    """A network whose sums cancel to the last digits, in a box of a few floats."""
    layers = random_network(generator, 6, 8, 8, 2)
    layers = [Layer(np.hstack([la.weight, -la.weight]) * 1e5, la.bias, la.relu) for la in layers]
    layers = [  # each width twice: the second half repeats the first
        Layer(np.vstack([la.weight, la.weight * (1.0 + 2e-16)]), np.tile(la.bias, 2), la.relu) for la in layers
    ]
    half = generator.standard_normal(6)
    x = np.concatenate([half, half])
    return layers, Box(x, np.nextafter(x, np.inf))


def violations(seeds: int) -> int:
    count = 0
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        layers, box = cancelling(generator)
        found = linear_bounds(layers, box, interval_bounds(layers, box))
        count += not all(holds(found, layers, x) for x in points(generator, box, 6))
    return count


def test_rounding_is_accounted_for() -> None:
    assert violations(12) == 0


def test_without_the_account_bounds_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail: float64 alone, with no error charged, leaves values outside."""
    monkeypatch.setattr(bounds, "rounding", lambda terms, magnitude, factor=0.0: 0.0 * magnitude)
    monkeypatch.setattr(bounds.np, "nextafter", lambda value, direction: value)
    assert violations(12) > 6


def test_the_linear_bound_is_below_everywhere() -> None:
    """A x + c ≤ h, in fractions, at corners and inner points of a wide box."""
    generator = np.random.default_rng(1)
    for _ in range(5):
        layers, box = random_network(generator, 3, 6, 6, 2), random_box(generator, 3, 0.7)
        found = linear_bounds(layers, box, interval_bounds(layers, box))
        a, c = minorant(layers, found, box, np.eye(2), np.zeros(2))
        for x in points(generator, box, 40).tolist():
            z = exactly(layers, [Fraction(v) for v in x])[-1]
            for row, constant, value in zip(a.tolist(), c.tolist(), z, strict=True):
                assert sum((Fraction(w) * Fraction(v) for w, v in zip(row, x, strict=True)), Fraction(constant)) <= value


def test_a_sum_that_cancels() -> None:
    """10¹⁶ + 1 − 10¹⁶ is 1, which float64 does not see."""
    layers = [Layer(np.array([[1e16, 1.0, -1e16]]), np.zeros(1), False)]
    (found,) = interval_bounds(layers, Box(np.ones(3), np.ones(3)))
    assert found.lower[0] <= 1.0 <= found.upper[0]
    assert found.upper[0] - found.lower[0] < 100.0


@pytest.mark.parametrize("bounded", [interval_bounds, linear_bounds])
def test_what_overflows_is_unbounded(bounded: Callable[[list[Layer], Box], list[Box]]) -> None:
    """10²⁰⁰ · 10²⁰⁰ − 10²⁰⁰ · 10²⁰⁰ is NaN in float64, and no bound."""
    large = np.array([[1e200], [1e200]])
    layers = [Layer(large, np.zeros(2), True), Layer(np.array([[1e200, -1e200]]), np.zeros(1), False)]
    found = bounded(layers, Box(np.zeros(1), np.ones(1)))[-1]
    assert (found.lower[0], found.upper[0]) == (-np.inf, np.inf)
