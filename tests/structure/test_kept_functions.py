"""Functions of the family that modules keep as attributes: found by what they compute, wherever they are kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.kept_functions import kept_functions
from hf_lambda_gelu.structure.smooth_activations import smooth_activations


def own_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / 2.0**0.5))


class Keeps(nn.Module):
    def __init__(self, **kept: Any) -> None:
        super().__init__()
        self.linear, self.known = nn.Linear(4, 4), nn.GELU()
        for name, value in kept.items():
            setattr(self, name, value)


class OfTheClass(Keeps):
    act = F.gelu
    other = staticmethod(own_gelu)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x)


FOUND = {
    "builtin": (F.gelu, "gelu"),
    "python": (F.silu, "silu"),
    "partial": (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    "operator": (torch.ops.aten.silu, "silu"),
    "overload": (torch.ops.aten.gelu.default, "gelu"),
    "method": (ACT2FN["quick_gelu"].forward, "quick_gelu"),
    "lambda": (lambda x: F.gelu(x), "gelu"),
    "own": (own_gelu, "gelu"),
}


@pytest.mark.parametrize("kind", FOUND)
def test_found(kind: str) -> None:
    function, base = FOUND[kind]
    assert [(item.attribute, item.base) for item in kept_functions(Keeps(act=function))] == [("act", base)]


def test_in_lists_and_dicts_and_classes() -> None:
    module = Keeps(acts=[F.relu, F.gelu], by_name={"a": (F.silu,), "b": F.relu})
    assert {item.attribute for item in kept_functions(module)} == {"acts[1]", "by_name['a'][0]"}
    assert {item.attribute: item.base for item in kept_functions(OfTheClass())} == {"act": "gelu", "other": "gelu"}


def shifted_far_out(x: Tensor) -> Tensor:
    return F.silu(x) + (x.abs() > 100.0)


UNLIKE = {
    "cut off": lambda x: F.gelu(x).clamp(-10.0, 10.0),
    "far out": shifted_far_out,
    "dropout": lambda x: F.dropout(F.gelu(x), 0.5),
    "not element by element": lambda x: F.gelu(x) if x.dim() == 1 else F.gelu(x).flip(0),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_like_a_gelu_on_small_numbers_alone(kind: str) -> None:
    """What a function computes far out counts too: torch's layers, whose function becomes a site, would change."""
    assert kept_functions(Keeps(act=UNLIKE[kind])) == []
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=UNLIKE[kind])
    with pytest.raises(hlg.ConversionError, match="nothing to convert"):
        hlg.convert(layer)


def test_others_are_not_taken_and_what_does_not_speak_of_an_activation_is_not_tried() -> None:
    tried: list[int] = []

    def record(x: Tensor) -> Tensor:
        tried.append(1)
        return F.gelu(x)

    module = Keeps(act=F.relu, activation=torch.tanh, act_fn=F.linear, log=record, act_dropout=0.1, act_name="gelu")
    module.forward = record  # type: ignore[method-assign]
    assert kept_functions(module) == []
    assert tried == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_device_and_dtype(device: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device(device):
            assert [item.base for item in kept_functions(Keeps(act=F.gelu))] == ["gelu"]
    finally:
        torch.set_default_dtype(torch.float32)


def test_convert_names_them_and_what_to_put_there() -> None:
    module = nn.ModuleDict({"mlp": Keeps(act=partial(F.gelu, approximate="tanh"))})
    report = hlg.convert(module)
    assert [site.name for site in report.sites] == ["mlp.known"]
    (left,) = report.unconverted
    assert left.name == "mlp.act"
    assert "approximate='tanh'" in left.what
    assert 'torch.nn.GELU(approximate="tanh")' in left.reason
    assert "mlp.act" in str(report)
    assert "mlp.act" in str(hlg.relu_ize(module, force=True))  # still smooth, and said so
    with pytest.raises(hlg.ConversionError, match="act: gelu: a function"):
        hlg.convert(nn.Sequential(_without_modules()))


def _without_modules() -> nn.Module:
    module = Keeps(act=F.gelu)
    del module.known
    return module


@pytest.mark.parametrize("kind", ["gelu_pytorch_tanh", "gelu_python", "quick_gelu", "silu"])
def test_what_an_activation_keeps_is_the_activation(kind: str) -> None:
    """transformers' GELUTanh keeps a partial: it is named once, as the module that a user can exchange."""
    module = nn.Sequential(nn.Linear(4, 4), ACT2FN[kind])
    assert [item.name for item in smooth_activations(module)] == ["1"]
