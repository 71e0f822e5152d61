"""The Triton programs that `cuda` launches; importing this takes Triton, seconds, and fails where it is not installed.

`runs`: one λ for a run of neighbouring elements. `columns`: λ changes from one element to the next, as one per neuron does.
Programs lie along one axis, as the others end at 65,535. `shares` of them divide a run, or a block of columns, among them.
Triton compiles these functions: their arguments are pointers and numbers of a device, which no Python type describes.
"""

import triton
import triton.language as tl


@triton.jit
def _least(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sigmoid_gate(p, derivative):
    e = tl.exp2(p * -1.4426950408889634)
    r = 1.0 / (1.0 + e)
    return e * r, derivative * e * r * r


@triton.jit
def _gate(u, BASE: tl.constexpr):
    # tail(u) = 1 − gate(u) and slope(u) = gate'(u) for u ≥ 0; where u is cut, the exponential is exactly 0, and so are both
    if BASE == 0:
        u = _least(u, 15.0)
        e = tl.exp2(u * u * -0.7213475204444817)  # exp(−u²/2)
        # (1 − Φ(u)) / e, with the least error after the product with e: 1.7e-8, and 6e-8 in fp32 [derived]
        w = u * -3.1554208135275985e-07 + 7.708760676905513e-06
        w = w * u - 8.477084338665009e-05
        w = w * u + 0.0005636521382257342
        w = w * u - 0.0025900888722389936
        w = w * u + 0.009003845974802971
        w = w * u - 0.025471815839409828
        w = w * u + 0.061923932284116745
        w = w * u - 0.13280579447746277
        w = w * u + 0.24997256696224213
        w = w * u - 0.3989405930042267
        w = w * u + 0.4999999701976776
        tail, slope = w * e, e * 0.3989422804014327
    elif BASE == 1:
        u = _least(u, 11.0)
        tail, slope = _sigmoid_gate(
            u * (u * u * 0.07135481282526 + 1.5957691216057308), u * u * 0.21406443847579 + 1.5957691216057308
        )
    elif BASE == 2:
        u = _least(u, 65.0)
        tail, slope = _sigmoid_gate(u * 1.702, 1.702)
    else:
        u = _least(u, 110.0)
        tail, slope = _sigmoid_gate(u, 1.0)
    return u, tail, slope


@triton.jit
def _parts(x, hardness, BASE: tl.constexpr):
    a = _least(tl.abs(x), 3.4028234663852886e38)  # as inf · 0 is no number
    u, tail, slope = _gate(_least(hardness, 3.4028234663852886e38) * a, BASE)
    return a, u, tail, slope


@triton.jit
def _value(x, hardness, BASE: tl.constexpr):
    a, _u, tail, _slope = _parts(x, hardness, BASE)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tail


@triton.jit
def _gradients(x, grad, hardness, BASE: tl.constexpr):
    a, u, tail, slope = _parts(x, hardness, BASE)
    d = tail - u * slope
    return grad * tl.where(x < 0, d, 1.0 - d), grad * (a * (a * slope))


@triton.jit
def forward_runs(x_ptr, hardness_ptr, out_ptr, channels, inner, shares, BASE: tl.constexpr, WIDTH: tl.constexpr):
    run = (tl.program_id(0) // shares).to(tl.int64)
    hardness = tl.load(hardness_ptr + run % channels).to(tl.float32)
    first = (tl.program_id(0) % shares).to(tl.int64) * WIDTH
    at, start = tl.arange(0, WIDTH), run * inner + first
    inside = at < tl.minimum(inner - first, WIDTH).to(tl.int32)
    x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + at, _value(x, hardness, BASE).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_runs(
    x_ptr, grad_ptr, hardness_ptr, out_ptr, sum_ptr, channels, inner, shares, BASE: tl.constexpr, WIDTH: tl.constexpr
):
    run = (tl.program_id(0) // shares).to(tl.int64)
    hardness = tl.load(hardness_ptr + run % channels).to(tl.float32)
    at, total = tl.arange(0, WIDTH), tl.zeros((WIDTH,), dtype=tl.float32)
    for first in range((tl.program_id(0) % shares).to(tl.int64) * WIDTH, inner, shares * WIDTH):
        start = run * inner + first
        inside = at < tl.minimum(inner - first, WIDTH)
        x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        by_x, by_hardness = _gradients(x, grad, hardness, BASE)
        tl.store(out_ptr + start + at, by_x.to(out_ptr.dtype.element_ty), mask=inside)
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
    hardness, row = hardness[None, :], tl.arange(0, ROWS)[:, None]
    at, beside = row * channels + column[None, :], (column < channels)[None, :]
    for first in range((tl.program_id(0) % shares).to(tl.int64) * ROWS, outer, shares * ROWS):
        start = first * channels
        inside = (row < tl.minimum(outer - first, ROWS)) & beside
        x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + start + at, _value(x, hardness, BASE).to(out_ptr.dtype.element_ty), mask=inside)


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
    hardness, row = hardness[None, :], tl.arange(0, ROWS)[:, None]
    at, beside = row * channels + column[None, :], (column < channels)[None, :]
    share = (tl.program_id(0) % shares).to(tl.int64)
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for first in range(share * ROWS, outer, shares * ROWS):
        start = first * channels
        inside = (row < tl.minimum(outer - first, ROWS)) & beside
        x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        by_x, by_hardness = _gradients(x, grad, hardness, BASE)
        tl.store(out_ptr + start + at, by_x.to(out_ptr.dtype.element_ty), mask=inside)
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
