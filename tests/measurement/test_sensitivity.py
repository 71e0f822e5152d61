"""`sensitivity` against loops over stock models in which one activation module is nn.ReLU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from support.calibration import BAD_LOADERS, labelled, padded, watched
from support.models import converted
from support.references import Gate
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement import calibration


def stock(name: str, hard: str | None = None, hardness: dict[str, float] | None = None) -> PreTrainedModel:
    """A model that was never converted; `hard` is the module that is nn.ReLU."""
    model = tiny.build(name)
    for site, value in (hardness or {}).items():
        model.set_submodule(site, Gate(value))
    if hard is not None:
        model.set_submodule(hard, nn.ReLU())
    return model


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> float:
    """Over examples, not over batches."""
    pairs = [(float(model(**batch).loss), len(batch["labels"])) for batch in batches]
    return sum(loss * size for loss, size in pairs) / sum(size for _, size in pairs)


@torch.no_grad()
def logits(model: PreTrainedModel, batches: list[dict[str, Tensor]], mask: str) -> np.ndarray:
    """All logits in float64, without those of padding."""
    found = []
    for batch in batches:
        out = model(**batch).logits.double().numpy()
        found.append(out[batch[mask].numpy() != 0].ravel() if mask in batch and out.ndim == 3 else out.ravel())
    return np.concatenate(found)


@pytest.mark.parametrize("hardness", [1.0, 2.5])
def test_change_of_the_loss(hardness: float) -> None:
    """Batches of 1, 3 and 5 examples; with λ = 2.5 and 3.0, each stock model keeps the other gate as it is."""
    model = converted("bert-classifier", hardness, 0.5 * (hardness > 1.0))
    profile = hlg.hardness_profile(model)
    batches = [labelled(seed, size) for seed, size in enumerate((1, 3, 5))]
    report = hlg.sensitivity(model, iter(batches))

    gates = {} if hardness == 1.0 else profile
    base = mean_loss(stock("bert-classifier", None, gates), batches)
    expected = {site: mean_loss(stock("bert-classifier", site, gates), batches) - base for site in profile}
    assert report.loss == pytest.approx(base, rel=1e-5)
    assert report.examples == 9
    assert [(site.name, site.base, site.hardness) for site in report.sites] == [(n, "gelu", v) for n, v in profile.items()]
    for site in report.sites:
        assert site.loss_change == pytest.approx(expected[site.name], abs=2e-6)
        assert abs(site.loss_change) > 1e-4
    assert report.order == sorted(expected, key=expected.__getitem__)
    assert [site.rank for site in report.sites] == [report.order.index(site.name) + 1 for site in report.sites]


def test_a_site_whose_relu_lowers_the_loss_costs_least() -> None:
    """Signs count: the labels are what the model with ReLU at one site says most strongly against the smooth one."""
    model = converted("bert-classifier")
    tokens = torch.randint(3, 99, (400, 11), generator=torch.Generator().manual_seed(0))
    last = list(hlg.hardness_sites(model))[1]
    with torch.no_grad():
        lift = stock("bert-classifier", last)(tokens).logits - tiny.build("bert-classifier")(tokens).logits
    batch = {"input_ids": tokens, "labels": lift.argmax(-1)}
    report = hlg.sensitivity(model, [batch])
    assert report.sites[1].loss_change < 0.0
    assert report.order[0] == last
    assert abs(report.sites[1].loss_change) > abs(report.sites[0].loss_change)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "albert"])
def test_change_of_the_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without labels: the relative root mean square over all batches of uneven norm, at tokens that are no padding."""
    monkeypatch.setattr(calibration, "_PIECE_ELEMENTS", 100)
    model = converted(name)
    batches = [tiny.inputs(model, seed) for seed in range(2)]
    mask = "decoder_attention_mask" if name == "t5" else "attention_mask"
    if name != "vit":
        batches[1] = padded(batches[1], "decoder_input_ids" if name == "t5" else "input_ids", mask, 4)
    report = hlg.sensitivity(model, batches)
    before = logits(stock(name), batches, mask)
    for site in report.sites:
        after = logits(stock(name, site.name), batches, mask)
        expected = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert site.relative_change == pytest.approx(expected, rel=1e-4)
        assert site.loss_change is None
    changes = {site.name: site.relative_change for site in report.sites}
    assert report.order == sorted(changes, key=changes.__getitem__)
    assert len(set(changes.values())) == len(changes)
    assert (report.loss, report.examples) == (None, 4)


def test_padding_does_not_count() -> None:
    """More padding, with other tokens in it: the same numbers."""
    model = converted("bert")
    batch = tiny.inputs(model)
    reference = hlg.sensitivity(model, [batch])
    more = hlg.sensitivity(model, [padded(batch, "input_ids", "attention_mask", 9)])
    for one, other in zip(reference.sites, more.sites, strict=True):
        assert one.relative_change == pytest.approx(other.relative_change, rel=1e-4)


