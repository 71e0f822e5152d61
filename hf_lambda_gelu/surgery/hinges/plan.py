"""Which layers can hold several ReLUs per gate, and how wide they will be: found, or refused, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...activation.module import LambdaGELU
from ...structure.feed_forward import FeedForward
from ...structure.feed_forward_search import feed_forwards
from ...structure.hard_coded import hard_coded_sites
from ...structure.hooks import Hooks
from ...structure.linear_calls import LinearCall
from ...structure.linear_maps import LinearMap, Parameters, watch_linears
from ...structure.modules import joined, transformers_parts
from ...structure.usable import check_base_alone
from ...structure.widths import Width, following, rebuild, widths
from .biases import unbiased
from .wanted import Wanted

# of what a map gets, relative to its largest element: products are rounded once each
_SAME = 1e-3


class HingeError(ValueError):
    """The model cannot hold several ReLUs per gate. Nothing was changed."""


@dataclass
class PlannedSite:
    """One site whose layer will be wider.

    Attributes:
        block: the maps around it.
        units: how many it will have.
        numbers: (module, attribute, number now, number then) of what its modules hold of the width.
    """

    block: FeedForward
    units: int
    numbers: list[tuple[nn.Module, str, int, int]] = field(default_factory=list)

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        return (*self.block.before, self.block.after)


@dataclass
class Plan:
    """What will be wider.

    Attributes:
        sites: by name.
        widths: (prefix of the part, part, width, the config's number then).
        single: site → why it keeps one ReLU per neuron.
    """

    sites: dict[str, PlannedSite] = field(default_factory=dict)
    widths: list[tuple[str, PreTrainedModel, Width, int | float]] = field(default_factory=list)
    single: dict[str, str] = field(default_factory=dict)

    @property
    def wanting(self) -> tuple[list[LinearMap], list[LinearMap]]:
        """The maps around the sites, and the gates among them that lack biases; none where no gate does."""
        gates = [site.block.gate for site in self.sites.values() if site.block.gate.bias is None]
        return [m for site in self.sites.values() for m in site.maps] if gates else [], gates


def plan_hinges(model: nn.Module, sites: Mapping[str, LambdaGELU], forward: Callable[[], Any], wanted: Wanted) -> Plan:
    """Which layers will be wider; `forward` runs the model, with its gates as ReLU, on what reaches all sites.

    Raises:
        HingeError: a layer whose width cannot be set, or none that can be wider.
    """
    check_base_alone(model, "hinges=… or budget=…", HingeError)
    blocks = feed_forwards(model, sites, forward)
    plan = Plan(single=dict(blocks.obstacles))
    found = dict(blocks.found)
    kept = dict.fromkeys(blocks.shown, "the model puts out what the map before it does")
    kept |= dict.fromkeys(hard_coded_sites(model), "its activation is hard-coded and stays smooth")
    for name, reason in kept.items():
        if found.pop(name, None) is not None:
            plan.single[name] = reason
    _check_formula(model, {name: sites[name] for name in found}, found, forward)
    try:
        _add_all(plan, model, found, wanted)
    except HingeError as error:  # a missing bias is what is said first: nothing can be done about it
        raise HingeError(unbiased(model, {name: block.gate for name, block in found.items()}) or str(error)) from error
    if not plan.sites:
        name, reason = next(iter(plan.single.items()))
        raise HingeError(
            f"no layer can hold several ReLUs per gate ({name}: {reason}). hinges=1 is one ReLU per neuron, in "
            "the layers as they are"
        )
    _add_numbers(model, plan)
    plan.sites = {name: plan.sites[name] for name in sites if name in plan.sites}
    return plan


def check_biases(model: nn.Module, plan: Plan) -> None:
    """HingeError where a gate has no bias, and the config cannot give it one."""
    reason = unbiased(model, {name: site.block.gate for name, site in plan.sites.items()})
    if reason is not None:
        raise HingeError(reason)


def _add_all(plan: Plan, model: nn.Module, found: Mapping[str, FeedForward], wanted: Wanted) -> None:
    """The sites of these blocks, by the numbers in the configs that are their widths."""
    inside: set[str] = set()
    for prefix, part in transformers_parts(model).items():
        here = {name: block for name, block in found.items() if not prefix or name.startswith(f"{prefix}.")}
        inside |= set(here)
        for width in widths(part, here, ratios=True):
            _add(plan, prefix, part, width, here, wanted)
    for name, block in found.items():
        if name not in inside:
            plan.sites[name] = PlannedSite(block, round(wanted.factor * block.units))
        elif name not in plan.sites:
            raise HingeError(f"{name} has {block.units} units, and no number in the config is its width")


def _add(
    plan: Plan, prefix: str, part: PreTrainedModel, width: Width, blocks: Mapping[str, FeedForward], wanted: Wanted
) -> None:
    """The sites of one number in the config, with the units that stock transformers will build."""
    if width.obstacle:
        raise HingeError(f"{width.sites[0]}: {width.obstacle}")
    exact = wanted.factor * width.value
    number: int | float = round(exact) if isinstance(width.value, int) else exact
    if width.ratio and number != exact:
        low, high = int(exact) / width.value, (int(exact) + 1) / width.value
        raise HingeError(
            f"config.{joined(prefix, width.path)} = {width.value} takes whole numbers alone, so that a budget of "
            f"{wanted.factor:g} cannot be said: {low:g} and {high:g} can"
        )
    then = rebuild(part, width.path, number)
    shapes = {} if then is None else {name: p.shape for name, p in then.named_parameters()}
    names = {parameter: name for name, parameter in part.named_parameters()}
    for name in width.sites:
        block, sides = blocks[name], blocks[name].parameters
        shape = shapes.get(names[sides[0].parameter])
        units = 0 if shape is None else shape[sides[0].dim]
        if any(shapes.get(names[side.parameter]) != side.shape(units) for side in sides):
            raise HingeError(f"{type(part).__name__} cannot be built with config.{width.path} = {number}")
        if not wanted.allows(block.units, units):
            raise HingeError(
                f"{name}: with config.{width.path} = {number:g} {type(part).__name__} has {units} units in the place of "
                f"{block.units}, as it rounds, and {wanted.factor:g} times as many were to be: pass another number of "
                "hinges, or with data a budget"
            )
        plan.sites[name] = PlannedSite(block, units)
    plan.widths.append((prefix, part, width, number))


def _add_numbers(model: nn.Module, plan: Plan) -> None:
    """What modules of one site hold of its width: it follows the weights, as GPT-2's Conv1D reads it in forward."""
    for site in plan.sites.values():
        for name, attributes, times in site.block.attributes:
            module, now, then = model.get_submodule(name), times * site.block.units, times * site.units
            numbers = ((module, attribute, now, then) for attribute in attributes)
            site.numbers += [number for number in numbers if getattr(module, number[1], None) == now]
    for prefix, part, width, number in plan.widths:
        wider = rebuild(part, width.path, number)
        for name, attribute, now, then in () if wider is None else following(part, wider):
            module, path = part.get_submodule(name), joined(prefix, name)
            around = [s for n, s in plan.sites.items() if n.startswith(f"{path}.")]
            known = any(m is module and a == attribute for s in plan.sites.values() for m, a, *_ in s.numbers)
            if len(around) == 1 and not known:
                around[0].numbers.append((module, attribute, now, then))


def _check_formula(
    model: nn.Module, sites: Mapping[str, LambdaGELU], blocks: Mapping[str, FeedForward], run: Callable[[], Any]
) -> None:
    """HingeError unless each map after a site gets relu(z) or relu(z) · u, z and u as the maps before it put them out."""
    outputs: dict[nn.Parameter, Tensor] = {}  # of a block, until its last map runs
    entered: set[str] = set()
    wrong: dict[str, str] = {}
    parameters = Parameters(model)
    makers = {made.parameter for block in blocks.values() for made in block.before}
    last = {block.after.parameter: name for name, block in blocks.items()}

    def on_linear(call: LinearCall) -> None:
        found = parameters.find(call)
        name = None if found is None else last.get(found.parameter)
        if name is not None and name in entered:
            block = blocks[name]
            entered.discard(name)
            z, u = block.made([outputs.pop(one.parameter) for one in block.before])
            wanted = z.clamp(min=0.0) if u is None else z.clamp(min=0.0) * u
            if not _alike(wanted, call.input):
                wrong[name] = "what the map after it gets is not its output, or that times another map's"
        if found is not None and found.parameter in makers:
            outputs[found.parameter] = call.output.detach()

    def on_site(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        entered.add(name)
        block = blocks[name]
        made = outputs.get(block.gate.parameter)
        gate = None if made is None else made if block.halves is None else block.halves.parts(made)[0]
        if gate is None or not _alike(gate, args[0]):
            wrong[name] = "it does not get what the map before it puts out"

    with torch.no_grad(), Hooks() as hooks, watch_linears(on_linear):
        for name, site in sites.items():
            hooks.after(site, partial(on_site, name))
        run()
    for name, reason in wrong.items():
        raise HingeError(f"{name}: {reason}, so that hinges cannot be put into the maps around it. Use hinges=1")


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether they hold the same, as rows of features; a convolution has its channels in dimension 1, and last in a call."""
    if one.numel() != other.numel():
        return False
    return _near(one, other.reshape(one.shape)) or (other.dim() > 2 and _near(one, other.movedim(1, -1).reshape(one.shape)))


def _near(one: Tensor, other: Tensor) -> bool:
    one, other = one.double(), other.double()
    return not other.numel() or bool((one - other).abs().max() <= _SAME * float(other.abs().max()))
