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
        if bool(torch.isnan(first).any()):
            return float("nan")
        if first.numel():
            finite = torch.isfinite(first)  # masks put −inf into some models' scores
            a, b = first[finite].double(), second[finite].double()
            scale = float(a.abs().max()) if a.numel() else 0.0
            worst = max(worst, float((a - b).abs().max()) / max(scale, 1e-12) if a.numel() else 0.0)
            same = torch.isfinite(second[finite]).all() and torch.equal(first[~finite], second[~finite].to(first.dtype))
            worst = worst if same else float("inf")
    return worst


def tolerance(outputs: list[Tensor]) -> float:
    """The relative difference that rounding can make."""
    return max((_TOLERANCE.get(t.dtype, _FP32_TOLERANCE) for t in outputs), default=_FP32_TOLERANCE)
