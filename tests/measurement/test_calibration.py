"""`calibrate` against numpy in float64 on pre-activations that hooks took from stock models, and against integrals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import ndtri
from support import tiny
from support.calibration import BAD_LOADERS, converted, labelled, padded, watched
from support.references import NUMPY_GATES
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement import calibration

BASES = {"gelu": "bert", "gelu_tanh": "gpt2", "quick_gelu": "clip", "silu": "llama"}
R = 2.0 ** (1 / 128)  # the factor by which half a bin, of 64 an octave, displaces |x| at most
each_base = pytest.mark.parametrize("base", list(BASES))


@torch.no_grad()
def captured(model: PreTrainedModel, sites: Iterable[str], batches: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """{site: every element that went into it}, in float64."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in sites}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].double().numpy().ravel())
        )
        for name in seen
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(arrays) for name, arrays in seen.items()}


def direct_error(x: np.ndarray, hardness: float, base: str) -> float:
    relu = np.maximum(x, 0)
    return math.sqrt(((x * NUMPY_GATES[base](hardness * x) - relu) ** 2).mean() / (relu**2).mean())


class Probe(PreTrainedModel):
    """What comes in goes to its sites; a third one is never called."""

    config_class = PreTrainedConfig
    main_input_name = "inputs_embeds"

    def __init__(self, base: str = "gelu") -> None:
        super().__init__(PreTrainedConfig())
        self.first, self.second, self.idle = (hlg.LambdaGELU(base=base) for _ in range(3))
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        self.modes.append((self.training or self.first.training, torch.is_grad_enabled()))
        return {"logits": self.first(inputs_embeds) + self.second(-inputs_embeds)}


def probed(*values: Any, base: str = "gelu") -> hlg.SiteStatistics:
    """The statistics of these values, a batch each."""
    tensors = [v if isinstance(v, Tensor) else torch.as_tensor(v, dtype=torch.float64) for v in values]
    return hlg.calibrate(Probe(base), [{"inputs_embeds": t.reshape(1, -1)} for t in tensors]).sites[0]


# --- the statistics


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
    """λ = 4 and 5 instead of 1: against a stock model with x Φ(λx), written here, in place of its activations."""

    class Gate(nn.Module):
        def __init__(self, hardness: float) -> None:
            super().__init__()
            self.hardness = hardness

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.special.ndtr(self.hardness * x)

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


# --- error and target


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


def assert_same(first: hlg.CalibrationReport, second: hlg.CalibrationReport, names: str = "") -> None:
    for one, other in zip(first.sites, second.sites, strict=True):
        assert one.count == other.count, one.name
        assert (one.mean, one.std, one.negative) == pytest.approx(
            (other.mean, other.std, other.negative), rel=1e-4, abs=1e-5
        )
        assert one.relative_error(3.0) == pytest.approx(other.relative_error(3.0), rel=1e-3)


def test_padding_does_not_count() -> None:
    """More padding, other tokens in it, the same numbers; without the mask they are others."""
    model = converted("bert")
    batch = tiny.inputs(model)
    batch["attention_mask"] = torch.ones(2, 11, dtype=torch.long)
    batch["attention_mask"][0, 8:] = 0
    reference = hlg.calibrate(model, [batch])
    assert [site.count for site in reference.sites] == [(8 + 11) * width for width in (37, 37, 32)]
    x = captured(model, hlg.hardness_sites(model), [batch])  # of all tokens: the rows of padding are cut out here
    keep = np.r_[0:8, 11:22]
    for site in reference.sites:
        rows = x[site.name].reshape(22, -1)[keep]
        assert (site.mean, site.std) == pytest.approx((rows.mean(), rows.std()), rel=1e-6)
    for more in (1, 9):
        assert_same(reference, hlg.calibrate(model, [padded(batch, "input_ids", "attention_mask", more)]))
    unmasked = hlg.calibrate(model, [{"input_ids": batch["input_ids"]}])
    assert unmasked.sites[0].count == 22 * 37


