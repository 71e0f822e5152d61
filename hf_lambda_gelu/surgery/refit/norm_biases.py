"""Maps without a bias whose output a batch norm takes up: the norm's bias does as theirs. [derived]

In evaluation a batch norm computes γ (y − μ) / √(v + ε) + β of a map's output y, so y + c is the same as β + γ c / √(v + ε).
Convolutions that a batch norm follows have no bias of their own, and no config attribute that gives them one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...measurement.forward import main_output
from ...structure.hooks import Hooks
from ...structure.linear_calls import Key, LinearCall
from ...structure.linear_maps import LinearMap, watch_linears

# of how far the outputs move: between a constant that is added to a map's output, and that in the norm's bias
_SAME = 1e-3


@torch.no_grad()
def borrow_biases(model: nn.Module, maps: Iterable[LinearMap], forward: Callable[[], Any]) -> None:
    """Let maps without a bias have that of the batch norm after them, where `forward` shows that it does the same."""
    lacking = [m for m in maps if m.bias is None and m.index is None]
    norms = _norms_after(model, {m.key for m in lacking}, forward) if lacking else {}
    gains = _that_do_as_well(norms, forward) if norms else {}
    for linear in lacking:
        if linear.key in gains:
            linear.bias, linear.gain = norms[linear.key].bias, gains[linear.key]


def _norms_after(model: nn.Module, keys: set[Key], forward: Callable[[], Any]) -> dict[Key, _BatchNorm]:
    """The batch norm that takes up what a map puts out, of maps that have one, called as often as they."""
    outputs: dict[int, tuple[Key, Tensor]] = {}
    calls: dict[Key, int] = {}
    found: dict[Key, list[_BatchNorm]] = {}

    def on_linear(call: LinearCall) -> None:
        if call.key in keys:
            outputs[call.output.data_ptr()] = call.key, call.output
            calls[call.key] = calls.get(call.key, 0) + 1

    def on_norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key, output = outputs.get(args[0].data_ptr(), (None, None)) if args and isinstance(args[0], Tensor) else (None, None)
        if key is not None and output is not None and output.numel() == args[0].numel() and isinstance(module, _BatchNorm):
            found.setdefault(key, []).append(module)

    parameters = [p for module in model.modules() for p in module.parameters(recurse=False)]
    with Hooks() as hooks, watch_linears(on_linear):
        for module in model.modules():
            if isinstance(module, _BatchNorm) and not module.training and module.affine and module.running_var is not None:
                hooks.before(module, on_norm)
        forward()
    once = {key: several[0] for key, several in found.items() if len(several) == calls[key] == 1}
    users = [norm.bias for norm in once.values()]
    alone = {p for p in users if sum(p is other for other in users) == sum(p is other for other in parameters) == 1}
    return {key: norm for key, norm in once.items() if norm.bias in alone}


def _that_do_as_well(norms: dict[Key, _BatchNorm], forward: Callable[[], Any]) -> dict[Key, Tensor]:
    """{map: (k,), what a constant before its norm is after it; fp64}: none, unless the outputs of one run, with random
    constants added to what the maps put out, are those of another, with these after the norms."""
    generator = torch.Generator().manual_seed(0)
    base = main_output(forward())
    constants: dict[Key, Tensor] = {}
    gains: dict[Key, Tensor] = {}

    def add(call: LinearCall) -> Tensor | None:
        if call.key not in norms:
            return None
        size = float(call.output.float().square().mean().sqrt())
        constants[call.key] = size * torch.randn(call.output.shape[-1], generator=generator)
        return call.output + constants[call.key].to(call.output)

    def add_after(key: Key, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        norm = norms[key]
        assert norm.running_var is not None
        gains[key] = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        constant = constants[key].to(output.device) * gains[key]
        return output + constant.to(output).view(-1, *[1] * (output.dim() - 2))

    with watch_linears(add):
        wanted = main_output(forward())
    with Hooks() as hooks:
        for key, norm in norms.items():
            hooks.after(norm, partial(add_after, key))
        given = main_output(forward())
    moved = float((wanted.double() - base.double()).norm())
    same = moved > 0.0 and float((given.double() - wanted.double()).norm()) <= _SAME * moved
    return gains if same else {}
