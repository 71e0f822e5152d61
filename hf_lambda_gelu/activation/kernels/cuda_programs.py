"""The Triton programs that `cuda` launches; importing this takes Triton, seconds, and fails where it is not installed.

`runs`: one λ for a run of neighbouring elements. `columns`: λ changes from one element to the next, as one per neuron does.
Programs lie along one axis, as the others end at 65,535. `shares` of them divide a run, or a block of columns, among them.
Triton compiles these functions: their arguments are pointers and numbers of a device, which no Python type describes.
"""

import triton
import triton.language as tl


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
    u = tl.where(hardness > 3.4028234663852886e38, 3.4028234663852886e38, hardness) * a
    u = tl.where(u > limit, limit, u)  # unlike minimum, keeps a NaN
    tail, slope = _gate(u, limit, BASE)
    return a, u, tail, slope


@triton.jit
def _value(x, hardness, BASE: tl.constexpr):
    a, _u, tail, _slope = _parts(x, hardness, BASE)
    # not −(a · tail): Triton computes 0 − …, which is +0 where the value is −0
    return tl.where(x <= 0, tl.where(x < -a, -a, x) * tail, x - a * tail)


@triton.jit
def _gradients(x, grad, hardness, BASE: tl.constexpr):
    a, u, tail, slope = _parts(x, hardness, BASE)
    d = tail - u * slope
    return grad * tl.where(x < 0, d, 1.0 - d), grad * (a * (a * slope))


@triton.jit
def forward_runs(x_ptr, hardness_ptr, out_ptr, channels, inner, shares, BASE: tl.constexpr, WIDTH: tl.constexpr):
    run = (tl.program_id(0) // shares).to(tl.int64)
    hardness = tl.load(hardness_ptr + run % channels).to(tl.float32)
    at = (tl.program_id(0) % shares).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside, at = at < inner, run * inner + at
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, _value(x, hardness, BASE).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_runs(
    x_ptr, grad_ptr, hardness_ptr, out_ptr, sum_ptr, channels, inner, shares, BASE: tl.constexpr, WIDTH: tl.constexpr
):
    run = (tl.program_id(0) // shares).to(tl.int64)
    hardness = tl.load(hardness_ptr + run % channels).to(tl.float32)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    start = (tl.program_id(0) % shares).to(tl.int64) * WIDTH
    for first in range(start, inner, shares * WIDTH):
        at = first + tl.arange(0, WIDTH)
        inside, at = at < inner, run * inner + at
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        by_x, by_hardness = _gradients(x, grad, hardness, BASE)
        tl.store(out_ptr + at, by_x.to(out_ptr.dtype.element_ty), mask=inside)
        total += by_hardness
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def sum_runs(sum_ptr, out_ptr, outer, channels, shares, WIDTH: tl.constexpr):
    channel = tl.program_id(0).to(tl.int64)
    total = tl.zeros((WIDTH,), dtype=tl.float64)
    for first in range(0, outer * shares, WIDTH):
        place = first + tl.arange(0, WIDTH)
        at = (place // shares) * channels * shares + channel * shares + place % shares
        total += tl.load(sum_ptr + at, mask=place < outer * shares, other=0.0).to(tl.float64)
    tl.store(out_ptr + channel, tl.sum(total).to(out_ptr.dtype.element_ty))


@triton.jit
def forward_columns(
    x_ptr, hardness_ptr, out_ptr, outer, channels, shares, BASE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    column = (tl.program_id(0) // shares) * WIDTH + tl.arange(0, WIDTH)
    hardness = tl.load(hardness_ptr + column, mask=column < channels, other=1.0).to(tl.float32)
    start = (tl.program_id(0) % shares).to(tl.int64) * ROWS
    for first in range(start, outer, shares * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < outer)[:, None] & (column < channels)[None, :]
        at = row[:, None] * channels + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, _value(x, hardness[None, :], BASE).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_columns(
    x_ptr,
    grad_ptr,
    hardness_ptr,
    out_ptr,
    sum_ptr,
    outer,
    channels,
    shares,
    BASE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = (tl.program_id(0) // shares) * WIDTH + tl.arange(0, WIDTH)
    hardness = tl.load(hardness_ptr + column, mask=column < channels, other=1.0).to(tl.float32)
    share = (tl.program_id(0) % shares).to(tl.int64)
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for first in range(share * ROWS, outer, shares * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < outer)[:, None] & (column < channels)[None, :]
        at = row[:, None] * channels + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        by_x, by_hardness = _gradients(x, grad, hardness[None, :], BASE)
        tl.store(out_ptr + at, by_x.to(out_ptr.dtype.element_ty), mask=inside)
        total += by_hardness
    tl.store(sum_ptr + share * channels + column, tl.sum(total, 0), mask=column < channels)


@triton.jit
def sum_columns(sum_ptr, out_ptr, channels, shares, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float64)
    for first in range(0, shares, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < shares)[:, None] & (column < channels)[None, :]
        total += tl.load(sum_ptr + row[:, None] * channels + column[None, :], mask=inside, other=0.0).to(tl.float64)
    tl.store(out_ptr + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < channels)
