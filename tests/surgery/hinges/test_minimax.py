"""Minimax hinges: the bound is proven on a grid, by a bound on the slope between its points; mpmath agrees at the worst."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from scipy.special import erf, expit

from hf_lambda_gelu.activation.bases import BASES, QUICK_SCALE
from hf_lambda_gelu.surgery.hinges.minimax import KNOWN, minimax

ROOT = math.sqrt(2 / math.pi)
FLOAT = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(ROOT * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * expit(QUICK_SCALE * x),
    "silu": lambda x: x * expit(x),
}
EXACT = {
    "gelu": lambda x: x * mpmath.ncdf(x),
    "gelu_tanh": lambda x: x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3))),
    "quick_gelu": lambda x: x / (1 + mpmath.exp(-mpmath.mpf("1.702") * x)),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
}
# no |f′ − Σ′| is above this: −0.13 ≤ f′ ≤ 1.13 for all bases, and Σ′ goes from −0.1 to 1.1
SLOPE = 1.3
# what a crude search had found: upper bounds
CRUDE = {"gelu": (0.036, 0.017, 0.015), "silu": (0.050, 0.05, 0.028)}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("count", KNOWN)
def test_bound(base: str, count: int) -> None:
    """|f − Σ| ≤ bound everywhere, and the bound is not slack; the asymptotes are f's."""
    found = minimax(base, count)
    at, weights = np.array(found.at), np.array(found.weights)
    assert len(at) == len(weights) == count
    assert np.all(np.diff(at) > 0)
    assert abs(weights.sum() - 1) < 1e-12
    assert abs((weights * at).sum()) < 1e-12
    assert np.all(np.abs(np.cumsum(weights) - 0.5) < 0.62)  # Σ′

    step = 1e-5
    x = np.arange(-9.0, 9.0, step)
    error = np.abs(FLOAT[base](x) - (weights * np.maximum(x[:, None] - at, 0.0)).sum(1))
    assert error.max() + SLOPE * step / 2 <= found.bound
    assert found.bound <= 1.01 * error.max()
    # beyond ±9 there are no hinges and |f − relu| falls; right of its maximum it is x·gate(−x), which falls
    assert abs(at).max() < 9.0
    assert error[0] < found.bound / 2

    worst = mpmath.mpf(float(x[error.argmax()]))
    sums = sum(mpmath.mpf(a) * max(worst - mpmath.mpf(t), 0) for a, t in zip(found.weights, found.at, strict=True))
    assert abs(float(abs(EXACT[base](worst) - sums)) - error.max()) < 1e-9


def test_better_than_a_crude_search() -> None:
    for base, bounds in CRUDE.items():
        assert all(minimax(base, count).bound <= bound for count, bound in zip(KNOWN, bounds, strict=True))
