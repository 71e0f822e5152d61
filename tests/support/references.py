"""What the gates are, written in numpy and float64, apart from the package."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import expit, ndtr
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

NUMPY_GATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": ndtr,
    "gelu_tanh": lambda u: expit(2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)),
    "quick_gelu": lambda u: expit(1.702 * u),
    "silu": expit,
}


BASES = ("gelu", "gelu_tanh", "quick_gelu", "silu")


STOCK: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": ACT2FN["quick_gelu"],
    "silu": F.silu,
}


EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


# dtype: (rounding of the result, relative to it; error of the arithmetic, relative to what cancels in it).
# The arithmetic runs in fp32 for half precision, so only the last rounding, half a unit, is the dtype's own. 8 is the
# number of roundings in the longest formula: λx, its cube, the scale, the sigmoid twice, three products.
TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (EPS[torch.float64], 8 * EPS[torch.float64]),
    torch.float32: (EPS[torch.float32], 8 * EPS[torch.float32]),
    torch.bfloat16: (EPS[torch.bfloat16] / 2, 1e-5),  # the polynomials of its kernel, a 390th of its own rounding
    torch.float16: (EPS[torch.float16] / 2, 8 * EPS[torch.float32]),
}


each_base = pytest.mark.parametrize("base", BASES)


def formula(x: np.ndarray, hardness: np.ndarray | float, base: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """f, ∂f/∂x, ∂f/∂λ and the error scale of the last, from the closed forms of the four gates."""
    u = hardness * x
    with np.errstate(over="ignore"):
        if base == "gelu":
            gate, slope = ndtr(u), np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
        elif base == "gelu_tanh":
            p = math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)
            gate = (1 + np.tanh(p)) / 2
            slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * u**2) / (2 * np.cosh(p) ** 2)
        else:
            k = 1.702 if base == "quick_gelu" else 1.0
            gate, slope = expit(k * u), k / (4 * np.cosh(k * u / 2) ** 2)
    by_hardness = x * x * slope
    return x * gate, gate + u * slope, by_hardness, by_hardness * (1 + u * u)


def grid(dtype: torch.dtype, hardness: float) -> Tensor:
    """±1e4 down to subnormals, ±0, and the region where the gate bends, which shrinks with λ."""
    info = torch.finfo(dtype)
    sizes = torch.logspace(-9, 4, 200, dtype=torch.float64)
    edges = torch.tensor([0.0, info.tiny, info.smallest_normal * info.eps, info.eps, 1e4], dtype=torch.float64)
    bend = torch.linspace(-14, 14, 1401, dtype=torch.float64) / hardness
    return torch.cat([sizes, -sizes, edges, -edges, bend]).to(dtype)


def assert_within(got: Tensor, expected: np.ndarray, scale: np.ndarray | float, dtype: torch.dtype) -> None:
    rounding, arithmetic = TOLERANCE[dtype]
    rounded = got.dtype is dtype  # ∂f/∂λ has λ's dtype, that of the arithmetic
    underflow = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps + 4 * torch.finfo(torch.float32).tiny
    allowed = rounded * rounding * np.abs(expected) + arithmetic * scale + underflow
    error = np.abs(got.detach().double().numpy() - expected)
    assert (error <= allowed).all(), (
        f"{(error - allowed).max():.3g} too far, {(error / allowed).max():.3g} times the tolerance"
    )


class Gate(nn.Module):
    """x Φ(λx) as a module, apart from the package."""

    def __init__(self, hardness: float) -> None:
        super().__init__()
        self.hardness = hardness

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.special.ndtr(self.hardness * x)
