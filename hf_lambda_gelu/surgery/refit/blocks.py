"""Where in the network sites can be worked on without running all of it: blocks, and chains of blocks.

A chain is a run of blocks of which each one's hidden state is the output of the one before. Their inputs are kept on disk,
so that going through a chain costs one pass over the calibration set whatever its length, and memory stays that of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...structure.linear_maps import LinearMap

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Chain:
    """Blocks in the order in which they run, and the sites in each.

    Attributes:
        pooled: one block that runs several times in a forward pass, with the same weights (ALBERT's layer).
    """

    blocks: list[str]
    sites: list[list[str]]
    pooled: bool = False

    def split(self) -> list[Chain]:
        """A chain for each block that has sites."""
        return [Chain([b], [s]) for b, s in zip(self.blocks, self.sites, strict=True) if s]


@dataclass
class _Calls:
    """What was seen of a module: how often it ran, when first, and its hidden state going in and coming out."""

    count: int = 0
    first: int = 0
    entered: Tensor | None = None
    left: Tensor | None = None


def plan(model: nn.Module, forward: Callable[[], Any], maps: dict[str, list[LinearMap]]) -> list[Chain]:
    """Sort the sites into chains, by watching one forward pass. Chains are in network order."""
    modules = dict(model.named_modules())
    around = {site: _ancestors(site, [m.name for m in taken]) for site, taken in maps.items()}
    lists = {parent for names in around.values() for name in names if _in_list(modules, parent := _parent(name), name)}
    watched = {name for names in around.values() for name in names}
    watched |= {
        f"{parent}.{child}" if parent else child for parent in lists for child, _ in modules[parent].named_children()
    }
    calls = _watch({name: modules[name] for name in watched}, forward)

    runs: dict[str, list[str]] = {}  # block → the blocks of its run
    for parent in lists:
        children = [f"{parent}.{child}" if parent else child for child, _ in modules[parent].named_children()]
        for run in _runs(sorted((c for c in children if calls[c].count == 1), key=lambda c: calls[c].first), calls):
            runs.update(dict.fromkeys(run, run))

    home: dict[str, str] = {}
    pooled: dict[str, list[str]] = {}
    for site, names in around.items():
        if calls[names[0]].count > 1:
            pooled.setdefault(names[0], []).append(site)
            continue

        def covered(name: str) -> int:
            return sum(bool(set(runs[name]) & set(others)) for others in around.values())

        chained = [name for name in names if name in runs]
        # the level whose run holds the most sites: few passes over the whole network; the innermost of equals
        home[site] = max(chained, key=covered) if chained else ""

    chains: list[Chain] = [Chain([block], [sites], pooled=True) for block, sites in pooled.items()]
    for blocks in {tuple(runs.get(block, [block])) for block in home.values()}:
        sites = [[site for site in maps if home.get(site) == block] for block in blocks]
        occupied = [index for index, found in enumerate(sites) if found]
        span = slice(occupied[0], occupied[-1] + 1)
        chains.append(Chain(list(blocks[span]), sites[span]))
    order = {site: index for index, site in enumerate(maps)}
    return sorted(chains, key=lambda chain: min(order[site] for sites in chain.sites for site in sites))


def _ancestors(site: str, parameters: Sequence[str]) -> list[str]:
    """The modules that hold both the site and the parameters, innermost first; the last one is the model, ""."""
    parts = site.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]
    return [name for name in names if all(not name or p.startswith(name + ".") for p in parameters)]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _in_list(modules: dict[str, nn.Module], parent: str, name: str) -> bool:
    return bool(name) and isinstance(modules[parent], (nn.ModuleList, nn.Sequential))


def _watch(modules: dict[str, nn.Module], forward: Callable[[], Any]) -> dict[str, _Calls]:
    calls = {name: _Calls() for name in modules}
    clock = 0

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal clock
            clock += 1
            seen = calls[name]
            seen.count += 1
            if seen.count == 1:
                place = hidden_place(args, kwargs)
                seen.first, seen.entered = clock, None if place is None else _at(args, kwargs, place)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name].left = hidden_of(output)

        return hook

    handles = [module.register_forward_pre_hook(before(name), with_kwargs=True) for name, module in modules.items()]
    handles += [module.register_forward_hook(after(name)) for name, module in modules.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _runs(children: list[str], calls: dict[str, _Calls]) -> list[list[str]]:
    runs: list[list[str]] = []
    for child in children:
        before = calls[runs[-1][-1]].left if runs else None
        entered = calls[child].entered
        linked = before is not None and entered is not None and before.shape == entered.shape
        if linked and torch.equal(before, entered):
            runs[-1].append(child)
        else:
            runs.append([child])
    return runs


def hidden_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where a block's hidden state is among its arguments: the first floating point tensor."""
    for place, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return place
    return None


def hidden_of(output: Any) -> Tensor | None:
    """A block's output, or the first of several."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def _at(args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str) -> Any:
    return args[place] if isinstance(place, int) else kwargs[place]


class _Hidden:
    """Stands where the hidden state goes."""


_HIDDEN = _Hidden()


def without_hidden(arguments: Arguments) -> tuple[Arguments, Tensor]:
    """The arguments with a mark in place of the hidden state, and the hidden state."""
    args, kwargs = list(arguments[0]), dict(arguments[1])
    place = hidden_place(*arguments)
    if place is None:
        raise ValueError("a block without a floating point input has no hidden state")
    owner: Any = args if isinstance(place, int) else kwargs
    hidden, owner[place] = owner[place], _HIDDEN
    return (tuple(args), kwargs), hidden


def with_hidden(arguments: Arguments, hidden: Tensor) -> Arguments:
    """The arguments with `hidden` where the mark is."""
    args, kwargs = arguments
    return tuple(hidden if a is _HIDDEN else a for a in args), {k: hidden if v is _HIDDEN else v for k, v in kwargs.items()}


class _Reached(Exception):
    """Ends a forward pass early; never leaves this module."""


def capture(model: nn.Module, chain: Chain, forward: Callable[[], Any]) -> list[Arguments]:
    """The arguments of each call of the chain's blocks. The pass ends when they are known."""
    seen: list[Arguments] = []
    modules = dict(model.named_modules())

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, dict(kwargs)))
        if len(seen) == len(chain.blocks) and not chain.pooled:
            raise _Reached

    handles = [modules[name].register_forward_pre_hook(hook, with_kwargs=True) for name in chain.blocks]
    try:
        forward()
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen
