"""Where in the network sites can be worked on without running all of it: chains of blocks.

A chain is a run of blocks of which each one's hidden state is the output of the one before. Their inputs are kept on disk,
so that going through a chain costs one pass over the calibration set whatever its length, and memory stays that of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...structure.hooks import Hooks
from ...structure.linear_maps import LinearMap
from .blocks import hidden_in, hidden_of


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
    """What was seen of a module.

    Attributes:
        count: how often it ran.
        first: when it did so first.
        before: the module of the same list that ran before it, where the hidden state that went in is what that one put out.
    """

    count: int = 0
    first: int = 0
    before: str | None = None


def find_chains(
    model: nn.Module, forward: Callable[[], Any], maps: Mapping[str, list[LinearMap]], *others: Callable[[], Any]
) -> list[Chain]:
    """Sort the sites into chains, by watching a forward pass, or several that together reach all sites.

    Chains are in network order. Whether blocks may be run apart from the model is not known yet: see `ChainWalk`.
    """
    modules = dict(model.named_modules())
    around = {site: _ancestors(site, [m.name for m in consumers]) for site, consumers in maps.items()}
    lists = {parent for names in around.values() for name in names if _in_list(modules, parent := _parent(name), name)}
    children = {parent: [_joined(parent, child) for child, _ in modules[parent].named_children()] for parent in lists}
    watched = {name for names in (*around.values(), *children.values()) for name in names}
    listed = {child: parent for parent, names in children.items() for child in names}
    calls = _watch({name: modules[name] for name in watched}, listed, (forward, *others))

    runs: dict[str, list[str]] = {}  # block → the blocks of its run
    for names in children.values():
        for run in _runs(sorted((c for c in names if calls[c].count == 1), key=lambda c: calls[c].first), calls):
            runs.update(dict.fromkeys(run, run))

    pooled: dict[str, list[str]] = {}  # block that runs several times → its sites
    home: dict[str, str] = {}  # site → its block
    for site, names in around.items():
        block = _home(names, runs, around.values())
        if not block and calls[names[0]].count > 1:
            pooled.setdefault(names[0], []).append(site)
        else:
            home[site] = block
    chains = [Chain([block], [sites], pooled=True) for block, sites in pooled.items()]
    for blocks in {tuple(runs.get(block, [block])) for block in home.values()}:
        chains.append(_trimmed(blocks, [[site for site in maps if home.get(site) == block] for block in blocks]))
    order = {site: index for index, site in enumerate(maps)}
    return sorted(chains, key=lambda chain: min(order[site] for sites in chain.sites for site in sites))


def _home(names: Sequence[str], runs: Mapping[str, list[str]], around: Iterable[Sequence[str]]) -> str:
    """Of the modules around a site, the one that is its block; "", the model, if none is part of a run."""
    chained = [name for name in names if name in runs]
    # the level whose run holds the most sites: few passes over the whole network; the innermost of equals
    return max(chained, key=lambda name: sum(bool(set(runs[name]) & set(others)) for others in around), default="")


def _trimmed(blocks: Sequence[str], sites: list[list[str]]) -> Chain:
    """The chain from the first block with sites to the last."""
    occupied = [index for index, found in enumerate(sites) if found]
    span = slice(occupied[0], occupied[-1] + 1)
    return Chain(list(blocks[span]), sites[span])


def _ancestors(site: str, parameters: Sequence[str]) -> list[str]:
    """The modules that hold both the site and the parameters, innermost first; the last one is the model, ""."""
    parts = site.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]
    return [name for name in names if all(not name or p.startswith(name + ".") for p in parameters)]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _joined(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def _in_list(modules: dict[str, nn.Module], parent: str, name: str) -> bool:
    return bool(name) and isinstance(modules[parent], (nn.ModuleList, nn.Sequential))


def _watch(
    modules: dict[str, nn.Module], listed: Mapping[str, str], forwards: Iterable[Callable[[], Any]]
) -> dict[str, _Calls]:
    """What is seen of the modules, each in the first pass that reaches it; counts are the largest of a pass.

    Args:
        listed: module → the list that it is in. Of each list one hidden state is kept at a time.
    """
    calls = {name: _Calls() for name in modules}
    clock = index = 0
    now: dict[str, int] = {}  # calls in this pass
    first_pass: dict[str, int] = {}
    left: dict[str, tuple[str, Tensor]] = {}  # list → the module of it that ended last, and what it put out

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal clock
        clock += 1
        now[name] = now.get(name, 0) + 1
        seen = calls[name]
        seen.count = max(seen.count, now[name])
        if name not in first_pass:
            first_pass[name] = index
            seen.first = clock
            last, put_out = left.pop(listed[name], (None, None)) if name in listed else (None, None)
            hidden = hidden_in(args, kwargs)
            if hidden is not None and put_out is not None and hidden.shape == put_out.shape and torch.equal(put_out, hidden):
                seen.before = last

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        put_out = hidden_of(output) if name in listed and first_pass[name] == index else None
        if put_out is not None:
            left[listed[name]] = name, put_out.clone()  # the next block may write into it

    with Hooks() as hooks:
        for name, module in modules.items():
            hooks.before(module, partial(before, name))
            hooks.after(module, partial(after, name))
        for run, forward in enumerate(forwards):
            index = run
            now.clear()
            left.clear()
            forward()
    return calls


def _runs(children: list[str], calls: dict[str, _Calls]) -> list[list[str]]:
    runs: list[list[str]] = []
    for child in children:
        if runs and calls[child].before == runs[-1][-1]:
            runs[-1].append(child)
        else:
            runs.append([child])
    return runs
