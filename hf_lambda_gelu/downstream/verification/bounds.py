"""Bounds on what a ReLU network puts out in a box: by intervals, and by linear relaxation backwards (CROWN).

Linear relaxation as in CROWN (Zhang et al. 2018, arXiv 1811.00866). Rounding is accounted for here: each bound holds for the
network in real arithmetic, whose weights are the stored ones, and not only for what float64 makes of it. A product with n
terms that is summed up in any order, with or without fused operations, errs by at most γₙ Σ|aᵢ||bᵢ|, γₙ = n u / (1 − n u),
u = 2⁻⁵³ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). Every product below is charged twice
that, for the error of the sum of absolute values itself, and what underflows. Where float64 overflows, bounds are infinite:
nothing is proven there. [derived]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .network import Array, Layer

_UNIT = 2.0**-53
_UNDERFLOW = 2.0**-1000  # far above what any product of float64 can lose by underflow


@dataclass(frozen=True)
class Box:
    """lower ≤ x ≤ upper, both of shape (features,)."""

    lower: Array
    upper: Array

    @property
    def magnitude(self) -> Array:
        return np.maximum(np.abs(self.lower), np.abs(self.upper))

    def and_also(self, other: Box) -> Box:
        """Where both hold: sound bounds of the same thing overlap."""
        return Box(np.maximum(self.lower, other.lower), np.minimum(self.upper, other.upper))


def rounding(terms: int, magnitude: Array, factor: float | Array = 0.0) -> Array:
    """How far a sum of `terms` products can be from its exact value, where Σ|aᵢ||bᵢ| was computed as `magnitude`.

    Args:
        factor: the largest sum of numbers that a product is multiplied by later, and what it lost by underflow with it.
    """
    n = terms + 4
    result: Array = 2.0 * n * _UNIT / (1.0 - n * _UNIT) * magnitude + n * _UNDERFLOW * (1.0 + factor)
    return result


def outwards(lower: Array, upper: Array) -> Box:
    """The box rounded outwards; infinite where float64 overflowed."""
    lower, upper = np.nextafter(lower, -np.inf), np.nextafter(upper, np.inf)
    return Box(np.where(np.isnan(lower), -np.inf, lower), np.where(np.isnan(upper), np.inf, upper))


@np.errstate(over="ignore", invalid="ignore")
def affine_bounds(weight: Array, bias: Array, box: Box) -> Box:
    """Bounds on W x + b for x in the box, by intervals."""
    positive, negative = np.maximum(weight, 0.0), np.minimum(weight, 0.0)
    error = rounding(weight.shape[1], np.abs(weight) @ box.magnitude + np.abs(bias))
    lower = positive @ box.lower + negative @ box.upper + bias - error
    upper = positive @ box.upper + negative @ box.lower + bias + error
    return outwards(lower, upper)


def relu_bounds(box: Box) -> Box:
    return Box(np.maximum(box.lower, 0.0), np.maximum(box.upper, 0.0))


def interval_bounds(layers: list[Layer], box: Box) -> list[Box]:
    """Bounds on each layer's W h + b, one layer after another."""
    found = []
    for layer in layers:
        found.append(affine_bounds(layer.weight, layer.bias, box))
        box = relu_bounds(found[-1]) if layer.relu else found[-1]
    return found


def linear_bounds(layers: list[Layer], box: Box, known: list[Box] | None = None) -> list[Box]:
    """Bounds on each layer's W h + b by linear relaxation, each at least as tight as `known`, those by intervals.

    The relaxation of a layer uses the bounds of the layers before it, so they are found from the first to the last.
    """
    found: list[Box] = []
    for index, layer in enumerate(layers):
        by_interval = affine_bounds(layer.weight, layer.bias, _outputs(layers, found, index, box))
        if known is not None:
            by_interval = by_interval.and_also(known[index])
        if index:
            lower = lower_bounds(layers[:index], found, box, layer.weight, layer.bias)
            upper = -lower_bounds(layers[:index], found, box, -layer.weight, -layer.bias)
            by_interval = by_interval.and_also(Box(lower, upper))
        found.append(by_interval)
    return found


def _outputs(layers: list[Layer], found: list[Box], index: int, box: Box) -> Box:
    """Bounds on what layer `index` gets."""
    if index == 0:
        return box
    return relu_bounds(found[index - 1]) if layers[index - 1].relu else found[index - 1]


def lower_bounds(layers: list[Layer], found: list[Box], box: Box, rows: Array, constants: Array) -> Array:
    """Lower bounds on rows · h + constants, where h is what `layers` put out, for x in the box.

    The rows go backwards: through a ReLU by its relaxation, through W by a product, until they multiply x. What each step
    errs by is at most its rounding times the largest |value| that it multiplies, and is taken off the constants.

    Args:
        found: bounds on each layer's W h + b.
        rows: shape (m, k), k the width of the last layer.
        constants: shape (m,).
    """
    rows, constants = minorant(layers, found, box, rows, constants)
    return affine_bounds(rows, constants, box).lower


@np.errstate(over="ignore", invalid="ignore")
def minorant(layers: list[Layer], found: list[Box], box: Box, rows: Array, constants: Array) -> tuple[Array, Array]:
    """A (m, features) and c (m,) with A x + c ≤ rows · h + constants for every x in the box; see `lower_bounds`."""
    for index in range(len(layers) - 1, -1, -1):
        layer, before = layers[index], _outputs(layers, found, index, box)
        if layer.relu:
            rows, constants = _through_relu(rows, constants, found[index])
        product = rows @ layer.weight
        size = np.abs(rows) @ (np.abs(layer.weight) @ before.magnitude + np.abs(layer.bias)) + np.abs(constants)
        later = float(before.magnitude.sum()) + np.abs(rows).sum(1)
        error = rounding(sum(layer.weight.shape), size, later)
        constants = np.nextafter(rows @ layer.bias + constants - error, -np.inf)
        rows = product
    return rows, constants


def _through_relu(rows: Array, constants: Array, pre: Box) -> tuple[Array, Array]:
    """Rows and constants for z, z in `pre`, from those for ReLU(z).

    ReLU(z) ≥ a z for any a in [0, 1]; ReLU(z) ≤ s z + t for any s, if it holds at both ends, since ReLU is convex. So s
    may be rounded in any way, and t is rounded up.
    """
    low, high = pre.lower, pre.upper
    active, unstable = low >= 0.0, (low < 0.0) & (high > 0.0)
    below = np.where(active | (unstable & (high > -low)), 1.0, 0.0)
    width = np.where(unstable, high - low, 1.0)
    slope = np.where(active, 1.0, np.where(unstable, np.clip(high / width, 0.0, 1.0), 0.0))
    at_low = np.nextafter(slope * -low, np.inf)  # the line is to be ≥ 0 there
    at_high = np.nextafter(np.nextafter(1.0 - slope, np.inf) * high, np.inf)  # and ≥ high here
    offset = np.where(unstable, np.maximum(at_low, at_high), 0.0)
    positive, negative = np.maximum(rows, 0.0), np.minimum(rows, 0.0)
    size = np.abs(rows) @ (pre.magnitude + np.abs(offset)) + np.abs(constants)
    error = rounding(rows.shape[1], size, float(pre.magnitude.sum()))
    constants = np.nextafter(negative @ offset + constants - error, -np.inf)
    return positive * below + negative * slope, constants
