"""`calibrate` against numpy in float64 on pre-activations that hooks took from stock models, and against integrals."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import ndtri
from support import tiny
from support.calibration import Probe, captured
from support.models import converted
from support.references import NUMPY_GATES, Gate
from torch import Tensor

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement import calibration

BASES = {"gelu": "bert", "gelu_tanh": "gpt2", "quick_gelu": "clip", "silu": "llama"}
R = 2.0 ** (1 / 128)  # the factor by which half a bin, of 64 an octave, displaces |x| at most
each_base = pytest.mark.parametrize("base", list(BASES))


def direct_error(x: np.ndarray, hardness: float, base: str) -> float:
    relu = np.maximum(x, 0)
    return math.sqrt(((x * NUMPY_GATES[base](hardness * x) - relu) ** 2).mean() / (relu**2).mean())


def probed(*values: Any, base: str = "gelu") -> hlg.SiteStatistics:
    """The statistics of these values, a batch each."""
    tensors = [v if isinstance(v, Tensor) else torch.as_tensor(v, dtype=torch.float64) for v in values]
    return hlg.calibrate(Probe(base), [{"inputs_embeds": t.reshape(1, -1)} for t in tensors]).sites[0]


@each_base
def test_statistics_of_a_stock_model(base: str) -> None:
    """Hooks on a model that was never converted; every batch, call, token and feature counts once."""
    name = BASES[base]
    model = converted(name)
    batches = [tiny.inputs(model, seed) for seed in range(3)]
    report = hlg.calibrate(model, iter(batches))
    sites = list(hlg.hardness_sites(model))
    expected = captured(tiny.build(name), sites, batches)
    assert [site.name for site in report.sites] == sites
    for site in report.sites:
        x = expected[site.name]
        assert (site.base, site.hardness, site.count) == (base, 1.0, x.size)
        assert site.mean == pytest.approx(x.mean(), abs=1e-5)
        assert site.std == pytest.approx(x.std(), rel=1e-5)
        assert site.negative == pytest.approx((x < 0).mean(), abs=2 / x.size)
        assert site.relu_square == pytest.approx((np.maximum(x, 0) ** 2).mean(), rel=1e-5)


def test_it_measures_the_present_hardness() -> None:
    """λ = 4 and 5 instead of 1: against a stock model with x Φ(λx) in place of its activations."""
    model = converted("bert-classifier", 4.0, 1.0)
    batches = [tiny.inputs(model, seed) for seed in range(2)]
    sites = list(hlg.hardness_sites(model))
    stock = tiny.build("bert-classifier")
    for index, name in enumerate(sites):
        stock.set_submodule(name, Gate(4.0 + index))
    smooth = captured(tiny.build("bert-classifier"), sites, batches)
    report = hlg.calibrate(model, batches)
    for index, (site, x) in enumerate(zip(report.sites, captured(stock, sites, batches).values(), strict=True)):
        assert site.hardness == pytest.approx(4.0 + index)
        assert (site.mean, site.std) == pytest.approx((x.mean(), x.std()), rel=1e-4)
    assert abs(report.sites[1].mean - smooth[sites[1]].mean()) > 1e-3


def test_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many uneven batches, cut into pieces, are one; variance is not lost beside a mean 1e6 times as large."""
    x = 1e4 + 0.01 * np.random.default_rng(0).standard_normal(3000)
    whole = probed(x)
    monkeypatch.setattr(calibration, "_PIECE_ELEMENTS", 7)
    parts = probed(*np.split(x, [1, 2, 50, 1000, 1001]))
    for site in (whole, parts):
        assert (site.count, site.negative) == (3000, 0.0)
        assert site.mean == pytest.approx(x.mean(), rel=1e-14)
        assert site.std == pytest.approx(x.std(), rel=1e-8)
    assert torch.equal(whole.histogram, parts.histogram)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The statistics of the very values in half precision, in fp64, whose squares would overflow there."""
    x = (torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 500).to(dtype)
    site, values = probed(x), x.double().numpy()
    assert site.std == pytest.approx(values.std(), rel=1e-12)
    assert site.relative_error(1.0) == pytest.approx(direct_error(values, 1.0, "gelu"), rel=0.02)


def test_pooled_sites_and_sites_that_are_not_called() -> None:
    """ALBERT's one site is called by each of three layers; one that no batch reaches is reported and gets an ℓ1 target."""
    model = converted("albert")
    batches = [tiny.inputs(model)]
    expected = captured(tiny.build("albert"), hlg.hardness_sites(model), batches)
    assert [site.count for site in hlg.calibrate(model, batches).sites] == [x.size for x in expected.values()]
    assert max(x.size for x in expected.values()) == 3 * 22 * 37

    report = hlg.calibrate(Probe("silu"), [{"inputs_embeds": torch.randn(1, 50)}])
    idle = report.sites[2]
    assert (idle.name, idle.count) == ("idle", 0)
    assert all(math.isnan(v) for v in (idle.mean, idle.std, idle.negative, idle.relative_error(1.0)))
    assert report.targets(0.1)["idle"] == hlg.target_hardness(base="silu")
    assert "no batch reached it" in str(report).splitlines()[-1]


