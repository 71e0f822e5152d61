"""Finds the linear maps that consume each activation's output: runs the model and follows autograd's graph."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import pytree
from ..activation.module import hardness_sites
from .block_source import source_of
from .computed_weights import WhyNoParameter
from .hooks import Hooks
from .linear_calls import Key, LinearCall
from .linear_maps import LinearMap, Parameters, all_parts, watch_linears
from .unread_maps import Uses, differentiable, origins


@dataclass
class Trace:
    """What one forward pass showed.

    Attributes:
        maps: site name → the linear maps that consume its output (several for experts); absent if it cannot be refit.
        obstacles: site name → why its output cannot be made up for.
        order: site names in the order in which they are called.
        batches: the batches that were run, by their place, until every site was reached or none was left.
        leading: site name → the leading shape (all but the features) of its output; of several calls, as `with_more` has it.
        rows: site name → how many rows the maps after it got, on the first batch that reached it.
    """

    maps: dict[str, list[LinearMap]] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    leading: dict[str, Sequence[int]] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)


def trace(model: nn.Module, forward: Callable[[], Any], *others: Callable[[], Any]) -> Trace:
    """Runs `forward` and finds, for every λ-GELU of `model`, the linear maps that consume its output.

    What the first batch does not reach (an expert to which it routes nothing, a tower without inputs) others may: they are
    run until every site was reached. The outputs of sites and of linear maps are cut off from what made them, so that
    following the graph back from a map's input ends at the sites and maps that it came from.

    Args:
        forward, others: the model's forward on one batch after the other.
    """
    sites: dict[nn.Module, str] = {site: name for name, site in hardness_sites(model).items()}
    parameters = Parameters(model)
    result, seen = Trace(), _Seen()
    for index, run in enumerate((forward, *others)):
        one = _seen(model, sites, parameters, run)
        if index and one.reached.keys() <= seen.reached.keys():
            continue
        result.batches.append(index)
        result.order = _merged(result.order, list(one.reached))
        seen.add(one)
        if len(seen.reached) == len(sites):
            break
    result.leading, result.rows = seen.leading, seen.rows
    return _read(parameters, sites.values(), seen, result)


def with_more(before: Sequence[int] | None, leading: Sequence[int]) -> Sequence[int]:
    """The leading shape of what several calls got, joined along the second dimension, as chunks are."""
    if before is None or len(before) < 2 or len(leading) < 2:
        return leading if before is None else before
    return (before[0], before[1] + leading[1], *before[2:])


def _merged(order: list[str], more: list[str]) -> list[str]:
    """The order with the sites of another pass, each after the one that came before it there."""
    merged = list(order)
    for before, site in zip([None, *more], more, strict=False):
        if site not in merged:
            merged.insert(0 if before is None else merged.index(before) + 1, site)
    return merged


@dataclass
class _Seen:
    """What forward passes showed.

    Attributes:
        reached: site → the linear maps that took its output up, by weight, in the order in which sites were called; None
            where it is no parameter's.
        leading, rows: as in `Trace`.
        computed: site → why a map's weight or bias is no parameter.
        unread: site → an operation with a weight that takes its output up and is no map that can be refit.
        elsewhere: parameter → what else it is used for.
        ways: a weight → whether it is used as (d, k), as (k, d), or both.
    """

    reached: dict[str, dict[Key, LinearMap | None]] = field(default_factory=dict)
    leading: dict[str, Sequence[int]] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    computed: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[nn.Parameter, str] = field(default_factory=dict)
    ways: dict[Key, set[bool]] = field(default_factory=dict)

    def add(self, other: _Seen) -> None:
        """Take in what another pass showed."""
        for site, taken in other.reached.items():
            self.reached.setdefault(site, {}).update(taken)
        for key, both in other.ways.items():
            self.ways.setdefault(key, set()).update(both)
        self.leading, self.rows = other.leading | self.leading, Counter({**other.rows, **self.rows})
        self.computed |= other.computed
        self.unread |= other.unread
        self.elsewhere |= other.elsewhere


def _seen(model: nn.Module, sites: Mapping[nn.Module, str], parameters: Parameters, forward: Callable[[], Any]) -> _Seen:
    """What one forward pass shows."""
    leaves: dict[int, str | None] = {}  # id of a leaf → the site that put it out, None for a linear map
    kept: list[Tensor] = []
    uses, seen, why = Uses(parameters.names, source_of(model)), _Seen(), WhyNoParameter(model)

    def leaf(output: Tensor, site: str | None) -> Tensor | None:
        if not output.is_floating_point():
            return None
        made = torch.empty(0, requires_grad=True, device="cpu")
        kept.append(made)
        leaves[id(made)] = site
        return made_by(made, output.detach())

    def on_site(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        seen.reached.setdefault(sites[module], {})
        seen.leading[sites[module]] = with_more(seen.leading.get(sites[module]), output.shape[:-1])
        return leaf(output, sites[module])

    def sources(tensor: Tensor) -> set[str]:
        found = origins(tensor, leaves, parameters.names.keys())
        seen.unread.update(found.unread)
        return found.sites

    def on_linear(call: LinearCall) -> Tensor | None:
        place = parameters.place(call)
        seen.ways.setdefault(place, set()).add(call.lies_transposed)
        for site in sources(call.input):
            seen.reached[site][place] = found = parameters.find(call)
            if found is None:
                seen.computed[site] = why((call.weight, call.bias))
            seen.rows[site] += math.prod(call.leading)
        return leaf(call.output, None)

    with Hooks() as hooks:
        for site in sites:
            hooks.after(site, on_site)
        with torch.enable_grad(), differentiable(model), watch_linears(on_linear, uses), graph_alone():
            output = forward()
    for tensor in pytree.tree_leaves(dict(output) if isinstance(output, dict) else output):
        if isinstance(tensor, Tensor):
            sources(tensor)
    for name, tensors in uses.detached:
        seen.unread.update({site: name for tensor in tensors for site in sources(tensor)})
    seen.elsewhere = {p: f"{sorted(names)[0]} uses it too" for p, names in uses.operations.items()}
    return seen


def made_by(leaf: Tensor, tensor: Tensor) -> Tensor:
    """Lets a tensor have come from a leaf, without a copy; the model may change it in place, which a leaf does not allow."""
    made: Tensor = _MadeBy.apply(leaf, tensor)  # type: ignore[no-untyped-call]
    return made


class _MadeBy(torch.autograd.Function):
    """See `made_by`."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, tensor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("a graph that was made to be followed has no backward pass")


