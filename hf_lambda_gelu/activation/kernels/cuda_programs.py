"""The Triton programs that `cuda` launches; importing this takes Triton, seconds, and fails where it is not installed.

`runs`: one λ for a run of neighbouring elements. `columns`: λ changes from one element to the next, as one per neuron does.
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
    return tl.where(x < 0, -(a * tail), x - a * tail)


@triton.jit
def _gradients(x, grad, hardness, BASE: tl.constexpr):
    a, u, tail, slope = _parts(x, hardness, BASE)
    d = tail - u * slope
    return grad * tl.where(x < 0, d, 1.0 - d), grad * (a * (a * slope))


@triton.jit
def forward_runs(x_ptr, hardness_ptr, out_ptr, channels, inner, BASE: tl.constexpr, WIDTH: tl.constexpr):
    run = tl.program_id(0).to(tl.int64)
    hardness = tl.load(hardness_ptr + run % channels).to(tl.float32)
    at = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside, at = at < inner, run * inner + at
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, _value(x, hardness, BASE).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_runs(x_ptr, grad_ptr, hardness_ptr, out_ptr, sum_ptr, channels, inner, BASE: tl.constexpr, WIDTH: tl.constexpr):
    run = tl.program_id(0).to(tl.int64)
    hardness = tl.load(hardness_ptr + run % channels).to(tl.float32)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    start = tl.program_id(1).to(tl.int64) * WIDTH
    for first in range(start, inner, tl.num_programs(1) * WIDTH):
        at = first + tl.arange(0, WIDTH)
        inside, at = at < inner, run * inner + at
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        by_x, by_hardness = _gradients(x, grad, hardness, BASE)
        tl.store(out_ptr + at, by_x.to(out_ptr.dtype.element_ty), mask=inside)
        total += by_hardness
    tl.store(sum_ptr + run * tl.num_programs(1) + tl.program_id(1), tl.sum(total))


@triton.jit
def sum_runs(sum_ptr, out_ptr, outer, channels, blocks, WIDTH: tl.constexpr):
    channel = tl.program_id(0).to(tl.int64)
    total = tl.zeros((WIDTH,), dtype=tl.float64)
    for first in range(0, outer * blocks, WIDTH):
        place = first + tl.arange(0, WIDTH)
        at = (place // blocks) * channels * blocks + channel * blocks + place % blocks
        total += tl.load(sum_ptr + at, mask=place < outer * blocks, other=0.0).to(tl.float64)
    tl.store(out_ptr + channel, tl.sum(total).to(out_ptr.dtype.element_ty))


@triton.jit
def forward_columns(
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
def backward_columns(
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
