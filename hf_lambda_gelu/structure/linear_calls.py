"""Linear maps as torch computes them: each operation that multiplies by a parameter, read as maps with channels last.

A weight is known by object: a parameter, or a view of one (a transpose, an expert's slice). Products of two computed tensors
(attention) are no maps. What is not understood here is not read: `unread_maps` then finds it in autograd's graph.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._compat import view_base
from .conv_windows import Window

Key = tuple[int, tuple[int, ...]]


@dataclass
class LinearCall:
    """One linear map as it was computed, channels last: output (…, k) = rows (…, d) · weightᵀ + bias, of the input's rows.

    Attributes:
        weight: the tensor that torch got, a parameter, a view or a slice of one.
        transposed: whether it is (d, k), as Conv1D keeps it, and not (k, d).
        order: the dimensions of torch's output in the order that they have here, (…, k); None if it is the same.
        window: how a convolution makes its rows of the input; None where they are the input's own.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    output: Tensor
    transposed: bool = False
    order: tuple[int, ...] | None = None
    window: Window | None = None

    @property
    def key(self) -> Key:
        """The same for every call with the same weight, and for its transpose."""
        return key_of(self.weight)

    @property
    def leading(self) -> tuple[int, ...]:
        """The leading shape of its rows: that of the output."""
        return tuple(self.output.shape[:-1])

    def rows(self, group: int = 0) -> Tensor:
        """(rows, d), what the weight is multiplied by; of a convolution in groups that of one group."""
        return self.input.reshape(-1, self.input.shape[-1]) if self.window is None else self.window.rows(self.input, group)

    def restored(self, output: Tensor) -> Tensor:
        """(…, k) with the dimensions as torch's output has them."""
        if self.order is None:
            return output
        return output.permute([self.order.index(dim) for dim in range(len(self.order))])

    @property
    def lies_transposed(self) -> bool:
        """Whether the weight's rows in memory are those of its input channels."""
        turned = self.weight.dim() == 2 and self.weight.stride(0) < self.weight.stride(1)
        return self.transposed != turned


def key_of(weight: Tensor) -> Key:
    """Where the elements are, and their shape as rows in memory: a weight and its transpose are one."""
    shape = tuple(weight.shape)
    if weight.dim() == 2 and (weight.stride(0) < weight.stride(1) or (1 in shape and shape[0] > 1)):
        shape = shape[::-1]
    return weight.data_ptr(), shape


@dataclass
class Read:
    """What an operation computes: linear maps, and how their outputs make up its own."""

    calls: list[LinearCall]
    together: Callable[[list[Tensor]], Tensor]


def is_weight(value: object) -> bool:
    """Whether it is a parameter, or a view of one."""
    return isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and isinstance(view_base(value), nn.Parameter))


def is_read(func: Any) -> bool:
    """Whether the operation may be a linear map."""
    return func in _READERS


