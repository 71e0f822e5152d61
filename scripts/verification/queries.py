"""Small ReLU networks to verify, random and trained on digits, and questions about them whose answer is known."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import torch
from scipy.optimize import linprog
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_lambda_gelu.downstream.verification.bounds import Box, interval_bounds, linear_bounds
from hf_lambda_gelu.downstream.verification.network import Array, Layer, values
from hf_lambda_gelu.downstream.verification.robustness import query
from hf_lambda_gelu.downstream.verification.solvers import Query


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
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        weight = scale * generator.standard_normal((after, before)) / np.sqrt(before)
        layers.append(Layer(weight, 0.3 * generator.standard_normal(after), relu=index < len(widths) - 2))
    return layers


def random_box(generator: np.random.Generator, features: int, radius: float) -> Box:
    centre = generator.standard_normal(features)
    return Box(centre - radius, centre + radius)


def random_query(seed: int) -> Query:
    """Whether a class can lose to another in a box, of a network with 2 to 5 inputs and one to three hidden layers.

    The margin is moved so that zero lies within what samples reach or not far outside, and about half of the answers are no.
    The box has 2 to 8 units that can be on and off.
    """
    generator = np.random.default_rng(seed)
    features, classes = int(generator.integers(2, 6)), int(generator.integers(2, 5))
    widths = [features, *generator.integers(3, 9, int(generator.integers(1, 4))).tolist(), classes]
    layers = random_network(generator, *widths, scale=1.5)
    margin = np.zeros(classes)
    margin[0], margin[1] = 1.0, -1.0
    free, spread = 0, 0.0
    while not 2 <= free <= 8 or spread < 0.01:
        box = random_box(generator, features, float(generator.uniform(0.05, 0.8)))
        pre = linear_bounds(layers, box, interval_bounds(layers, box))
        free = sum(int(unstable(layer, bounds).sum()) for layer, bounds in zip(layers, pre, strict=True))
        x = box.lower + generator.random((4000, features)) * (box.upper - box.lower)
        reached = values(layers, x) @ margin
        lowest, spread = float(reached.min()), float(np.ptp(reached))
    layers[-1].bias[1] += lowest + spread * float(generator.uniform(-0.25, 0.15))
    return query(layers, linear_bounds(layers, box, interval_bounds(layers, box)), box, margin)


def unstable(layer: Layer, bounds: Box) -> Array:
    """Which units of a layer can be on and off."""
    found: Array = layer.relu & (bounds.lower < 0.0) & (bounds.upper > 0.0)
    return found


def lowest_by_regions(asked: Query) -> float:
    """The least objective in the box: one linear program for each way in which the unstable units can be on or off.

    By scipy, with no big-M and no branching: independent of the solvers, and slow.
    """
    low, high = asked["box"]
    layers, pre = [Layer(*layer) for layer in asked["layers"]], [Box(*bounds) for bounds in asked["pre"]]
    units = [(i, int(j)) for i, layer in enumerate(layers) for j in np.flatnonzero(unstable(layer, pre[i]))]
    best = np.inf
    for signs in itertools.product((0.0, 1.0), repeat=len(units)):
        on = dict(zip(units, signs, strict=True))
        a, c = np.eye(len(low)), np.zeros(len(low))
        rows, limits = [], []
        for i, layer in enumerate(layers):
            a, c = layer.weight @ a, layer.weight @ c + layer.bias
            if layer.relu:
                gate = np.array([on.get((i, j), float(pre[i].lower[j] >= 0.0)) for j in range(len(c))])
                sign = np.where(gate > 0.0, -1.0, 1.0)  # z ≥ 0 where on, z ≤ 0 where off
                rows.append(sign[:, None] * a)
                limits.append(-sign * c)
                a, c = gate[:, None] * a, gate * c
        row, constant = asked["objective"]
        bounds = list(zip(low, high, strict=True))
        found = linprog(row @ a, np.vstack(rows), np.concatenate(limits), bounds=bounds)
        if found.status == 0:
            best = min(best, found.fun + float(row @ c) + constant)
    return best
