"""The fused kernels against numpy in float64, whatever the shape, layout, dtype and number of threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.kernel_runs import OP, check, draw, run
from support.references import BASES, EPS, STOCK, TOLERANCE, each_base, formula, grid
from torch import Tensor
from torch.nn import functional as F

import hf_lambda_gelu as hlg
from hf_lambda_gelu.activation.kernels import cpu

FUSED = pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)


@pytest.fixture
def fused() -> Iterator[None]:
    """Nothing but the fused kernel may run."""
    before = hlg.set_kernels("fused")
    yield
    hlg.set_kernels(before)


@each_base
@FUSED
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4095, 4096, 4097, 100_003])
def test_sizes(base: str, dtype: torch.dtype, size: int, fused: None) -> None:
    """Vector widths, blocks and what is left over at their ends."""
    x, grad, hardness = draw(size, dtype=dtype), draw(size, dtype=dtype, seed=1), torch.tensor([2.7])
    check(x, hardness, grad, base, run(x, hardness, grad, base))


VIEWS = [
    ((37, 20), (20,), (37, 20, 1)),
    ((3, 70, 20), (20,), (210, 20, 1)),
    ((3, 70, 20), (70, 20), (3, 1400, 1)),
    ((3, 7, 20), (3, 7, 20), (1, 420, 1)),
    ((3, 7, 20), (7, 1), (3, 7, 20)),
    ((3, 7, 20), (3, 1, 1), (1, 3, 140)),
    ((2, 3, 70, 70), (3, 1, 1), (2, 3, 4900)),
    ((2, 3, 70, 70), (1, 1, 1, 1), (1, 1, 29400)),
    ((2, 1, 9), (2, 1, 9), (1, 18, 1)),
]


@each_base
@FUSED
@pytest.mark.parametrize(("shape", "own", "view"), VIEWS, ids=str)
def test_one_hardness_per_neuron(
    base: str, dtype: torch.dtype, shape: tuple[int, ...], own: tuple[int, ...], view: tuple[int, ...], fused: None
) -> None:
    """λ along the last dimension, along channels and along both; numpy broadcasts and sums."""
    x, grad = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    hardness = 1 + 9 * torch.rand(own, generator=torch.Generator().manual_seed(2))
    assert cpu.known_view(x, hardness) == view
    check(x, hardness, grad, base, run(x, hardness, grad, base))


LAYOUTS = {
    "strided": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(1, 3),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "offset": lambda x: x.flatten()[1:].view(1, 1, 1, -1),
    "backwards": lambda x: x.flip(3),
}


@FUSED
@pytest.mark.parametrize(("one", "two"), list(itertools.permutations(LAYOUTS, 2)))
def test_layouts(dtype: torch.dtype, one: str, two: str, fused: None) -> None:
    """x and the gradient that comes in each laid out in its own way; what goes out is laid out as F.gelu does it."""
    x, grad = LAYOUTS[one](draw(4, 4, 4, 4, dtype=dtype)), LAYOUTS[two](draw(4, 4, 4, 4, dtype=dtype, seed=1))
    if x.shape != grad.shape:
        grad = LAYOUTS[two](draw(4, 4, 4, 4, dtype=dtype, seed=1)).flatten()[:1].expand(x.shape)
    for hardness in (torch.tensor(3.0), 1 + torch.arange(x.shape[1], dtype=torch.float32).view(-1, 1, 1)):
        got = run(x, hardness, grad, "gelu")
        check(x, hardness, grad, "gelu", got)
        assert got[0].stride() == got[1].stride() == F.gelu(x).stride()


@each_base
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("hardness", [1.0, 1.693, 10.0, 159.58, 1e3, 1e4])
def test_accuracy_rule(base: str, dtype: torch.dtype, hardness: float) -> None:
    """error(ours) ≤ 2 error(stock activation) + half a unit: value and gradient, at the places where each bends most."""
    x, stock_x = grid(dtype, hardness), grid(dtype, 1.0)
    leaf, stock_leaf = x.clone().requires_grad_(), stock_x.clone().requires_grad_()
    out, stock = hlg.lambda_gelu(leaf, hardness, base), STOCK[base](stock_leaf)
    out.sum().backward()
    stock.sum().backward()

    def errors(x: Tensor, hardness: float, *got: Tensor) -> list[float]:
        xs = x.double().numpy()
        near = np.abs(xs) < 30
        exact = formula(xs, hardness, base)[:2]
        return [np.abs(g.detach().double().numpy() - e)[near].max() for g, e in zip(got, exact, strict=True)]

    ours, theirs = errors(x, hardness, out, leaf.grad), errors(stock_x, 1.0, stock, stock_leaf.grad)
    assert all(a <= 2 * b + EPS[dtype] / 2 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@FUSED
@pytest.mark.parametrize("sign", ["one sign", "both signs"])
def test_sum_over_many(dtype: torch.dtype, sign: str, fused: None) -> None:
    """∂L/∂λ over 50 million elements, to 1e-4 of numpy's sum in float64."""
    size, piece = 50_000_000, 1_000_000
    torch.manual_seed(0)
    x, grad = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    if sign == "one sign":
        grad = grad.abs_()
    total = 0.0
    for i in range(0, size, piece):  # at λ = 1, x² φ(x)
        xs, gs = x[i : i + piece].double().numpy(), grad[i : i + piece].double().numpy()
        total += float((gs * xs**2 * np.exp(-(xs**2) / 2)).sum() / np.sqrt(2 * np.pi))
    _, got = OP.backward(grad, x, torch.ones(()), "gelu")
    assert got.item() == pytest.approx(total, rel=1e-4)


