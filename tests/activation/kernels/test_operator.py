"""The operator for torch: its registration, functorch, export and what a compiler makes of it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from support.kernel_runs import OP, draw
from support.references import TOLERANCE, assert_within, each_base, formula, grid
from torch import Tensor, nn
from torch.autograd import forward_ad

import hf_lambda_gelu as hlg


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
def test_forwards_and_stacks(base: str) -> None:
    """Forward-mode AD of the value and of its gradient, and stacks of gradients, in float32, against numpy in float64."""
    x, hardness = draw(7).requires_grad_(), torch.tensor([2.5], requires_grad=True)
    _, by_x, by_hardness, _ = formula(x.detach().double().numpy(), 2.5, base)
    close = lambda got, wanted: np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)  # noqa: E731
    out = hlg.lambda_gelu(x, hardness, base)
    stacked = torch.autograd.grad(out, (x, hardness), torch.eye(7), is_grads_batched=True, retain_graph=True)
    close(stacked[0], np.diag(by_x))
    close(stacked[1][:, 0], by_hardness)
    with forward_ad.dual_level():
        pair = [forward_ad.make_dual(t.detach(), torch.ones_like(t)) for t in (x, hardness)]
        close(forward_ad.unpack_dual(hlg.lambda_gelu(*pair, base)).tangent, by_x + by_hardness)
        (grad,) = torch.autograd.grad(out, x, forward_ad.make_dual(torch.ones(7), torch.full((7,), 3.0)))
        close(forward_ad.unpack_dual(grad).tangent, 3.0 * by_x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), hlg.LambdaGELU(2.0), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces(tmp_path: Path) -> None:
    """torch.fx and torch.jit.trace take λ as a parameter: one that is set later, or that has a gradient, is the module's."""
    net = Net().eval()
    x = draw(3, 8)
    graph, script = torch.fx.symbolic_trace(net), torch.jit.trace(net, x)
    net.act.set_hardness(5.0)
    for traced in (graph, script):
        (grad,) = torch.autograd.grad(traced(x).sum(), net.act.unclipped_hardness)
        (wanted,) = torch.autograd.grad(net(x).sum(), net.act.unclipped_hardness)
        torch.testing.assert_close(traced(x), net(x))
        torch.testing.assert_close(grad, wanted)
    torch.jit.save(script, tmp_path / "net.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "net.pt")(x), net(x))
    torch.testing.assert_close(copy.deepcopy(graph)(x), net(x))


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
        (grad,) = torch.autograd.grad(compiled(x).sum(), net.act.unclipped_hardness)
        (wanted,) = torch.autograd.grad(net(x).sum(), net.act.unclipped_hardness)
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