def test_batches_of_which_some_have_no_labels() -> None:
    """A mean of the loss over some of the batches would be compared with outputs of all: there is none."""
    model = converted("bert-classifier")
    bare = {"input_ids": labelled(1)["input_ids"]}
    for batches in ([labelled(), bare], [bare, labelled()]):
        report = hlg.sensitivity(model, batches)
        assert (report.loss, report.examples) == (None, 4)
        assert all(site.loss_change is None and site.relative_change > 0.0 for site in report.sites)


def test_one_pass_over_the_loader() -> None:
    """A generator will do; a batch is run once as it is and once per site, in eval mode."""
    model = converted("bert-classifier").train()
    runs: list[tuple[int, bool, bool]] = []
    drawn = []

    def loader() -> Iterator[dict[str, Tensor]]:
        for seed in range(3):
            drawn.append(seed)
            yield labelled(seed)

    hook = model.register_forward_pre_hook(lambda *_: runs.append((len(drawn), model.training, torch.is_grad_enabled())))
    hlg.sensitivity(model, loader())
    hook.remove()
    assert runs == [(count, False, False) for count in (1, 2, 3) for _ in range(3)]
    assert model.training


def test_sites_that_are_relu_already() -> None:
    """They stay so, and change nothing."""
    model = converted("bert-classifier")
    first, second = hlg.hardness_sites(model).values()
    first.as_relu = True
    report = hlg.sensitivity(model, [labelled()])
    assert (first.as_relu, second.as_relu) == (True, False)
    assert (report.sites[0].relative_change, report.sites[0].loss_change) == (0.0, 0.0)
    assert report.sites[1].relative_change > 0.0


@pytest.mark.parametrize("name", list(BAD_LOADERS))
def test_bad_loaders(name: str) -> None:
    loader, message = BAD_LOADERS[name]
    with pytest.raises(hlg.CalibrationError, match=message):
        watched(hlg.sensitivity, converted("bert-classifier"), loader())


def test_a_good_loader_leaves_the_model_as_it_was() -> None:
    assert watched(hlg.sensitivity, converted("bert-classifier"), [labelled()]).loss > 0.0


@pytest.mark.parametrize("call", [2, 3, 4, 5])
def test_a_forward_that_raises_half_way(call: int) -> None:
    """In the first batch as it is, with one site as ReLU, with the other, and in the second batch."""
    model = converted("bert-classifier")
    calls = []

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            if len(calls) == call:  # the first is one of `watched`
                raise RuntimeError("out of memory")
            return x

    model.bert.encoder.layer[1].output.dropout = Failing()
    with pytest.raises(hlg.CalibrationError, match=f"batch {int(call == 5)}: .*RuntimeError: out of memory") as caught:
        watched(hlg.sensitivity, model, [labelled(0), labelled(1)])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert not any(site.as_relu for site in hlg.hardness_sites(model).values())


def test_losses_and_outputs_that_are_not_finite() -> None:
    """The message names the batch, and the site whose ReLU makes it so."""

    def spoilt(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> Any:
        with pytest.raises(hlg.CalibrationError, match=expected):
            hlg.sensitivity(model, batches)

    expected = r"batch 1: the outputs or the loss \(nan\) are not finite.*labels are −100"
    spoilt(converted("bert"), [{**tiny.inputs(tiny.build("bert")), "labels": torch.full((2, 11), v)} for v in (5, -100)])
    model = converted("bert-classifier")
    with torch.no_grad():
        model.classifier.bias[0] = math.inf
    expected = "batch 0: the outputs or the loss .* are not finite"
    spoilt(model, [{"input_ids": labelled()["input_ids"]}])

    model = converted("bert-classifier")
    site = list(hlg.hardness_sites(model))[1]
    module = model.get_submodule(site)
    module.register_forward_hook(lambda m, _, out: out * math.nan if m.as_relu else out)
    expected = f"batch 0 with {site} as ReLU: the outputs or the loss"
    spoilt(model, [labelled()])
    assert not module.as_relu


def test_models_without_sites() -> None:
    with pytest.raises(ValueError, match="has no λ-GELU"):
        hlg.sensitivity(tiny.build("bert-classifier"), [labelled()])


def test_report_and_plot(tmp_path: Path) -> None:
    """The table is aligned and shows what `to_dict` holds, which JSON takes; the plot is a PNG."""
    model = converted("bert-classifier")
    with_loss, without = (hlg.sensitivity(model, [batch]) for batch in (labelled(), tiny.inputs(model)))
    for report in (with_loss, without):
        record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert record["order"] == report.order
        lines = str(report).splitlines()
        assert len({len(line) for line in lines[2:]}) == 1
        for line, site in zip(lines[2:], record["sites"], strict=True):
            name, *numbers = line.split()
            expected = [site["hardness"], site["relative_change"]]
            expected += [] if site["loss_change"] is None else [site["loss_change"]]
            assert name == site["name"]
            assert [float(n) for n in numbers[:-1]] == pytest.approx(expected, rel=6e-3, abs=5e-5)
            assert int(numbers[-1]) == site["rank"]
        path = hlg.plot_sensitivity(report, tmp_path / "plot.png")
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "Δ loss" in str(with_loss)
    assert "Δ loss" not in str(without)
    with pytest.raises(ValueError, match="report is empty"):
        hlg.plot_sensitivity(hlg.SensitivityReport([], None, 0), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
