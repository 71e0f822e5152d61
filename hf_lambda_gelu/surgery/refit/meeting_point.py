"""Looks into one run of a block: what a linear map got and gave, and the residual stream that its output is added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...measurement.forward import main_output
from ...structure.hooks import Hooks
from ...structure.linear_calls import LinearCall
from ...structure.linear_maps import LinearMap, watch_linears
from .blocks import Arguments, hidden_in, hidden_of


@dataclass(frozen=True)
class Meeting:
    """Where the output y of a linear map has become part of the residual stream: T = (what else is there) + scale ⊙ y.

    Attributes:
        module: the module whose input T is, by its name in the block; None if T is the block's output.
        moved: whether T has its channels in dimension 1.
        scale: (k,), a layer scale; ones without one.
    """

    module: str | None
    moved: bool
    scale: Tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """What is at the point, as (rows, k)."""
        return flat(tensor.movedim(1, -1) if self.moved else tensor)


@dataclass
class Observed:
    """One run of a block. Tensors are channels last and flattened to rows.

    Attributes:
        inputs, outputs: label of the map → (rows, d), (rows, k).
        leading: label of the map → the shape that the rows were flattened from.
        stream: the residual stream T at the meeting point, (rows, k).
        hidden: the block's output.
        routing: (tokens, choices), the experts that each token went to.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    leading: dict[str, torch.Size] = field(default_factory=dict)
    stream: Tensor | None = None
    hidden: Tensor | None = None
    routing: Tensor | None = None


def flat(tensor: Tensor) -> Tensor:
    """(…, features) as (rows, features)."""
    return tensor.reshape(-1, tensor.shape[-1])


@torch.no_grad()
def observe(block: nn.Module, arguments: Arguments, maps: Sequence[LinearMap], meeting: Meeting | None = None) -> Observed:
    """Run `block` and keep what concerns `maps`."""
    seen = Observed()
    labels = {linear.key: linear.label for linear in maps}

    def on_linear(call: LinearCall) -> None:
        label = labels.get(call.key)
        if label is not None:
            seen.inputs[label], seen.outputs[label] = flat(call.input), flat(call.output)
            seen.leading[label] = call.input.shape[:-1]

    def on_meeting(meeting: Meeting, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = hidden_in(args, kwargs)
        seen.stream = None if value is None else meeting.rows(value).clone()

    def on_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tables = [
            v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() == 2 and not v.is_floating_point()
        ]
        seen.routing = tables[0] if len(tables) == 1 else None

    with Hooks() as hooks, watch_linears(on_linear):
        if meeting is not None and meeting.module is not None:
            hooks.before(block.get_submodule(meeting.module), partial(on_meeting, meeting))
        if maps and maps[0].index is not None:
            for owner in block.modules():
                if any(p is maps[0].parameter for p in owner.parameters(recurse=False)):
                    hooks.before(owner, on_experts)
        seen.hidden = main_tensor(block(*arguments[0], **arguments[1]))
    if meeting is not None and meeting.module is None and seen.hidden is not None:
        seen.stream = meeting.rows(seen.hidden)
    return seen


def main_tensor(output: Any) -> Tensor | None:
    """A block's output, the first of several, or a whole model's main output."""
    return main_output(output) if isinstance(output, dict) else hidden_of(output)


@torch.no_grad()
def find_meeting(block: nn.Module, arguments: Arguments, linear: LinearMap) -> Meeting | None:
    """The last point in `block` that moves by exactly scale ⊙ δ when the linear map's output moves by δ, if there is one.

    In a block with the norm first this is the block's output, in one with the norm last that norm's input.
    """
    base = _points(block, arguments, linear, None)
    output = base.pop("", None)
    if output is None:
        return None
    # large beside the stream, so that rounding of the sum is small beside it and a norm cannot pass for linear
    size = 10.0 * max(float(t.float().square().mean().sqrt()) for t in base.values())
    generator = torch.Generator().manual_seed(0)
    # twice, as whatever happens to a single row is a scale for each channel
    deltas = [(torch.randn(output.shape, generator=generator) * max(size, 1e-3)).to(output) for _ in range(2)]
    afters = [_points(block, arguments, linear, delta) for delta in deltas]
    wanted = torch.cat([flat(delta).float() for delta in deltas])
    # the block's output first, then inputs of modules from the last call backwards
    for name in [None, *reversed([n for n in base if n is not None])]:
        before = base.get(name)
        if before is None:
            continue
        now = [n for after in afters if (n := after.get(name)) is not None and n.shape == before.shape]
        if len(now) < len(afters):
            continue
        for moved in (False, True):
            if moved and before.dim() < 3:
                continue
            changes = [n.float() - before.float() for n in now]
            change = torch.cat([flat(c.movedim(1, -1) if moved else c) for c in changes])
            if change.shape == wanted.shape:
                scale = _scale(change, wanted, torch.finfo(before.dtype).eps)
                if scale is not None:
                    return Meeting(name, moved, scale)
    return None


def _scale(change: Tensor, delta: Tensor, eps: float) -> Tensor | None:
    scale = (change * delta).sum(0) / delta.square().sum(0).clamp(min=1e-30)
    norm = float(change.norm())
    if norm == 0.0 or float((change - scale * delta).norm()) > max(1e-3, 2.0 * eps) * norm:
        return None
    return scale


def _points(block: nn.Module, arguments: Arguments, linear: LinearMap, delta: Tensor | None) -> dict[str | None, Tensor]:
    """Module name → its input, of modules called after the map; None → the block's output; "" → the map's output."""
    points: dict[str | None, Tensor] = {}
    key = linear.key

    def on_linear(call: LinearCall) -> Tensor | None:
        if call.key != key:
            return None
        points[""] = call.output
        return None if delta is None else call.output + delta

    def on_input(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = hidden_in(args, kwargs)
        if "" in points and value is not None:
            points.pop(name, None)  # the last call counts
            points[name] = value.clone()

    with Hooks() as hooks, watch_linears(on_linear):
        for name, module in block.named_modules():
            if name:
                hooks.before(module, partial(on_input, name))
        output = main_tensor(block(*arguments[0], **arguments[1]))
    if output is not None:
        points[None] = output
    return points
