"""Smooth activations that are written as formulas are known by what they compute, whatever the dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.audited import kinds, network, x_of
from torch import Tensor, nn

from hf_lambda_gelu import lambda_gelu, lambda_gelu_reference
from hf_lambda_gelu.measurement.audit.audit import audit

FORMULAS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "half_first": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "half_second": ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x * 0.70710678))),
    "half_last": ("gelu", lambda x: x * (1 + torch.erf(x / math.sqrt(2))) * 0.5),
    "half_inside": ("gelu", lambda x: x * (0.5 * (1 + torch.erf(x / math.sqrt(2))))),
    "distributed": ("gelu", lambda x: 0.5 * x + 0.5 * x * torch.erf(x / math.sqrt(2))),
    "erfc": ("gelu", lambda x: 0.5 * x * torch.erfc(-x / math.sqrt(2))),
    "ndtr": ("gelu", lambda x: x * torch.special.ndtr(x)),
    "cdf": ("gelu", lambda x: x * torch.distributions.Normal(0.0, 1.0).cdf(x)),
    "tanh": ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    "tanh_bloom": ("gelu_tanh", lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))),
    "tanh_as_sigmoid": ("gelu_tanh", lambda x: x * torch.sigmoid(2 * 0.79788456 * (x + 0.044715 * x**3))),
    "quick": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "silu": ("silu", lambda x: x * torch.sigmoid(x)),
    "silu_in_place": ("silu", lambda x: x.clone().mul_(torch.sigmoid(x))),
    "silu_as_tanh": ("silu", lambda x: 0.5 * x * (1 + torch.tanh(0.5 * x))),
    "silu_as_exp": ("silu", lambda x: x / (1 + torch.exp(-x))),
    "silu_in_fp32": ("silu", lambda x: x * torch.sigmoid(x.float()).to(x.dtype)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str, dtype: torch.dtype) -> None:
    kind, function = FORMULAS[name]
    (entry,) = audit(network(function, dtype), x_of(dtype)).entries
    assert (entry.name, entry.kind, entry.hardness, entry.group) == ("1", kind, None, "smooth")


@pytest.mark.parametrize("base", ["gelu", "gelu_tanh", "silu"])
def test_hardness_of_formulas(base: str) -> None:
    (entry,) = audit(network(lambda x: lambda_gelu_reference(x, 3.0, base)), x_of()).entries
    assert (entry.kind, entry.group) == (base, "smooth")
    assert entry.hardness == pytest.approx(3.0, rel=1e-3)


def test_function_with_one_hardness_per_neuron() -> None:
    """The operator behind `lambda_gelu` is seen as what it is, with the softest of its gates."""
    hardness = torch.linspace(3.0, 9.0, 64)
    report = audit(network(lambda x: lambda_gelu(x, hardness, "silu")), x_of())
    (entry,) = report.entries
    assert (entry.kind, entry.group, entry.base, entry.hardness) == ("lambda_gelu", "smooth", "silu", 3.0)
    assert not report.opaque


def test_formula_in_a_child_that_is_only_its_gate() -> None:
    class Quick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(1.702 * x)

    report = audit(nn.Sequential(nn.Linear(8, 32), Quick()), x_of())
    assert kinds(report) == {"1": "quick_gelu"}
    assert not report.unreached
