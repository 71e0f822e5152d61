"""`certified_distance`: how far a ReLU network can be from the smooth one that it was made of, for inputs in a box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...activation.functional import lambda_gelu_reference
from ...activation.module import LambdaGELU
from ...reports import progress, table, to_dict
from ...structure.modules import probed_base
from ...structure.transaction import transaction
from .balls import balls, checked_inputs
from .bounds import Box, affine_bounds, interval_bounds, linear_bounds, lower_bounds, outwards, relu_bounds
from .gate_errors import Gate, gate_error
from .network import Array, Layer, check_as_read, in_float64, read_network

_SAMPLES = 256  # of each ball, half of them corners


@dataclass(frozen=True)
class DistanceReport:
    """What `certified_distance` found. Printing it gives the table; `to_dict` what a JSON file can hold.

    Attributes:
        epsilon: the radius of the ball, in units of the inputs.
        clip: the range that inputs stay in; None if any number will do.
        bounds: by input, what the largest difference of an output cannot exceed in the ball.
        measured: by input, the largest difference met among the samples; at most the bound.
        outputs: by input, the largest |output| of the smooth network at the input itself, to compare with.

    Examples:
        >>> report = hlg.certified_distance(block, rows, 0.01)  # import hf_lambda_gelu as hlg
        >>> max(report.bounds), max(report.measured)
    """

    epsilon: float
    clip: tuple[float, float] | None
    bounds: list[float]
    measured: list[float]
    outputs: list[float]

    def to_dict(self) -> dict[str, Any]:
        """The attributes."""
        return to_dict(self)

    def __str__(self) -> str:
        within = "" if self.clip is None else f", values in [{self.clip[0]:g}, {self.clip[1]:g}]"
        lines = [f"{len(self.bounds)} inputs, each value within ± {self.epsilon:g}{within}"]
        rows = [
            [name, *(f"{value:.3g}" for value in (min(values), float(np.median(values)), max(values)))]
            for name, values in (("bound", self.bounds), ("measured", self.measured), ("|output|", self.outputs))
        ]
        return "\n".join(lines + table(["largest difference", "least", "median", "most"], [">9"] * 3, rows))


@transaction
def certified_distance(
    block: nn.Module,
    inputs: Tensor,
    epsilon: float,
    *,
    relu: nn.Module | None = None,
    clip: tuple[float, float] | None = None,
) -> DistanceReport:
    """Bounds |ReLU network − smooth network|, the largest over the outputs, for every x with |xᵢ − x₀ᵢ| ≤ ε.

    Formula: of one block, y = W₂ f(W₁x + b₁; λ) + b₂, output i of the ReLU block differs by Σⱼ W₂ᵢⱼ eⱼ, where eⱼ lies in
    [0, 0.17/λ] for the erf base, and closer where the box keeps unit j away from |z| = 0.75/λ. Where a further gate
    follows, ReLU passes on a difference at most as large as it gets, and its own e is added. Rounding is accounted for; of
    torch's erf and sigmoid in float64 an error of 2⁻⁴⁸ is allowed for. Source: derived.

    Args:
        block: the smooth network, nn.Sequential of nn.Linear, λ-GELU, GELU, SiLU and what `verify_robustness` takes. λ is
            that of each gate, 1 of a stock activation.
        inputs: (n, …), as in `verify_robustness`.
        epsilon: ε > 0, in the units of the inputs.
        relu: the ReLU network, layer for layer, where a refit has changed its weights; by default that of the block's own.
        clip: (low, high), the range that x stays in.

    Returns:
        Bounds, and beside them the largest difference at 256 seeded points of each ball, corners among them.

    Raises:
        ValueError: a layer that is none of these, networks that are not alike, or inputs, ε or range that cannot be used.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> from torch import nn
        >>> unit = nn.Sequential(nn.Linear(1, 1, bias=False), nn.GELU(), nn.Linear(1, 1, bias=False))
        >>> _ = [nn.init.ones_(parameter) for parameter in unit.parameters()]
        >>> report = hlg.certified_distance(unit, torch.zeros(1, 1), 1.0)
        >>> round(report.bounds[0], 4), round(report.measured[0], 4)
        (0.17, 0.17)
    """
    smooth = in_float64(block)
    twin, gates = relu_twin(smooth)
    exact = twin if relu is None else in_float64(relu)
    layers, own = read_network(exact), read_network(twin)
    _check_alike(layers, own, gates)
    rows = checked_inputs(inputs, epsilon, clip)
    doubles = inputs.detach().to("cpu", torch.float64)
    check_as_read(exact, layers, doubles)
    check_as_read(smooth, own, doubles, lambda rows: _smooth_values(own, gates, rows))
    report = DistanceReport(float(epsilon), clip, [], [], [])
    generator = np.random.default_rng(0)
    for x in progress(rows, "distance"):
        outer, inner = balls(x, epsilon, clip)
        report.bounds.append(float(difference_bounds(own, gates, layers, outer).magnitude.max()))
        samples = _samples(generator, inner, x)
        smooth_outputs, relu_outputs = (_outputs(model, samples, inputs.shape[1:]) for model in (smooth, exact))
        report.measured.append(float((relu_outputs - smooth_outputs).abs().max()))
        report.outputs.append(float(smooth_outputs[0].abs().max()))
    return report


def relu_twin(model: nn.Module) -> tuple[nn.Module, list[Gate | None]]:
    """The same modules with nn.ReLU in the place of what is smooth, and what each activation was; None for nn.ReLU."""
    gates: list[Gate | None] = []

    def replaced(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            return nn.Sequential(*(replaced(child) for child in module)).train(module.training)
        base = module.base if isinstance(module, LambdaGELU) else probed_base(module)
        if base is None:
            gates.extend([None] if type(module) is nn.ReLU else [])
            return module
        hardness = module.hardness if isinstance(module, LambdaGELU) else torch.ones(1, device="cpu")
        gates.append(Gate(base, hardness.detach().double().reshape(-1).numpy()))
        return nn.ReLU()

    return replaced(model), gates


def _check_alike(layers: list[Layer], own: list[Layer], gates: Sequence[Gate | None]) -> None:
    if sum(layer.relu for layer in own) != len(gates):
        raise ValueError("two activations follow each other: expected a nn.Linear between them")
    shapes = [[(*layer.weight.shape, layer.relu) for layer in of] for of in (own, layers)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the ReLU network is not the smooth one's, layer for layer: (outputs, inputs, gate) are {shapes[1]}, expected "
            f"{shapes[0]}"
        )


def _smooth_values(layers: list[Layer], gates: Sequence[Gate | None], rows: Array) -> Array:
    left = iter(gates)
    for layer in layers:
        rows = rows @ layer.weight.T + layer.bias
        gate = next(left) if layer.relu else None
        if gate is not None:
            hardness = torch.from_numpy(gate.hardness)
            rows = lambda_gelu_reference(torch.from_numpy(rows), hardness, gate.base).numpy()
        elif layer.relu:
            rows = np.maximum(rows, 0.0)
    return rows


def difference_bounds(own: list[Layer], gates: Sequence[Gate | None], layers: list[Layer], box: Box) -> Box:
    """Bounds on (ReLU network − smooth network), for x in the box.

    Args:
        own, gates: the smooth network.
        layers: the ReLU network.
    """
    pre = linear_bounds(layers, box, interval_bounds(layers, box))
    smooth, left = box, iter(gates)  # bounds on what enters the layer in the smooth network
    difference = Box(np.zeros_like(box.lower), np.zeros_like(box.lower))
    for index, (layer, other, bounds) in enumerate(zip(own, layers, pre, strict=True)):
        # V h' + c − (W h + b) = W (h' − h) + (V − W) h' + (c − b)
        moved = affine_bounds(layer.weight, np.zeros_like(layer.bias), difference)
        refit = _refit_bounds(layers[:index], pre, box, Layer(other.weight - layer.weight, other.bias - layer.bias, False))
        difference = outwards(moved.lower + refit.lower, moved.upper + refit.upper)
        smooth = affine_bounds(layer.weight, layer.bias, smooth)
        smooth = smooth.and_also(outwards(bounds.lower - difference.upper, bounds.upper - difference.lower))
        if layer.relu:
            gate = next(left)
            error = gate_error(gate, smooth)
            kept = relu_bounds(smooth)
            smooth = outwards(kept.lower - error.upper, kept.upper - error.lower)
            difference = outwards(
                np.minimum(difference.lower, 0.0) + error.lower, np.maximum(difference.upper, 0.0) + error.upper
            )
    return difference


def _refit_bounds(layers: list[Layer], pre: list[Box], box: Box, change: Layer) -> Box:
    """Bounds on what a change of weights makes of what `layers` put out."""
    if not layers:
        return affine_bounds(change.weight, change.bias, box)
    lower = lower_bounds(layers, pre, box, change.weight, change.bias)
    return Box(lower, -lower_bounds(layers, pre, box, -change.weight, -change.bias))


def _samples(generator: np.random.Generator, box: Box, x: Array) -> Tensor:
    """The input itself, corners and inner points."""
    share = generator.random((_SAMPLES, len(x)))
    share[: _SAMPLES // 2] = share[: _SAMPLES // 2].round()
    points = np.clip(box.lower + share * (box.upper - box.lower), box.lower, box.upper)
    return torch.from_numpy(np.vstack([x[None], points]))


@torch.no_grad()
def _outputs(model: nn.Module, samples: Tensor, shape: torch.Size) -> Tensor:
    outputs: Tensor = model(samples.reshape(-1, *shape))
    return outputs
