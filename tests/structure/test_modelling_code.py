"""Smooth activations that a class's code calls, found by reading it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_lambda_gelu.structure.modelling_code import calls_in_class


def gated(x: Tensor) -> Tensor:
    """A function of the file, which calls another one."""
    return deeper(x) * x


def deeper(x: Tensor) -> Tensor:
    return nn.functional.silu(x)


def test_calls_are_read() -> None:
    """SiLU and quick GELU written as products, gates that are neither, functions that a method calls."""

    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x *= torch.sigmoid(x)
            z = x * torch.sigmoid(x * self.alpha) + y.sigmoid() * y
            return z + x * torch.sigmoid(y) + torch.sigmoid(gated(z))

    assert calls_in_class(Model) == (
        "x *= torch.sigmoid(x)",
        "x * torch.sigmoid(x * self.alpha)",
        "y.sigmoid() * y",
        "nn.functional.silu(x)",
    )
