"""`certified_distance`: no sample is further than the bound, of one unit the bound is reached, and the formula by mpmath."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from support.verified import digits, digits_network
from torch import nn

import hf_lambda_gelu as hlg
from hf_lambda_gelu.activation.bases import BASES
from hf_lambda_gelu.downstream.verification.bounds import Box
from hf_lambda_gelu.downstream.verification.distance import difference_bounds, relu_twin
from hf_lambda_gelu.downstream.verification.gate_errors import Gate, _peak, gate_error
from hf_lambda_gelu.downstream.verification.network import read_network


def smooth_network(seed: int, *widths: int, hardness: float = 3.0, base: str = "gelu") -> nn.Sequential:
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after), hlg.LambdaGELU(init_hardness=hardness, base=base)]
    return nn.Sequential(*parts[:-1]).double().eval()


def exact_error(base: str, hardness: float, z: float) -> mpmath.mpf:
    """ReLU(z) − f(z; λ) with 40 digits, by the definitions of the four activations."""
    with mpmath.workdps(40):
        u = mpmath.mpf(hardness) * z
        cubic = mpmath.sqrt(2 / mpmath.pi) * (u + mpmath.mpf("0.044715") * u**3)
        gate = {
            "gelu": lambda: mpmath.ncdf(u),
            "gelu_tanh": lambda: (1 + mpmath.tanh(cubic)) / 2,
            "quick_gelu": lambda: 1 / (1 + mpmath.exp(-mpmath.mpf("1.702") * u)),
            "silu": lambda: 1 / (1 + mpmath.exp(-u)),
        }[base]()
        return max(mpmath.mpf(z), 0) - z * gate


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("hardness", [1.0, 7.3, 160.0])
def test_gate_error(base: str, hardness: float) -> None:
    """Intervals of all widths, on either side of the peak and over it: bounds hold at every point and are close."""
    generator = np.random.default_rng(0)
    centres, radii = 4.0 * generator.standard_normal(30) / hardness, 10.0 ** generator.uniform(-6, 0.5, 30) / hardness
    low, high = centres - radii, centres + radii
    found = gate_error(Gate(base, np.array([hardness])), Box(low, high))
    for i in range(30):
        points = np.linspace(low[i], high[i], 31)
        values = [exact_error(base, hardness, float(z)) for z in points]
        assert found.lower[i] <= min(values)
        assert max(values) <= found.upper[i]
        spread = float(max(values) - min(values))
        assert found.upper[i] - float(max(values)) <= 0.1 * spread + 1e-12
        assert float(min(values)) - found.lower[i] <= 0.1 * spread + 1e-12 or low[i] < 0.0 < high[i]


@pytest.mark.parametrize("base", BASES)
def test_the_peak(base: str) -> None:
    """Where the supremum of `bases` is attained; 0.7518 for erf."""
    peak = _peak(base)
    assert float(exact_error(base, 1.0, -peak)) == pytest.approx(BASES[base].sup_error, rel=1e-12)
    if base == "gelu":
        assert peak == pytest.approx(0.7518, abs=1e-4)


@pytest.mark.parametrize("hardness", [1.0, 10.0, 100.0])
def test_of_one_unit_the_bound_is_reached(hardness: float) -> None:
    unit = smooth_network(0, 1, 1, 1, hardness=hardness)
    with torch.no_grad():
        unit[0].weight.fill_(2.0)
        unit[0].bias.fill_(0.0)
        unit[2].weight.fill_(-3.0)
    report = hlg.certified_distance(unit, torch.zeros(1, 1, dtype=torch.float64), 2.0 / hardness)
    λ = unit[1].hardness.item()
    assert report.bounds[0] == pytest.approx(3.0 * 0.16997120747990369 / λ, rel=1e-9)
    assert 0.999 * report.bounds[0] < report.measured[0] <= report.bounds[0]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("widths", [(4, 16, 4), (3, 8, 8, 2), (3, 6, 6, 6, 3)])
def test_no_sample_is_further(base: str, widths: tuple[int, ...]) -> None:
    """4,000 points of each box, which are not those of the report."""
    for seed in range(3):
        model = smooth_network(seed, *widths, base=base)
        points = torch.randn(4, widths[0], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        twin, _ = relu_twin(model)
        for epsilon in (0.01, 0.3):
            report = hlg.certified_distance(model, points, epsilon)
            for x, bound, measured in zip(points, report.bounds, report.measured, strict=True):
                sampled = x + epsilon * (2 * torch.rand(4000, widths[0], dtype=torch.float64) - 1)
                with torch.no_grad():
                    difference = float((twin(sampled) - model(sampled)).abs().max())
                assert difference <= bound
                assert 0.0 < measured <= bound


@pytest.mark.parametrize("widths", [(1, 1, 1, 1), (1, 2, 2, 1), (1, 3, 3, 3, 2)])
def test_signed_bounds_of_deep_networks(widths: tuple[int, ...]) -> None:
    """Of one input all points can be looked at: the difference lies within its bounds, which have signs."""
    for seed in range(40):
        model = smooth_network(seed, *widths, hardness=1.0)
        with torch.no_grad():
            for module in model:
                if isinstance(module, nn.Linear):
                    module.weight *= 4.0
        twin, gates = relu_twin(model)
        layers = read_network(twin)
        centre = float(np.random.default_rng(seed).standard_normal())
        x = torch.linspace(centre - 0.05, centre + 0.05, 101, dtype=torch.float64)[:, None]
        with torch.no_grad():
            difference = (twin(x) - model(x)).numpy()
        found = difference_bounds(layers, gates, layers, Box(x[0].numpy(), x[-1].numpy()))
        assert (found.lower - 1e-12 <= difference).all()
        assert (difference <= found.upper + 1e-12).all()


def test_each_output_has_bounds_of_its_own() -> None:
    """With signs: the difference is ReLU's minus the smooth one's, and of a map with weights ≥ 0 it is ≥ 0."""
    model = smooth_network(1, 3, 8, 2)
    with torch.no_grad():
        model[2].weight[0].abs_()
        model[2].weight[1].abs_().neg_()
    twin, gates = relu_twin(model)
    layers = read_network(twin)
    found = difference_bounds(layers, gates, layers, Box(np.full(3, -1.0), np.full(3, 1.0)))
    assert -1e-12 <= found.lower[0] < found.upper[0]
    assert found.lower[1] < found.upper[1] <= 1e-12
    assert found.upper[0] <= model[2].weight[0].abs().sum().item() * hlg.sup_error(model[1].hardness.item()) * (1 + 1e-9)


def test_a_box_away_from_zero_is_closer() -> None:
    """Where units are sure to be on or off, the gate is ReLU but for its tail."""
    unit = smooth_network(0, 1, 1, 1, hardness=10.0)
    with torch.no_grad():
        unit[0].weight.fill_(1.0)
        unit[0].bias.fill_(0.0)
    points = torch.tensor([[0.1], [1.0], [-1.0]], dtype=torch.float64)
    near, on, off = hlg.certified_distance(unit, points, 0.2).bounds
    assert near > 1e-3
    assert on == pytest.approx(off)
    assert on < 1e-12


def test_a_refit_network() -> None:
    """Other weights in the ReLU network: the bound holds for what it computes."""
    model = smooth_network(2, 4, 12, 3)
    twin, _ = relu_twin(model)
    refit = copy.deepcopy(twin)
    with torch.no_grad():
        refit[2].weight += 0.01 * torch.randn(3, 12, dtype=torch.float64)
        refit[2].bias += 0.02
    points = torch.randn(5, 4, dtype=torch.float64)
    report = hlg.certified_distance(model, points, 0.1, relu=refit)
    assert report.bounds != hlg.certified_distance(model, points, 0.1).bounds
    for x, bound in zip(points, report.bounds, strict=True):
        sampled = x + 0.1 * (2 * torch.rand(4000, 4, dtype=torch.float64) - 1)
        with torch.no_grad():
            assert float((refit(sampled) - model(sampled)).abs().max()) <= bound
    same = hlg.certified_distance(model, points, 0.1, relu=copy.deepcopy(twin))
    assert same == hlg.certified_distance(model, points, 0.1)


def test_equal_networks_are_at_no_distance() -> None:
    images, _ = digits()
    report = hlg.certified_distance(digits_network(16, 16), images[:2], 0.1)
    assert max(report.bounds) < 1e-9
    assert report.measured == [0.0, 0.0]


def test_a_harder_gate_is_closer() -> None:
    """Bounds fall as 1/λ."""
    images, _ = digits()
    model = copy.deepcopy(digits_network(16, activation=nn.GELU))
    soft = hlg.certified_distance(model, images[:3], 0.05, clip=(0.0, 1.0))
    hlg.convert(model, init_hardness=100.0)
    hard = hlg.certified_distance(model, images[:3], 0.05, clip=(0.0, 1.0))
    assert max(hard.bounds) < max(soft.bounds) / 20
    text = str(hard).splitlines()
    assert text[0] == "3 inputs, each value within ± 0.05, values in [0, 1]"
    assert [line.split()[0] for line in text[2:]] == ["bound", "measured", "|output|"]
    assert json.loads(json.dumps(hard.to_dict(), allow_nan=False))["bounds"] == hard.bounds


def test_the_model_is_left_as_it_was() -> None:
    model = smooth_network(0, 4, 8, 2).float().train()
    before = copy.deepcopy(model.state_dict())
    hlg.certified_distance(model, torch.randn(2, 4), 0.1)
    assert model.training
    assert isinstance(model[1], hlg.LambdaGELU)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.Tanh()), {}, r"1 \(Tanh\) is no layer"),
        (nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.GELU()), {}, "two activations follow each other"),
        (nn.Sequential(nn.Linear(2, 3), nn.GELU()), {"epsilon": 0.0}, "epsilon must be a finite number > 0"),
        (nn.Sequential(nn.Linear(2, 3), nn.GELU()), {"inputs": torch.zeros(1, 5)}, "does not take inputs of shape"),
        (
            nn.Sequential(nn.Linear(2, 3), nn.GELU()),
            {"relu": nn.Sequential(nn.Linear(2, 4), nn.ReLU())},
            r"is not the smooth one's, layer for layer: .* are \[\(4, 2, True\)\], expected \[\(3, 2, True\)\]",
        ),
        (
            nn.Sequential(nn.Linear(2, 3), nn.GELU()),
            {"relu": nn.Sequential(nn.Linear(2, 3), nn.GELU())},
            r"1 \(GELU\) is smooth",
        ),
    ],
)
def test_bad_input(model: nn.Module, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hlg.certified_distance(model, **{"inputs": torch.zeros(1, 2), "epsilon": 0.1, **change})


def test_a_hook_is_noticed() -> None:
    model = smooth_network(0, 2, 3, 2)
    model[1].register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(ValueError, match="does a forward hook"):
        hlg.certified_distance(model, torch.ones(1, 2), 0.1)
