"""The kernels for CUDA on a device: against numpy in float64, beyond 2³¹ elements, in graphs and on other streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.kernel_runs import check, draw, run
from support.references import BASES, TOLERANCE, formula
from torch.nn import functional as F

import hf_lambda_gelu as hlg

pytestmark = pytest.mark.cuda

DTYPES = [dtype for dtype in TOLERANCE if dtype is not torch.float64]
# shape of x, shape of λ: runs, columns, images, blocks that do not come out even, several programs for one sum
LAYOUTS = [
    ((3000,), (1,)),
    ((7, 1100, 1024), (1,)),
    ((70, 9), (9,)),
    ((130, 600), (600,)),
    ((2, 3, 5), (3, 1)),
    ((2, 3, 4100), (3, 1)),
    ((), ()),
    ((0,), ()),
]


@pytest.fixture(autouse=True)
def fused() -> object:
    """The kernels and nothing in their place."""
    before = hlg.set_kernels("fused")
    yield
    hlg.set_kernels(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("shape", "own"), LAYOUTS, ids=str)
def test_value_and_gradients(dtype: torch.dtype, base: str, shape: tuple[int, ...], own: tuple[int, ...]) -> None:
    x, grad = draw(*shape, dtype=dtype).cuda(), draw(*shape, dtype=dtype, seed=1).cuda()
    hardness = (1 + 4 * torch.rand(own, generator=torch.Generator().manual_seed(2))).cuda()
    got = run(x, hardness, grad, base)
    assert all(each.is_cuda for each in got)
    check(x.cpu(), hardness.cpu(), grad.cpu(), base, tuple(each.cpu() for each in got))


@pytest.mark.parametrize("hardness", [1.0, 3.0, 160.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_over_the_whole_line(dtype: torch.dtype, hardness: float) -> None:
    """From the least numbers to the largest, with infinities, zeros of both signs and NaN."""
    exponents = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    x = torch.cat([2.0**exponents, -(2.0**exponents), torch.linspace(-9, 9, 8001, dtype=torch.float64) / hardness])
    x = torch.cat([x, torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max, 0.0])]).to(dtype)
    x = x[x.isfinite()]
    out = hlg.lambda_gelu(x.cuda(), hardness).cpu().double().numpy()
    wanted, *_ = formula(x.double().numpy(), hardness, "gelu")
    rounding, arithmetic = TOLERANCE[dtype]
    tiny = float(torch.finfo(dtype).tiny)
    np.testing.assert_array_less(
        np.abs(out - wanted), rounding * np.abs(wanted) + arithmetic * np.abs(x.double().numpy()) + tiny
    )
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0], dtype=dtype, device="cuda")
    first, *others = hlg.lambda_gelu(odd, hardness).tolist()
    assert first != first
    assert others == [float("inf"), 0.0, 0.0, 0.0]


def test_beyond_32_bits() -> None:
    count = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 8 * count:
        pytest.skip("needs 16 GiB of free device memory")
    x = torch.full((count,), 2.0, dtype=torch.bfloat16, device="cuda")
    x[-3000:] = -1.0
    one = torch.tensor(1.5, device="cuda")
    out = torch.ops.hf_lambda_gelu.forward(x, one, "gelu")
    wanted = torch.from_numpy(formula(np.array([2.0, -1.0]), 1.5, "gelu")[0]).to(torch.bfloat16)
    assert out[:-3000].eq(wanted[0].item()).all()
    assert out[-3000:].eq(wanted[1].item()).all()
    by_x, by_hardness = torch.ops.hf_lambda_gelu.backward(x, x, one, "gelu")
    slope = formula(np.array([2.0, -1.0]), 1.5, "gelu")[2] * np.array([2.0, -1.0])
    torch.testing.assert_close(by_hardness.item(), slope[0] * (count - 3000) + slope[1] * 3000, rtol=1e-5, atol=0)
    assert by_x.shape == x.shape


@pytest.mark.parametrize("own", [(1,), (1024,)], ids=str)
def test_the_same_bits_each_time(own: tuple[int, ...]) -> None:
    """No atomics: the gradient of λ is summed in one order, whatever runs beside it."""
    x, grad = draw(5000, 1024).cuda(), draw(5000, 1024, seed=1).cuda()
    hardness = torch.full(own, 2.5, device="cuda")
    first = run(x, hardness, grad, "gelu")
    noise = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(noise):
            torch.mm(x.T, x)
        assert all(torch.equal(a, b) for a, b in zip(first, run(x, hardness, grad, "gelu"), strict=True))


def test_the_current_stream() -> None:
    """Work waits for what came before it on its own stream, and on no other."""
    stream = torch.cuda.Stream()
    x, hardness = torch.zeros(2**22, device="cuda"), torch.tensor(2.0, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        out = hlg.lambda_gelu(x, hardness)
    stream.synchronize()
    assert out.unique().numel() == 1
    torch.testing.assert_close(out[0].item(), float(formula(np.ones(1), 2.0, "gelu")[0][0]), rtol=1e-6, atol=0)


def test_in_a_graph() -> None:
    """A CUDA graph that was recorded once gives what a fresh call gives, forward and backward, on other numbers."""
    module = hlg.LambdaGELU(2.0).cuda()
    x = draw(64, 300).cuda().requires_grad_()
    for _ in range(3):  # compiled and allocated
        module(x).sum().backward()
    x.grad = module.unclipped_hardness.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
        out.sum().backward()
    x.data.copy_(draw(64, 300, seed=5))
    graph.replay()
    fresh = x.detach().clone().requires_grad_()
    again = hlg.LambdaGELU(2.0).cuda()
    wanted = again(fresh)
    wanted.sum().backward()
    assert torch.equal(out, wanted)
    assert torch.equal(x.grad, fresh.grad)
    assert torch.equal(module.unclipped_hardness.grad, again.unclipped_hardness.grad)


def test_under_autocast_and_channels_last() -> None:
    images = draw(4, 6, 9, 9).cuda().contiguous(memory_format=torch.channels_last)
    hardness = torch.linspace(1, 4, 6, device="cuda").view(6, 1, 1)
    out = hlg.lambda_gelu(images, hardness)
    assert out.stride() == images.stride()
    wanted, *_ = formula(images.cpu().double().numpy(), hardness.cpu().double().numpy(), "gelu")
    torch.testing.assert_close(out.cpu().double(), torch.from_numpy(wanted), rtol=1e-6, atol=1e-6)
    with torch.autocast("cuda", torch.bfloat16):
        assert hlg.LambdaGELU(1.0).cuda()(F.linear(draw(4, 8).cuda(), draw(5, 8).cuda())).dtype is torch.bfloat16


def test_inside_a_compiler() -> None:
    """torch.compile makes one graph of it, which λ does not recompile."""
    module = hlg.LambdaGELU(2.0).cuda()
    linear = torch.nn.Linear(64, 128).cuda()
    whole = torch.compile(torch.nn.Sequential(linear, module), fullgraph=True)
    x = draw(32, 64).cuda()
    for value in (2.0, 3.5, 1.0):
        module.set_hardness(value)
        torch.testing.assert_close(whole(x), module(linear(x)), rtol=1e-5, atol=1e-5)
