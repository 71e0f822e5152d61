"""Launches the Triton kernel for CUDA devices: cpu.cpp's formulas, one launch forward, two backward, one for the sum."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .layout import BASE_NUMBERS, in_layout_of, known_view

try:
    import triton

    from . import cuda_programs as programs
except ImportError:  # no CUDA build of torch
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_BLOCK = 4096  # elements that a program takes at once
_WIDTH = 512  # columns of such a block, at most
_WARPS = 8  # of a program
_HERE = nullcontext()
_PROGRAMS = 1024  # that share the sums for λ: each has one in fp32, the sum of these is float64


def forward(x: Tensor, hardness: Tensor, base: str) -> Tensor:
    """f(x; λ), laid out as x; see `lambda_gelu`. λ broadcasts to x such that `layout.view` knows it."""
    out = torch.empty_like(x)
    if x.numel():
        outer, channels, inner = known_view(out, hardness)
        arguments = (in_layout_of(x, out), hardness.to(x.device).contiguous(), out)
        number = BASE_NUMBERS[base]
        with _on_device(x):
            if inner == 1 and channels > 1:
                rows, width, blocks, shares = _columns(outer, channels)
                programs.forward_columns[(blocks * shares,)](
                    *arguments, outer, channels, shares, number, rows, width, num_warps=_WARPS
                )
            else:
                width = min(_BLOCK, triton.next_power_of_2(inner))
                shares = triton.cdiv(inner, width)
                programs.forward_runs[(outer * channels * shares,)](
                    *arguments, channels, inner, shares, number, width, num_warps=_WARPS
                )
    return out


def backward(grad: Tensor, x: Tensor, hardness: Tensor, base: str) -> tuple[Tensor, Tensor]:
    """∂L/∂x, laid out as x, and ∂L/∂λ, of λ's shape and dtype; no atomics, so always the same bits."""
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(hardness)
    outer, channels, inner = known_view(grad_x, hardness)
    own = hardness.to(x.device).contiguous()
    by_hardness = torch.empty_like(own)
    arguments = (in_layout_of(x, grad_x), in_layout_of(grad, grad_x), own, grad_x)
    number = BASE_NUMBERS[base]
    with _on_device(x):
        if inner == 1 and channels > 1:
            rows, width, blocks, shares = _columns(outer, channels)
            sums = torch.empty(shares * channels, dtype=torch.float32, device=x.device)
            programs.backward_columns[(blocks * shares,)](
                *arguments, sums, outer, channels, shares, number, rows, width, num_warps=_WARPS
            )
            programs.sum_columns[(triton.cdiv(channels, 32),)](sums, by_hardness, channels, shares, 32, 32)
        else:
            width, runs = min(_BLOCK, triton.next_power_of_2(inner)), outer * channels
            shares = min(triton.cdiv(inner, width), triton.cdiv(_PROGRAMS, runs))
            sums = torch.empty(runs * shares, dtype=torch.float32, device=x.device)
            programs.backward_runs[(runs * shares,)](
                *arguments, sums, channels, inner, shares, number, width, num_warps=_WARPS
            )
            programs.sum_runs[(channels,)](sums, by_hardness, outer, channels, shares, 1024)
    return grad_x, by_hardness if own is hardness else by_hardness.to(hardness)


@functools.cache
def unavailable() -> str | None:
    """What keeps the kernel from running on this machine, in words; None if nothing does."""
    if triton is None:
        return "Triton is not installed (pip install triton)"
    try:  # whether it can compile is known once it has: it needs a C compiler and Python's headers
        x, hardness = torch.ones(1, device="cuda"), torch.ones(1, device="cuda")
        backward(x, forward(x, hardness, "gelu"), hardness, "gelu")
    except Exception as error:
        return f"Triton cannot run here: {type(error).__name__}: {str(error)[:300]}"
    return None


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device_of(x) if elsewhere else _HERE


def _columns(outer: int, channels: int) -> tuple[int, int, int, int]:
    """Rows and columns of a program's block, blocks beside each other, and the programs that share the rows of one."""
    width = min(_WIDTH, triton.next_power_of_2(channels))
    rows = 1 if channels > 2**27 else _BLOCK // width  # places in a block are 32-bit numbers
    blocks = triton.cdiv(channels, width)
    return rows, width, blocks, min(triton.cdiv(outer, rows), triton.cdiv(_PROGRAMS, blocks))
