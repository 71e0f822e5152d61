"""The inputs and the balls about them, as given by a user: checked, and rounded outwards or inwards."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .bounds import Box
from .network import Array


def balls(x: Array, epsilon: float, clip: tuple[float, float] | None) -> tuple[Box, Box]:
    """The ball about x rounded outwards, for proofs, and inwards, for points that are to lie in it."""
    outer = Box(np.nextafter(x - epsilon, -np.inf), np.nextafter(x + epsilon, np.inf))
    inner = Box(np.minimum(np.nextafter(x - epsilon, np.inf), x), np.maximum(np.nextafter(x + epsilon, -np.inf), x))
    low, high = clip if clip is not None else (-math.inf, math.inf)
    return Box(np.maximum(outer.lower, low), np.minimum(outer.upper, high)), Box(
        np.maximum(inner.lower, low), np.minimum(inner.upper, high)
    )


def checked_inputs(inputs: Tensor, epsilon: float, clip: tuple[float, float] | None) -> Array:
    """The inputs as rows in float64; ValueError if they, ε or the range cannot be used."""
    if not 0.0 < epsilon < math.inf:
        raise ValueError(
            f"epsilon must be a finite number > 0, the radius of the ball in units of the inputs, got {epsilon}"
        )
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() < 2 or not len(inputs):
        got = f"{tuple(inputs.shape)} of {inputs.dtype}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"inputs must be a floating point tensor of shape (inputs, …) with one input or more, got {got}")
    rows: Array = inputs.detach().to("cpu", torch.float64).flatten(1).numpy()
    low, high = clip if clip is not None else (-math.inf, math.inf)
    if not low < high:
        raise ValueError(f"clip must be (low, high) with low < high, got {clip}")
    if not np.isfinite(rows).all() or rows.min() < low or rows.max() > high:
        raise ValueError(f"inputs must be finite and in the range clip={clip}: they lie in [{rows.min():g}, {rows.max():g}]")
    return rows
