"""Finds the feed-forward blocks of a ReLU network: the maps before and after each ReLU, by following autograd's graph.

Nothing is assumed of names. A block is h = max(0, W₁x + b₁), perhaps times W₃x + b₃, and the map W₂ that takes up h; between
them stand products of equals and views alone, so that unit j of one is unit j of all. [derived]

Of a map that ran what it is is kept, and no tensor: its weight may be gone by the end of the pass (`BlockSource`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Hooks
from .linear_calls import Key, LinearCall
from .linear_maps import LinearMap, Parameters, eager_experts, watch_linears
from .tracing import MADE_BY, ancestors, graph_alone, made_by
from .unread_maps import differentiable, operation_of

# operations that leave each unit where it is: views too, as what they connect has the same shape in the end
_UNITWISE = frozenset({"Relu", "Mul", "Clone", "Alias", "View", "UnsafeView", "ReshapeAlias", "Contiguous", "ToCopy"})
_UNITWISE |= {MADE_BY}
# operations that take a part of what a map puts out, as of one that makes gate and up together
_CUTS = frozenset({"Split", "SplitWithSizes", "Slice", "Unbind", "Select", "Narrow"})


@dataclass(frozen=True)
class FeedForward:
    """One block.

    Attributes:
        site: name of its ReLU.
        after: the map that takes up its units, W₂.
        gate: the map before the ReLU, W₁.
        up: the map that is multiplied in, W₃; None in a block without gating.
        up_last: whether `up` runs after the ReLU.
    """

    site: str
    after: LinearMap
    gate: LinearMap
    up: LinearMap | None = None
    up_last: bool = False

    @property
    def units(self) -> int:
        """How many it has now."""
        return self.after.shape[0]

    @property
    def before(self) -> tuple[LinearMap, ...]:
        """The maps that make its units."""
        return (self.gate,) if self.up is None else (self.gate, self.up)

    @property
    def parameters(self) -> list[tuple[nn.Parameter, int]]:
        """Each parameter with units in it, and which of its dimensions they are."""
        found = [(self.after.parameter, 0 if self.after.transposed else 1)]
        for made in self.before:
            found.append((made.parameter, 1 if made.transposed else 0))
            if made.bias is not None:
                found.append((made.bias, 0))
        return found


@dataclass
class Blocks:
    """What one forward pass showed: the blocks by site, and why the other sites have none that can be told."""

    found: dict[str, FeedForward] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)


def feed_forwards(model: nn.Module, sites: Mapping[str, nn.Module], forward: Callable[[], Any]) -> Blocks:
    """The blocks around `sites`, the model's ReLUs; runs `forward` once, for its graph."""
    walk = _Walk(Parameters(model))
    with Hooks() as hooks, eager_experts(model), torch.enable_grad(), differentiable(model), graph_alone():
        for name, site in sites.items():
            hooks.after(site, partial(walk.on_site, name))
        with watch_linears(walk.on_linear):
            forward()
    result = Blocks()
    for name in sites:
        try:
            result.found[name] = walk.block(name)
        except _Obstacle as obstacle:
            result.obstacles[name] = str(obstacle)
    return result


class _Obstacle(Exception):
    """Why a site's block cannot be told."""


@dataclass(frozen=True)
class _Ran:
    """A linear map that ran.

    Attributes:
        place: the same for every call with the same weight.
        found: its parameters; None if they are not its own.
        shape: of what it put out.
        obstacle: why its rows are not its input's; empty if they are.
    """

    place: Key
    found: LinearMap | None
    shape: torch.Size
    obstacle: str


_Maps = tuple[_Ran, ...]  # of a block: after, gate, and up where it is gated


