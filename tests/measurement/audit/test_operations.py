"""Operations and what they are taken for: smooth, piecewise linear, another gate, or no activation at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.audited import Apply, kinds, network, x_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_lambda_gelu.measurement.audit.audit import audit


def kind_of(function: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> str:
    (entry,) = audit(network(function, dtype), x_of(dtype)).entries
    return entry.kind


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.chunk(2, dim=-1)


OTHERS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "tanh": ("tanh", "other", lambda x: torch.tanh(x).repeat(1, 1)),
    "sigmoid": ("sigmoid", "other", torch.sigmoid),
    "soft cap": ("tanh", "other", lambda x: 30.0 * torch.tanh(x / 30.0)),
    "glu": ("sigmoid gate", "other", lambda x: F.glu(x).repeat(1, 2)),
    "written glu": ("sigmoid gate", "other", lambda x: (halves(x)[0] * halves(x)[1].sigmoid()).repeat(1, 2)),
    "normed gate": ("sigmoid gate", "other", lambda x: x * torch.sigmoid(F.layer_norm(x, (64,)))),
    "reversed": ("self_gated", "smooth", lambda x: x * (1 - torch.sigmoid(x))),
    "clamped": ("self_gated", "smooth", lambda x: x.clamp(max=2.0) * torch.sigmoid(x)),
    "tanh times another": ("tanh", "other", lambda x: (halves(x)[0] * halves(x)[1].tanh()).repeat(1, 2)),
    "laplace": ("erf", "other", ACT2FN["laplace"]),
    "relu": ("relu", "piecewise", F.relu),
    "relu in place": ("relu", "piecewise", lambda x: F.relu(x, inplace=True)),
    "clamp": ("relu", "piecewise", lambda x: x.clamp(min=0)),
    "clamp_min": ("relu", "piecewise", lambda x: torch.clamp_min(x, 0.0)),
    "maximum": ("relu", "piecewise", lambda x: torch.maximum(x, torch.zeros(()))),
    "relu6": ("relu6", "piecewise", F.relu6),
    "hardtanh": ("hardtanh", "piecewise", F.hardtanh),
    "leaky": ("leaky_relu", "piecewise", F.leaky_relu),
    "relu2": ("relu2", "smooth", ACT2FN["relu2"]),
    "relu2 as product": ("relu2", "smooth", lambda x: (lambda r: r * r)(F.relu(x))),
    "out": ("gelu", "smooth", lambda x: torch._C._nn.gelu(x, out=torch.empty_like(x))),
    **{
        name: (name, "smooth", function)
        for name, function in {
            "mish": F.mish,
            "softplus": F.softplus,
            "elu": F.elu,
            "selu": F.selu,
            "celu": F.celu,
            "hardswish": F.hardswish,
            "gelu": F.gelu,
            "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
            "silu": lambda x: F.silu(x, inplace=True),
        }.items()
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_kinds(name: str) -> None:
    kind, group, function = OTHERS[name]
    (entry,) = audit(network(function), x_of()).entries
    assert (entry.kind, entry.group) == (kind, group)


def test_factors_with_a_soft_cap() -> None:
    report = audit(network(lambda x: 3.0 * torch.tanh(x / 3.0) * torch.sigmoid(x)), x_of())
    assert report.counts == {"tanh": 1, "self_gated": 1}
    assert [entry.calls for entry in report.entries] == [1, 1]


def test_no_activation() -> None:
    def none(x: Tensor) -> Tensor:
        x = F.layer_norm(x, (64,)).softmax(-1) * x.cos() + x.clamp(-50.0, 50.0) * torch.exp(-x.abs())
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()

    report = audit(network(none), x_of())
    assert report.entries == ()
    assert not report.is_relu


def test_a_function_of_a_parameter_is_no_activation() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * F.softplus(self.scale) * self.scale.view(1, -1).tanh()

    assert audit(Scaled(), x_of()).entries == ()


def test_a_norm_after_relu_is_no_relu2() -> None:
    norm = Apply(lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())
    assert kinds(audit(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), norm), x_of())) == {"1": "relu"}


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell])
def test_recurrent_layers_have_no_smooth_gate(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    report = audit(layer(8, 16), x_of())
    assert report.entries
    assert {entry.group for entry in report.entries} == {"other"}


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_torch_encoder_is_not_taken_as_one_operation(activation: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True).eval()
    report = audit(nn.TransformerEncoder(layer, 2), x_of()[None])
    assert kinds(report) == {f"layers.{i}": activation for i in range(2)}


@torch.library.custom_op("audit_test::act", mutates_args=())
def custom_act(x: Tensor) -> Tensor:
    return F.gelu(x)


def test_operations_of_other_libraries_are_named() -> None:
    report = audit(network(lambda x: F.relu(custom_act(x))), x_of())
    assert report.opaque == ("audit_test::act",)
    assert "not seen into: audit_test::act" in str(report)


def test_a_relu_that_is_written_over_is_no_relu2() -> None:
    assert kind_of(lambda x: F.relu(x).add_(x).pow(2)) == "relu"
