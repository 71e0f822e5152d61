"""Linear maps: watched in a forward pass, and as parameters that can be refit.

Nothing is assumed of the architecture. Linear maps are seen where torch computes them (see `linear_calls`), so that experts,
whose weights are slices of one parameter, are seen like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._compat import without_torch_function
from .block_source import source_of
from .linear_calls import Key, LinearCall, is_read, key_of, read_operation
from .modules import transformers_parts


class watch_linears(TorchFunctionMode):
    """Calls `watcher` with each linear map that is computed; what it returns, if anything, takes the output's place.

    One operation may be several maps: a product with a stack is one for each expert.

    Args:
        unread: called with (function, output, args, kwargs) of every other operation, where it is given.
    """

    def __init__(
        self,
        watcher: Callable[[LinearCall], Tensor | None],
        unread: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], None] | None = None,
    ) -> None:
        super().__init__()
        self.watcher, self.unread = watcher, unread

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.unread is None and not is_read(func):
            return output
        with without_torch_function():
            read = read_operation(func, output, args, kwargs)
            if read is None:
                if self.unread is not None:
                    self.unread(func, output, args, kwargs)
                return output
            new = [self.watcher(call) for call in read.calls]
            if all(tensor is None for tensor in new):
                return output
            return read.together([c.output if n is None else n for n, c in zip(new, read.calls, strict=True)])


@dataclass
class LinearMap:
    """A linear map that can be refit: its weight and bias in place, whatever their layout.

    Attributes:
        name: the parameter that holds the weight.
        parameter, bias: the parameters; for an expert, those of all experts.
        index: which expert; None otherwise.
        transposed: as in `LinearCall`.
        group, groups: which of so many groups of a convolution.
        gain: (outputs,), what a constant in the output is in the bias, where that is of a batch norm after it; None for 1.
    """

    name: str
    parameter: nn.Parameter
    bias: nn.Parameter | None
    index: int | None
    transposed: bool
    group: int = 0
    groups: int = 1
    gain: Tensor | None = None

    @property
    def key(self) -> Key:
        """The `LinearCall.key` of calls with this weight, wherever its data is now."""
        return key_of(self.parameter.data if self.index is None else self.parameter.data[self.index])

    @property
    def outputs(self) -> slice:
        """Which of the weight's outputs are its own: all, or those of its group."""
        count = len(self.parameter) // self.groups
        return slice(self.group * count, (self.group + 1) * count) if self.groups > 1 else slice(None)

    @property
    def place(self) -> Tensor:
        """The weight itself: the parameter, the expert's slice of it, or the group's."""
        return self.parameter[self.outputs] if self.index is None else self.parameter[self.index]

    @property
    def label(self) -> str:
        """The name that a report gives."""
        index = self.group if self.groups > 1 else self.index
        return self.name if index is None else f"{self.name}[{index}]"

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k), the widths of its rows and of what it makes of them."""
        place = self.place
        return (place.shape[0], place.shape[1]) if self.transposed else (place[0].numel(), len(place))

    @torch.no_grad()
    def add(self, weight: Tensor | None, bias: Tensor) -> None:
        """Add ΔW (d, k) and c (k,), computed in fp64 and rounded once."""
        if weight is not None:
            place = self.place
            change = (weight if self.transposed else weight.T).reshape(place.shape)
            place.copy_(place.double() + change.to(place.device))
        if self.bias is not None:
            own, constant = self.bias[self.outputs], bias.to(self.bias.device)
            constant = constant if self.gain is None else constant * self.gain[self.outputs].to(constant)
            own.copy_(own.double() + constant)


def all_parts(maps: list[LinearMap]) -> list[LinearMap]:
    """All groups of a convolution; all experts, as what this batch did not reach another one may."""
    first = maps[0]
    if first.groups > 1:
        return [replace(first, group=group) for group in range(first.groups)]
    return maps if first.index is None else [replace(first, index=i) for i in range(len(first.parameter))]


class Parameters:
    """Finds the parameter that a weight is, or is a slice of, while that parameter is in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._source, self._seen = source_of(model), -1
        self._by_pointer: dict[int, nn.Parameter] = {}
        self.names: dict[nn.Parameter, list[str]] = {}
        for prefix, module in model.named_modules():  # a module that several names hold counts once
            for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self.names.setdefault(parameter, []).append(f"{prefix}.{leaf}" if prefix else leaf)
        self.stacks = [p for p in self.names if p.dim() == 3]

    @property
    def by_pointer(self) -> dict[int, nn.Parameter]:
        """Address → parameter, as they are now."""
        now = 0 if self._source is None else self._source.generation
        if now != self._seen:
            self._by_pointer, self._seen = {p.data_ptr(): p for p in self.names if p.numel()}, now
        return self._by_pointer

    def place(self, call: LinearCall) -> Key:
        """The same for every call with the same weight, whatever address that has by now."""
        owner = self.by_pointer.get(call.weight.data_ptr())
        if owner is not None:
            return id(owner), key_of(call.weight)[1]
        found = self.find(call)
        return call.key if found is None else (id(found.parameter), (found.index or 0,))

    def find(self, call: LinearCall) -> LinearMap | None:
        """The linear map of this call; None if its weight is neither a parameter nor an expert's, or its bias is none.

        A parameter may be seen as its transpose: what counts is where each element lies.
        """
        pointer = call.weight.data_ptr()
        whole = self.by_pointer.get(pointer)
        bias = None if call.bias is None else self.by_pointer.get(call.bias.data_ptr())
        if whole is not None and (transposed := _layout(whole, call)) is not None:
            if call.bias is not None and bias is None:
                return None
            groups = 1 if call.window is None else call.window.groups
            return LinearMap(self.names[whole][0], whole, bias, None, transposed, groups=groups)
        for stack in self.stacks:
            step = stack.stride(0) * stack.element_size()
            index, rest = divmod(pointer - stack.data_ptr(), max(1, step))
            if 0 <= index < len(stack) and rest == 0 and call.bias is None:
                transposed = _layout(stack[index], call)
                if transposed is not None:
                    return LinearMap(self.names[stack][0], stack, None, index, transposed)
        return None

    def other_names(self, name: str) -> list[str]:
        """The other names under which the parameter called `name` is known: tied weights."""
        return next(names for names in self.names.values() if name in names)[1:]


def _layout(place: Tensor, call: LinearCall) -> bool | None:
    """Whether the place has the weight of the call as (d, k), and not (k, d); None if it has it in neither way."""
    weight = call.weight
    for seen, transposed in ((place, call.transposed), (place.mT if place.dim() == 2 else None, not call.transposed)):
        if seen is not None and seen.shape == weight.shape and seen.stride() == weight.stride():
            return transposed
    return None


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Within the block, experts run one after the other, where each one's weight can be told."""
    changed: list[tuple[Any, Any]] = []
    try:
        for part in transformers_parts(model).values():
            read, write = (getattr(part, f"{verb}_experts_implementation", None) for verb in ("get", "set"))
            before = read() if read is not None else None
            if write is not None and before is not None and not set(before.values()) <= {None, "eager"}:
                changed.append((write, before))
                write("eager")
        yield
    finally:
        for write, before in changed:
            write(before)