def test_padding_of_an_encoder_and_a_decoder() -> None:
    """Each side by its own mask; the decoder's by its labels where the model makes its input from them."""
    model = converted("t5")
    batch = tiny.inputs(model)
    reference = hlg.calibrate(model, [batch])
    assert [site.count for site in reference.sites] == [2 * 11 * 37] * 2 + [2 * 7 * 37] * 2
    encoder = padded(batch, "input_ids", "attention_mask", 4)
    both = padded(encoder, "decoder_input_ids", "decoder_attention_mask", 5)
    for other in (encoder, both):
        assert_same(reference, hlg.calibrate(model, [other]))

    labels = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    model.config.decoder_start_token_id = model.config.pad_token_id
    short = {"input_ids": batch["input_ids"], "labels": labels}
    longer = {**short, "labels": torch.cat([labels, torch.full((2, 3), -100)], 1)}
    assert_same(hlg.calibrate(model, [short]), hlg.calibrate(model, [longer]))


@pytest.mark.parametrize("name", ["wav2vec2", "convnext", "vit"])
def test_every_element_counts_where_there_are_no_tokens(name: str) -> None:
    """Channels first or last, patches or frames: a mask over samples fits none of them."""
    model = converted(name)
    batch = tiny.inputs(model)
    if name == "wav2vec2":
        batch["attention_mask"] = torch.ones(2, 400, dtype=torch.long)
        batch["attention_mask"][0, 300:] = 0
    expected = captured(tiny.build(name), hlg.hardness_sites(model), [batch])
    for site in hlg.calibrate(model, [batch]).sites:
        x = expected[site.name]
        assert (site.count, site.mean, site.std) == pytest.approx((x.size, x.mean(), x.std()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", list(BAD_LOADERS))
def test_bad_loaders(name: str) -> None:
    loader, message = BAD_LOADERS[name]
    model = converted("bert-classifier")
    with pytest.raises(hlg.CalibrationError, match=message) as caught:
        watched(hlg.calibrate, model, loader())
    if name == "token out of range":
        assert isinstance(caught.value.__cause__, IndexError)
    assert_same(hlg.calibrate(model, [labelled()]), hlg.calibrate(converted("bert-classifier"), [labelled()]))


def test_a_forward_that_raises_half_way() -> None:
    """After the first site has been reached, in the second batch; the cause is kept."""
    model = converted("bert-classifier")
    calls = []

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            if len(calls) == 3:  # the first is one of `watched`
                raise RuntimeError("out of memory")
            return x

    model.bert.encoder.layer[1].output.dropout = Failing()
    with pytest.raises(hlg.CalibrationError, match=r"batch 1: .*RuntimeError: out of memory") as caught:
        watched(hlg.calibrate, model, [labelled(0), labelled(1)])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(calls) == 4


def test_pre_activations_that_are_not_finite() -> None:
    """The message names the site and the batch; infinite values of padding do not matter."""
    model = converted("bert-classifier")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[98] = math.inf
    bad = labelled(1)
    bad["input_ids"][1, 10] = 98
    good = labelled()
    good["input_ids"].clamp_(max=97)
    with pytest.raises(hlg.CalibrationError, match=r"batch 1: the pre-activations of bert\.encoder\.layer\.0\S* are not"):
        hlg.calibrate(model, [good, bad])
    x = torch.randn(2, 3, 5)
    x[1, 2] = math.nan
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert hlg.calibrate(Probe(), [{"inputs_embeds": x, "attention_mask": mask}]).sites[0].count == 25


def test_models_without_sites() -> None:
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no λ-GELU: call hf_lambda_gelu\.convert"):
        hlg.calibrate(tiny.build("bert-classifier"), [labelled()])
    with pytest.raises(ValueError, match="meta device"):
        hlg.calibrate(converted("bert-classifier").to("meta"), [labelled()])


def test_the_model_is_run_without_dropout_or_gradients() -> None:
    """In training mode the numbers are those of eval mode."""
    model = converted("bert-classifier")
    reference = hlg.calibrate(model, [labelled()])
    assert_same(reference, watched(hlg.calibrate, model, [labelled()]))
    probe = Probe().train()
    hlg.calibrate(probe, [{"inputs_embeds": torch.randn(1, 4)}] * 2)
    assert probe.modes == [(False, False)] * 2
    assert probe.training


# --- the report


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
    expected = [3.0, values.mean(), values.std(), 100 * (values < 0).mean(), 3.0 * values.std()]
    expected += [100 * first["relative_error"], first["hardness_for_1_percent"]]
    assert name == "first"
    assert [float(n) for n in numbers] == pytest.approx(expected, rel=6e-3)
