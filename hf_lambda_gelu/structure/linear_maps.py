"""Linear maps: as torch computes them in a forward pass, and as parameters that can be refit.

Nothing is assumed of the architecture. Linear maps are seen where torch computes them (`F.linear`, `addmm` for GPT-2's
Conv1D, 1 × 1 convolutions), so that experts, whose weights are slices of one parameter, are seen like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._compat import without_torch_function

Key = tuple[int, tuple[int, ...]]


@dataclass
class LinearCall:
    """One linear map as it was computed, channels last: output (…, k) = input (…, d) · weightᵀ + bias.

    Attributes:
        weight: the tensor that torch got, a parameter or a slice of one.
        transposed: whether it is (d, k), as Conv1D keeps it, and not (k, d).
        moved: whether torch had the channels in dimension 1.
        obstacle: why it cannot be refit; empty if it can.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    output: Tensor
    transposed: bool = False
    moved: bool = False
    obstacle: str = ""

    @property
    def key(self) -> Key:
        """The same for every call with the same weight."""
        return self.weight.data_ptr(), tuple(self.weight.shape)


class watch_linears(TorchFunctionMode):
    """Calls `watcher` with each linear map that is computed; what it returns, if anything, takes the output's place."""

    def __init__(self, watcher: Callable[[LinearCall], Tensor | None]) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        read = _READERS.get(func)
        if read is None:
            return output
        with without_torch_function():
            call = read(output, *args, **(kwargs or {}))
            new = self.watcher(call) if call is not None else None
        if call is None or new is None:
            return output
        return new.movedim(-1, 1) if call.moved else new


def _linear(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearCall:
    return LinearCall(input, weight, bias, output)


def _addmm(output: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> LinearCall | None:
    if scales or input.dim() != 1 or not isinstance(mat2, nn.Parameter):
        return None
    return LinearCall(mat1, mat2, input, output, transposed=True)


def _conv(
    output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> LinearCall:
    values = dict(zip(("stride", "padding", "dilation", "groups"), args, strict=False)) | kwargs
    pointwise = weight[0, 0].numel() == 1 and values.get("groups", 1) == 1 and output.shape[2:] == input.shape[2:]
    kernel = "×".join(map(str, weight.shape[2:]))
    obstacle = "" if pointwise else f"it feeds a convolution with kernel {kernel}"
    return LinearCall(input.movedim(1, -1), weight, bias, output.movedim(1, -1), moved=True, obstacle=obstacle)


_READERS: dict[Any, Callable[..., LinearCall | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
}


@dataclass
class LinearMap:
    """A linear map that can be refit: its weight and bias in place, whatever their layout.

    Attributes:
        name: the parameter that holds the weight.
        parameter, bias: the parameters; for an expert, those of all experts.
        index: which expert; None otherwise.
        transposed: as in `LinearCall`.
    """

    name: str
    parameter: nn.Parameter
    bias: nn.Parameter | None
    index: int | None
    transposed: bool

    @property
    def key(self) -> Key:
        """The `LinearCall.key` of calls with this weight, wherever its data is now."""
        place = self.place.data
        return place.data_ptr(), tuple(place.shape)

    @property
    def place(self) -> Tensor:
        """The weight itself: the parameter, or the expert's slice of it."""
        return self.parameter if self.index is None else self.parameter[self.index]

    @property
    def label(self) -> str:
        """The name that a report gives."""
        return self.name if self.index is None else f"{self.name}[{self.index}]"

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k), the widths of input and output."""
        shape = self.parameter.shape if self.index is None else self.parameter.shape[1:]
        return (shape[0], shape[1]) if self.transposed else (shape[1], shape[0])

    @torch.no_grad()
    def add(self, weight: Tensor | None, bias: Tensor) -> None:
        """Add ΔW (d, k) and c (k,), computed in fp64 and rounded once."""
        if weight is not None:
            place = self.place
            change = (weight if self.transposed else weight.T).reshape(place.shape)
            place.copy_(place.double() + change.to(place.device))
        if self.bias is not None:
            self.bias.copy_(self.bias.double() + bias.to(self.bias.device))


def all_experts(maps: list[LinearMap]) -> list[LinearMap]:
    """Also those of the experts that this batch did not reach: another one may."""
    first = maps[0]
    return maps if first.index is None else [replace(first, index=i) for i in range(len(first.parameter))]


class Parameters:
    """Finds the parameter that a weight is, or is a slice of."""

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[nn.Parameter, list[str]] = {}
        for prefix, module in model.named_modules():  # a module that several names hold counts once
            for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self.names.setdefault(parameter, []).append(f"{prefix}.{leaf}" if prefix else leaf)
        self.by_pointer = {p.data_ptr(): p for p in self.names if p.numel()}
        self.stacks = [p for p in self.names if p.dim() == 3]

    def find(self, call: LinearCall) -> LinearMap | None:
        """The linear map of this call; None if its weight is neither a parameter nor an expert's, or its bias is none."""
        pointer = call.weight.data_ptr()
        whole = self.by_pointer.get(pointer)
        bias = None if call.bias is None else self.by_pointer.get(call.bias.data_ptr())
        if whole is not None and _same_layout(whole, call.weight):
            if call.bias is not None and bias is None:
                return None
            return LinearMap(self.names[whole][0], whole, bias, None, call.transposed)
        for stack in self.stacks:
            step = stack.stride(0) * stack.element_size()
            index, rest = divmod(pointer - stack.data_ptr(), max(1, step))
            if 0 <= index < len(stack) and rest == 0 and _same_layout(stack[index], call.weight) and call.bias is None:
                return LinearMap(self.names[stack][0], stack, None, index, call.transposed)
        return None

    def other_names(self, name: str) -> list[str]:
        """The other names under which the parameter called `name` is known: tied weights."""
        return next(names for names in self.names.values() if name in names)[1:]


def _same_layout(parameter: Tensor, weight: Tensor) -> bool:
    return parameter.shape == weight.shape and parameter.stride() == weight.stride()  # a square one may be transposed


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Within the block, experts run one after the other, where each one's weight can be told."""
    read, write = (getattr(model, f"{verb}_experts_implementation", None) for verb in ("get", "set"))
    before = read() if read is not None else None
    if write is None or before is None or set(before.values()) <= {None, "eager"}:
        yield
        return
    write("eager")
    try:
        yield
    finally:
        write(before)
