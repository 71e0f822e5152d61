"""`relu_ize` and `gates_as_relu`, against stock ReLU networks that share nothing with them but the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, RoFormerConfig, RoFormerForSequenceClassification
from transformers.activations import ACT2FN

import hf_lambda_gelu as hlg

# base → a stock activation of it, and a model whose sites have it
BASES = {
    "gelu": ("gelu", "bert"),
    "gelu_tanh": ("gelu_new", "gpt2"),
    "quick_gelu": ("quick_gelu", "clip"),
    "silu": ("silu", "llama"),
}


def hardened(name: str, value: float = 160.0, step: float = 0.0) -> PreTrainedModel:
    """A converted model with λ = value, value + step …"""
    model = tiny.build(name)
    hlg.convert(model)
    tiny.set_hardness(model, value, step)
    return model


def stock_relu(name: str, weights: PreTrainedModel) -> PreTrainedModel:
    """The network that stock transformers builds when the config says relu, with these weights."""
    model = tiny.build(name, seed=1, **tiny.relu_overrides(name))
    state = {key: tensor for key, tensor in weights.state_dict().items() if not key.endswith("raw_hardness")}
    model.load_state_dict(state)
    return model


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


def test_gates_as_relu_is_undone() -> None:
    """An exception inside the block does not leave the gates hard."""
    model = hardened("bert", 1.0)
    batch = tiny.inputs(model)
    soft = tiny.outputs(model, batch)
    with pytest.raises(KeyError, match="inside"), hlg.gates_as_relu(model):  # noqa: PT012
        assert tiny.relative_difference(soft, tiny.outputs(model, batch)) > 1e-3
        raise KeyError("inside")
    assert tiny.relative_difference(soft, tiny.outputs(model, batch)) == 0.0


def test_gates_as_relu_nests() -> None:
    """The end of an inner block, such as an evaluation inside one, leaves the outer block in force."""
    model = hardened("bert", 1.0)
    batch = tiny.inputs(model)
    with hlg.gates_as_relu(model):
        hard = tiny.outputs(model, batch)
        with hlg.gates_as_relu(model):
            pass
        assert tiny.relative_difference(hard, tiny.outputs(model, batch)) == 0.0


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """As users write it for the Trainer."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_calibration_numbers() -> None:
    """Change, loss and accuracy against numpy on the logits of the smooth model and of a stock ReLU network."""
    model = hardened("bert", 1.0)
    twin = stock_relu("bert", model)
    batches = [tiny.inputs(model, seed) for seed in range(3)]
    before, after = (np.stack([tiny.outputs(m, b)[0].double().numpy() for b in batches]) for m in (model, twin))
    labels = before.argmax(-1)
    labels[:, 0] = 5  # half of them are right before
    model.train()
    report = hlg.relu_ize(
        model,
        force=True,
        # what a data loader adds does no harm: columns that forward does not take, columns that are no tensors
        calibration=({**b, "labels": torch.tensor(y), "text": ["a", "b"]} for b, y in zip(batches, labels, strict=True)),
        compute_metrics=accuracy,
    )
    assert model.training
    change = math.sqrt(((after - before) ** 2).sum() / (before**2).sum())
    assert change > 0.05
    assert report.relative_change == pytest.approx(change, rel=1e-4)
    surprisals = [np.log(np.exp(x).sum(-1)) - np.take_along_axis(x, labels[..., None], -1)[..., 0] for x in (before, after)]
    losses = tuple(float(x.mean()) for x in surprisals)
    hits = tuple(float((x.argmax(-1) == labels).mean()) for x in (before, after))
    assert hits[0] >= 0.5 > hits[1] + 0.05
    assert report.metrics == {"loss": pytest.approx(losses, rel=1e-5), "accuracy": pytest.approx(hits)}
    assert f"loss: {losses[0]:.4f} → {losses[1]:.4f}" in str(report)
    assert f"accuracy: {hits[0]:.4f} → {hits[1]:.4f}" in str(report)
    assert f"outputs changed by {change:.2e}" in str(report)

    unlabelled = hlg.relu_ize(hardened("bert", 2.0), True, calibration=[tiny.inputs(model)], compute_metrics=accuracy)
    assert unlabelled.metrics == {}
    assert unlabelled.relative_change > 0.0


