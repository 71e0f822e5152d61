"""The structural edit: a layer of d units becomes one of W, unit for unit out of what it was. [derived]

Unit w of the new layer is a hinge of neuron o(w): relu(z − t_w) with weight a_w. So the rows of the map before the site are
repeated, W₁′[w] = W₁[o(w)], with biases b₁′[w] = b₁[o(w)] − t_w; those of the map that is multiplied in are repeated as they
are, W₃′[w] = W₃[o(w)]; the columns of the map after it are W₂′[:, w] = a_w W₂[:, o(w)], and b₂′ = b₂ + W₂ c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...structure.feed_forward import FeedForward
from .placement import Places


@dataclass(frozen=True)
class Hinges:
    """The hinges of one layer, unit by unit.

    Attributes:
        neuron: (W,), which neuron each is of; increasing.
        at, weight: (W,), t and a; fp64.
        shift: (d,), c by neuron; None without one.
    """

    neuron: Tensor
    at: Tensor
    weight: Tensor
    shift: Tensor | None = None

    def counts(self, neurons: int) -> dict[int, int]:
        """Number of hinges → how many neurons have so many."""
        each = torch.bincount(self.neuron, minlength=neurons)
        return {int(n): int((each == n).sum()) for n in each.unique()}


def spent(places: Places, gain: Tensor, units: int) -> Hinges:
    """As many hinges as there are units, one per neuron at least, the others where they save most.

    Args:
        places: the best hinges of each neuron, by their number.
        gain: (d,), what a neuron's squared error counts for.
    """
    numbers = sorted(places.at)
    errors = torch.stack([places.errors[n] for n in numbers], dim=1) * gain.unsqueeze(1)
    counts = _counts(errors, units)
    return _laid_out(places, counts)


def _counts(errors: Tensor, units: int) -> Tensor:
    """(d,) hinges by neuron: the largest savings first, along the lower convex hull of each neuron's errors (d, most)."""
    d, most = errors.shape
    if units == d * most:
        return torch.full((d,), most, dtype=torch.long, device=errors.device)
    savings = _hull(errors)
    order = savings.reshape(-1).argsort(descending=True, stable=True)[: units - d]
    return 1 + torch.bincount(order // max(1, most - 1), minlength=d)


def _hull(errors: Tensor) -> Tensor:
    """(d, most − 1) what each further hinge saves, never more than the one before: a chord where one alone saves little."""
    steps = errors.shape[1] - 1
    hull = torch.zeros_like(errors[:, 1:])
    for step in range(steps):  # the slope of the hull over a step: the least, over starts, of the steepest chord
        chords = [
            torch.stack([(errors[:, i] - errors[:, j]) / (j - i) for j in range(step + 1, steps + 1)]).amax(0)
            for i in range(step + 1)
        ]
        hull[:, step] = torch.stack(chords).amin(0)
    return hull.clamp(min=0.0)


def _laid_out(places: Places, counts: Tensor) -> Hinges:
    neuron, at, weight = [], [], []
    for number in sorted(places.at):
        chosen = (counts == number).nonzero()[:, 0]
        neuron.append(chosen.repeat_interleave(number))
        at.append(places.at[number][chosen].reshape(-1))
        weight.append(places.weights[number][chosen].reshape(-1))
    order = torch.cat(neuron).argsort(stable=True)
    shifts = torch.stack([places.shift[number] for number in sorted(places.at)], dim=1)
    shift = shifts.gather(1, (counts - min(places.at)).unsqueeze(1))[:, 0]
    return Hinges(torch.cat(neuron)[order], torch.cat(at)[order], torch.cat(weight)[order], shift)


def alike(hardness: Tensor, neurons: int, at: Tensor, weight: Tensor) -> Hinges:
    """The same k hinges (k,) for every neuron, in units of 1/λ; λ is one number, or one per neuron (d,)."""
    scale = hardness.double().reshape(-1).expand(neurons)
    neuron = torch.arange(neurons, device=hardness.device).repeat_interleave(len(at))
    return Hinges(neuron, (at.to(scale) / scale.unsqueeze(1)).reshape(-1), weight.to(scale).repeat(neurons))


@torch.no_grad()
def widened(block: FeedForward, hinges: Hinges) -> Mapping[nn.Parameter, Tensor]:
    """The new data of each parameter around the site, computed in fp64 and rounded once."""
    neuron = hinges.neuron
    made: dict[nn.Parameter, Tensor] = {}
    columns, *rows = block.parameters
    for side in rows:
        made[side.parameter] = block.of_units(side, neuron)
    gate = block.gate.bias
    if gate is not None:
        at = hinges.at if block.halves is None else block.halves.together(hinges.at, torch.zeros_like(hinges.at))
        made[gate] = (made[gate].double() - at.to(gate.device)).to(gate.dtype)
    after, dim, weight = block.after, columns.dim, block.after.parameter.data
    shape = [-1 if d == dim else 1 for d in range(weight.dim())]
    wide = block.of_units(columns, neuron).double() * hinges.weight.to(weight.device).reshape(shape)
    made[after.parameter] = wide.to(weight.dtype).contiguous()
    if hinges.shift is not None and after.bias is not None:
        flat = weight.movedim(dim, -1).reshape(-1, weight.shape[dim]).double()
        made[after.bias] = (after.bias.data.double() + flat @ hinges.shift.to(weight.device)).to(after.bias.dtype)
    return made


def column_norms(block: FeedForward) -> Tensor:
    """(d,) Σ W₂², of each unit's column."""
    weight, dim, _ = block.parameters[0]
    return weight.detach().double().movedim(dim, 0).reshape(block.units, -1).square().sum(1)
