"""Weights between an activation and a map that nobody has read: found in autograd's graph, where nothing is hidden.

A linear map that is read (see `linear_calls`) is cut off from what made it. Whatever else takes a matrix of the model on the
way from a site to the next map stays in the graph as a node: a custom function, a compiled module, a gathered expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .block_source import BlockSource

# nodes that take a parameter element by element, or put it beside the activations: a gain, an offset, a class token
# fmt: off
_ELEMENTWISE = frozenset({
    "Add", "Addcdiv", "Addcmul", "Atan2", "Cat", "Copy", "CopySlices", "CudnnBatchNorm", "Div", "Fmod", "FusedRmsNorm",
    "IndexAdd", "IndexCopy", "IndexPut", "Lerp", "Logaddexp", "MaskedFill", "MaskedScatter", "Maximum", "Minimum", "Mul",
    "NativeBatchNorm", "NativeGroupNorm", "NativeLayerNorm", "Pow", "PreluKernel", "Remainder", "Rsub", "Scatter",
    "ScatterAdd", "SelectScatter", "SliceScatter", "Stack", "Sub", "Where",
})
_PRODUCTS = frozenset({"Addbmm", "Addmm", "Addmv", "Baddbmm", "Bmm", "Dot", "Mm", "Mv"})
# fmt: on


@dataclass
class Origins:
    """Where a tensor comes from.

    Attributes:
        sites: the sites whose output is in it.
        unread: site → the operation with a weight of its own on the way, if there is one.
        constant: whether it is made of parameters alone; `matrix`: of one with two dimensions or more.
    """

    sites: set[str] = field(default_factory=set)
    unread: dict[str, str] = field(default_factory=dict)
    constant: bool = False
    matrix: bool = False


def origins(tensor: Tensor, leaves: Mapping[int, str | None], parameters: Collection[nn.Parameter]) -> Origins:
    """Follow the graph back from `tensor` to the leaves: {id of a leaf: the site that put it out, None for a linear map}."""
    if tensor.grad_fn is None:
        return Origins()
    known: dict[Any, Origins] = {}
    stack = [tensor.grad_fn]
    while stack:
        node = stack[-1]
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        missing = [parent for parent in parents if parent not in known]
        if node not in known and missing:
            stack += missing
            continue
        stack.pop()
        if node not in known:
            variable = getattr(node, "variable", None)
            known[node] = (
                _combined(operation_of(node), [known[parent] for parent in parents])
                if variable is None
                else _of_leaf(variable, leaves, parameters)
            )
    return known[tensor.grad_fn]


def _of_leaf(variable: Tensor, leaves: Mapping[int, str | None], parameters: Collection[nn.Parameter]) -> Origins:
    if id(variable) in leaves:
        site = leaves[id(variable)]
        return Origins(set() if site is None else {site})
    constant = isinstance(variable, nn.Parameter) and variable in parameters
    return Origins(constant=constant, matrix=constant and variable.dim() > 1)


def _combined(operation: str, parents: list[Origins]) -> Origins:
    found = Origins(constant=bool(parents) and operation != "Embedding" and all(p.constant for p in parents))
    for parent in parents:
        found.sites |= parent.sites
        found.unread |= parent.unread
    found.matrix = found.constant and any(p.matrix for p in parents)
    weights = [p for p in parents if p.constant and (p.matrix or operation in _PRODUCTS)]
    if weights and operation not in _ELEMENTWISE:
        for parent in parents:
            found.unread |= {site: operation for site in parent.sites if site not in found.unread}
    return found


def operation_of(node: Any) -> str:
    """The operation of a node of autograd's graph."""
    name: str = node.name()
    return name.rstrip("0123456789").removesuffix("Backward").removeprefix("torch::autograd::")


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Within the block, every floating point parameter takes part in the graph."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


class Uses:
    """What a forward pass does with the parameters besides the linear maps that are read.

    Attributes:
        operations: parameter → the names of the operations that take it, views apart.
        detached: (operation, the other operands) where a matrix of the model is used outside of autograd's graph.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], source: BlockSource | None = None) -> None:
        self.operations: dict[nn.Parameter, set[str]] = {}
        self.detached: list[tuple[str, list[Tensor]]] = []
        self._parameters, self._source, self._seen = list(parameters), source, -1
        self._owners: dict[int, nn.Parameter] = {}

    def _owner(self, tensor: Tensor) -> nn.Parameter | None:
        """The parameter whose memory this is."""
        now = 0 if self._source is None else self._source.generation
        if now != self._seen:
            kept = [(_storage(p), p) for p in self._parameters]
            several = {place for place, count in Counter(place for place, _ in kept).items() if count > 1}
            self._owners, self._seen = {place: p for place, p in kept if place not in {*several, -1}}, now
        return self._owners.get(_storage(tensor))

    def __call__(self, func: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of an operation that is not read as a linear map."""
        if not isinstance(output, Tensor):
            return
        operands = [t for t in _flat((*args, *kwargs.values())) if isinstance(t, Tensor)]
        place = _storage(output)
        for tensor in operands:
            owner = self._owner(tensor)
            if owner is None or _storage(tensor) == place:
                continue
            name = str(getattr(func, "__name__", func))
            self.operations.setdefault(owner, set()).add(name)
            if tensor.grad_fn is None and not tensor.requires_grad and tensor.dim() > 1 and name in _NAMES_OF_PRODUCTS:
                self.detached.append((name, [other for other in operands if other is not tensor]))


_NAMES_OF_PRODUCTS = {
    "matmul",
    "mm",
    "mv",
    "bmm",
    "einsum",
    "tensordot",
    "inner",
    "__matmul__",
    "__rmatmul__",
    "linalg_matmul",
}
_NAMES_OF_PRODUCTS |= {"addmm", "addbmm", "baddbmm", "addmv", "bilinear", "kron", "_grouped_mm", "grouped_mm"}
_NAMES_OF_PRODUCTS |= {f"conv_transpose{n}d" for n in (1, 2, 3)}


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def _storage(tensor: Tensor) -> int:
    """Where the elements of a tensor are kept; −1 of one that has no such place."""
    try:
        return tensor.untyped_storage().data_ptr() or -1
    except (NotImplementedError, RuntimeError):  # sparse and fake tensors
        return -1
