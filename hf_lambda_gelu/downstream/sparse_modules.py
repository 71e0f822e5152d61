"""The classes that `sparsify_ffn` gives modules of a feed-forward block: for one row they read the rows that fire alone.

All else is left to the class that they had: several rows, more units that fire than pays, gradients, autocast, another dtype
or device, and whatever looks at the operations themselves (compilers, exporters, torch.func, function modes).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._compat import function_modes, functorch_active
from . import sparse_products


class Fired:
    """What the ReLU of a gated block put out, until the map that is multiplied with it has run.

    Attributes:
        output: one row; None before, after, and where it was not one row.
    """

    def __init__(self) -> None:
        self.output: Tensor | None = None


class SparseReLU(nn.ReLU):
    """max(0, x), noted for `SparseUp`."""

    sparse_fired: Fired

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.sparse_fired.output = out if out.numel() == out.shape[-1] else None
        return out


class SparseUp(nn.Linear):
    """W₃x + b₃ for the units that the gate lets through, and 0 for the others."""

    sparse_fired: Fired
    sparse_most: int

    def forward(self, x: Tensor) -> Tensor:
        gate, self.sparse_fired.output = self.sparse_fired.output, None
        if gate is not None and gate.numel() == self.out_features and gate.is_contiguous() and gate.dtype is x.dtype:
            weight = self.weight
            if _one_row(x, weight) and weight.is_contiguous():
                out = sparse_products.chosen(gate, x, weight, self.bias, self.sparse_most)
                if out is not None:
                    return out
        return super().forward(x)


class SparseDown(nn.Linear):
    """W₂h + b₂ from the columns of W₂ whose units fire; in memory they are rows."""

    sparse_most: int

    def forward(self, h: Tensor) -> Tensor:
        rows = self.weight.t()
        if _one_row(h, self.weight) and rows.is_contiguous():
            out = sparse_products.gathered(h, rows, self.bias, self.sparse_most)
            if out is not None:
                return out
        return super().forward(h)


class SparseConv1D(Conv1D):
    """hW₂ + b₂ likewise, where the weight is transposed as it is (GPT-2)."""

    sparse_most: int

    def forward(self, h: Tensor) -> Tensor:
        if _one_row(h, self.weight) and self.weight.is_contiguous():
            out = sparse_products.gathered(h, self.weight, self.bias, self.sparse_most)
            if out is not None:
                return out
        dense: Tensor = super().forward(h)  # type: ignore[no-untyped-call]  # transformers'
        return dense


SPARSE = (SparseReLU, SparseUp, SparseDown, SparseConv1D)


def _one_row(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can take x, and nobody needs to see what it does."""
    return (
        x.numel() == x.shape[-1]
        and type(x) is Tensor
        and x.dtype in sparse_products.DTYPES
        and weight.dtype is x.dtype
        and x.device.type == weight.device.type == "cpu"
        and x.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not function_modes()
        and not functorch_active()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )
