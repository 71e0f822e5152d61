"""Looks into one run of a block: what a linear map got and gave, and the residual stream that its output is added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...measurement.chosen_rows import from_taken, taken_rows
from ...measurement.places import chunks
from ...measurement.towers import Chosen, Note
from ...structure.hooks import Hooks
from ...structure.linear_calls import Key, LinearCall
from ...structure.linear_maps import LinearMap, watch_linears
from .blocks import hidden_in
from .runs import Run

# a tensor of the residual stream, by the number of map calls before it, less one; several where a point is passed again
Stream = dict[int, Tensor]


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

    def rows(self, stream: Stream, notes: Sequence[Note]) -> Tensor | None:
        """What is at the point, as (rows, k), in the order of the map's calls; None if it is not their sum."""
        return _rows_of_calls(stream, notes, self.moved)


@dataclass(frozen=True)
class MapCall:
    """One call of a linear map. Tensors are channels last and flattened to rows.

    Attributes:
        input, output: (rows, d), (rows, k).
        note: where it was seen.
        routing: (tokens, choices), the experts that each token went to; None outside of stacked experts.
    """

    input: Tensor
    output: Tensor
    note: Note
    routing: Tensor | None = None


@dataclass
class Observed:
    """One run of a block.

    Attributes:
        calls: label of the map → its calls.
        stream: what is at the meeting point, as it is there, after which of the map's calls.
        hidden: the block's output.
        gated: whether the site before the maps ran on any row.
    """

    calls: dict[str, list[MapCall]] = field(default_factory=dict)
    stream: Stream = field(default_factory=dict)
    hidden: Tensor | None = None
    gated: bool = False


def flat(tensor: Tensor) -> Tensor:
    """(…, features) as (rows, features)."""
    return tensor.reshape(-1, tensor.shape[-1])


def _rows_of_calls(stream: Stream, notes: Sequence[Note], moved: bool) -> Tensor | None:
    """The rows of what is at a point, in the order of the map's calls.

    The point is passed once after each call, or once after all of them, which are pieces of it: else None.
    """
    tensors = [tensor.movedim(1, -1) if moved else tensor for tensor in stream.values()]
    if list(stream) == list(range(len(notes))):
        return torch.cat([flat(tensor) for tensor in tensors])
    pieces = chunks(notes)
    if list(stream) != [len(notes) - 1] or any(piece is None for piece in pieces):
        return None
    (whole,) = tensors
    if whole.dim() < 3 or {p.total for p in pieces if p} != {whole.shape[1]}:
        return None
    lengths = [note.leading[1] for note in notes]
    return torch.cat([flat(whole[:, p.start : p.start + n]) for p, n in zip(pieces, lengths, strict=True) if p])