# what `operation_of` calls it
MADE_BY = "_MadeBy"


def graph_alone() -> AbstractContextManager[None]:
    """Within the block, autograd's graph keeps none of the numbers that a backward pass would need."""

    def forget(tensor: Any) -> Any:
        return None

    hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(forget, forget)
    return hooks


def ancestors(start: Any) -> Iterator[Any]:
    """The nodes of autograd's graph from `start`, a tensor's `grad_fn`, back, each once; none where it is None."""
    seen: set[Any] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [parent for parent, _ in node.next_functions]


def _read(parameters: Parameters, names: Iterable[str], seen: _Seen, result: Trace) -> Trace:
    consumed: dict[str, set[str]] = {}  # parameter → the sites whose output it consumes
    for site, found in seen.reached.items():
        held = {m.name for m in found.values() if m is not None}
        if site in seen.unread:
            result.obstacles[site] = f"it feeds {seen.unread[site]}, which takes a weight in a way that cannot be refit"
        elif not found:
            result.obstacles[site] = "no linear map takes up its output"
        elif any(m is None for m in found.values()):
            result.obstacles[site] = seen.computed[site]
        elif len(held) > 1:
            result.obstacles[site] = f"it feeds several linear maps: {', '.join(sorted(held))}"
        elif shared := parameters.other_names(next(iter(held))):
            result.obstacles[site] = f"the weight that it feeds is shared with {shared[0]}"
        elif any(len(seen.ways[key]) > 1 for key in found):
            result.obstacles[site] = f"it feeds {next(iter(held))}, which is used as its transpose too"
        elif other := next(
            (seen.elsewhere[m.parameter] for m in found.values() if m is not None and m.parameter in seen.elsewhere), ""
        ):
            result.obstacles[site] = f"it feeds {next(iter(held))}; {other}"
        else:
            result.maps[site] = all_parts([m for m in found.values() if m is not None])
            consumed.setdefault(next(iter(held)), set()).add(site)
    for name, several in consumed.items():
        if len(several) > 1:
            for site in several:
                del result.maps[site]
                result.obstacles[site] = f"{name} takes up {', '.join(sorted(several - {site}))} too"
    for name in names:
        if name not in seen.reached:
            result.obstacles[name] = "the calibration batches never reach it"
    return result
