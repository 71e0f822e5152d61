"""The operator behind `lambda_gelu` called directly, and what it gives against numpy in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from support.references import assert_within, formula

OP = torch.ops.hf_lambda_gelu


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 2.0) -> Tensor:
    """Normal numbers, always the same for a seed."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def check(x: Tensor, hardness: Tensor, grad: Tensor, base: str, got: tuple[Tensor, Tensor, Tensor]) -> None:
    """Value, ∂L/∂x and ∂L/∂λ, the last summed by numpy over the dimensions that λ lacks."""
    xs, hs, gs = (t.detach().double().numpy() for t in (x, hardness, grad))
    value, by_x, by_hardness, scale = formula(xs, hs, base)
    scale = scale + xs**2 * 1e-29  # a slope below fp32's range is 0
    lead = x.dim() - hardness.dim()
    dims = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(hardness.shape) if n == 1)
    summed, allowed = (each.sum(dims).reshape(hardness.shape) for each in (gs * by_hardness, np.abs(gs) * scale))
    assert got[0].shape == got[1].shape == x.shape
    assert got[2].shape == hardness.shape
    assert got[0].dtype is got[1].dtype is x.dtype
    assert_within(got[0], value, np.abs(xs), x.dtype)
    assert_within(got[1], gs * by_x, np.abs(gs), x.dtype)
    assert_within(got[2], summed, allowed, x.dtype)


def run(x: Tensor, hardness: Tensor, grad: Tensor, base: str) -> tuple[Tensor, Tensor, Tensor]:
    """Value, ∂L/∂x and ∂L/∂λ of the operator."""
    return OP.forward(x, hardness, base), *OP.backward(grad, x, hardness, base)
