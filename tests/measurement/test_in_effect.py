"""Whether sites are what runs: blocks whose fused path stands back for hooks, forwards bound anew, experts that idle."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from support import tiny
from support.experts import experts_model
from torch import Tensor, nn
from torch.nn import functional as F

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement.in_effect import counting_calls

SITES = [f"model.layers.{i}.mlp.act_fn" for i in (0, 1)]


class Fusing(nn.Module):
    """A block of one's own that does what torch's layers do: a fused path in eval mode, unless there are hooks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
        if self.training or hooked or torch.is_grad_enabled():
            return x + self.down(self.act(self.up(x)))
        return x + F.linear(F.gelu(F.linear(x, self.up.weight, self.up.bias)), self.down.weight, self.down.bias)


class Recorded(Fusing):
    """The same, but only where it knows the activation: it takes every ReLU for the GELU that it was built with."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.act, hlg.LambdaGELU):
            return x + self.down(self.act(self.up(x)))
        return super().forward(x)


def batches(count: int = 6) -> list[Tensor]:
    return [torch.randn(16, 6, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def state(model: nn.Module) -> list[tuple[str, Any]]:
    weights = [(name, value.clone()) for name, value in model.state_dict().items()]
    return [*((n, w.tolist()) for n, w in weights), *((n, type(m), m.training) for n, m in model.named_modules())]


@pytest.mark.parametrize("options", [{"compensate": "least_squares"}, {"force": True}])
def test_path_that_hooks_switch_off(options: dict[str, Any]) -> None:
    model = nn.Sequential(Fusing(), Fusing()).train()
    hlg.convert(model)
    before = state(model)
    with pytest.raises(
        hlg.CalibrationError, match=r"0\.act \(and 1 more: 1\.act\) .*only while hooks are on .*0 \(Fusing\)"
    ):
        hlg.relu_ize(model, calibration=batches(), **options)
    assert state(model) == before


@pytest.mark.parametrize("options", [{"compensate": "least_squares"}, {"force": True}])
def test_relu_that_does_not_run(options: dict[str, Any]) -> None:
    model = nn.Sequential(Recorded(), nn.Linear(6, 3)).train()
    hlg.convert(model)
    before = state(model)
    with pytest.raises(ValueError, match="does not run the ReLUs that were put into it"):
        hlg.relu_ize(model, calibration=batches(), **options)
    assert state(model) == before


def switching(self: Any, x: Tensor) -> Tensor:
    """A forward that names the activation, and does not call it as long as the input is short."""
    gate = self.gate_proj(x)
    return self.down_proj((self.act_fn(gate) if x.shape[1] > 50 else F.silu(gate)) * self.up_proj(x))


def test_forward_that_may_call_it_and_does_not() -> None:
    """What the code leaves open, the run decides: in calibrate, and in relu_ize with batches or without."""
    model = tiny.build("llama").eval()
    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(switching, layer.mlp)
    hlg.convert(model, 1e5)
    batch = tiny.inputs(model)
    expected = tiny.outputs(model, batch)
    for refused in (
        lambda: hlg.calibrate(model, [batch]),
        lambda: hlg.relu_ize(model, calibration=[batch]),
        lambda: hlg.relu_ize(model),
    ):
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.act_fn .*switching"):
            refused()
        assert set(hlg.hardness_sites(model)) == set(SITES)
        assert model.config.hidden_act == "lambda_silu"
        assert tiny.relative_difference(expected, tiny.outputs(model, batch)) == 0.0


def test_bound_after_conversion() -> None:
    model = tiny.build("llama").eval()
    hlg.convert(model, 1e5)
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(lambda self, x: self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), mlp)
    batch = tiny.inputs(model)
    for refused in (lambda: hlg.calibrate(model, [batch]), lambda: hlg.relu_ize(model)):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.act_fn is not what runs"):
            refused()
    assert set(hlg.hardness_sites(model)) == set(SITES)


class Routed(nn.Module):
    """Experts as a list, of which the input's sign takes one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts[int(x.sum() > 0)](x)
        return out


def test_experts_that_idle_are_said_and_not_refused() -> None:
    model = Routed().eval()
    hlg.convert(model)
    calibration = [x.abs() for x in batches()]
    report = hlg.relu_ize(model, calibration=calibration, force=True)
    assert report.unreached == ["experts.0.1"]
    assert "1 ran on none of the batches, so nothing was measured there   experts.0.1" in str(report)
    assert isinstance(model.experts[0][1], nn.ReLU)


def test_experts_as_stacks_run() -> None:
    model = experts_model("mixtral")
    report = hlg.relu_ize(model, calibration=[tiny.inputs(model)], force=True)
    assert report.unreached == []


def test_calls_are_counted_in_compiled_models_too() -> None:
    """And outside of the block the compiled code is what it was."""
    model = nn.Sequential(nn.Linear(4, 4), hlg.LambdaGELU(), nn.Linear(4, 2), hlg.LambdaGELU())
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 4)
    expected = compiled(x)
    for _ in range(2):
        called: set[str] = set()
        with counting_calls(model, called):
            torch.testing.assert_close(compiled(x), expected, rtol=0.0, atol=0.0)
        assert called == {"1", "3"}
    torch.testing.assert_close(compiled(x), expected, rtol=0.0, atol=0.0)
    assert all(site.calls is None for site in hlg.hardness_sites(model).values())
