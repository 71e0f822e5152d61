"""The Triton kernel for CUDA devices: cpu.cpp's formulas, one launch forward, one and a small sum backward."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from .layout import BASE_NUMBERS, in_layout_of, view

try:
    import triton
    import triton.language as tl
except ImportError:  # no CUDA build of torch
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_BLOCK = 4096  # elements for one program; its sum over them is fp32, the sum of these float64
_ROWS = 64  # rows for one program where λ changes along them


def forward(x: Tensor, hardness: Tensor, base: str) -> Tensor:
    """f(x; λ), laid out as x; see `lambda_gelu`. λ broadcasts to x such that `view` knows it."""
    out = torch.empty_like(x)
    if x.numel():
        outer, channels, inner = view(out, hardness)
        arguments = (in_layout_of(x, out), hardness.to(x.device).contiguous(), out)
        with _on_device(x):
            if inner == 1 and channels > 1:
                width, grid = _columns(outer, channels)
                _forward_columns[grid](*arguments, outer, channels, BASE_NUMBERS[base], _ROWS, width)
            else:
                width, grid = _runs(outer * channels, inner)
                _forward_runs[grid](*arguments, channels, inner, BASE_NUMBERS[base], width, num_warps=8)
    return out


def backward(grad: Tensor, x: Tensor, hardness: Tensor, base: str) -> tuple[Tensor, Tensor]:
    """∂L/∂x, laid out as x, and ∂L/∂λ, of λ's shape and dtype; no atomics, so always the same bits."""
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(hardness)
    outer, channels, inner = view(grad_x, hardness)
    flat = hardness.to(x.device).contiguous()
    arguments = (in_layout_of(x, grad_x), in_layout_of(grad, grad_x), flat, grad_x)
    with _on_device(x):
        if inner == 1 and channels > 1:
            width, grid = _columns(outer, channels)
            sums = torch.empty(grid[1], channels, 1, dtype=torch.float32, device=x.device)
            _backward_columns[grid](*arguments, sums, outer, channels, BASE_NUMBERS[base], _ROWS, width)
        else:
            width, grid = _runs(outer * channels, inner)
            sums = torch.empty(outer, channels, grid[1], dtype=torch.float32, device=x.device)
            _backward_runs[grid](*arguments, sums, channels, inner, BASE_NUMBERS[base], width, num_warps=8)
    grad_hardness = sums.sum((0, 2), dtype=torch.float64)
    return grad_x, grad_hardness.to(hardness).view(hardness.shape)


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


def _on_device(x: Tensor) -> Any:
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def _runs(runs: int, inner: int) -> tuple[int, tuple[int, int]]:
    # the width of a program's block, and the grid: runs × blocks of a run
    width = min(_BLOCK, triton.next_power_of_2(inner))
    return width, (runs, triton.cdiv(inner, width))


def _columns(outer: int, channels: int) -> tuple[int, tuple[int, int]]:
    width = min(512, triton.next_power_of_2(channels))
    return width, (triton.cdiv(channels, width), triton.cdiv(outer, _ROWS))