@each_base
def test_relative_error_of_a_model(base: str) -> None:
    """Displacing every |x| by a factor within [1/R, R] moves the error at most to R^±1 times the error at λ R^∓1."""
    model = converted(BASES[base])
    batches = [tiny.inputs(model, seed) for seed in range(3)]
    expected = captured(model, hlg.hardness_sites(model), batches)
    for site in hlg.calibrate(model, batches).sites:
        x = expected[site.name]
        for hardness in (1.0, 2.5, 10.0, 100.0, 1e3, 1e4):
            got, slack = site.relative_error(hardness), 1 + 1e-6
            lowest = direct_error(x, hardness * R * slack, base) / (R * slack)
            assert lowest <= got <= R * slack * direct_error(x, hardness / (R * slack), base), hardness
            if hardness <= 10.0:  # enough values take part for the displacements to average out
                assert got == pytest.approx(direct_error(x, hardness, base), rel=2e-3)


@each_base
@pytest.mark.parametrize("tolerance", [0.1, 0.01, 0.001])
def test_target_of_a_model(base: str, tolerance: float) -> None:
    """The error at the target is within the tolerance, at 0.97 of it no longer; both evaluated without a histogram too."""
    model = converted(BASES[base])
    batches = [tiny.inputs(model, seed) for seed in range(3)]
    expected = captured(model, hlg.hardness_sites(model), batches)
    report = hlg.calibrate(model, batches)
    targets = report.targets(tolerance)
    assert list(targets) == [site.name for site in report.sites]
    for site in report.sites:
        target, x = targets[site.name], expected[site.name]
        assert target == site.target_hardness(tolerance) > 1.0
        assert site.relative_error(target) <= tolerance < site.relative_error(0.97 * target)
        assert site.relative_error(target * (1 - 1e-6)) > tolerance
        assert direct_error(x, target, base) <= 1.01 * tolerance
        assert direct_error(x, 0.97 * target, base) > tolerance


@each_base
def test_gaussian_pre_activations(base: str) -> None:
    """Against quadrature of the definition for N(0, σ²); only λσ matters, so the target is inversely proportional to σ."""
    normal = ndtri((np.arange(200_000) + 0.5) / 200_000)

    def integral(hardness: float) -> float:
        def gap(x: float) -> float:
            return (x * NUMPY_GATES[base](hardness * x) - max(x, 0.0)) ** 2 * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

        bends = [k / hardness for k in (0.5, 2, 5, 20)]
        ends = [0.0, *bends, max(8.0, 2 * bends[-1])]
        half = sum(quad(gap, a, b)[0] for a, b in pairwise(ends))
        return math.sqrt(2 * half / 0.5)  # D is even; E[ReLU²] is ½

    site = probed(normal, base=base)
    for hardness in (1.0, 3.0, 10.0, 100.0):
        assert site.relative_error(hardness) == pytest.approx(integral(hardness), rel=1e-3)
    expected = brentq(lambda h: integral(h) - 0.01, 1.0, 1000.0)
    assert site.target_hardness() == pytest.approx(expected, rel=1e-3)
    for scale in (0.01, 1 / 3):
        assert probed(normal * scale, base=base).target_hardness(0.01) == pytest.approx(expected / scale, rel=2e-3)
    assert probed(normal * 100, base=base).target_hardness(0.01) == 1.0


