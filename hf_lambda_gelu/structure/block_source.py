"""Weights that are in memory only while their block runs: the hooks that bring them, wherever they come from.

Between its block's runs a parameter rests: its data is a stand-in of its shape, which takes up no memory of its own. When a
block is entered its weights are brought whole onto the device, and when it is left they rest again. Where they come from is
said by the class: files (`file_source`), or the shards of several processes (`shard_source`). All of it is derived.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import without_torch_function

_SOURCE = "_block_source"


class BlockSource(ABC):
    """Brings the weights of a model's blocks in and lets them go.

    Attributes:
        device: where the model runs.
        blocks: the modules whose weights come and go, with these.
        generation: goes up whenever weights come or go, and with them their addresses in memory.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.blocks: dict[nn.Module, list[nn.Parameter]] = {}
        self.generation = 0
        self._streamed: set[nn.Parameter] = set()
        self._entered: dict[nn.Module, list[list[tuple[nn.Parameter, Tensor]]]] = {}
        self._skipped: frozenset[nn.Module] = frozenset()

    # ------------------------------------------------------------------------------------------------- what rests

    @abstractmethod
    def rests(self, data: Tensor) -> bool:
        """Whether this stands in for a weight that is elsewhere."""

    @abstractmethod
    def load_all(self, resting: Sequence[Tensor]) -> list[Tensor]:
        """Copies of what rests, whole and on the device."""

    @abstractmethod
    def prepare(self) -> None:
        """Fill `blocks`, and bring in what does not come and go."""

    def came_in(self, parameters: Sequence[nn.Parameter]) -> None:  # noqa: B027
        """Called when these were brought in together, and are in memory: others will be wanted next."""

    def streams(self, parameter: nn.Parameter) -> bool:
        """Whether it comes and goes with a block; what lies outside of blocks stays."""
        return parameter in self._streamed

    # ------------------------------------------------------------------------------------------------ what comes in

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block, the model runs: weights come and go with its blocks, all else is on the device."""
        handles = []
        try:
            vars(self.model)[_SOURCE] = self
            self.prepare()
            self._streamed = {p for weights in self.blocks.values() for p in weights if self.rests(p.data)}
            for block in self.blocks:
                handles.append(block.register_forward_pre_hook(self._enter, prepend=True))
                handles.append(block.register_forward_hook(self._leave, prepend=True, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block, stack in self._entered.items():
                while stack:
                    self._leave(block)
            vars(self.model).pop(_SOURCE, None)

    def _enter(self, block: nn.Module, *given: Any) -> None:
        with torch.no_grad(), without_torch_function():
            wanted = () if block in self._skipped else self.blocks[block]
            brought = [(p, p.data) for p in wanted if self.rests(p.data)]
            for (parameter, _), data in zip(brought, self.load_all([rest for _, rest in brought]), strict=True):
                parameter.data = data
            self._entered.setdefault(block, []).append(brought)
            self.generation += bool(brought)
            self.came_in([parameter for parameter, _ in brought])

    def _leave(self, block: nn.Module, *given: Any) -> None:
        with torch.no_grad(), without_torch_function():
            stack = self._entered.get(block)
            brought = stack.pop() if stack else []
            for parameter, resting in brought:
                parameter.data = resting
            self.generation += bool(brought)

    @contextmanager
    def holding(self, parameters: Iterable[nn.Parameter]) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Within the block, these weights stay on the device: {parameter: where it rests} of those that rested before."""
        held = {p: p.data for p in parameters if self.rests(p.data)}
        try:
            for parameter, data in zip(held, self.load_all(list(held.values())), strict=True):
                parameter.data = data
            self.came_in(list(held))
            self.generation += 1
            yield held
        finally:
            for parameter, resting in held.items():
                if not self.rests(parameter.data):
                    parameter.data = resting
            self.generation += 1


def source_of(model: nn.Module) -> BlockSource | None:
    """What brings the weights of this model's blocks; None if all of them are in memory."""
    found: BlockSource | None = vars(model).get(_SOURCE)
    return found


@contextmanager
def skipping(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, these blocks are called and do not run: nobody reads their weights."""
    source = source_of(model)
    if source is None:
        yield
        return
    before = source._skipped
    try:
        source._skipped = before | frozenset(blocks)
        yield
    finally:
        source._skipped = before


def device_of(model: nn.Module) -> torch.device:
    """Where the model runs: its first parameter's device, or that which weights are brought to."""
    source = source_of(model)
    if source is not None:
        return source.device
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that lists of modules hold and that can be called: a network's layers."""
    found: dict[nn.Module, None] = {}
    stack: list[nn.Module] = [model]
    while stack:
        module = stack.pop()
        for child in module.children():
            listed = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and module is not model
            container = isinstance(child, (nn.ModuleList, nn.ModuleDict))
            if listed and not container and any(True for _ in child.parameters()):
                found[child] = None
            else:
                stack.append(child)
    return list(found)
