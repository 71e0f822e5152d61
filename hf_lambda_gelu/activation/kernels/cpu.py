"""The C++ kernel for CPUs: cpu.cpp, called with pointers into tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .compiled import Library
from .layout import BASE_NUMBERS, in_layout_of, known_view

DTYPES = (torch.float32, torch.bfloat16)

_LIBRARY = Library(
    Path(__file__).with_name("cpu.cpp"), {"lambda_gelu_forward": (3, 3, 3), "lambda_gelu_backward": (5, 3, 3)}
)
unavailable = _LIBRARY.unavailable


def forward(x: Tensor, hardness: Tensor, base: str) -> Tensor:
    """f(x; λ), laid out as x; see `lambda_gelu`. λ broadcasts to x such that `layout.view` knows it."""
    out = torch.empty_like(x)
    if x.numel():
        source, flat = in_layout_of(x, out), hardness.to(torch.float32).contiguous()
        _LIBRARY.loaded().lambda_gelu_forward(
            source.data_ptr(), flat.data_ptr(), out.data_ptr(), *known_view(out, hardness), *_numbers(x, base)
        )  # fmt: skip
    return out


def backward(grad: Tensor, x: Tensor, hardness: Tensor, base: str) -> tuple[Tensor, Tensor]:
    """∂L/∂x, laid out as x, and ∂L/∂λ, of λ's shape and dtype."""
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(hardness)
    source, upstream, flat = in_layout_of(x, grad_x), in_layout_of(grad, grad_x), hardness.to(torch.float32).contiguous()
    by_hardness = torch.empty_like(flat)
    _LIBRARY.loaded().lambda_gelu_backward(
        source.data_ptr(), upstream.data_ptr(), flat.data_ptr(), grad_x.data_ptr(), by_hardness.data_ptr(),
        *known_view(grad_x, hardness), *_numbers(x, base),
    )  # fmt: skip
    return grad_x, by_hardness.to(hardness.dtype)


def _numbers(x: Tensor, base: str) -> tuple[bool, int, int]:
    return x.dtype is torch.bfloat16, BASE_NUMBERS[base], torch.get_num_threads()
