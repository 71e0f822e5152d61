"""λ-GELU out of torch's own operations: for every device and dtype, differentiable twice, and what a compiler fuses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bases import SATURATION, Base
from .layout import in_layout_of

_HALF = (torch.float16, torch.bfloat16)
# Elements per block on a CPU: temporaries of this size stay in the cache: half the time of one piece, by hand, where
# 2¹⁶ to 2¹⁸ were alike.
_BLOCK = 1 << 17


def value(x: Tensor, hardness: Tensor, base: Base) -> Tensor:
    """f = x gate(λx), in fp32 for half precision."""
    xc, hc = _computing(x, hardness)
    return (base.gate(xc * hc) * xc).to(x.dtype)


def gradients(grad: Tensor, x: Tensor, hardness: Tensor, base: Base) -> tuple[Tensor, Tensor]:
    """∂L/∂x, and ∂L/∂λ summed to λ's shape, with u = λx: ∂f/∂x = gate(u) + u gate'(u), ∂f/∂λ = x² gate'(u). [derived]"""
    xc, hc = _computing(x, hardness)
    gc = grad.to(xc.dtype)
    u = (xc * hc).clamp(-SATURATION, SATURATION)
    slope = base.slope(u)
    grad_x = (torch.addcmul(base.gate(u), u, slope) * gc).to(x.dtype)
    # x · (x · slope), not x² · slope: where x² would overflow, slope is exactly 0
    return grad_x, (xc * (xc * slope) * gc).sum_to_size(hardness.shape).to(hardness.dtype)


def forward(x: Tensor, hardness: Tensor, base: Base) -> Tensor:
    """`value` into a tensor laid out as x, in blocks that a CPU's cache holds."""
    out = torch.empty_like(x)
    if not _in_blocks(x, hardness):
        return out.copy_(value(x, hardness, base))
    for part, result in zip(_split(x, out), _split(out, out), strict=True):
        result.copy_(value(part, hardness, base))
    return out


def backward(grad: Tensor, x: Tensor, hardness: Tensor, base: Base) -> tuple[Tensor, Tensor]:
    """`gradients`, the first laid out as x, in blocks that a CPU's cache holds, whose sums add up in float64."""
    grad_x = torch.empty_like(x)
    if not _in_blocks(x, hardness):
        by_x, by_hardness = gradients(grad, x, hardness, base)
        return grad_x.copy_(by_x), by_hardness
    total = torch.zeros(hardness.shape, dtype=torch.float64, device=hardness.device)
    for part, part_grad, out in zip(_split(x, grad_x), _split(grad, grad_x), _split(grad_x, grad_x), strict=True):
        by_x, by_hardness = gradients(part_grad, part, hardness, base)
        out.copy_(by_x)
        total += by_hardness
    return grad_x, total.to(hardness.dtype)


def _computing(x: Tensor, hardness: Tensor) -> tuple[Tensor, Tensor]:
    # x and λ in the dtype of the arithmetic: fp32 for half precision, since λx overflows fp16 at λ = 1e4, x = 300
    dtype = torch.float32 if x.dtype in _HALF else x.dtype
    return x.to(dtype), hardness.to(dtype).clamp(max=torch.finfo(dtype).max)  # inf · 0 is no number; a NaN stays one


def _in_blocks(x: Tensor, hardness: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() > _BLOCK and hardness.numel() == 1


def _split(tensor: Tensor, dense: Tensor) -> tuple[Tensor, ...]:
    # in the order of memory, so that the blocks of what is written are views
    order = sorted(range(dense.dim()), key=dense.stride, reverse=True)
    parts: tuple[Tensor, ...] = in_layout_of(tensor, dense).permute(order).view(-1).split(_BLOCK)
    return parts
