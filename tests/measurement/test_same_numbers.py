"""Both sides of a comparison draw the same random numbers; what is not a number is never called equal."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement.difference import difference


class Noisy(nn.Module):
    """Draws in every forward, from one of the generators that modelling code draws from."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.up, self.act, self.down, self.source = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), source

    def forward(self, x: Tensor) -> Tensor:
        draws = {"torch": lambda: float(torch.rand(())), "numpy": np.random.rand, "python": random.random}
        return self.down(self.act(self.up(x))) * (1 + draws[self.source]())


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_noise_is_no_change(source: str) -> None:
    torch.manual_seed(0)
    model = Noisy(source)
    hlg.convert(model, init_hardness=1e6)
    batches = [torch.randn(4, 8) for _ in range(3)]
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert hlg.sensitivity(model, batches).sites[0].relative_change < 1e-4
    assert hlg.relu_ize(model, calibration=batches).relative_change < 1e-4
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[:2]
    assert torch.equal(torch.get_rng_state(), state[2])


def test_nan_is_no_change_of_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    hlg.convert(model, init_hardness=1e6)
    with torch.no_grad():
        model[2].bias.fill_(torch.nan)
    with pytest.raises(hlg.FoldError, match="NaN already"):
        hlg.fold(model, torch.randn(2, 4))
    assert math.isnan(hlg.relu_ize(model, calibration=[torch.randn(2, 4)]).relative_change)


def test_difference_of_what_is_not_finite() -> None:
    one, nan, inf = torch.ones(2), torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf])
    assert math.isnan(difference([nan], [nan]))
    assert difference([one], [nan]) == difference([inf], [-inf]) == difference([inf], [one]) == math.inf
    assert difference([inf], [inf]) == difference([-inf], [-inf]) == 0.0


@pytest.mark.parametrize("verb", ["convert", "relu_ize", "refit", "fold"])
@pytest.mark.parametrize("weights", [False, True])
def test_inference_mode_is_named(verb: str, weights: bool) -> None:
    """Around the call, or around what made the weights; nothing is changed."""
    with torch.inference_mode(weights):
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    if verb != "convert":
        model[1] = hlg.LambdaGELU(1e5)
    x = torch.randn(4, 4)
    calls = {
        "convert": lambda: hlg.convert(model),
        "relu_ize": lambda: hlg.relu_ize(model),
        "refit": lambda: hlg.relu_ize(model, calibration=[x], compensate="least_squares"),
        "fold": lambda: hlg.fold(model, x),
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode(not weights), pytest.raises(ValueError, match="inference_mode"):
        calls[verb]()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model[1], nn.GELU if verb == "convert" else hlg.LambdaGELU)


def test_measuring_works_in_inference_mode() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), hlg.LambdaGELU(2.0), nn.Linear(8, 4)), torch.randn(4, 4)
    outside = hlg.calibrate(model, [x]).to_dict(), hlg.sensitivity(model, [x]).to_dict()
    with torch.inference_mode():
        assert (hlg.calibrate(model, [x]).to_dict(), hlg.sensitivity(model, [x]).to_dict()) == outside


def test_dynamic_quantisation_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 8), hlg.LambdaGELU(2.0), nn.Linear(8, 4))
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    with pytest.raises(ValueError, match=r"0\.weight is quantised"):
        hlg.relu_ize(model, calibration=[torch.randn(4, 4)], compensate="least_squares")
