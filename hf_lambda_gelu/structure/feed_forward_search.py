"""Finds the feed-forward blocks of a ReLU network: the maps before and after each ReLU, by following autograd's graph.

Nothing is assumed of names. Between the maps of a block stand products of equals and views alone, so that unit j of one is
unit j of all; what permutes dimensions, as convolutions are read with their channels last, must be undone on the way.

Of a map that ran what it is is kept, and no tensor: its weight may be gone by the end of the pass (`BlockSource`). [derived]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import pytree
from .feed_forward import Blocks, FeedForward
from .fused_maps import Halves, Lain
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
# operations after which a dimension is not where it was
_MOVING = frozenset({"View", "UnsafeView", "ReshapeAlias"}) | _CUTS


def feed_forwards(model: nn.Module, sites: Mapping[str, nn.Module], forward: Callable[[], Any]) -> Blocks:
    """The blocks around `sites`, the model's ReLUs; runs `forward` once, for its graph."""
    walk = _Walk(Parameters(model))
    with Hooks() as hooks, eager_experts(model), torch.enable_grad(), differentiable(model), graph_alone():
        for name, site in sites.items():
            hooks.after(site, partial(walk.on_site, name))
        with watch_linears(walk.on_linear):
            output = forward()
    result, shown = Blocks(), walk.shown_by(output)
    for name in sites:
        try:
            block = result.found[name] = walk.block(name)
            result.shown += [name] if any(made.parameter in shown for made in block.before) else []
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
        lain: where what it put out lay.
        turned: whether its features are the last dimension in `LinearCall` alone, as a convolution's channels.
    """

    place: Key
    found: LinearMap | None
    shape: torch.Size
    obstacle: str
    lain: Lain
    turned: bool


@dataclass(frozen=True)
class _Found:
    """The maps of a block: after, gate, and up where it is gated; or the gate's and the up map's halves of one."""

    maps: tuple[_Ran, ...]
    halves: Halves | None


class _Walk:
    """One forward pass in which the output of each linear map comes from a leaf of autograd's graph."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._leaves: dict[int, _Ran] = {}  # in the order in which they ran
        self._ran: dict[str, int] = {}  # site → how many linear maps ran before its last call
        self._sites: dict[Any, str] = {}  # the node that a ReLU's output comes from
        self._kept: list[Any] = []  # or another object might get the id of one that is gone
        self._entered: dict[str, Lain | None] = {}  # where what a site got last lay
        self._found: dict[str, dict[tuple[Key, ...], _Found]] = {}
        self._obstacles: dict[str, str] = {}
        self._users: dict[Key, set[Key]] = {}  # map → the maps that take up what it puts out

    def on_site(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self._found.setdefault(name, {})
        self._ran[name] = len(self._leaves)
        self._entered[name] = Lain.of(args[0]) if args else None
        if output.grad_fn is not None:
            self._sites[output.grad_fn] = name
            self._kept.append(output.grad_fn)

    def on_linear(self, call: LinearCall) -> Tensor | None:
        if not call.output.is_floating_point():
            return None
        window = (
            "" if call.window is None else f"it feeds a convolution with kernel {'×'.join(map(str, call.window.kernel))}"
        )
        place, lain = self._parameters.place(call), Lain.of(call.output)
        ran = _Ran(place, self._parameters.find(call), call.output.shape, window, lain, call.order is not None)
        nodes = list(ancestors(call.input.grad_fn))
        names = {self._sites[node] for node in nodes if node in self._sites}
        for name in names:
            try:
                block = self._block(ran, call.input, nodes, names)
                self._found[name][tuple(one.place for one in block.maps)] = block
            except _Obstacle as obstacle:
                self._obstacles.setdefault(name, str(obstacle))
        for node in nodes:
            made = self._leaves.get(id(getattr(node, "variable", None)))
            if made is not None:
                self._users.setdefault(made.place, set()).add(ran.place)
        leaf = torch.empty(0, requires_grad=True, device="cpu")
        self._kept.append(leaf)
        self._leaves[id(leaf)] = ran
        return made_by(leaf, call.output.detach())

    def shown_by(self, output: Any) -> set[nn.Parameter]:
        """The weights of the maps whose outputs are in what the model puts out, no other map between."""
        runs = output if isinstance(output, (list, tuple)) else [output]
        tensors = pytree.tree_leaves([dict(run) if isinstance(run, dict) else run for run in runs])
        leaves = [leaf for t in tensors if isinstance(t, Tensor) for leaf in self._leaves_before(t.grad_fn)]
        found = [self._leaves[id(leaf)].found for leaf in leaves]
        return {linear.parameter for linear in found if linear is not None}

    def _block(self, after: _Ran, taken: Tensor, nodes: list[Any], names: set[str]) -> _Found:
        """The maps of a block, whose last one gets `taken`, from these nodes."""
        if after.obstacle:
            raise _Obstacle(after.obstacle)
        if after.found is not None and after.found.index is not None:
            raise _Obstacle(f"{after.found.name} is one of the stacks of experts' weights, to which no biases belong")
        if len(names) > 1:
            raise _Obstacle(f"the map after it takes up {', '.join(sorted(names))} together")
        makers, cut = self._makers(taken)
        inside = {id(node) for site in nodes if site in self._sites for node in self._leaves_before(site)}
        gates = [ran for leaf, ran in makers.items() if leaf in inside]
        ups = [ran for leaf, ran in makers.items() if leaf not in inside]
        if len(gates) != 1 or len(ups) > 1:
            raise _Obstacle(f"{len(makers)} linear maps make its units: expected one, or two where it is gated")
        for maker in makers.values():
            if maker.obstacle:
                raise _Obstacle(maker.obstacle)
            if maker.turned != after.turned:
                raise _Obstacle("one of the maps before and after it is a convolution, and another none")
            times = 1 if not cut or ups else 2
            if (maker.shape[-1], maker.shape.numel()) != (times * taken.shape[-1], times * taken.numel()):
                raise _Obstacle(cut or "the maps before and after it have unlike shapes")
        entered = self._entered[next(iter(names))]
        halves = gates[0].lain.halves(entered) if cut and entered is not None else None
        if cut and halves is None:
            raise _Obstacle(cut)
        return _Found((after, *gates, *ups), halves)

    def _leaves_before(self, node: Any) -> list[Any]:
        found = (getattr(parent, "variable", None) for parent in ancestors(node))
        return [leaf for leaf in found if id(leaf) in self._leaves]

    def _makers(self, taken: Tensor) -> tuple[dict[int, _Ran], str]:
        """The maps whose outputs a tensor is made of, and what cuts them, if anything does, in words."""
        found: dict[int, _Ran] = {}
        cut, whole = "", tuple(range(taken.dim()))
        stack: list[tuple[Any, tuple[int, ...]]] = [(taken.grad_fn, whole)]  # and where its dimensions are there
        seen = set(stack)
        while stack:
            node, order = stack.pop()
            variable = getattr(node, "variable", None)
            operation = "" if variable is not None else operation_of(node)
            if operation in _CUTS:
                cut = cut or f"one map makes its units and others, and is cut in parts by {operation}"
            elif operation == "Permute":
                order = _permuted(order, node._saved_dims)
            elif operation and operation not in _UNITWISE:
                raise _Obstacle(f"{operation} stands between the maps around it")
            elif variable is not None and id(variable) not in self._leaves:
                raise _Obstacle("a parameter that is no linear map is multiplied in")
            if order != whole and (variable is not None or operation in _MOVING):
                raise _Obstacle("Permute stands between the maps around it")
            if variable is not None:
                found[id(variable)] = self._leaves[id(variable)]
                continue
            parents = [(parent, order) for parent, _ in node.next_functions if parent is not None]
            stack += [one for one in parents if one not in seen]
            seen.update(parents)
        return found, cut

    def block(self, name: str) -> FeedForward:
        """That of a site; _Obstacle if there is none that can be told."""
        if name not in self._found:
            raise _Obstacle("no input reached it")
        if name in self._obstacles:
            raise _Obstacle(self._obstacles[name])
        if len(self._found[name]) != 1:
            count = len(self._found[name])
            raise _Obstacle(f"{count} blocks share it" if count else "no linear map takes up its output")
        found = next(iter(self._found[name].values()))
        after, *before = found.maps
        if any(self._users.get(one.place) != {after.place} for one in before):
            raise _Obstacle("what the map before it puts out is used elsewhere too")
        w1, *w3, w2 = (self._own_map(one) for one in (*before, after))
        ran_later = list(self._leaves.values())[self._ran[name] :]
        up_last = bool(w3) and any(one is before[-1] for one in ran_later)
        return FeedForward(name, w2, w1, w3[0] if w3 else None, up_last, found.halves)

    def _own_map(self, ran: _Ran) -> LinearMap:
        """The map, whose weight and bias belong to it alone."""
        found = ran.found
        if found is None or found.index is not None:
            raise _Obstacle("the weight of a map around it is computed, or a slice of a parameter")
        for parameter in (found.parameter, found.bias):
            names = [] if parameter is None else self._parameters.names[parameter]
            if len(names) > 1:
                raise _Obstacle(f"{names[0]} is tied to {names[1]}")
        return found


def _permuted(order: tuple[int, ...], dims: Sequence[int]) -> tuple[int, ...]:
    """Where the dimensions in this order are before they were permuted."""
    if len(order) != len(dims):
        raise _Obstacle("Permute stands between the maps around it")
    signed = [dim - 2**64 if dim >= 2**63 else dim for dim in dims]  # autograd keeps a negative one without its sign
    return tuple(signed[dim] % len(dims) for dim in order)
