"""Small ReLU networks to verify; what `scripts.verification` has of them, and as modules."""

from __future__ import annotations

import torch
from torch import nn

from hf_lambda_gelu.downstream.verification.network import Layer
from scripts.verification.queries import digits, digits_network, lowest_by_regions, random_box, random_network, random_query

__all__ = ["as_module", "digits", "digits_network", "lowest_by_regions", "random_box", "random_network", "random_query"]


def as_module(layers: list[Layer]) -> nn.Sequential:
    """The same network as torch's modules, in float64."""
    parts: list[nn.Module] = []
    for layer in layers:
        linear = nn.Linear(*reversed(layer.weight.shape), dtype=torch.float64)
        linear.load_state_dict({"weight": torch.from_numpy(layer.weight), "bias": torch.from_numpy(layer.bias)})
        parts += [linear, nn.ReLU()] if layer.relu else [linear]
    return nn.Sequential(*parts).eval()
