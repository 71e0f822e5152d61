"""What `relu_ize` measures on a calibration set, against numpy on stock networks; sets that are bad."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from support.calibration import padded
from support.models import hardened, stock_relu
from torch import Tensor
from transformers import EvalPrediction

import hf_lambda_gelu as hlg


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


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_outputs_at_padding_do_not_count(name: str) -> None:
    """What is behind a causal network's tokens changes nothing in them: the change is that without padding."""
    whose = {"gpt2": ("input_ids", "attention_mask"), "t5": ("decoder_input_ids", "decoder_attention_mask")}[name]
    changes = []
    for more in (0, 9):
        model = hardened(name, 1.0)
        made = [padded(tiny.inputs(model, seed), *whose, more) for seed in range(3)]
        changes.append(hlg.relu_ize(model, force=True, calibration=made).relative_change)
    assert changes[1] == pytest.approx(changes[0], rel=1e-4)


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
        ("no tensors", hlg.CalibrationError, "batch 2 has input_ids as a list: expected tensors"),
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