if triton is not None:

    @triton.jit
    def _sigmoid_gate(p, derivative):
        e = tl.exp(-p)
        r = 1.0 / (1.0 + e)
        return e * r, derivative * e * r * r

    @triton.jit
    def _gate(u, limit, BASE: tl.constexpr):
        # tail(u) = 1 − gate(u) and slope(u) = gate'(u) for u ≥ 0, both exactly 0 from the limit on
        if BASE == 0:
            e = tl.exp(u * u * -0.5)
            t = 1.0 / (u * 0.27 + 1.0)
            w = t * 0.02896109810156472 - 0.1264858464711555
            w = w * t + 0.16978612222022715
            w = w * t - 0.06921071728019693
            w = w * t + 0.10782559220824826
            w = w * t + 0.07204962797634863
            w = w * t + 0.10181060372203841
            w = w * t + 0.10754287472522422
            w = w * t + 0.10772065668199807
            tail, slope = w * t * e, e * 0.3989422804014327
        elif BASE == 1:
            tail, slope = _sigmoid_gate(
                u * (u * u * 0.07135481282526 + 1.5957691216057308), u * u * 0.21406443847579 + 1.5957691216057308
            )
        elif BASE == 2:
            tail, slope = _sigmoid_gate(u * 1.702, 1.702)
        else:
            tail, slope = _sigmoid_gate(u, 1.0)
        return tl.where(u == limit, 0.0, tail), tl.where(u == limit, 0.0, slope)

    @triton.jit
    def _parts(x, hardness, BASE: tl.constexpr):
        limit = 13.28 if BASE == 0 else (10.0385 if BASE == 1 else (51.82 if BASE == 2 else 88.2))
        a = tl.abs(x)
        a = tl.where(a > 3.4028234663852886e38, 3.4028234663852886e38, a)  # inf · 0 is no number
        u = hardness * a
        u = tl.where(u > limit, limit, u)  # unlike minimum, keeps a NaN
        tail, slope = _gate(u, limit, BASE)
        return a, u, tail, slope

    @triton.jit
    def _value(x, hardness, BASE: tl.constexpr):
        a, _u, tail, _slope = _parts(x, hardness, BASE)
        return tl.where(x < 0, -(a * tail), x - a * tail)

    @triton.jit
    def _gradients(x, grad, hardness, BASE: tl.constexpr):
        a, u, tail, slope = _parts(x, hardness, BASE)
        d = tail - u * slope
        return grad * tl.where(x < 0, d, 1.0 - d), grad * (a * (a * slope))

    @triton.jit
    def _forward_runs(x_ptr, hardness_ptr, out_ptr, channels, inner, BASE: tl.constexpr, WIDTH: tl.constexpr):
        run = tl.program_id(0).to(tl.int64)
        hardness = tl.load(hardness_ptr + run % channels).to(tl.float32)
        at = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
        inside, at = at < inner, run * inner + at
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, _value(x, hardness, BASE).to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_runs(
        x_ptr, grad_ptr, hardness_ptr, out_ptr, sum_ptr, channels, inner, BASE: tl.constexpr, WIDTH: tl.constexpr
    ):
        run = tl.program_id(0).to(tl.int64)
        hardness = tl.load(hardness_ptr + run % channels).to(tl.float32)
        at = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
        inside, at = at < inner, run * inner + at
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        by_x, by_hardness = _gradients(x, grad, hardness, BASE)
        tl.store(out_ptr + at, by_x.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(sum_ptr + run * tl.num_programs(1) + tl.program_id(1), tl.sum(by_hardness))

    @triton.jit
    def _forward_columns(
        x_ptr, hardness_ptr, out_ptr, outer, channels, BASE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
    ):
        column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        inside = column < channels
        hardness = tl.load(hardness_ptr + column, mask=inside, other=1.0).to(tl.float32)
        first = tl.program_id(1).to(tl.int64) * ROWS
        for row in range(first, tl.minimum(first + ROWS, outer)):
            at = row * channels + column
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, _value(x, hardness, BASE).to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_columns(
        x_ptr,
        grad_ptr,
        hardness_ptr,
        out_ptr,
        sum_ptr,
        outer,
        channels,
        BASE: tl.constexpr,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        inside = column < channels
        hardness = tl.load(hardness_ptr + column, mask=inside, other=1.0).to(tl.float32)
        first = tl.program_id(1).to(tl.int64) * ROWS
        total = tl.zeros((WIDTH,), dtype=tl.float32)
        for row in range(first, tl.minimum(first + ROWS, outer)):
            at = row * channels + column
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            by_x, by_hardness = _gradients(x, grad, hardness, BASE)
            tl.store(out_ptr + at, by_x.to(out_ptr.dtype.element_ty), mask=inside)
            total += by_hardness
        tl.store(sum_ptr + tl.program_id(1).to(tl.int64) * channels + column, total, mask=inside)