@pytest.mark.parametrize("compensate", [None, "least_squares"])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_zeros(name: str, compensate: str | None) -> None:
    """Of what the ReLUs of the finished model put out, tokens that are padding left out."""
    model, generator = hardened(name, 1.0), torch.Generator().manual_seed(0)
    made = []
    for seed in range(6):
        batch = tiny.inputs(model, seed)
        batch["attention_mask"] = (torch.rand(batch["input_ids"].shape, generator=generator) < 0.7).long()
        batch["attention_mask"][:, 0] = 1
        if "decoder_input_ids" in batch:
            batch["decoder_attention_mask"] = torch.ones_like(batch["decoder_input_ids"])
            batch["decoder_attention_mask"][:, -1] = 0
        made.append(batch)
    report = hlg.relu_ize(model, force=True, calibration=made, compensate=compensate)
    counted: dict[str, list[Tensor]] = {}
    for site in report.sites:
        mask = "decoder_attention_mask" if site.name.startswith("decoder") else "attention_mask"

        def hook(module: torch.nn.Module, args: Any, output: Tensor, name: str = site.name, mask: str = mask) -> None:
            counted.setdefault(name, []).append(output[batch[mask] == 1] == 0)

        model.get_submodule(site.name).register_forward_hook(hook)
    for batch in made:
        with torch.no_grad():
            model(**batch)
    expected = {name: float(torch.cat(parts).float().mean()) for name, parts in counted.items()}
    assert report.zeros == pytest.approx(expected, abs=1e-3)  # a refit sums in another order
    assert all(0.2 < value < 0.8 for value in expected.values())
    low, high, mean = (f(list(expected.values())) for f in (min, max, np.mean))
    assert f"zeros in what the ReLUs put out: {mean:.0%}, by site {low:.0%} to {high:.0%}" in str(report)
    assert hlg.relu_ize(hardened(name, 1.0), force=True).zeros == {}


def batches(case: str, good: dict[str, Tensor]) -> Iterable[Any]:
    """A calibration set with something wrong; all but those of nothing begin with good batches."""
    ids = good["input_ids"]
    bad: dict[str, Any] = {
        "a tuple": (ids, None),
        "a tensor": ids,
        "other columns": {"review": ids, "input": torch.ones(1)},
        "no tensors": {"input_ids": ids.tolist()},
        "labels alone": {"labels": ids},
        "another dtype": {"input_ids": ids.int()},
        "another device": {"input_ids": ids.to("meta")},
        "forward raises": {"input_ids": ids + 1000},
        "metrics raise": {**good, "labels": ids},
    }
    if case == "only padding":
        yield from [{**good, "attention_mask": torch.zeros_like(ids)}] * 2
    elif case == "the loader raises":
        yield good
        raise OSError("disk gone")
    elif case != "empty":
        yield from [good, good, bad[case], good]


