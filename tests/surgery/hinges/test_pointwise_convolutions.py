"""Layers of 1×1 convolutions made wider: against float64 by channels and positions, and what cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.hinges import UNEVEN, uneven_sum
from support.other_layers import other_layers, other_rows
from support.states import full_snapshot
from torch import Tensor, nn

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.hinges import work

REFIT: dict[str, Any] = {"compensate": "least_squares"}
UNITS, WIDTH = 6, 5


class Pointwise(nn.Module):
    """Two convolutions in one or two dimensions, with as many channels as positions, so that no shape tells them apart."""

    def __init__(self, dims: int, between: str = "") -> None:
        super().__init__()
        kind, self.between = (nn.Conv1d, nn.Conv2d)[dims - 1], between
        self.before, self.act, self.after = kind(UNITS, UNITS, 1), nn.SiLU(), kind(UNITS, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.before(x))
        return self.after(h.transpose(1, -1) if self.between == "Transpose" else h.permute(0, 2, 1) if self.between else h)


@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions_compute_the_sum(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel by channel and position by position, as for a linear layer."""
    monkeypatch.setattr(work, "minimax", lambda base, hinges: UNEVEN)
    torch.manual_seed(0)
    model = Pointwise(dims)
    hlg.convert(model, init_hardness=2.0)
    x = 3.0 * torch.randn(2, UNITS, *[UNITS] * dims)
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in (*model.before.parameters(), *model.after.parameters()))
    w1, w2 = w1.reshape(UNITS, UNITS), w2.reshape(WIDTH, UNITS)
    report = hlg.relu_ize(model, calibration=[x], hinges=5)
    assert report.hinges is not None
    assert report.hinges.sites[0].units == (UNITS, 5 * UNITS)
    with torch.no_grad():
        got = model(x).double().numpy()
    for place in np.ndindex(2, *[UNITS] * dims):
        at = (place[0], slice(None), *place[1:])
        z = w1 @ x.double().numpy()[at] + b1
        wanted = w2 @ uneven_sum(z, 2.0) + b2
        assert np.abs(got[at] - wanted).max() < 1e-5 * max(1.0, np.abs(wanted).max())
    assert (model.before.out_channels, model.after.in_channels) == (5 * UNITS, 5 * UNITS)


@pytest.mark.parametrize("between", ["Transpose", "Permute"])
def test_channels_that_change_places(between: str) -> None:
    """Where positions become the channels of the next convolution, a unit is none of its channels."""
    torch.manual_seed(0)
    model = Pointwise(1, between)
    hlg.convert(model)
    with pytest.raises(hlg.HingeError, match=f"{between} stands between"):
        hlg.relu_ize(model, calibration=[torch.randn(2, UNITS, UNITS)], hinges=4)


class Mixed(nn.Module):
    """A linear map before, a convolution after."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.act, self.after = nn.Linear(WIDTH, UNITS), nn.GELU(), nn.Conv1d(UNITS, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.act(self.before(x)).permute(0, 2, 1))


def test_a_linear_map_and_a_convolution() -> None:
    """As a readout between two parts of a model has them, whose width is that of both: it keeps one ReLU per neuron."""
    model = Mixed()
    hlg.convert(model)
    with pytest.raises(hlg.HingeError, match="one of the maps before and after it is a convolution, and another none"):
        hlg.relu_ize(model, calibration=[torch.randn(2, 7, WIDTH)], hinges=4)


def test_rows_of_a_convolution() -> None:
    """A calibration set that is too small is told by its positions: 2 × 8 × 8 are 128 rows, and channels are none."""
    model = other_layers("poolformer", mlp_ratio=12.0)
    before = full_snapshot(model)
    with pytest.raises(hlg.CalibrationError, match="will have 288 units, and the calibration set has about 128 rows"):
        hlg.relu_ize(model, calibration=other_rows("poolformer", 1), **REFIT, hinges=2)
    assert full_snapshot(model) == before


def test_a_ratio_that_the_class_rounds() -> None:
    """12 × 2.0333… are 24 channels, three times as wide 73: too many for 3 each, told before work is done; a budget fits."""
    sizes = {"hidden_sizes": [12, 12], "mlp_ratio": 24.4 / 12}
    model = other_layers("poolformer", **sizes)
    before = full_snapshot(model)
    with pytest.raises(hlg.HingeError, match=r"has 73 units in the place of 24, as it rounds, and 3 times as many"):
        hlg.relu_ize(model, calibration=other_rows("poolformer"), **REFIT, hinges=3)
    assert full_snapshot(model) == before
    report = hlg.relu_ize(model, calibration=other_rows("poolformer"), **REFIT, budget=3.0)
    assert report.hinges is not None
    assert {site.units for site in report.hinges.sites} == {(24, 73)}
