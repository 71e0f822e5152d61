"""Weights on the way from a site to the next map that are not read: each is a stop with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.tracing import Trace, trace


class Scaled(torch.autograd.Function):
    """x · Wᵀ by code of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight, None


@torch.library.custom_op("hf_lambda_gelu_tests::rotated", mutates_args=())
def rotated(x: Tensor, weight: Tensor) -> Tensor:
    """x · Wᵀ as an operator that torch does not know."""
    return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


rotated.register_autograd(lambda ctx, grad: (grad @ ctx.saved_tensors[0], None), setup_context=_setup)

Step = Callable[["Net", Tensor], Tensor]
STOPS: dict[str, tuple[Step, str]] = {
    "custom function": (lambda m, h: Scaled.apply(h, m.own), "Scaled"),
    "custom operator": (lambda m, h: rotated(h, m.own), "rotated"),
    "bilinear": (lambda m, h: F.bilinear(h, h, m.stack), "Trilinear"),
    "transposed convolution": (lambda m, h: F.conv_transpose1d(h.mT, m.own[:, :, None]).mT, "Convolution"),
    "gathered": (lambda m, h: h @ m.stack[torch.tensor([1, 0])], "Bmm"),
    "computed": (lambda m, h: h @ m.own.softmax(0), "Mm"),
    "heads": (lambda m, h: torch.einsum("nbd,nde->be", h, m.stack)[None].expand(2, -1, -1), "Bmm"),
    "a stream is added": (lambda m, h: torch.baddbmm(h.detach(), h, m.stack), "Baddbmm"),
    "attention of torch": (lambda m, h: m.attention(h, h, h)[0], "Mm"),
    "detached": (lambda m, h: h @ m.own.detach().T, "matmul"),
    "data": (lambda m, h: h @ m.own.data, "matmul"),
    "vector": (lambda m, h: h * torch.mv(h[0], 2 * m.gain)[None, :, None], "Mv"),
}
PASSES: dict[str, Step] = {
    "gain": lambda m, h: h * m.gain + m.gain,
    "matrix of gains": lambda m, h: h * m.positions + m.positions,
    "norm": lambda m, h: F.layer_norm(h, (8,), m.gain, m.gain),
    "class token": lambda m, h: torch.cat([m.positions[None, :1].expand(2, 1, 8), h[:, 1:]], 1),
    "attention between activations": lambda m, h: (h @ h.mT).softmax(-1) @ h,
    "written into": lambda m, h: torch.where(h > 0, h, m.positions),
}


class Net(nn.Module):
    """A site, a step of the test's choice, and a linear map."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.second = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)
        self.own, self.stack = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(2, 8, 8))
        self.gain, self.positions = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(3, 8))
        self.stack = nn.Parameter(torch.randn(8, 8, 8) if step is STOPS["bilinear"][0] else torch.randn(2, 8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.step(self, self.act(self.first(x))))


def traced(model: nn.Module) -> Trace:
    model.eval()
    hlg.convert(model)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    flags = [p.requires_grad for p in model.parameters()]
    found = trace(model, lambda: model(x))
    assert [p.requires_grad for p in model.parameters()] == flags
    return found


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("what", STOPS)
def test_stops(what: str, frozen: bool) -> None:
    """No map is taken in its place, whether the parameters take part in the graph or are frozen."""
    step, name = STOPS[what]
    result = traced(Net(step).requires_grad_(not frozen))
    assert result.maps == {}
    assert "takes a weight in a way that cannot be refit" in result.obstacles["act"]
    assert name in result.obstacles["act"]


@pytest.mark.parametrize("what", PASSES)
def test_passes(what: str) -> None:
    """What takes a parameter element by element is passed, and the map behind it is the one."""
    result = traced(Net(PASSES[what]))
    assert result.obstacles == {}
    assert [m.label for m in result.maps["act"]] == ["second.weight"]


def test_last() -> None:
    """A stop with nothing behind it has its name too."""
    model = Net(lambda m, h: Scaled.apply(h, m.own))
    model.second = nn.Identity()
    assert "Scaled" in traced(model).obstacles["act"]


USED: dict[str, tuple[Step, str]] = {
    "table": (lambda m, h: h @ m.own.T + F.embedding(torch.tensor([[1, 2, 3]] * 2), m.own), "embedding uses it too"),
    "transpose": (lambda m, h: torch.tanh(h @ m.own) @ m.own.T, "used as its transpose too"),
    "norm of it": (lambda m, h: h @ m.own / torch.linalg.matrix_norm(m.own), "matrix_norm uses it too"),
}


@pytest.mark.parametrize("what", USED)
def test_used_elsewhere(what: str) -> None:
    """A refit would change what else the parameter does, so that it is none."""
    step, reason = USED[what]
    result = traced(Net(step))
    assert result.maps == {}
    assert result.obstacles["act"].startswith("it feeds own")
    assert reason in result.obstacles["act"]


def test_compiled() -> None:
    """A compiled part runs operation by operation where they are watched: its map is the one, and not the next."""
    model = Net(lambda m, h: m.hidden(h))
    model.hidden = torch.compile(nn.Linear(8, 8), backend="aot_eager")
    assert [m.label for m in traced(model).maps["act"]] == ["hidden._orig_mod.weight"]