def read_operation(func: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Read | None:
    """The linear maps that `func(*args, **kwargs)` = `output` computes; None if it is none, or not understood."""
    reader = _READERS.get(func)
    given = {name: value for name, value in kwargs.items() if value is not None}
    return None if reader is None or "out" in given else reader(output, *args, **given)


def _single(call: LinearCall) -> Read:
    return Read([call], lambda outputs: call.restored(outputs[0]))


def _stacked(calls: list[LinearCall], dim: int = 0) -> Read:
    return Read(calls, lambda outputs: torch.stack([c.restored(o) for o, c in zip(outputs, calls, strict=True)], dim))


def _linear(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Read:
    return _single(LinearCall(input, weight, bias, output))


def _addmm(output: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Read | None:
    if scales or input.dim() != 1 or not is_weight(mat2) or is_weight(mat1):
        return None
    return _single(LinearCall(mat1, mat2, input, output, transposed=True))


def _conv(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Read:
    window = Window.of(weight.shape[2:], dict(zip(("stride", "padding", "dilation", "groups"), args, strict=False)) | kwargs)
    channels = 1 if input.dim() == weight.dim() else 0  # without a batch
    order = (*(dim for dim in range(output.dim()) if dim != channels), channels)
    over = None if window.pointwise else window
    return _single(LinearCall(input.permute(order), weight, bias, output.permute(order), order=order, window=over))


def _matmul(output: Tensor, first: Tensor, second: Tensor, **options: Any) -> Read | None:
    """x @ W, W @ x, and stacks of either: one map for each expert."""
    if options or is_weight(first) == is_weight(second):
        return None
    weight, x = (second, first) if is_weight(second) else (first, second)
    if weight.dim() == 2:
        return _single(_product(output, x, weight, last=weight is second))
    if weight.dim() != 3 or x.dim() not in (2, 3) or (x.dim() == 3 and len(x) != len(weight)):
        return None
    xs = x if x.dim() == 3 else [x] * len(weight)
    calls = [_product(o, i, w, last=weight is second) for o, i, w in zip(output, xs, weight, strict=True)]
    return _stacked(calls)


def _product(output: Tensor, x: Tensor, weight: Tensor, last: bool) -> LinearCall:
    if last:
        return LinearCall(x, weight, None, output, transposed=True)
    if x.dim() == 1:
        return LinearCall(x, weight, None, output)
    dims = range(output.dim() - 2)
    return LinearCall(x.mT, weight, None, output.mT, order=(*dims, len(dims) + 1, len(dims)))


def _rmatmul(output: Tensor, second: Tensor, first: Tensor) -> Read | None:
    return _matmul(output, first, second)


def _grouped(output: Tensor, input: Tensor, weight: Tensor, offs: Tensor | None = None, **options: Any) -> Read | None:
    """Rows that are sorted by expert, each expert's up to its offset."""
    if offs is None or not is_weight(weight) or is_weight(input) or (input.dim(), weight.dim()) != (2, 3):
        return None
    if options:
        return None
    ends = [int(end) for end in offs.tolist()]
    spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    calls = [LinearCall(input[s], w, None, output[s], transposed=True) for s, w in zip(spans, weight, strict=True)]
    rest = output.detach()[ends[-1] :]
    return Read(calls, lambda outputs: torch.cat([*outputs, rest]))


def _tensordot(output: Tensor, a: Tensor, b: Tensor, dims: Any = 2, **options: Any) -> Read | None:
    axes = ([-1], [0]) if dims == 1 else dims
    if not isinstance(axes, (tuple, list)) or len(axes) != 2 or options:
        return None
    pairs = [[axis] if isinstance(axis, int) else list(axis) for axis in axes]
    if [len(pair) for pair in pairs] != [1, 1]:
        return None
    x, w = _LETTERS[: a.dim()], _LETTERS[a.dim() : a.dim() + b.dim()]
    contracted, other = x[pairs[0][0]], w[pairs[1][0]]
    w = w.replace(other, contracted)
    return _einsum(output, f"{x},{w}->{(x + w).replace(contracted, '')}", a, b)


_LETTERS = string.ascii_uppercase


def _einsum(output: Tensor, equation: Any, *operands: Any) -> Read | None:
    """Two operands, of which the weight has a letter of its own, one that is summed over, and at most one for the expert."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or is_weight(operands[0]) == is_weight(operands[1]):
        return None
    letters = _letters(equation, operands)
    if letters is None:
        return None
    at = 0 if is_weight(operands[0]) else 1
    weight, x, (of_weight, of_x, of_output) = operands[at], operands[1 - at], (letters[at], letters[1 - at], letters[2])
    summed = [c for c in of_weight if c in of_x and c not in of_output]
    own = [c for c in of_weight if c not in of_x and c in of_output]
    shared = [c for c in of_weight if c in of_x and c in of_output]
    if len(summed) + len(own) + len(shared) != len(of_weight) or len(summed) != 1 or len(own) + len(shared) not in (1, 2):
        return None
    if any(c not in of_output for c in of_x if c != summed[0]):
        return None
    if len(of_weight) == 2:
        return None if shared else _single(_contraction(output, of_output, x, of_x, weight, of_weight, summed[0], own[0]))
    expert = shared[0] if shared else of_weight[0]
    own = [c for c in own if c != expert]
    if len(own) != 1:
        return None
    calls = []
    for index in range(weight.shape[of_weight.index(expert)]):
        parts = [
            (t.select(of.index(expert), index), of.replace(expert, "")) if expert in of else (t, of)
            for t, of in ((output, of_output), (x, of_x), (weight, of_weight))
        ]
        calls.append(_contraction(*parts[0], *parts[1], *parts[2], summed[0], own[0]))
    return _stacked(calls, of_output.index(expert))


def _contraction(
    output: Tensor, of_output: str, x: Tensor, of_x: str, weight: Tensor, of_weight: str, summed: str, own: str
) -> LinearCall:
    """Rows in the order of the input, as the batch that it comes from has them."""
    rows = of_x.replace(summed, "")
    order = tuple(of_output.index(c) for c in rows + own)
    input = x.permute([of_x.index(c) for c in rows + summed])
    return LinearCall(input, weight, None, output.permute(order), transposed=of_weight[0] == summed, order=order)


def _letters(equation: str, operands: tuple[Tensor, ...]) -> tuple[str, str, str] | None:
    """The letters of both operands and of the output, an ellipsis spelled out; None if one is twice in a term."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    unused = "".join(c for c in _LETTERS + string.ascii_lowercase if c not in equation)
    hidden = max(o.dim() - len(t.replace("...", "")) if "..." in t else 0 for t, o in zip(terms, operands, strict=True))
    for term, operand in zip(terms, operands, strict=True):
        if "..." in term and operand.dim() - len(term.replace("...", "")) != hidden:
            return None  # they are broadcast
    rest = unused[:hidden]
    if not arrow:
        right = ("..." if hidden else "") + "".join(c for c in sorted(set(left) - set(".,")) if left.count(c) == 1)
    first, second, out = (term.replace("...", rest) for term in (*terms, right))
    return None if any(len(set(term)) < len(term) for term in (first, second, out)) else (first, second, out)


_READERS: dict[Any, Callable[..., Read | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    **dict.fromkeys((torch.matmul, torch.mm, torch.mv, torch.bmm, torch.linalg.matmul), _matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.mv, Tensor.bmm), _matmul),
    Tensor.__rmatmul__: _rmatmul,
    torch.einsum: _einsum,
    torch.tensordot: _tensordot,
    **{f: _grouped for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None},
}
