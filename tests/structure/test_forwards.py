"""Forwards in the place of a module's own: which ones call the activation, as far as their code shows."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from support import tiny
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.forwards import bypassed_by_code

SITES = [f"model.layers.{i}.mlp.act_fn" for i in (0, 1)]


def product(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def fused(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(product(self.gate_proj(x), self.up_proj(x)))


def fused_block(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0] + hidden_states
    return attended + F.silu(attended)


def bind(mlp: nn.Module) -> None:
    mlp.forward = types.MethodType(fused, mlp)


def close_over(mlp: Any) -> None:
    act = mlp.act_fn  # the module of today, which no swap reaches
    mlp.forward = lambda x: mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x))


def partially(mlp: nn.Module) -> None:
    mlp.forward = functools.partial(fused, mlp)


def decorate(mlp: Any) -> None:
    original = mlp.forward

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    mlp.forward = timed


def decorate_without_wraps(mlp: Any) -> None:
    original = type(mlp).forward
    mlp.forward = types.MethodType(lambda self, x: original(self, x) * 1.0, mlp)


def through_a_helper(mlp: Any) -> None:
    mlp.forward = types.MethodType(_helped, mlp)


def _helped(self: Any, x: Tensor) -> Tensor:
    return _help(self, x)


def _help(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(getattr(mlp, "act_fn")(mlp.gate_proj(x)) * mlp.up_proj(x))  # noqa: B009


def hook(mlp: Any) -> None:
    add_hook_to_module(mlp, ModelHook())


def compile_forward(mlp: Any) -> None:
    mlp.forward = torch.compile(mlp.forward, backend="eager")


@pytest.mark.parametrize("change", [bind, close_over, partially])
def test_refused(change: Any) -> None:
    model = tiny.build("llama")
    for layer in model.model.layers:
        change(layer.mlp)
    before = tiny.snapshot(model)
    with pytest.raises(hlg.ConversionError, match=r"layers\.0\.mlp\.act_fn .*does not call act_fn\. Switch off"):
        hlg.convert(model)
    assert tiny.snapshot(model) == before
    assert not hlg.hardness_sites(model)


@pytest.mark.parametrize(
    "change", [decorate, decorate_without_wraps, through_a_helper, hook, compile_forward], ids=lambda f: f.__name__
)
def test_not_refused_where_the_original_runs(change: Any) -> None:
    model = tiny.build("llama")
    batch = tiny.inputs(model)
    for layer in model.model.layers:
        change(layer.mlp)
    hlg.convert(model)
    model.eval()
    hlg.calibrate(model, [batch])
    report = hlg.relu_ize(model, force=True, calibration=[batch])
    assert report.unreached == []
    assert set(report.zeros) == set(SITES)


def test_a_block_around_it() -> None:
    model = tiny.build("llama")
    model.model.layers[1].forward = types.MethodType(fused_block, model.model.layers[1])
    assert set(bypassed_by_code(model, SITES)) == {SITES[1]}
    with pytest.raises(hlg.ConversionError, match=r"model\.layers\.1 was replaced .*fused_block.* does not call mlp"):
        hlg.convert(model)


def test_put_into_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", fused)
    with pytest.raises(hlg.ConversionError, match="act_fn"):
        hlg.convert(tiny.build("llama"))


def test_what_to_switch_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(model: PreTrainedModel, module: str) -> str:
        kernel = types.FunctionType(fused.__code__, globals(), "forward")
        kernel.__module__ = module
        for layer in model.model.layers:
            layer.mlp.forward = types.MethodType(kernel, layer.mlp)
        with pytest.raises(hlg.ConversionError) as caught:
            hlg.convert(model)
        return str(caught.value)

    assert "use_liger_kernel=False" in replace(tiny.build("llama"), "liger_kernel.transformers.swiglu")
    assert "use_kernels=False" in replace(tiny.build("llama"), "kernels.layer")
