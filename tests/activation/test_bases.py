"""The four gates and their constants, against mpmath and against the activations of torch and transformers."""

from __future__ import annotations

from collections.abc import Callable

import mpmath as mp
import pytest
import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, NewGELUActivation, QuickGELUActivation

from hf_lambda_gelu.activation.bases import BASES, SATURATION
from hf_lambda_gelu.activation.functional import lambda_gelu

GATES: dict[str, Callable[[mp.mpf], mp.mpf]] = {
    "gelu": mp.ncdf,
    "gelu_tanh": lambda u: (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (u + mp.mpf("0.044715") * u**3))) / 2,
    "quick_gelu": lambda u: 1 / (1 + mp.exp(-mp.mpf("1.702") * u)),
    "silu": lambda u: 1 / (1 + mp.exp(-u)),
}
STOCK: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": GELUActivation(),
    "gelu_tanh": NewGELUActivation(),
    "quick_gelu": QuickGELUActivation(),
    "silu": nn.SiLU(),
}
each_base = pytest.mark.parametrize("name", list(BASES))


def test_these_are_the_bases() -> None:
    """The tables of this file cover every base, so that a fifth cannot go untested."""
    assert list(BASES) == list(GATES) == list(STOCK)


@each_base
def test_sup_error_is_the_maximum(name: str) -> None:
    """mpmath finds where |f − ReLU| is stationary, on both sides of 0, from a formula of its own."""
    with mp.workdps(40):

        def distance(x: mp.mpf) -> mp.mpf:
            return abs(x * GATES[name](x) - max(x, 0))

        peaks = []
        for side in (-1, 1):
            start = max((mp.mpf(k) / 20 for k in range(1, 200)), key=lambda x, side=side: distance(side * x))
            peaks.append(distance(mp.findroot(lambda x: mp.diff(distance, x), side * start)))
        assert BASES[name].sup_error == pytest.approx(float(max(peaks)), rel=1e-15, abs=0.0)


@each_base
def test_gate_l1_is_the_integral(name: str) -> None:
    """mpmath integrates the gate's distance to the step; nothing of the package is in the integrand."""
    with mp.workdps(30):
        gate = GATES[name]
        left = mp.quad(lambda u: abs(gate(u)), [-mp.inf, -20, -5, -2, 0])
        right = mp.quad(lambda u: abs(1 - gate(u)), [0, 2, 5, 20, mp.inf])
        assert BASES[name].gate_l1 == pytest.approx(float(left + right), rel=1e-15, abs=0.0)


@each_base
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gate_and_slope(name: str, dtype: torch.dtype) -> None:
    """Gate against mpmath's formula, slope against mpmath's numerical derivative of it, into the far tails."""
    u = torch.cat([torch.linspace(-9, 9, 61), torch.tensor([0.0, 1e-20, -1e-20, 15.0, -15.0, 30.0, -30.0])]).to(dtype)
    with mp.workdps(340):  # a numerical derivative needs as many digits as the slope has zeros
        gates = [GATES[name](mp.mpf(v)) for v in u.tolist()]
        slopes = [mp.diff(GATES[name], mp.mpf(v)) for v in u.tolist()]
    gate = torch.tensor([float(g) for g in gates], dtype=torch.float64)
    slope = torch.tensor([float(s) for s in slopes], dtype=torch.float64)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    argument = 1 + u.double() ** 2  # what rounding inside the exponential is multiplied by
    assert ((BASES[name].gate(u).double() - gate).abs() <= 2 * eps).all()
    assert ((BASES[name].slope(u).double() - slope).abs() <= 4 * eps * argument * slope + tiny).all()


@pytest.mark.parametrize(
    "name",
    [
        "gelu",
        "gelu_tanh",
        "quick_gelu",
        "silu",
    ],
)
def test_saturation_changes_no_value(name: str) -> None:
    """Beyond the clamp mpmath's gate is 0 or 1 to the last bit of float64, subnormals included, as the comment claims."""
    with mp.workdps(400):
        assert GATES[name](-mp.mpf(SATURATION)) < mp.mpf(2) ** -1075
        assert 1 - GATES[name](mp.mpf(SATURATION)) < mp.mpf(2) ** -54


@each_base
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_hardness_one_is_the_stock_activation(name: str, dtype: torch.dtype) -> None:
    """At λ = 1 the function is what torch and transformers compute with code of their own, in every dtype."""
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([0.0, -0.0, 1e4, -1e4])]).to(dtype)
    noise = 3 * torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps * x.double().abs()
    ours = lambda_gelu(x, 1.0, name)
    exact = STOCK[name](x.double())  # in half precision the stock code itself is less exact than ours
    assert ours.dtype is dtype
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((ours.double() - exact).abs() <= noise + rounding).all()
    if dtype in (torch.float64, torch.float32):
        assert ((ours - STOCK[name](x)).abs() <= noise).all()
        assert ((BASES[name].activation(x) - STOCK[name](x)).abs() <= noise).all()
