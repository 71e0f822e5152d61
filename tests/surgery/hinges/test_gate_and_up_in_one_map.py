"""Layers whose gate and up are one map made wider: against loops in float64, and what is no such layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.hinges import UNEVEN, uneven_sum
from support.other_layers import other_layers, other_rows
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.hinges import work

REFIT: dict[str, Any] = {"compensate": "least_squares"}
UNITS, WIDTH = 6, 5


class Fused(nn.Module):
    """One map for gate and up, whose outputs are cut in the way that it is made with."""

    def __init__(self, cut: str, as_conv1d: bool = False) -> None:
        super().__init__()
        self.cut = cut
        both = Conv1D(2 * UNITS, WIDTH) if as_conv1d else nn.Linear(WIDTH, 2 * UNITS)
        self.both, self.act, self.down = both, nn.GELU(), nn.Linear(UNITS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        if self.cut == "gate first":
            gate, up = y.chunk(2, -1)
        elif self.cut == "up first":
            up, gate = y.split(y.shape[-1] // 2, dim=-1)
        elif self.cut == "in turns":
            gate, up = y[..., ::2], y[..., 1::2]
        elif self.cut == "in turns, up first":
            up, gate = y.unflatten(-1, (-1, 2)).unbind(-1)
        elif self.cut == "by another dimension":
            gate, up = y.view(*y.shape[:-1], 2, -1)[..., 0, :], y.view(*y.shape[:-1], 2, -1)[..., 1, :]
        elif self.cut == "turned around":
            gate, up = y.chunk(2, -1)
            up = up.flip(-1)
        elif self.cut == "doubled":
            gate, up = y.chunk(2, -1)
            up = 2.0 * up
        elif self.cut == "overlapping":
            gate, up = y[..., :UNITS], y[..., 1 : UNITS + 1]
        elif self.cut == "used elsewhere":
            gate, up = y.chunk(2, -1)
            return self.down(self.act(gate) * up) + up[..., :WIDTH]
        else:  # the gate is a copy, of which nothing tells where it was
            gate, up = (half.contiguous() for half in y.chunk(2, -1))
        return self.down(self.act(gate) * up)


# how it is cut → which outputs are the gate's and the up map's unit by unit
CUTS: dict[str, tuple[range, range]] = {
    "gate first": (range(UNITS), range(UNITS, 2 * UNITS)),
    "up first": (range(UNITS, 2 * UNITS), range(UNITS)),
    "in turns": (range(0, 2 * UNITS, 2), range(1, 2 * UNITS, 2)),
    "in turns, up first": (range(1, 2 * UNITS, 2), range(0, 2 * UNITS, 2)),
    "by another dimension": (range(UNITS), range(UNITS, 2 * UNITS)),
}


@pytest.mark.parametrize(("cut", "as_conv1d"), [*((cut, False) for cut in CUTS), ("up first", True), ("in turns", True)])
def test_fused_layer_computes_the_sum(cut: str, as_conv1d: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neuron by neuron, Σᵢ aᵢ relu(z − tᵢ) u through the old halves is what the wider layer puts out, at λ = 3."""
    monkeypatch.setattr(work, "minimax", lambda base, hinges: UNEVEN)
    torch.manual_seed(0)
    model = Fused(cut, as_conv1d)
    with torch.no_grad():
        model.both.weight.normal_(std=0.3)
        model.both.bias.normal_(std=0.3)
    hlg.convert(model, init_hardness=3.0)
    x = 3.0 * torch.randn(2, 7, WIDTH)
    w, b = (p.detach().double().numpy() for p in (model.both.weight.T if as_conv1d else model.both.weight, model.both.bias))
    w2, b2 = (p.detach().double().numpy() for p in (model.down.weight, model.down.bias))
    report = hlg.relu_ize(model, calibration=[x], hinges=5)
    assert report.hinges is not None
    assert report.hinges.sites[0].units == (UNITS, 5 * UNITS)
    with torch.no_grad():
        got = model(x).double().numpy().reshape(-1, WIDTH)
    gates, ups = CUTS[cut]
    for row, entry in enumerate(x.double().numpy().reshape(-1, WIDTH)):
        wanted = b2.copy()
        for unit, (gate, up) in enumerate(zip(gates, ups, strict=True)):
            z = w[gate] @ entry + b[gate]
            wanted += w2[:, unit] * uneven_sum(z, 3.0) * (w[up] @ entry + b[up])
        assert np.abs(got[row] - wanted).max() < 1e-5 * max(1.0, np.abs(wanted).max())
    assert (model.both.nf if as_conv1d else model.both.out_features, model.down.in_features) == (10 * UNITS, 5 * UNITS)


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        ("turned around", "Flip stands between"),
        ("doubled", r"what the map after it gets is not its output, or that times another map's"),
        ("overlapping", r"what the map after it gets is not its output, or that times another map's"),
        ("used elsewhere", "the model puts out what the map before it does"),
        ("copied", r"is cut in parts by Split"),
    ],
)
def test_fused_layer_that_is_no_such_block(cut: str, reason: str) -> None:
    """What is not relu(z) · u of the two halves is refused, and the model as it was."""
    torch.manual_seed(0)
    model = Fused(cut)
    hlg.convert(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(hlg.HingeError, match=reason):
        hlg.relu_ize(model, calibration=[torch.randn(4, WIDTH)], hinges=4)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_budget_of_a_fused_layer() -> None:
    """A unit of the wider layer has gate and up rows of one neuron; its width is the config's, each neuron is there."""
    model = other_layers("modernbert")
    old = [model.layers[i].mlp.Wi.weight.detach().clone() for i in (0, 1)]
    report = hlg.relu_ize(model, calibration=other_rows("modernbert"), **REFIT, budget=1.5)
    assert report.hinges is not None
    assert report.hinges.widths == {"intermediate_size": (37, 56)}
    assert (model.config.intermediate_size, model.config.mlp_bias) == (56, True)
    assert report.compensation is not None
    assert report.compensation.bias_attribute == "mlp_bias"
    for layer, site in enumerate(report.hinges.sites):
        mlp = model.layers[layer].mlp
        assert (mlp.Wi.out_features, mlp.Wo.in_features, len(mlp.Wi.bias)) == (112, 56, 112)
        assert not mlp.Wi.bias[56:].any()
        pairs = {(g.numpy().tobytes(), u.numpy().tobytes()) for g, u in zip(*old[layer].chunk(2), strict=True)}
        wide = [(g.numpy().tobytes(), u.numpy().tobytes()) for g, u in zip(*mlp.Wi.weight.detach().chunk(2), strict=True)]
        assert set(wide) == pairs
        assert sum(number * count for number, count in site.neurons.items()) == 56