class _Walk:
    """One forward pass in which the output of each linear map comes from a leaf of autograd's graph."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._leaves: dict[int, _Ran] = {}  # in the order in which they ran
        self._ran: dict[str, int] = {}  # site → how many linear maps ran before its last call
        self._sites: dict[Any, str] = {}  # the node that a ReLU's output comes from
        self._kept: list[Any] = []  # or another object might get the id of one that is gone
        self._found: dict[str, dict[tuple[Key, ...], _Maps]] = {}
        self._obstacles: dict[str, str] = {}
        self._users: dict[Key, set[Key]] = {}  # map → the maps that take up what it puts out

    def on_site(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self._found.setdefault(name, {})
        self._ran[name] = len(self._leaves)
        if output.grad_fn is not None:
            self._sites[output.grad_fn] = name
            self._kept.append(output.grad_fn)

    def on_linear(self, call: LinearCall) -> Tensor | None:
        if not call.output.is_floating_point():
            return None
        window = (
            "" if call.window is None else f"it feeds a convolution with kernel {'×'.join(map(str, call.window.kernel))}"
        )
        ran = _Ran(self._parameters.place(call), self._parameters.find(call), call.output.shape, window)
        nodes = list(ancestors(call.input.grad_fn))
        names = {self._sites[node] for node in nodes if node in self._sites}
        for name in names:
            try:
                block = self._block(ran, call.input.shape, nodes, names)
                self._found[name][tuple(one.place for one in block)] = block
            except _Obstacle as obstacle:
                self._obstacles.setdefault(name, str(obstacle))
        for node in nodes:
            made = self._leaves.get(id(getattr(node, "variable", None)))
            if made is not None:
                self._users.setdefault(made.place, set()).add(ran.place)
        leaf = torch.empty(0, requires_grad=True)
        self._kept.append(leaf)
        self._leaves[id(leaf)] = ran
        return made_by(leaf, call.output.detach())

    def _block(self, after: _Ran, taken: torch.Size, nodes: list[Any], names: set[str]) -> _Maps:
        """The maps of a block, whose last one gets what has the shape `taken`, from these nodes."""
        if after.obstacle:
            raise _Obstacle(after.obstacle)
        if len(names) > 1:
            raise _Obstacle(f"the map after it takes up {', '.join(sorted(names))} together")
        makers = self._makers(nodes)
        inside = [node for site in nodes if site in self._sites for node in ancestors(site)]
        gates = self._makers(inside)
        ups = [made for made in makers if not any(made is gate for gate in gates)]
        if len(gates) != 1 or len(ups) > 1:
            raise _Obstacle(f"{len(makers)} linear maps make its units: expected one, or two where it is gated")
        for maker in makers:
            if maker.obstacle or maker.shape != taken:
                raise _Obstacle("the maps before and after it have unlike shapes")
        return (after, *gates, *ups)

    def _makers(self, nodes: Iterable[Any]) -> list[_Ran]:
        """The maps whose outputs these nodes begin with."""
        found: dict[int, _Ran] = {}
        for node in nodes:
            variable = getattr(node, "variable", None)
            if variable is None:
                operation = operation_of(node)
                if operation in _CUTS:
                    raise _Obstacle(f"one map makes its units and others, and is cut in parts by {operation}")
                if operation not in _UNITWISE:
                    raise _Obstacle(f"{operation} stands between the maps around it")
            elif id(variable) in self._leaves:
                found[id(variable)] = self._leaves[id(variable)]
            else:
                raise _Obstacle("a parameter that is no linear map is multiplied in")
        return list(found.values())

    def block(self, name: str) -> FeedForward:
        """That of a site; _Obstacle if there is none that can be told."""
        if name not in self._found:
            raise _Obstacle("no input reached it")
        if name in self._obstacles:
            raise _Obstacle(self._obstacles[name])
        if len(self._found[name]) != 1:
            count = len(self._found[name])
            raise _Obstacle(f"{count} blocks share it" if count else "no linear map takes up its output")
        after, *before = next(iter(self._found[name].values()))
        if any(self._users.get(one.place) != {after.place} for one in before):
            raise _Obstacle("what the map before it puts out is used elsewhere too")
        w2, w1, *w3 = (self._own_map(one) for one in (after, *before))
        ran_later = list(self._leaves.values())[self._ran[name] :]
        up_last = bool(w3) and any(one is before[-1] for one in ran_later)
        return FeedForward(name, w2, w1, w3[0] if w3 else None, up_last)

    def _own_map(self, ran: _Ran) -> LinearMap:
        """The map, whose weight and bias belong to it alone."""
        found = ran.found
        if found is None or found.index is not None:
            raise _Obstacle("a map around it is an expert's, or its weight is computed")
        for parameter in (found.parameter, found.bias):
            names = [] if parameter is None else self._parameters.names[parameter]
            if len(names) > 1:
                raise _Obstacle(f"{names[0]} is tied to {names[1]}")
        return found