@torch.no_grad()
def observe(run: Run, maps: Sequence[LinearMap], meeting: Meeting | None = None, site: nn.Module | None = None) -> Observed:
    """Run a block and keep what concerns `maps`, and whether `site` ran."""
    seen, block = Observed(), run.block
    routing: Tensor | None = None
    watched: dict[Key, list[LinearMap]] = {}
    for linear in maps:
        watched.setdefault(linear.key, []).append(linear)
    stacked = bool(maps) and maps[0].index is not None
    taken: list[Chosen] = []

    def on_linear(call: LinearCall) -> None:
        for linear in watched.get(call.key, ()):
            note = run.towers.note(call.output)
            if stacked and routing is None and note.chosen is None:
                note = replace(note, chosen=from_taken(call.input, taken))
            made = MapCall(call.rows(linear.group), flat(call.output)[:, linear.outputs], note, routing)
            seen.calls.setdefault(linear.label, []).append(made)

    def on_other(func: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = taken_rows(func, args)
        if found is not None:
            taken[:] = [*taken[-3:], found]

    def on_meeting(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value, calls = hidden_in(args, kwargs), len(seen.calls.get(maps[0].label, ()))
        if calls and value is not None:
            seen.stream[calls - 1] = value.clone()

    def on_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal routing
        tables = [
            v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() == 2 and not v.is_floating_point()
        ]
        routing = tables[0] if len(tables) == 1 else None

    def on_site(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.gated = seen.gated or output.numel() > 0

    with Hooks() as hooks, watch_linears(on_linear, on_other if stacked else None):
        if site is not None:
            hooks.after(site, on_site)
        if meeting is not None and meeting.module is not None:
            hooks.before(block.get_submodule(meeting.module), on_meeting)
        if stacked:
            for owner in block.modules():
                if any(p is maps[0].parameter for p in owner.parameters(recurse=False)):
                    hooks.before(owner, on_experts)
        seen.hidden = run()
    if meeting is not None and meeting.module is None and seen.hidden is not None:
        seen.stream[len(seen.calls.get(maps[0].label, ())) - 1] = seen.hidden
    return seen


@torch.no_grad()
def find_meeting(run: Run, linear: LinearMap) -> Meeting | None:
    """The last point in `block` that moves by exactly scale ⊙ δ when the linear map's output moves by δ, if there is one.

    In a block with the norm first this is the block's output, in one with the norm last that norm's input.

    Raises:
        ReplayError: the block does not give what it gave in the model's forward.
    """
    base, outputs, notes = _points(run, linear, ())
    if not outputs or not base:
        return None
    # large beside the stream, so that rounding of the sum is small beside it and a norm cannot pass for linear
    size = 10.0 * max(float(t.float().square().mean().sqrt()) for stream in base.values() for t in stream.values())
    generator = torch.Generator().manual_seed(0)
    # twice, as whatever happens to a single row is a scale for each channel
    drawn = [[torch.randn(o.shape, generator=generator, device="cpu") for o in outputs] for _ in range(2)]
    both = [[(one * max(size, 1e-3)).to(o) for one, o in zip(each, outputs, strict=True)] for each in drawn]
    moved_run = replace(run, sample=None)
    afters = [_points(moved_run, linear, deltas)[0] for deltas in both]
    wanted = torch.cat([flat(delta).float() for deltas in both for delta in deltas])
    # the block's output first, then inputs of modules from the last call backwards
    for name in [None, *reversed([n for n in base if n is not None])]:
        before, now = base.get(name), [after.get(name) for after in afters]
        shapes = [None if stream is None else _shapes(stream) for stream in now]
        if before is None or any(shape != _shapes(before) for shape in shapes):
            continue
        for moved in (False, True):
            if moved and any(tensor.dim() < 3 for tensor in before.values()):
                continue
            old = _rows_of_calls(before, notes, moved)
            new = [None if stream is None else _rows_of_calls(stream, notes, moved) for stream in now]
            if old is not None:
                change = torch.cat([n.float() - old.float() for n in new if n is not None])
                scale = _scale(change, wanted, torch.finfo(old.dtype).eps) if change.shape == wanted.shape else None
                if scale is not None:
                    return Meeting(name, moved, scale)
    return None


def _shapes(stream: Stream) -> list[tuple[int, torch.Size]]:
    return [(call, tensor.shape) for call, tensor in stream.items()]


def _scale(change: Tensor, delta: Tensor, eps: float) -> Tensor | None:
    scale = (change * delta).sum(0) / delta.square().sum(0).clamp(min=1e-30)
    norm = float(change.norm())
    if norm == 0.0 or float((change - scale * delta).norm()) > max(1e-3, 2.0 * eps) * norm:
        return None
    return scale


def _points(
    run: Run, linear: LinearMap, deltas: Sequence[Tensor]
) -> tuple[dict[str | None, Stream], list[Tensor], list[Note]]:
    """What goes into modules once the map was called, by name, and under None what the block puts out, with `deltas` added
    to what the map puts out, call by call; what the map put out in each call, and where."""
    points: dict[str | None, Stream] = {}
    outputs: list[Tensor] = []
    notes: list[Note] = []
    key = linear.key

    def on_linear(call: LinearCall) -> Tensor | None:
        if call.key != key:
            return None
        outputs.append(call.output)
        notes.append(run.towers.note(call.output))
        return call.output + deltas[len(outputs) - 1] if len(outputs) <= len(deltas) else None

    def on_input(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = hidden_in(args, kwargs)
        if outputs and value is not None:
            stream = points.pop(name, {})  # the last call comes last
            points[name] = stream | {len(outputs) - 1: value.clone()}

    with Hooks() as hooks, watch_linears(on_linear):
        for name, module in run.block.named_modules():
            if name:
                hooks.before(module, partial(on_input, name))
        output = run()
    if output is not None and outputs:
        points[None] = {len(outputs) - 1: output}
    return points, outputs, notes
