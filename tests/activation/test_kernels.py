"""The fused kernels against numpy in float64, whatever the shape, layout, dtype and number of threads; and their choice."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.references import BASES, EPS, STOCK, TOLERANCE, assert_within, each_base, formula, grid
from torch import Tensor, nn
from torch.nn import functional as F

import hf_lambda_gelu as hlg
from hf_lambda_gelu.activation.kernels import cpu as kernels_cpu
from hf_lambda_gelu.activation.kernels import dispatch as kernels

OP = torch.ops.hf_lambda_gelu
FUSED = pytest.mark.parametrize("dtype", kernels_cpu.DTYPES, ids=str)


@pytest.fixture
def fused() -> Iterator[None]:
    """Nothing but the fused kernel may run."""
    before = hlg.set_kernels("fused")
    yield
    hlg.set_kernels(before)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def check(x: Tensor, hardness: Tensor, grad: Tensor, base: str, got: tuple[Tensor, Tensor, Tensor]) -> None:
    """Value, ∂L/∂x and ∂L/∂λ, the last summed by numpy over the dimensions that λ lacks."""
    xs, hs, gs = (t.detach().double().numpy() for t in (x, hardness, grad))
    value, by_x, by_hardness, scale = formula(xs, hs, base)
    scale = scale + xs**2 * 1e-29  # a slope below fp32's range is 0
    lead = x.dim() - hardness.dim()
    dims = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(hardness.shape) if n == 1)
    summed, allowed = (each.sum(dims).reshape(hardness.shape) for each in (gs * by_hardness, np.abs(gs) * scale))
    assert got[0].shape == got[1].shape == x.shape
    assert got[2].shape == hardness.shape
    assert got[0].dtype is got[1].dtype is x.dtype
    assert_within(got[0], value, np.abs(xs), x.dtype)
    assert_within(got[1], gs * by_x, np.abs(gs), x.dtype)
    assert_within(got[2], summed, allowed, x.dtype)


def run(x: Tensor, hardness: Tensor, grad: Tensor, base: str) -> tuple[Tensor, Tensor, Tensor]:
    return OP.forward(x, hardness, base), *OP.backward(grad, x, hardness, base)


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
    assert kernels_cpu.known_view(x, hardness) == view
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


def test_hardness_that_no_view_takes() -> None:
    """Dimensions with a gap between them: no fused kernel, so torch's operations without a word, or the error asked for."""
    x, hardness = draw(4, 3, 5), 1 + torch.rand(4, 1, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(x, hardness, x, "gelu", run(x, hardness, x, "gelu"))
    before = hlg.set_kernels("fused")
    try:
        with pytest.raises(
            hlg.KernelUnavailable, match=r"λ of shape \(4, 1, 5\) over x of shape \(4, 3, 5\); hlg.set_kernels"
        ):
            OP.forward(x, hardness, "gelu")
        with pytest.raises(hlg.KernelUnavailable, match=r"no fused kernel for torch\.float64 on cpu"):
            hlg.lambda_gelu(x.double(), 2.0)
    finally:
        hlg.set_kernels(before)


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


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("own", [(), (1,), (5,), (4, 1)], ids=str)
def test_registration(dtype: torch.dtype, own: tuple[int, ...]) -> None:
    """torch's own examination of an operator: schema, autograd, fake tensors, the compiler with sizes that change."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x, hardness = draw(4, 5, dtype=dtype).requires_grad_(), (1 + torch.rand(own, dtype=wide)).requires_grad_()
    torch.library.opcheck(OP.forward, (x, hardness, "gelu"))
    torch.library.opcheck(OP.backward, (draw(4, 5, dtype=dtype), x.detach(), hardness.detach(), "silu"))
    layout = draw(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(OP.forward, (layout, torch.tensor(2.0), "gelu"))


@each_base
def test_functorch(base: str) -> None:
    """torch.func's transforms, alone and stacked, against numpy and against finite differences of it."""
    x, hardness = draw(6, 5).double(), torch.tensor(2.5, dtype=torch.float64)
    value, by_x, by_hardness, _ = formula(x.numpy(), 2.5, base)
    f = lambda x, h: hlg.lambda_gelu(x, h, base)  # noqa: E731
    loss = lambda h, x: f(x, h).sum()  # noqa: E731
    close = lambda got, wanted: np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-10, atol=1e-12)  # noqa: E731
    close(torch.func.vmap(f, (0, None))(x, hardness), value)
    close(torch.func.grad(loss)(hardness, x), by_hardness.sum())
    close(torch.func.vmap(torch.func.grad(loss), (None, 0))(hardness, x), by_hardness.sum(1))
    close(torch.func.jvp(f, (x, hardness), (torch.ones_like(x), torch.ones_like(hardness)))[1], by_x + by_hardness)
    step = 1e-5
    second = (formula(x.numpy(), 2.5 + step, base)[2] - formula(x.numpy(), 2.5 - step, base)[2]).sum() / (2 * step)
    np.testing.assert_allclose(torch.func.hessian(loss)(hardness, x).item(), second, rtol=1e-6)


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


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), hlg.LambdaGELU(2.0), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def test_export() -> None:
    """An exported network holds torch's operations alone, takes other batch sizes, and computes what the module does."""
    net = Net().eval()
    program = torch.export.export(net, (draw(3, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets
    assert not [t for t in targets if "hf_lambda_gelu" in t]
    for batch in (2, 3, 17):
        torch.testing.assert_close(program.module()(draw(batch, 8)), net(draw(batch, 8)))


def test_compile_once() -> None:
    """Neither λ nor the batch size makes a compiler start again, and nothing breaks the graph."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=count)
    for hardness, batch in ((2.0, 3), (5.0, 3), (50.0, 9), (1e4, 30)):
        net.act.set_hardness(hardness)
        x = draw(batch, 8)
        (grad,) = torch.autograd.grad(compiled(x).sum(), net.act.raw_hardness)
        (wanted,) = torch.autograd.grad(net(x).sum(), net.act.raw_hardness)
        torch.testing.assert_close(grad, wanted)
        torch.testing.assert_close(compiled(x), net(x))
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("erf" in name for name in called)
    assert not [name for name in called if "hf_lambda_gelu" in name or "autograd" in name]  # all for the compiler to fuse


@each_base
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("hardness", [1.0, 159.58, 1e4])
def test_what_a_compiler_derives(base: str, dtype: torch.dtype, hardness: float) -> None:
    """AOTAutograd's gradients of the formula against numpy's, and ReLU's own where λx overflows.

    It writes σ' as σ (1 − σ), as it does for the stock activations, which rounds at eps where the kernels do not.
    """
    torch.compiler.reset()
    wide = torch.promote_types(dtype, torch.float32)
    big = torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max], dtype=dtype)
    x = torch.cat([grid(dtype, hardness), big]).requires_grad_()
    each = torch.full(x.shape, hardness, dtype=wide, requires_grad=True)
    out = torch.compile(lambda x, h: hlg.lambda_gelu(x, h, base), backend="aot_eager", fullgraph=True)(x, each)
    by_x, by_hardness = torch.autograd.grad(out.sum(), (x, each))
    assert out[-2:].tolist() == [big[0].item(), 0.0]
    assert by_x[-2:].tolist() == [1.0, 0.0]
    assert by_hardness[-2:].tolist() == [0.0, 0.0]
    xs, out, by_x, by_hardness = x.detach()[:-2].double().numpy(), out[:-2], by_x[:-2], by_hardness[:-2]
    value, slope, expected, scale = formula(xs, hardness, base)
    assert_within(out, value, np.abs(xs), dtype)
    steepness = {
        "gelu": 0.0,
        "gelu_tanh": 1.6 + 0.22 * np.minimum(np.abs(hardness * xs), 10) ** 2,
        "quick_gelu": 1.702,
        "silu": 1.0,
    }[base]
    assert_within(by_x, slope, 1 + np.minimum(np.abs(hardness * xs), 40) * steepness, dtype)
    assert_within(by_hardness, expected, scale + xs**2 * (1e-29 + steepness), dtype)


def in_fresh_process(code: str, **environment: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("/nowhere/g++", "no C++ compiler found (looked for /nowhere/g++); install g++ or set CXX"),
        ("broken", "broken failed: no such flag"),
    ],
)
def test_without_a_compiler(compiler: str, message: str, tmp_path: Path) -> None:
    """One warning that says what is missing, then torch's operations; asked for outright, an error that says the same."""
    code = """
        import warnings, torch, hf_lambda_gelu as hlg
        x = torch.randn(50, requires_grad=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                hlg.lambda_gelu(x, 2.0).sum().backward()
        assert torch.allclose(hlg.lambda_gelu(x, 2.0), hlg.lambda_gelu_reference(x, 2.0), atol=1e-6)
        print(len(caught), caught[0].message)
        hlg.set_kernels("fused")
        try:
            hlg.lambda_gelu(x, 2.0)
        except hlg.KernelUnavailable as error:
            print(error)
        hlg.set_kernels("torch")
        hlg.lambda_gelu(x, 2.0)
    """
    if compiler == "broken":
        script = tmp_path / compiler
        script.write_text(f"#!/bin/sh\necho tried >> {tmp_path}/log\necho no such flag >&2\nexit 1\n")
        script.chmod(0o755)
        compiler = str(script)
    lines = in_fresh_process(code, CXX=compiler, TORCH_EXTENSIONS_DIR=str(tmp_path)).splitlines()
    assert lines[0].startswith("1 λ-GELU runs on torch's own operations")
    assert all(message in " ".join(part.split()) for part in (lines[0], " ".join(lines[1:])))
    assert not list(tmp_path.rglob("*.so"))
    assert compiler.startswith("/nowhere") or (tmp_path / "log").read_text() == "tried\n"  # once, not at every call


def test_built_once(tmp_path: Path) -> None:
    """Processes that start at once make one file, and a later one finds it without any compiler."""
    code = """
        import torch, hf_lambda_gelu as hlg
        hlg.set_kernels("fused")
        print(hlg.lambda_gelu(torch.tensor([1.0]), 1.0).item())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    together = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [float(process.communicate(timeout=300)[0]) for process in together] == pytest.approx([0.8413447] * 2)
    (built,) = tmp_path.rglob("*.so")
    made = built.stat().st_mtime_ns
    assert float(in_fresh_process(code, TORCH_EXTENSIONS_DIR=str(tmp_path))) == pytest.approx(0.8413447)
    assert [path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")] == [made]


def test_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is then built for this process alone."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(blocked))
    folder = kernels_cpu._folder()
    assert folder.is_dir()
    assert blocked not in folder.parents
    folder.rmdir()


def test_unknown_choice() -> None:
    with pytest.raises(ValueError, match="unknown choice of kernels 'fast': expected 'auto', 'fused' or 'torch'"):
        hlg.set_kernels("fast")
    assert kernels._choice == "auto"


def test_reference_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "torch" keeps the fused kernel from running at all."""
    monkeypatch.setattr(kernels_cpu, "forward", None)
    before = hlg.set_kernels("torch")
    try:
        assert hlg.lambda_gelu(torch.tensor([1.0]), 1.0).item() == pytest.approx(0.8413447)
    finally:
        assert hlg.set_kernels(before) == "torch"


def test_triton() -> None:
    """The kernel for CUDA, run by Triton's interpreter on a CPU: every base, dtype and view, against torch in float64."""
    pytest.importorskip("triton")
    code = """
        import torch
        from hf_lambda_gelu.activation.kernels import eager as kernels_torch
        from hf_lambda_gelu.activation.kernels import cuda as kernels_triton
        from hf_lambda_gelu.activation.bases import BASES

        def never(*_):
            raise AssertionError("the kernel waits for the device")

        torch.manual_seed(0)
        views = [((3000,), (1,)), ((70, 9), (9,)), ((130, 600), (600,)), ((2, 3, 5), (3, 1)), ((2, 3, 4100), (3, 1))]
        views += [((0,), ()), ((), ())]
        for dtype, unit in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
            for name, base in BASES.items():
                for shape, own in views if name == "gelu" else views[:2]:
                    x, grad = 3 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
                    hardness = 1 + 4 * torch.rand(own)
                    x.view(-1)[:1] = torch.finfo(dtype).max
                    torch.Tensor.item, kept = never, torch.Tensor.item
                    out = kernels_triton.forward(x, hardness, name)
                    by_x, by_hardness = kernels_triton.backward(grad, x, hardness, name)
                    torch.Tensor.item = kept
                    wide = [t.double() for t in (grad, x, hardness)]
                    exact_x, exact_hardness = kernels_torch.gradients(*wide, base)
                    for got, exact in ((out, kernels_torch.value(*wide[1:], base)), (by_x, exact_x)):
                        assert got.dtype is dtype and got.shape == x.shape
                        # a unit, not half of one: the interpreter cuts bfloat16 off where a device rounds
                        torch.testing.assert_close(got.double(), exact, rtol=unit, atol=unit)
                    assert by_hardness.dtype is torch.float32
                    torch.testing.assert_close(by_hardness.double(), exact_hardness, rtol=1e-5, atol=2e-5)
        nan = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
        print(kernels_triton.forward(nan, torch.tensor(2.0), "gelu").tolist())
        x, grad, one = torch.randn(5000), torch.randn(5000), torch.tensor(3.0)
        first, second = (kernels_triton.backward(grad, x, one, "gelu")[1] for _ in range(2))
        assert torch.equal(first, second)
    """
    assert in_fresh_process(code, TRITON_INTERPRET="1").strip() == "[nan, inf, -0.0, -0.0]"


def test_triton_for_a_device() -> None:
    """Triton's own compiler, which needs no device, takes every kernel to machine code; loads are 16 bytes wide."""
    pytest.importorskip("triton")
    code = """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from hf_lambda_gelu.activation.kernels import cuda_programs

        sizes = {"BASE": 0, "WIDTH": 4096, "ROWS": 64}
        for name in ("forward_runs", "backward_runs", "forward_columns", "backward_columns"):
            kernel = getattr(cuda_programs, name)
            types = {"hardness_ptr": "*fp32", "sum_ptr": "*fp32", "outer": "i32", "channels": "i32", "inner": "i32"}
            names = kernel.arg_names
            signature = {n: "constexpr" if n in sizes else types.get(n, "*bf16") for n in names}
            # what the launcher finds out by itself: addresses and sizes that 16 divides
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in sizes}
            constants = {n: v for n, v in sizes.items() if n in names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
            built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
            assert built.asm["cubin"]
            print(name, "ld.global.v4.b32" in built.asm["ptx"])
    """
    lines = in_fresh_process(code).splitlines()
    assert lines[:2] == ["forward_runs True", "backward_runs True"]
    assert len(lines) == 4
