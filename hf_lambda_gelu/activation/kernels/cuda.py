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
_WARPS = 8  # of a program
_PROGRAMS = 1024  # that share the sum for λ: each has one in fp32, the sum of these is float64
_ROWS = 64  # rows for one program where λ changes along them


def forward(x: Tensor, hardness: Tensor, base: str) -> Tensor:
    """f(x; λ), laid out as x; see `lambda_gelu`. λ broadcasts to x such that `layout.view` knows it."""
    out = torch.empty_like(x)
    if x.numel():
        outer, channels, inner = known_view(out, hardness)
        arguments = (in_layout_of(x, out), hardness.to(x.device).contiguous(), out)
        with _on_device(x):
            if inner == 1 and channels > 1:
                width, grid = _columns(outer, channels)
                programs.forward_columns[grid](*arguments, outer, channels, BASE_NUMBERS[base], _ROWS, width)
            else:
                width, grid = _runs(outer * channels, inner)
                programs.forward_runs[grid](*arguments, channels, inner, BASE_NUMBERS[base], width, num_warps=_WARPS)
    return out


def backward(grad: Tensor, x: Tensor, hardness: Tensor, base: str) -> tuple[Tensor, Tensor]:
    """∂L/∂x, laid out as x, and ∂L/∂λ, of λ's shape and dtype; no atomics, so always the same bits."""
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(hardness)
    outer, channels, inner = known_view(grad_x, hardness)
    flat = hardness.to(x.device).contiguous()
    arguments = (in_layout_of(x, grad_x), in_layout_of(grad, grad_x), flat, grad_x)
    with _on_device(x):
        if inner == 1 and channels > 1:
            width, grid = _columns(outer, channels)
            sums = torch.empty(grid[1], channels, dtype=torch.float32, device=x.device)
            programs.backward_columns[grid](*arguments, sums, outer, channels, BASE_NUMBERS[base], _ROWS, width)
            by_hardness = sums.sum(0, dtype=torch.float64)
        else:
            width, (runs, blocks) = _runs(outer * channels, inner)
            grid = runs, min(blocks, triton.cdiv(_PROGRAMS, runs))
            sums = torch.empty(runs * grid[1], dtype=torch.float32, device=x.device)
            by_hardness = torch.empty_like(flat)
            programs.backward_runs[grid](*arguments, sums, channels, inner, BASE_NUMBERS[base], width, num_warps=_WARPS)
            programs.sum_runs[(channels,)](sums, by_hardness, outer, channels, grid[1], 1024)
    return grad_x, by_hardness.to(hardness).view(hardness.shape)


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
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def _runs(runs: int, inner: int) -> tuple[int, tuple[int, int]]:
    # the width of a program's block, and the grid: runs × blocks of a run
    width = min(_BLOCK, triton.next_power_of_2(inner))
    return width, (runs, triton.cdiv(inner, width))


def _columns(outer: int, channels: int) -> tuple[int, tuple[int, int]]:
    width = min(512, triton.next_power_of_2(channels))
    return width, (triton.cdiv(channels, width), triton.cdiv(outer, _ROWS))
