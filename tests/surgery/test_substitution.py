"""`relu_ize` and `gates_as_relu`, against stock ReLU networks that share nothing with them but the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from support import tiny
from support.models import hardened, roformer, stock_relu
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

import hf_lambda_gelu as hlg

# base → a stock activation of it, and a model whose sites have it
BASES = {
    "gelu": ("gelu", "bert"),
    "gelu_tanh": ("gelu_new", "gpt2"),
    "quick_gelu": ("quick_gelu", "clip"),
    "silu": ("silu", "llama"),
}


def distance(key: str) -> tuple[float, float]:
    """sup |a − ReLU| and ∫ |a(x)/x − H(x)| dx of a stock activation a, by brute force in float64."""
    x = torch.linspace(-40, 40, 4_000_002, dtype=torch.float64)  # 0 is not on the grid
    gap = (ACT2FN[key](x) - x.relu()).abs()
    return float(gap.max()), float(torch.trapezoid(gap / x.abs(), x))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_stock_relu_network(name: str) -> None:
    """After relu_ize the model is the stock ReLU network: outputs to the bit, module classes, config, state dict."""
    model = hardened(name, 160.0, step=1.0)
    profile = hlg.hardness_profile(model)
    batch = tiny.inputs(model)
    twin = stock_relu(name, model)
    wanted, soft = tiny.outputs(twin, batch), tiny.outputs(model, batch)
    assert tiny.relative_difference(wanted, soft) > 0.0

    with hlg.gates_as_relu(model):
        assert tiny.relative_difference(wanted, tiny.outputs(model, batch)) == 0.0
    assert tiny.relative_difference(soft, tiny.outputs(model, batch)) == 0.0
    assert hlg.hardness_profile(model) == profile

    report = hlg.relu_ize(model, force=True)
    assert tiny.relative_difference(wanted, tiny.outputs(model, batch)) == 0.0
    assert [(n, str(type(m))) for n, m in model.named_modules()] == [(n, str(type(m))) for n, m in twin.named_modules()]
    assert list(model.state_dict()) == list(twin.state_dict())
    assert all(not module.training for module in model.modules())
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    assert not any("lambda" in json.dumps(config.to_dict()) for config in configs.values())
    assert model.config.to_dict() == twin.config.to_dict()

    assert report.profile == profile
    assert set(report.attributes) - {"feed_forward_proj"} == set(tiny.ACTIVATIONS[name])
    assert [(item.name, item.what) for item in report.left] == tiny.LEFT.get(name, [])
    assert (f"{len(report.left)} smooth activations remain" in str(report)) == bool(report.left)


@pytest.mark.parametrize("base", BASES)
def test_bounds_and_target(base: str) -> None:
    """λ that passes and the bounds reported, against distances measured on the stock activation."""
    key, name = BASES[base]
    sup, l1 = distance(key)
    target = l1 / 0.02
    with pytest.raises(hlg.SoftGateError, match=rf"expected at least {target:.4g}\b"):
        hlg.relu_ize(hardened(name, 0.99 * target), tolerance=0.02)
    report = hlg.relu_ize(hardened(name, 0.9995 * target), tolerance=0.02)  # a ramp ends at its target to fp32's accuracy
    assert not report.forced
    assert report.tolerance == 0.02
    for site in report.sites:
        assert site.base == base
        assert site.hardness == pytest.approx(0.9995 * target, rel=1e-6)
        assert site.sup_error == pytest.approx(sup / site.hardness, rel=1e-5)
    if base == "gelu":
        assert target == pytest.approx(2 / (0.02 * math.sqrt(2 * math.pi)), rel=1e-6)
        assert report.sites[0].sup_error == pytest.approx(0.16997 / report.sites[0].hardness, rel=1e-4)


def test_targets_per_site() -> None:
    """λ of each site is held against its own target; a site without one is named."""
    model = hardened("bert", 10.0, step=10.0)  # λ = 10, 20, 30
    names = list(hlg.hardness_profile(model))
    with pytest.raises(hlg.SoftGateError, match=rf"1 of 3 gates are soft for their targets: {names[1]} has λ = 20, .* 25"):
        hlg.relu_ize(model, targets=dict(zip(names, (10.0, 25.0, 30.0), strict=True)))
    with pytest.raises(ValueError, match=f"no λ for 1 of 3 sites, {names[2]}"):
        hlg.relu_ize(model, targets=dict.fromkeys(names[:2], 10.0))
    assert len(hlg.hardness_sites(model)) == 3
    assert not hlg.relu_ize(model, targets=dict(zip(names, (10.0, 20.0, 30.0), strict=True))).forced


def test_soft_gates() -> None:
    """The softest gate is named with the λ it has and needs; force and a looser tolerance let it pass."""
    model = hardened("bert")
    site = "bert.encoder.layer.1.intermediate.intermediate_act_fn"
    hlg.hardness_sites(model)[site].set_hardness(12.5)
    before = tiny.snapshot(model)
    for tolerance, needed in ((0.005, "159.6"), (0.063, "12.66")):  # 0.79788 / 12.5 = 0.06383
        with pytest.raises(hlg.SoftGateError, match=rf"1 of 3 gates .* {site} has λ = 12\.5, expected at least {needed}"):
            hlg.relu_ize(model, tolerance=tolerance)
        assert tiny.snapshot(model) == before
    twin, batch = stock_relu("bert", model), tiny.inputs(model)
    report = hlg.relu_ize(model, force=True)
    assert report.forced
    assert "(forced: gates were soft)" in str(report)
    assert tiny.relative_difference(tiny.outputs(twin, batch), tiny.outputs(model, batch)) == 0.0
    assert not hlg.relu_ize(hardened("bert", 12.5), tolerance=0.064).forced
    assert not hlg.relu_ize(hardened("bert"), force=True).forced  # nothing was soft


def test_report_text() -> None:
    """The printed table, word for word."""
    report = hlg.relu_ize(hardened("roberta", 200.0, step=50.0))
    assert str(report).splitlines() == [
        "2 activations are ReLU now",
        "  site                                                        λ before  sup |f − ReLU|",
        "  roberta.encoder.layer.0.intermediate.intermediate_act_fn         200  0.00085",
        "  roberta.encoder.layer.1.intermediate.intermediate_act_fn         250  0.00068",
        "1 smooth activations remain",
        "  lm_head: gelu(x): a function call in the modelling code, out of reach of a module swap",
    ]
    assert json.loads(json.dumps(report.to_dict()))["sites"][1]["hardness"] == 250.0


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: tiny.build("bert"), r"BertForMaskedLM has no λ-GELU to replace: call convert\(model\) first"),
        (lambda: tiny.build("bert", hidden_act="relu"), "it is a ReLU model already, or never was converted"),
    ],
    ids=["never converted", "ReLU"],
)
def test_nothing_to_replace(make: Callable[[], PreTrainedModel], hint: str) -> None:
    """What to do is said, and nothing is done."""
    model = make()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=hint):
        hlg.relu_ize(model, force=True)
    assert tiny.snapshot(model) == before


def test_twice() -> None:
    """A second call finds a ReLU model."""
    model = hardened("bert")
    hlg.relu_ize(model)
    with pytest.raises(ValueError, match="ReLU model already"):
        hlg.relu_ize(model)


def test_left_follows_a_lookup() -> None:
    """What became ReLU because its attribute did is not among the smooth activations that remain."""
    assert hlg.relu_ize(roformer()).left == []


def test_meta() -> None:
    """Without storage λ has no value: said, and nothing is done."""
    model = hardened("bert").to("meta")
    with pytest.raises(ValueError, match="meta device"):
        hlg.relu_ize(model, force=True)
    assert hlg.hardness_sites(model)