@FUSED
def test_same_bits(dtype: torch.dtype, fused: None) -> None:
    """Twice the same, and the same with one thread as with three."""
    for hardness in (torch.tensor([3.0]), 1 + torch.rand(700)):
        x, grad = draw(400, 700, dtype=dtype), draw(400, 700, dtype=dtype, seed=1)
        before, results = torch.get_num_threads(), []
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            results.append(run(x, hardness, grad, "gelu"))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@FUSED
def test_nothing_is_lost(dtype: torch.dtype, fused: None) -> None:
    """A NaN in x, λ or the gradient stays one; infinities behave as in ReLU, whose limit they are."""
    inf, nan = float("inf"), float("nan")
    one, grad = torch.tensor(2.0), torch.ones(20, dtype=dtype)
    x = torch.tensor([inf, -inf, nan, 0.0] * 5, dtype=dtype)
    for base in BASES:
        value, by_x, by_hardness = run(x, one, grad, base)
        assert value[:2].tolist() == [inf, 0.0]
        assert by_x[[0, 1, 3]].tolist() == [1.0, 0.0, 0.5]
        assert value[2].isnan()
        assert by_x[2].isnan()
        assert by_hardness.isnan()
        assert run(x[:2], one, grad[:2], base)[2] == 0.0
        assert OP.forward(grad, torch.tensor(nan), base).isnan().all()
        assert all(t.isnan().all() for t in OP.backward(grad * nan, grad, one, base))


@each_base
@FUSED
def test_double_backward(base: str, dtype: torch.dtype, fused: None) -> None:
    """∂²L/∂λ∂x and ∂²L/∂λ² behind the fused forward pass, against finite differences of numpy's formula."""
    x, hardness = draw(64, dtype=dtype).requires_grad_(), torch.tensor([2.0], requires_grad=True)
    by_x, by_hardness = torch.autograd.grad(hlg.lambda_gelu(x, hardness, base).sum(), (x, hardness), create_graph=True)
    mixed, twice = torch.autograd.grad(by_x.float().sum() + by_hardness.sum(), (x, hardness))
    step, xs = 1e-4, x.detach().double().numpy()

    def slope(x: np.ndarray, h: float) -> np.ndarray:
        return np.add(*formula(x, h, base)[1:3])

    np.testing.assert_allclose(
        mixed.double().numpy(), (slope(xs + step, 2.0) - slope(xs - step, 2.0)) / (2 * step), rtol=1e-2, atol=2e-3
    )
    expected = (slope(xs, 2.0 + step) - slope(xs, 2.0 - step)).sum() / (2 * step)
    assert twice.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
