"""Small ReLU networks to verify: trained on digits, random, and what their layers are."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_lambda_gelu.downstream.verification.bounds import Box
from hf_lambda_gelu.downstream.verification.network import Layer


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 64 numbers in [0, 1], float32, and what they show."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


@cache
def digits_network(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Trained on the first 1,500 for a second; about 0.9 of the others are right. Not to be changed."""
    torch.manual_seed(0)
    images, labels = digits()
    parts: list[nn.Module] = []
    for before, after in zip((64, *widths), (*widths, 10), strict=True):
        parts += [nn.Linear(before, after), activation()]
    model = nn.Sequential(*parts[:-1])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(250):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[:1500]), labels[:1500]).backward()
        optimizer.step()
    return model.eval()


def random_network(generator: np.random.Generator, *widths: int, scale: float = 1.0) -> list[Layer]:
    """Layers of these widths with ReLU between, none after the last."""
    layers = []
    for index, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        weight = scale * generator.standard_normal((after, before)) / np.sqrt(before)
        layers.append(Layer(weight, 0.3 * generator.standard_normal(after), relu=index < len(widths) - 2))
    return layers


def random_box(generator: np.random.Generator, features: int, radius: float) -> Box:
    centre = generator.standard_normal(features)
    return Box(centre - radius, centre + radius)
