"""`lambda_gelu` against formulas in float64 numpy and scipy that share nothing with the package."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from support.references import BASES, EPS, STOCK, TOLERANCE, assert_within, each_base, formula, grid
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hf_lambda_gelu as hlg
from hf_lambda_gelu.activation.kernels import eager

HARDNESSES = (1.0, 1.693, 10.0, 159.58, 1e4)
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(params=["auto", "torch"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Fused kernels where there are some, then torch's operations for all."""
    before = hlg.set_kernels(request.param)
    yield request.param
    hlg.set_kernels(before)


@each_base
@each_dtype
@pytest.mark.parametrize("hardness", HARDNESSES)
def test_value_and_gradients(base: str, dtype: torch.dtype, hardness: float, kernels: str) -> None:
    """Every element of f, ∂f/∂x and ∂f/∂λ against numpy's closed forms at the very numbers the tensors hold."""
    x = grid(dtype, hardness).requires_grad_()
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    each = torch.full(x.shape, hardness, dtype=wide).requires_grad_()  # one λ per element shows every term of the sum
    one = torch.tensor([hardness], dtype=wide).requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    out = hlg.lambda_gelu(x, each, base)
    grad_x, grad_each = torch.autograd.grad(out, (x, each), upstream)
    grad_one = torch.autograd.grad(hlg.lambda_gelu(x, one, base), one, upstream)[0]

    xs, weights = x.detach().double().numpy(), upstream.double().numpy()
    value, by_x, by_hardness, scale = formula(xs, each.detach().double().numpy(), base)
    scale = scale + xs**2 * 1e-29  # times 8 eps: a slope below fp32's range is 0
    assert out.dtype is grad_x.dtype is dtype
    assert grad_each.dtype is grad_one.dtype is wide
    assert grad_one.shape == (1,)
    assert torch.equal(out.signbit(), x.signbit())  # a gate is never negative: −0 stays −0
    assert_within(out, value, np.abs(xs), dtype)
    assert_within(grad_x, weights * by_x, np.abs(weights), dtype)
    assert_within(grad_each, weights * by_hardness, np.abs(weights) * scale, dtype)
    assert_within(grad_one, (weights * by_hardness).sum(keepdims=True), (np.abs(weights) * scale).sum(), dtype)


@each_base
@each_dtype
def test_no_worse_than_stock(base: str, dtype: torch.dtype, kernels: str) -> None:
    """The largest error at λ = 1, measured by numpy, is at most twice the stock activation's, plus half a unit."""
    x = grid(dtype, 1.0)
    value, by_x, _, _ = formula(x.double().numpy(), 1.0, base)
    errors: list[np.ndarray] = []
    for function in (lambda z: hlg.lambda_gelu(z, 1.0, base), STOCK[base]):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        near = np.abs(x.double().numpy()) < 30  # beyond, both are exact
        gaps = [np.abs(got.detach().double().numpy() - exact) for got, exact in ((out, value), (grad, by_x))]
        errors.append(np.array([gap[near].max() for gap in gaps]))
    assert (errors[0] <= 2 * errors[1] + EPS[dtype] / 2).all(), errors


