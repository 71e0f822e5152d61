"""What can be read as a piecewise-linear network, and that anything else is named with what to do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support import tiny
from support.verified import as_module, random_network
from torch import nn
from transformers.activations import ACT2FN

import hf_lambda_gelu as hlg
from hf_lambda_gelu.downstream.verification.network import check_as_read, in_float64, read_network, values


def test_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 4), nn.Dropout(0.5), nn.ReLU(), nn.Sequential(nn.Identity(), nn.Linear(4, 3, bias=False))
    ).eval()
    layers = read_network(model)
    assert [layer.weight.shape for layer in layers] == [(4, 6), (3, 4)]
    assert [layer.relu for layer in layers] == [True, False]
    assert (layers[1].bias == 0.0).all()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.from_numpy(values(layers, x.flatten(1).numpy())), model.double()(x))


def test_round_trip() -> None:
    layers = random_network(np.random.default_rng(0), 3, 5, 4, 2)
    for one, other in zip(layers, read_network(as_module(layers)), strict=True):
        assert (one.weight == other.weight).all()
        assert (one.bias == other.bias).all()
        assert one.relu == other.relu


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), ACT2FN["gelu_new"], ACT2FN["quick_gelu"], hlg.LambdaGELU()])
def test_smooth_ones_are_told_apart(activation: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^1 \(\w+\) is smooth, and exact solvers need .* hf_lambda_gelu.relu_ize"):
        read_network(nn.Sequential(nn.Linear(2, 3), activation, nn.Linear(3, 2)))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([nn.Linear(2, 3), nn.Tanh()], r"1 \(Tanh\) is no layer that can be verified: expected nn.Linear, nn.ReLU"),
        ([nn.Sequential(nn.Conv2d(1, 1, 2))], r"0\.0 \(Conv2d\) is no layer"),
        ([nn.LayerNorm(2), nn.Linear(2, 3)], r"0 \(LayerNorm\) is no layer"),
        ([nn.Linear(2, 3), nn.Dropout().train()], r"1 is nn\.Dropout in training mode: call model\.eval\(\)"),
        ([nn.ReLU(), nn.Linear(2, 3)], "0 is a ReLU with no nn.Linear before it"),
        ([nn.Identity()], "Sequential has no nn.Linear: there is nothing to verify"),
        ([nn.Linear(2, 3), nn.Linear(4, 2)], "1 takes 4 features, and the layer before it puts out 3"),
        ([nn.Flatten(0), nn.Linear(2, 3)], "0 flattens dimensions 0 to -1: expected 1 to -1"),
        ([nn.Linear(2, 3, device="meta")], r"0\.weight is on the meta device"),
    ],
)
def test_refused(parts: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_network(nn.Sequential(*parts))


def test_a_transformers_model_is_refused_with_what_to_take() -> None:
    with pytest.raises(
        ValueError, match=r"the model \(BertForSequenceClassification\) is no layer .* by hf_lambda_gelu\.feed_forward"
    ):
        read_network(tiny.build("bert-classifier"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        model[0].bias[1] = value
    with pytest.raises(ValueError, match=r"0\.bias holds values that are not finite"):
        read_network(model)


def test_a_subclass_is_no_layer_that_is_known() -> None:
    """It may compute anything."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="Doubled"):
        read_network(nn.Sequential(Doubled(2, 2)))


def test_a_hook_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    layers, x = read_network(model), torch.randn(4, 2, dtype=torch.float64)
    check_as_read(in_float64(model), layers, x)
    model[1].register_forward_hook(lambda module, args, output: output + 0.1)
    with pytest.raises(ValueError, match="does a forward hook or a parametrization change it"):
        check_as_read(in_float64(model), layers, x)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 2), (1, 2, 2, 2)])
def test_shapes(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(2, 3)).double()
    with pytest.raises(ValueError, match=rf"inputs of shape \({shape[0]}, {shape[1]}"):
        check_as_read(model, read_network(model), torch.zeros(shape, dtype=torch.float64))


def test_the_copy_is_one_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 3)).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    made = in_float64(model)
    made[0].weight.data.zero_()
    assert made[0].weight.dtype == torch.float64
    assert all((model.state_dict()[name] == value).all() for name, value in before.items())