@each_base
def test_extreme_pre_activations(base: str) -> None:
    """Zeros, values of every magnitude, and sites where ReLU is 0 throughout; the error falls in λ, whatever the values."""
    x = np.array([[10.0**k, -(10.0**k), 0.0] for k in range(-50, 3)])
    wild = probed(*x, base=base)
    errors = [wild.relative_error(10.0**k) for k in np.linspace(0, 30, 200)]
    assert all(a >= b for a, b in pairwise(errors))
    for hardness in (1.0, 1e5, 1e15, 1e28):
        low, high = (direct_error(x.ravel(), hardness * factor, base) / factor for factor in (1.01 * R, 1 / (1.01 * R)))
        assert low <= wild.relative_error(hardness) <= high
    high_only = probed([1e30, -1e30, 1e3], base=base)  # beyond the last bin
    assert (high_only.relative_error(1.0), high_only.target_hardness(1e-9)) == (0.0, 1.0)

    zero = probed([0.0, -0.0, 1e-320], base=base)
    assert (zero.relative_error(1.0), zero.target_hardness(1e-6), zero.negative) == (0.0, 1.0, 0.0)
    dead = probed([-1.0, -2.0], base=base)
    target = dead.target_hardness(0.01)  # where f is 0 in float64, too
    assert (dead.relative_error(1.0), dead.relative_error(0.97 * target)) == (math.inf, math.inf)
    assert dead.relative_error(target) == 0.0
    assert target < 1000.0
    tiniest = probed([1e-32, -1e-32], base=base).target_hardness(0.01)  # would be beyond what λ may be
    assert tiniest == pytest.approx(1e30)
    assert tiniest <= 1e30
    nearly = probed(np.array([1e-20, -1e-20] * 10), base=base)  # λ|x| as for x = ±1 at λ / 1e20
    assert nearly.target_hardness(0.01) == pytest.approx(
        1e20 * probed([1.0, -1.0] * 10, base=base).target_hardness(0.01), rel=0.02
    )


@pytest.mark.parametrize("tolerance", [0.0, -0.1, math.nan, math.inf])
def test_tolerances_out_of_range(tolerance: float) -> None:
    report = hlg.calibrate(Probe(), [{"inputs_embeds": torch.randn(1, 50)}])
    with pytest.raises(ValueError, match=rf"relative tolerance .*> 0.*, got {tolerance}"):
        report.targets(tolerance)
    for site in report.sites:
        with pytest.raises(ValueError, match="hardness must be a finite number >= 1"):
            site.relative_error(0.5)


def test_report() -> None:
    """The table is aligned, and shows what `to_dict` holds, which JSON takes."""
    model = Probe()
    model.first.set_hardness(3.0)
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)) * 2
    report = hlg.calibrate(model, [{"inputs_embeds": x}])
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    first, _, idle = record["sites"]
    values = x.double().numpy()
    assert first["relative_error"] == pytest.approx(direct_error(values, 3.0, "gelu"), rel=1e-3)
    assert first["hardness_for_1_percent"] == report.targets()["first"] == pytest.approx(7.885 / 2, rel=0.05)
    assert (idle["count"], idle["mean"], idle["relative_error"]) == (0, None, None)

    lines = str(report).splitlines()
    assert len({len(line) for line in lines[1:4]}) == 1
    name, *numbers = lines[2].replace(" %", "").split()
    expected = [3.0, 1, 0, values.mean(), values.std(), 100 * (values < 0).mean(), 3.0 * values.std()]
    expected += [100 * first["relative_error"], first["hardness_for_1_percent"]]
    assert name == "first"
    assert [float(n) for n in numbers] == pytest.approx(expected, rel=6e-3)
