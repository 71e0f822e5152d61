"""The differentiable kernel behind `lambda_gelu`.

It saves x and λ for the backward pass and nothing else, which is what `F.gelu` keeps, where autograd through the written
formula would keep four tensors of x's size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bases import SATURATION, Base

_HALF = (torch.float16, torch.bfloat16)
# Elements per block on a CPU: temporaries of this size stay in the cache. Forward and backward of 2.4M elements took 9.7
# times as long as F.gelu in one piece and 4.1 times in blocks (fp32, 2 threads, one run each); 2¹⁶ to 2¹⁸ are alike.
_BLOCK = 1 << 17


class LambdaGELUFunction(torch.autograd.Function):
    """f = x gate(λx);  ∂f/∂x = gate(u) + u gate'(u);  ∂f/∂λ = x² gate'(u), with u = λx. [derived]

    Shapes: x any, λ broadcastable to x; the λ-gradient is summed back to λ's shape in fp32 (float64 for float64). Second
    derivatives work too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, hardness: Tensor, base: Base) -> Tensor:
        ctx.save_for_backward(x, hardness)
        ctx.base = base
        if not _in_blocks(x, hardness):
            return _value(x, hardness, base)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)  # so that its blocks are views
        for part, result in zip(_split(x), _split(out), strict=True):
            result.copy_(_value(part, hardness, base))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, hardness = ctx.saved_tensors
        want_x, want_hardness, _ = ctx.needs_input_grad
        # under create_graph the gradients must be differentiable themselves, so no writing into slices
        if torch.is_grad_enabled() or not _in_blocks(x, hardness):
            return *_gradients(x, hardness, grad, ctx.base, want_x, want_hardness), None
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if want_x else None
        total = torch.zeros((), dtype=torch.float64) if want_hardness else None
        blocks = _split(x)
        outs = _split(grad_x) if want_x else [None] * len(blocks)
        for part, part_grad, out in zip(blocks, _split(grad), outs, strict=True):
            part_x, part_hardness = _gradients(part, hardness, part_grad, ctx.base, want_x, want_hardness)
            if out is not None:
                out.copy_(part_x)
            if total is not None:
                total += part_hardness.sum()
        return grad_x, None if total is None else total.to(hardness.dtype).reshape(hardness.shape), None


def _value(x: Tensor, hardness: Tensor, base: Base) -> Tensor:
    xc, hc = _computing(x, hardness)
    return (base.gate(xc * hc) * xc).to(x.dtype)


def _gradients(
    x: Tensor, hardness: Tensor, grad: Tensor, base: Base, want_x: bool, want_hardness: bool
) -> tuple[Tensor | None, Tensor | None]:
    xc, hc = _computing(x, hardness)
    gc = grad.to(xc.dtype)
    u = (xc * hc).clamp(-SATURATION, SATURATION)
    slope = base.slope(u)
    grad_x = grad_hardness = None
    if want_x:
        grad_x = (torch.addcmul(base.gate(u), u, slope) * gc).to(x.dtype)
    if want_hardness:
        # x · (x · slope), not x² · slope: where x² would overflow, slope is exactly 0
        grad_hardness = (xc * (xc * slope) * gc).sum_to_size(hardness.shape).to(hardness.dtype)
    return grad_x, grad_hardness


def _computing(x: Tensor, hardness: Tensor) -> tuple[Tensor, Tensor]:
    # x and λ in the dtype of the arithmetic: fp32 for half precision, since λx overflows fp16 at λ = 1e4, x = 300
    dtype = torch.float32 if x.dtype in _HALF else x.dtype
    return x.to(dtype), hardness.to(dtype)


def _in_blocks(x: Tensor, hardness: Tensor) -> bool:
    # a compiler fuses by itself, and would unroll the loop
    return x.device.type == "cpu" and x.numel() > _BLOCK and hardness.numel() == 1 and not torch.compiler.is_compiling()


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).split(_BLOCK)
