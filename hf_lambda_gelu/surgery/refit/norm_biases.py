"""Maps without a bias whose output a batch norm takes up: the norm's bias does as theirs. [derived]

In evaluation a batch norm computes γ (y − μ) / √(v + ε) + β of a map's output y, so y + c is the same as β + γ c / √(v + ε).
Convolutions that a batch norm follows have no bias of their own, and no config attribute that gives them one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...measurement.forward import main_output
from ...structure.hooks import Hooks
from ...structure.linear_calls import LinearCall
from ...structure.linear_maps import LinearMap, Parameters, watch_linears

# of how far the outputs move: between a constant that is added to a map's output, and that in the norm's bias
_SAME = 1e-3


@torch.no_grad()
def borrow_biases(model: nn.Module, maps: Iterable[LinearMap], forward: Callable[[], Any]) -> None:
    """Let maps without a bias have that of the batch norm after them, where `forward` shows that it does the same."""
    lacking = [m for m in maps if m.bias is None and m.index is None]
    weights = _Weights(Parameters(model), {m.parameter for m in lacking})
    norms = _norms_after(model, weights, forward) if lacking else {}
    gains = _that_do_as_well(norms, weights, forward) if norms else {}
    for linear in lacking:
        if linear.parameter in gains:
            linear.bias, linear.gain = norms[linear.parameter].bias, gains[linear.parameter]


@dataclass(frozen=True)
class _Weights:
    """The weights of the maps, known while they are in memory."""

    parameters: Parameters
    own: set[nn.Parameter]

    def of(self, call: LinearCall) -> nn.Parameter | None:
        """The weight of a call of one of the maps; None of other calls."""
        found = self.parameters.by_pointer.get(call.weight.data_ptr())
        return found if found in self.own else None


def _norms_after(model: nn.Module, weights: _Weights, forward: Callable[[], Any]) -> dict[nn.Parameter, _BatchNorm]:
    """By the map's weight the batch norm that takes its output up, of maps that have one and are called once."""
    outputs: dict[int, tuple[nn.Parameter, Tensor]] = {}
    calls: dict[nn.Parameter, int] = {}
    found: dict[nn.Parameter, list[_BatchNorm]] = {}

    def on_linear(call: LinearCall) -> None:
        weight = weights.of(call)
        if weight is not None:
            outputs[call.output.data_ptr()] = weight, call.output
            calls[weight] = calls.get(weight, 0) + 1

    def on_norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args or not isinstance(args[0], Tensor) or not isinstance(module, _BatchNorm):
            return
        weight, output = outputs.get(args[0].data_ptr(), (None, None))
        if weight is not None and output is not None and output.numel() == args[0].numel():
            found.setdefault(weight, []).append(module)

    parameters = [p for module in model.modules() for p in module.parameters(recurse=False)]
    with Hooks() as hooks, watch_linears(on_linear):
        for module in model.modules():
            if isinstance(module, _BatchNorm) and not module.training and module.affine and module.running_var is not None:
                hooks.before(module, on_norm)
        forward()
    once = {weight: several[0] for weight, several in found.items() if len(several) == calls[weight] == 1}
    users = [norm.bias for norm in once.values()]
    alone = {p for p in users if sum(p is other for other in users) == sum(p is other for other in parameters) == 1}
    return {weight: norm for weight, norm in once.items() if norm.bias in alone}


def _that_do_as_well(
    norms: dict[nn.Parameter, _BatchNorm], weights: _Weights, forward: Callable[[], Any]
) -> dict[nn.Parameter, Tensor]:
    """{weight: (k,), what a constant before its norm is after it; fp64}: none, unless the outputs of one run, with random
    constants added to what the maps put out, are those of another, with these after the norms."""
    generator = torch.Generator().manual_seed(0)
    base = main_output(forward())
    constants: dict[nn.Parameter, Tensor] = {}
    gains: dict[nn.Parameter, Tensor] = {}

    def add(call: LinearCall) -> Tensor | None:
        weight = weights.of(call)
        if weight is None or weight not in norms:
            return None
        size = float(call.output.float().square().mean().sqrt())
        constants[weight] = size * torch.randn(call.output.shape[-1], generator=generator, device="cpu")
        return call.output + constants[weight].to(call.output)

    def add_after(weight: nn.Parameter, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        norm = norms[weight]
        assert norm.running_var is not None
        gains[weight] = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        constant = constants[weight].to(output.device) * gains[weight]
        return output + constant.to(output).view(-1, *[1] * (output.dim() - 2))

    with watch_linears(add):
        wanted = main_output(forward())
    with Hooks() as hooks:
        for weight, norm in norms.items():
            hooks.after(norm, partial(add_after, weight))
        given = main_output(forward())
    moved = float((wanted.double() - base.double()).norm())
    same = moved > 0.0 and float((given.double() - wanted.double()).norm()) <= _SAME * moved
    return gains if same else {}
