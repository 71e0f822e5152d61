"""How far from sparse a row of activations is: norms of r = max(z, 0), what ReLU puts out for the pre-activations z.

Both are from 1/√d or 1/d, one unit fires, to 1, all fire alike, and do not change if z is scaled: so a number means the same
in layers and models of any width and scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_TINY = 1e-12  # in place of 0, in rows where no unit fires


def hoyer(z: Tensor) -> Tensor:
    """(rows, d) → (rows,): (Σ r)² / (d Σ r²), from 1/d to 1, and 0 where no unit fires.

    Large r grow by its gradient, small ones shrink. Source: the Hoyer-square norm (Yang et al. 2020, DeepHoyer, arXiv
    1908.09979; there of weights); the division by d is derived.
    """
    sums, squares = _sums(z)
    return sums.square() / (z.shape[-1] * squares.clamp(min=_TINY))


def l1(z: Tensor) -> Tensor:
    """(rows, d) → (rows,): Σ r / √(d Σ r²), from 1/√d to 1, and 0 where no unit fires; the divisor has no gradient.

    All r > 0 of a row shrink alike by its gradient. The division is derived.
    """
    sums, squares = _sums(z)
    return sums / (z.shape[-1] * squares.detach()).clamp(min=_TINY).sqrt()


NORMS: dict[str, Callable[[Tensor], Tensor]] = {"hoyer": hoyer, "l1": l1}


def _sums(z: Tensor) -> tuple[Tensor, Tensor]:
    """Σ r and Σ r² by row, in fp32, of float64 in float64."""
    sums: tuple[Tensor, Tensor] = _Sums.apply(z)  # type: ignore[no-untyped-call]
    return sums


class _Sums(torch.autograd.Function):
    """Keeps z alone, which the activation keeps as well: autograd's own operations would keep three more of its size."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z)
        r = _finer(z).relu()
        return r.sum(-1), r.square().sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_sum: Tensor, by_squares: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        r = _finer(z).relu()
        gradient = (by_sum.unsqueeze(-1) + 2 * by_squares.unsqueeze(-1) * r) * (r > 0)
        return gradient.to(z.dtype)


def _finer(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()
