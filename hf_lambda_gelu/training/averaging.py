"""Schedule-free optimizers (Defazio et al. 2024) keep two points of a parameter: one that is stepped, and an average.

They train at y = βx + (1 − β)z, where the steps move z and x is the average of all z: that is the network which evaluation
takes. The parameter is y or x, by `train()` and `eval()` of the optimizer, and z is in its state. Whoever sets a parameter
from outside must therefore set z too, or x lies beyond what was set and the next steps go back to where z is. [derived]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def optimizers_in(optimizer: Any) -> list[Any]:
    """An optimizer and those that it holds, from outside to inside: accelerate's wrapper, SAM, two in one."""
    found: list[Any] = []
    waiting = [optimizer]
    while waiting:
        one = waiting.pop(0)
        if any(one is other for other in found):
            continue
        found.append(one)
        # torch's own ZeRO holds one for the parameters of this process alone, and steps all
        if type(one).__name__ != "ZeroRedundancyOptimizer":
            waiting += _held(one)
    return found


def _held(optimizer: Any) -> Iterator[Any]:
    for value in list(getattr(optimizer, "__dict__", {}).values()):
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        yield from (one for one in values if isinstance(one, Optimizer))


def to_average(optimizer: Any) -> None:
    """Makes the parameters those that evaluation takes; the next training step of a Trainer calls `train()`."""
    for one in _averaging(optimizer):
        one.eval()


@torch.no_grad()
def go_on_from(optimizer: Any, parameters: Iterable[nn.Parameter] | None = None) -> None:
    """Has training go on from what these parameters now are, or all: z and x are what the parameter is."""
    for one in _averaging(optimizer):
        chosen = parameters if parameters is not None else [p for group in one.param_groups for p in group["params"]]
        for parameter in chosen:
            z = one.state.get(parameter, {}).get("z")
            if z is not None:
                z.copy_(parameter)


@torch.no_grad()
def clip(optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
    """λ ≥ 1 after a step: the parameter, and where there are two points of it, both. [derived]"""
    own = {id(parameter) for parameter in parameters}
    averaging = any(one is optimizer for one in _averaging(optimizer))
    for group in optimizer.param_groups:
        chosen = [parameter for parameter in group["params"] if id(parameter) in own]
        points = [optimizer.state.get(parameter, {}).get("z") if averaging else None for parameter in chosen]
        for parameter in (p for p, z in zip(chosen, points, strict=True) if z is None):
            parameter.clamp_(min=1.0)
        pairs = [(p, z) for p, z in zip(chosen, points, strict=True) if z is not None]
        if pairs:
            _clip_both(optimizer, group, pairs)


def _clip_both(optimizer: Any, group: dict[str, Any], pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Clips x and z; y, which is the parameter within training, is their mean."""
    kept = [parameter.clone() for parameter, _ in pairs]
    below = [(parameter < 1.0) | (z < 1.0) for parameter, z in pairs]
    groups = optimizer.param_groups
    # what x is, the optimizer knows: its own change of modes, on a copy of the group that has these parameters alone
    optimizer.param_groups = [{**group, "params": [parameter for parameter, _ in pairs]}]
    try:
        optimizer.eval()
        for parameter, z in pairs:
            parameter.clamp_(min=1.0)
            z.clamp_(min=1.0)
        optimizer.train()
    finally:
        optimizer.param_groups = groups
    for (parameter, _), old, clipped in zip(pairs, kept, below, strict=True):
        parameter.copy_(torch.where(clipped, parameter, old))  # what was not below stays as it is, to the bit


def _averaging(optimizer: Any) -> list[Any]:
    """Those with two points of a parameter."""
    passing_on = ("AcceleratedOptimizer", "DeepSpeedOptimizerWrapper")
    own = [one for one in optimizers_in(optimizer) if type(one).__name__ not in passing_on]
    return [one for one in own if callable(getattr(one, "train", None)) and callable(getattr(one, "eval", None))]
