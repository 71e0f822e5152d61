"""Finds the linear maps that consume each activation's output: runs the model and follows autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..activation.module import hardness_sites
from .computed_weights import why_no_parameter
from .hooks import Hooks
from .linear_maps import LinearCall, LinearMap, Parameters, all_experts, watch_linears


@dataclass
class Trace:
    """What one forward pass showed.

    Attributes:
        maps: site name → the linear maps that consume its output (several for experts); absent if it cannot be refit.
        obstacles: site name → why its output cannot be made up for.
        order: site names in the order in which they were first called.
    """

    maps: dict[str, list[LinearMap]] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


def trace(model: nn.Module, forward: Callable[[], Any]) -> Trace:
    """Runs `forward` and finds, for every λ-GELU of `model`, the linear maps that consume its output.

    The outputs of sites and of linear maps are cut off from what made them, so that following the graph back from a map's
    input ends at the sites and maps that it came from.
    """
    sites: dict[nn.Module, str] = {site: name for name, site in hardness_sites(model).items()}
    leaves: dict[int, str | None] = {}  # id of a leaf → the site that put it out, None for a linear map
    kept: list[Tensor] = []
    reached: dict[str, list[LinearCall]] = {}

    def leaf(output: Tensor, site: str | None) -> Tensor | None:
        if not output.is_floating_point():
            return None
        made = output.detach().requires_grad_()
        kept.append(made)
        leaves[id(made)] = site
        return made.clone()  # the model may change it in place, which a leaf does not allow

    def on_site(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        reached.setdefault(sites[module], [])
        return leaf(output, sites[module])

    def on_linear(call: LinearCall) -> Tensor | None:
        for site in _sources(call.input, leaves):
            reached[site].append(call)
        return leaf(call.output, None)

    with Hooks() as hooks:
        for site in sites:
            hooks.after(site, on_site)
        with torch.enable_grad(), watch_linears(on_linear):
            forward()
    return _read(model, sites.values(), reached)


def ancestors(tensor: Tensor) -> Iterator[Any]:
    """The nodes of autograd's graph that `tensor` comes from, each once."""
    seen: set[Any] = set()
    stack = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [parent for parent, _ in node.next_functions]


def _sources(tensor: Tensor, leaves: dict[int, str | None]) -> set[str]:
    variables = (getattr(node, "variable", None) for node in ancestors(tensor))
    sites = (leaves.get(id(variable)) for variable in variables if variable is not None)
    return {site for site in sites if site is not None}


def _read(model: nn.Module, names: Iterable[str], reached: Mapping[str, list[LinearCall]]) -> Trace:
    result = Trace(order=list(reached))
    parameters = Parameters(model)
    consumed: dict[str, set[str]] = {}  # parameter → the sites whose output it consumes
    for site, calls in reached.items():
        unique = {call.key: call for call in calls}
        found = {key: parameters.find(call) for key, call in unique.items()}
        obstacles = [call.obstacle for call in unique.values() if call.obstacle]
        held = {m.name for m in found.values() if m is not None}
        if not unique:
            result.obstacles[site] = "no linear map takes up its output"
        elif obstacles:
            result.obstacles[site] = obstacles[0]
        elif any(m is None for m in found.values()):
            result.obstacles[site] = why_no_parameter(model)
        elif len(held) > 1:
            result.obstacles[site] = f"it feeds several linear maps: {', '.join(sorted(held))}"
        elif shared := parameters.other_names(next(iter(held))):
            result.obstacles[site] = f"the weight that it feeds is shared with {shared[0]}"
        else:
            result.maps[site] = all_experts([m for m in found.values() if m is not None])
            consumed.setdefault(next(iter(held)), set()).add(site)
    for name, several in consumed.items():
        if len(several) > 1:
            for site in several:
                del result.maps[site]
                result.obstacles[site] = f"{name} takes up {', '.join(sorted(several - {site}))} too"
    for name in names:
        if name not in reached:
            result.obstacles[name] = "the calibration batches never reach it"
    return result
