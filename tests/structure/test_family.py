"""The lists of the family, which derive from one table, against lists written by hand and transformers' own activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import activations
from transformers.activations import ACT2CLS, ACT2FN

from hf_lambda_gelu.activation.bases import BASES
from hf_lambda_gelu.structure import modules
from hf_lambda_gelu.structure.config import LAMBDA_KEYS, STOCK_KEYS
from hf_lambda_gelu.structure.modelling_code import calls_in_class
from hf_lambda_gelu.structure.modules import base_of, is_activation
from hf_lambda_gelu.structure.smooth_activations import smooth_modules

CLASSES = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
}


def test_keys() -> None:
    """Of all of transformers' activations, those that compute a base are in the list, under that base, and no others."""
    x = torch.linspace(-12.0, 12.0, 481, dtype=torch.float64)  # beyond 10, where gelu_10 is cut off
    found = {}
    for key in set(ACT2FN) - set(LAMBDA_KEYS):
        module = ACT2FN[key]
        for base in BASES.values():
            if not any(True for _ in module.parameters()) and (module(x) - base.activation(x)).abs().max() < 2e-6:
                found[key] = base.name
    assert found == STOCK_KEYS


def test_classes() -> None:
    for cls, base in CLASSES.items():
        module = cls()
        assert base_of(module) == base, cls
        assert is_activation(module)
        assert [left.what for left in smooth_modules(nn.Sequential(module))] == [cls.__name__]
    assert (base_of(nn.GELU()), base_of(nn.GELU(approximate="tanh"))) == ("gelu", "gelu_tanh")
    assert [base_of(module) for module in (nn.ReLU(), nn.Tanh(), nn.Mish(), activations.MishActivation())] == [None] * 4


def test_entry_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class is judged by what it computes, whatever name it has in the table."""

    class Other(nn.Module):
        pass

    monkeypatch.setitem(ACT2CLS, "gelu", Other)
    assert Other not in modules._class_bases()
    assert modules._class_bases()[nn.SiLU] == "silu"


def test_names_in_the_code() -> None:
    class Model(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return gelu_new(F.silu(x)) + F.relu(quick_gelu(x)) + self.gelu(x) + swish(x) + mish(x)  # noqa: F821

    assert sorted(calls_in_class(Model)) == ["F.silu(x)", "gelu_new(F.silu(x))", "quick_gelu(x)", "swish(x)"]


@pytest.mark.parametrize("name", ["MyGELU", "FastSilu", "swish_glu", "Other"])
def test_names_of_classes(name: str) -> None:
    """A module of an unknown class that takes two tensors is known by its name."""
    module = type(name, (nn.Module,), {"forward": lambda self, x, y: x})()
    assert len(smooth_modules(nn.ModuleList([module]))) == (name != "Other")