@each_base
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1, 1), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("block", [1 << 17, 5])
def test_gradcheck(base: str, shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """First and second derivatives in x and λ against finite differences, with and without blocks."""
    monkeypatch.setattr(eager, "_BLOCK", block)
    x = torch.tensor([[[0.0, -1.3, 0.4], [2.2, -0.2, 1.1]], [[-2.5, 0.7, -0.7], [3.0, 1e-3, -0.1]]], dtype=torch.float64)
    hardness = torch.linspace(1.2, 2.7, math.prod(shape), dtype=torch.float64).reshape(shape)
    inputs = (x.requires_grad_(), hardness.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: hlg.lambda_gelu(a, b, base), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: hlg.lambda_gelu(a, b, base), inputs)


@each_base
@pytest.mark.parametrize("shape", [(5,), (3, 1), (4, 3, 1), (4, 1, 1)], ids=str)
def test_hardness_per_neuron(base: str, shape: tuple[int, ...], kernels: str) -> None:
    """numpy's broadcasting, and its sum over the broadcast dimensions, stand for autograd's."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    hardness = (1 + 20 * torch.rand(shape, dtype=torch.float64, generator=generator)).requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    out = hlg.lambda_gelu(x, hardness, base)
    grads = torch.autograd.grad(out, (x, hardness), upstream)
    value, by_x, by_hardness, _ = formula(x.detach().numpy(), hardness.detach().numpy(), base)
    lead = x.dim() - len(shape)
    dims = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(shape) if n == 1)
    summed = (upstream.numpy() * by_hardness).sum(dims, keepdims=True).reshape(shape)
    for got, expected in ((out, value), (grads[0], upstream.numpy() * by_x), (grads[1], summed)):
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-12, atol=1e-13)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "strided": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(1, 3),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "one_row": lambda x: x[0, 0, 0],
    "empty": lambda x: x[:, :0],
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["gelu", "silu"])
def test_blocks(layout: str, dtype: torch.dtype, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, the last one partial, against numpy and against one piece, for every memory layout of x and gradient."""
    generator = torch.Generator().manual_seed(2)
    storage = torch.randn(2, 3, 4, 6, generator=generator).to(dtype)
    weights = LAYOUTS[layout](torch.randn(2, 3, 4, 6, generator=generator).to(dtype))
    calls: list[int] = []
    value = eager.value
    monkeypatch.setattr(eager, "value", lambda x, *rest: (calls.append(x.numel()), value(x, *rest))[1])
    results: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr("hf_lambda_gelu.activation.kernels.dispatch._choice", "torch")
    for block in (1 << 17, 5):
        monkeypatch.setattr(eager, "_BLOCK", block)
        calls.clear()
        leaf, hardness = storage.clone().requires_grad_(), torch.tensor([3.0], requires_grad=True)
        x = LAYOUTS[layout](leaf)
        out = hlg.lambda_gelu(x, hardness, base)
        grads = torch.autograd.grad(out, (x, hardness), weights)
        assert out.shape == grads[0].shape == x.shape
        assert calls == [x.numel()] if x.numel() <= block else len(calls) == math.ceil(x.numel() / block)
        xs, ws = x.detach().double().numpy(), weights.double().numpy()
        exact, by_x, by_hardness, scale = formula(xs, 3.0, base)
        assert_within(out, exact, np.abs(xs), dtype)
        assert_within(grads[0], ws * by_x, np.abs(ws), dtype)
        assert_within(grads[1], (ws * by_hardness).sum(keepdims=True).reshape(1), (np.abs(ws) * scale).sum(), dtype)
        results.append((out, *grads))
    for whole, blocked in zip(*results, strict=True):
        torch.testing.assert_close(blocked, whole)


@pytest.mark.parametrize(
    "hardness",
    [
        2.0,
        torch.tensor(2.0, requires_grad=True),
        torch.tensor([2.0], requires_grad=True),
    ],
    ids=["number", "zero-dim", "shape (1,)"],
)
def test_zero_dim(hardness: Tensor | float, kernels: str) -> None:
    """The shape rule of F.gelu, and numpy's numbers, for an x without dimensions."""
    x = torch.tensor(0.5, requires_grad=True)
    out = hlg.lambda_gelu(x, hardness)
    out.backward(torch.ones_like(out))
    value, by_x, by_hardness, _ = formula(np.array(0.5), 2.0, "gelu")
    assert out.shape == x.grad.shape == F.gelu(x).shape
    assert (out.item(), x.grad.item()) == (pytest.approx(float(value), rel=1e-6), pytest.approx(float(by_x), rel=1e-6))
    if isinstance(hardness, Tensor):
        (grad,) = torch.autograd.grad(hlg.lambda_gelu(x, hardness), hardness)
        assert grad.item() == pytest.approx(float(by_hardness), rel=1e-6)


@pytest.mark.parametrize(
    ("base", "dtype"),
    [pytest.param(b, d, id=f"{b}-{d}") for b in BASES for d in TOLERANCE],
)
def test_extreme_inputs(base: str, dtype: torch.dtype, kernels: str) -> None:
    """Where λx overflows, value and gradients are exactly ReLU's and ∂f/∂λ is exactly 0, the limits on paper."""
    top = torch.finfo(dtype).max
    big = torch.tensor([top, top / 3, min(top, 1e37)], dtype=torch.float64).to(dtype)
    for hardness in (1.0, 159.58, 1e4):
        x = torch.cat([big, -big]).requires_grad_()
        each = torch.full(x.shape, hardness, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
        out = hlg.lambda_gelu(x, each, base)
        grad_x, grad_each = torch.autograd.grad(out, (x, each), torch.ones_like(out))
        assert torch.equal(out, x.detach().clamp(min=0))
        assert torch.equal(grad_x, (x.detach() > 0).to(dtype))
        assert torch.equal(grad_each, torch.zeros_like(each))


@pytest.mark.parametrize("size", [1000, eager._BLOCK + 3], ids=["one piece", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_memory(size: int, dtype: torch.dtype, kernels: str) -> None:
    """autograd's own hooks count the bytes kept for the backward pass: what F.gelu keeps, plus λ."""

    def kept(function: Callable[[Tensor], Tensor]) -> dict[int, int]:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(x)
        return saved

    x = torch.randn(size).to(dtype).requires_grad_()
    hardness = torch.tensor([2.0], requires_grad=True)
    ours = kept(lambda z: hlg.lambda_gelu(z, hardness))
    assert ours == kept(F.gelu) | {hardness.data_ptr(): hardness.nbytes}
    assert sum(kept(hlg.LambdaGELU()).values()) <= x.nbytes + 64  # λ, s and s / t


def test_autocast(kernels: str) -> None:
    """bf16 from autocast comes back in bf16 with numpy's value, fp32 is left alone to the bit, λ's gradient is fp32."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(6, 9), torch.randn(7, 6)
    hardness = torch.tensor([3.0], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = linear(x)
        out = hlg.lambda_gelu(hidden, hardness)
        untouched = hlg.lambda_gelu(x, hardness)
    (grad,) = torch.autograd.grad(out.float().sum(), hardness)
    zs = hidden.detach().double().numpy()
    value, _, by_hardness, scale = formula(zs, 3.0, "gelu")
    assert hidden.dtype is out.dtype is torch.bfloat16
    assert_within(out, value, np.abs(zs), torch.bfloat16)
    assert_within(grad, by_hardness.sum().reshape(1), scale.sum(), torch.bfloat16)
    assert torch.equal(untouched, hlg.lambda_gelu(x, hardness))


@pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"
)
def test_compile() -> None:
    """One graph from torch's own compiler, whose kernels are not ours, gives value and gradients of numpy's formula."""
    torch.manual_seed(0)
    x, hardness = torch.randn(6, 8, requires_grad=True), torch.tensor([2.0], requires_grad=True)
    compiled = torch.compile(lambda a, b: hlg.lambda_gelu(a, b, "gelu_tanh"), fullgraph=True)
    out = compiled(x, hardness)
    grads = torch.autograd.grad(out.sum(), (x, hardness))
    xs = x.detach().double().numpy()
    value, by_x, by_hardness, scale = formula(xs, 2.0, "gelu_tanh")
    assert_within(out, value, np.abs(xs), torch.float32)
    assert_within(grads[0], by_x, 1.0, torch.float32)
    assert_within(grads[1], by_hardness.sum().reshape(1), scale.sum(), torch.float32)
    torch.testing.assert_close(out, hlg.lambda_gelu(x, hardness, "gelu_tanh"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, kernels: str) -> None:
    """Recomputing the forward pass gives, to the bit, the gradients of a run that did not."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 6, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    hardness = torch.tensor([3.0], requires_grad=True)

    def block(a: Tensor) -> Tensor:
        return hlg.lambda_gelu(a @ w, hardness).square()

    plain = torch.autograd.grad(block(x).sum(), (x, w, hardness))
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, (x.grad, w.grad, hardness.grad), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.zeros(2), 1.0, "relu"),
            ValueError,
            "unknown base 'relu': expected one of 'gelu', 'gelu_tanh', 'quick_gelu'",
        ),
        ((torch.zeros(2), 1.0, ["gelu"]), ValueError, "unknown base"),
        ((torch.zeros(2), 0.999), ValueError, "hardness must be a finite number >= 1 .* got 0.999"),
        ((torch.zeros(2), -5), ValueError, "got -5"),
        ((torch.zeros(2), float("nan")), ValueError, "got nan"),
        ((torch.zeros(2), float("inf")), ValueError, "got inf; for ReLU itself, use relu_ize"),
        ((torch.zeros(2, dtype=torch.int64), 1.0), TypeError, "got torch.int64: convert it"),
        ((torch.zeros(2, dtype=torch.complex64), 1.0), TypeError, "got torch.complex64"),
        (([0.0, 1.0], 1.0), TypeError, "expects a floating point tensor, got list"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    """Each message names what it got and what would do."""
    with pytest.raises(error, match=message):
        hlg.lambda_gelu(*arguments)