@pytest.mark.parametrize("compensate", [None, "bias", "least_squares"])
@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("empty", hlg.CalibrationError, "the calibration set yielded no batch"),
        ("a tuple", hlg.CalibrationError, "batch 2 is a tuple: expected a mapping of the model's inputs"),
        ("a tensor", hlg.CalibrationError, "batch 2 is a Tensor: expected a mapping of the model's inputs"),
        ("other columns", hlg.CalibrationError, r"batch 2 .* no tensor .* is an input of BertForMaskedLM\.forward"),
        ("no tensors", hlg.CalibrationError, r"batch 2 .* no tensor .* is an input of BertForMaskedLM\.forward"),
        ("labels alone", hlg.CalibrationError, r"batch 2 .* no tensor .* takes 'input_ids'"),
        ("another dtype", hlg.CalibrationError, r"batch 2: input_ids is torch\.int32 on cpu, .* it was torch\.int64 on cpu"),
        (
            "another device",
            hlg.CalibrationError,
            r"batch 2: input_ids is torch\.int64 on meta, .* it was torch\.int64 on cpu",
        ),
        ("only padding", hlg.CalibrationError, "only padding"),
        ("forward raises", hlg.CalibrationError, r"batch 2: BertForMaskedLM\.forward raised IndexError: .*out of range"),
        ("the loader raises", OSError, "disk gone"),
        ("metrics raise", ZeroDivisionError, "division"),
    ],
)
def test_bad_calibration(case: str, error: type[Exception], message: str, compensate: str | None) -> None:
    """The model is as it was: modules, config, weights, mode, and the gates smooth again."""
    model = hardened("bert", 2.0).train()
    good = tiny.inputs(model)
    before, soft = tiny.snapshot(model), tiny.outputs(model.eval(), good)
    with pytest.raises(error, match=message):
        hlg.relu_ize(
            model.train(),
            True,
            calibration=batches(case, good),
            compensate=compensate,
            compute_metrics=lambda _: {"x": 1 / 0},
        )
    assert tiny.snapshot(model) == before
    assert tiny.relative_difference(soft, tiny.outputs(model.eval(), good)) == 0.0


def test_calibration_keeps_partial_modes() -> None:
    """A model that trains its head with the body in eval mode goes on doing so."""
    model = hardened("bert-classifier").train()
    model.bert.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    hlg.relu_ize(model, calibration=[tiny.inputs(model)])
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_calibration_with_dynamic_padding() -> None:
    """Batches padded to their own longest sequence, as data collators make them, have metrics too."""
    model = hardened("bert")
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 99, (2, length), generator=generator) for length in (7, 11)]
    report = hlg.relu_ize(model, calibration=[{"input_ids": i, "labels": i} for i in ids], compute_metrics=accuracy)
    assert set(report.metrics) == {"loss", "accuracy"}


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


def roformer() -> PreTrainedModel:
    """A converted and hardened model whose classifier looks `hidden_act` up inside forward."""
    torch.manual_seed(0)
    model = RoFormerForSequenceClassification(RoFormerConfig(**tiny.MODELS["bert"][2])).eval()
    hlg.convert(model)
    tiny.set_hardness(model, 160.0)
    return model


def test_left_follows_a_lookup() -> None:
    """What became ReLU because its attribute did is not among the smooth activations that remain."""
    assert hlg.relu_ize(roformer()).left == []


def test_gates_as_relu_and_a_lookup() -> None:
    """What evaluation with hard gates sees is what relu_ize makes, also where forward makes its own activation."""
    model = roformer()
    batch = tiny.inputs(model)
    with hlg.gates_as_relu(model):
        expected = tiny.outputs(model, batch)
    hlg.relu_ize(model)
    assert tiny.relative_difference(expected, tiny.outputs(model, batch)) == 0.0


def test_calibration_loss_of_unequal_batches() -> None:
    """The loss is the mean over examples, computed here by numpy from logits, also where a config says return_dict=False."""
    model = hardened("bert-classifier", 1.0)
    model.config.return_dict = False
    batch = tiny.inputs(model)
    ids, labels = batch["input_ids"].repeat(2, 1) % 97 + torch.arange(4)[:, None] % 3, torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        logits = model(input_ids=ids, return_dict=True).logits.double().numpy()
    wanted = float((np.logaddexp.reduce(logits, axis=1) - logits[np.arange(4), labels.numpy()]).mean())
    batches = [{"input_ids": ids[part], "labels": labels[part]} for part in (slice(0, 3), slice(3, 4))]
    report = hlg.relu_ize(model, force=True, calibration=batches)
    assert report.metrics["loss"][0] == pytest.approx(wanted, rel=1e-5)


def test_meta() -> None:
    """Without storage λ has no value: said, and nothing is done."""
    model = hardened("bert").to("meta")
    with pytest.raises(ValueError, match="meta device"):
        hlg.relu_ize(model, force=True)
    assert hlg.hardness_sites(model)
