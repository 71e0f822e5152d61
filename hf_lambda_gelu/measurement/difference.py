"""How far two outputs of a model are apart, and how far they may be by rounding alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._compat import pytree

# relative to the largest output; λ that is no power of two is rounded into every weight
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
_FP32_TOLERANCE = 1e-5
# elements that are compared at a time
_PIECE = 2**20


def float_outputs(output: Any) -> list[Tensor]:
    """All floating point tensors in what a forward returned."""
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """max |got − expected| of each tensor relative to its own largest value; the largest of these.

    NaN where `expected` has a NaN, which no number can be compared with; infinite where infinities are not the same.
    """
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    worst = 0.0
    for first, second in zip(expected, got, strict=True):
        scale = apart = 0.0
        for a, b in zip(*(tensor.reshape(-1).split(_PIECE) for tensor in (first, second)), strict=True):  # logits are large
            if bool(torch.isnan(a).any()):
                return float("nan")
            finite = torch.isfinite(a)  # masks put −inf into some models' scores
            if not torch.isfinite(b[finite]).all() or not torch.equal(a[~finite], b[~finite].to(a.dtype)):
                apart = float("inf")
            elif finite.any():
                a, b = a[finite].double(), b[finite].double()
                scale, apart = max(scale, float(a.abs().max())), max(apart, float((a - b).abs().max()))
        worst = max(worst, apart / max(scale, 1e-12))
    return worst


def tolerance(outputs: list[Tensor]) -> float:
    """The relative difference that rounding can make."""
    return max((_TOLERANCE.get(t.dtype, _FP32_TOLERANCE) for t in outputs), default=_FP32_TOLERANCE)
