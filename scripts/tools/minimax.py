"""Searches the hinges of surgery/hinges/minimax.py: the least sup |f − Σ| by differential evolution, k = 4 to 6.

    python -m scripts.tools.minimax            # minutes on one core; prints places, values of Σ − relu there, and the bound

Hinges lie at ±t, so that Σ − relu is even, as f − relu is: the search is over the places t > 0 and the values of Σ − relu at
them, 0 at the outermost, and at 0 where k is odd. The bounds that the package states are proven in tests/surgery/hinges.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import differential_evolution, minimize
from scipy.special import expit, ndtr

# f(x) − relu(x) for x ≥ 0, and where it has died away
EVEN = {
    "gelu": (lambda x: -x * ndtr(-x), 7.0),
    "gelu_tanh": (lambda x: -x * expit(-2.0 * np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)), 7.0),
    "silu": (lambda x: -x * expit(-x), 22.0),
}


def unpacked(v: np.ndarray, hinges: int) -> tuple[np.ndarray, np.ndarray]:
    """Corners of Σ − relu for x ≥ 0, from 0 on, and its values there; between ±t₁ the slope of Σ is ½ where k is even."""
    pairs = hinges // 2
    places, rest = np.sort(np.abs(v[:pairs])), v[pairs:]
    if hinges % 2:
        return np.array([0.0, *places]), np.array([*rest, 0.0])
    return np.array([0.0, *places]), np.array([rest[0] + places[0] / 2, *rest, 0.0])


def search(base: str, hinges: int, seed: int = 0) -> tuple[float, np.ndarray, np.ndarray]:
    """The bound, the corners and the values of the best that is found."""
    even, reach = EVEN[base]
    x = np.linspace(0.0, reach, 1401)
    wanted = even(x)

    def cost(v: np.ndarray) -> float:
        corners, values = unpacked(v, hinges)
        return float(np.abs(np.interp(x, corners, values, right=0.0) - wanted).max())

    free = hinges // 2 - 1 + hinges % 2
    bounds = [(0.0, 0.9 * reach)] * (hinges // 2) + [(-0.5, 0.3)] * free
    best = differential_evolution(cost, bounds, seed=seed, maxiter=250, popsize=25, tol=1e-10, polish=False).x
    for _ in range(4):
        best = minimize(cost, best, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12, "maxiter": 6000}).x
    return cost(best), *unpacked(best, hinges)


def main() -> None:
    for base in EVEN:
        for hinges in (4, 5, 6):
            bound, corners, values = min((search(base, hinges, seed) for seed in range(2)), key=lambda found: found[0])
            print(f"{base} {hinges}: {bound:.5f} at {np.round(corners, 4)}, {np.round(values, 4)}", flush=True)


if __name__ == "__main__":
    main()
