"""`activation_sparsity` against numpy on what hooks took from networks that stock transformers built with relu."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from support.models import converted, relu_model, stock_relu
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, ResNetConfig, ResNetModel

import hf_lambda_gelu as hlg


def relu_outputs(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, list[np.ndarray]]:
    """{module name: outputs of its calls} of every ReLU, with nothing of the package."""
    found: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            found[name] = []
            module.register_forward_hook(lambda m, a, out, name=name: found[name].append(out.detach().numpy().copy()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return found


def masked(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """A batch of two texts, of which the second is padded."""
    batch = tiny.inputs(model, seed)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 6:] = 0
    return batch


@pytest.mark.parametrize("name", ["bert-classifier", "llama", "gpt2", "albert"])
def test_zeros_of_stock_networks(name: str) -> None:
    """Zeros and units that never fire, at tokens alone; a padded position that fires does not bring a unit to life."""
    model = relu_model(name)
    batches = [masked(model), tiny.inputs(model, 1)]
    expected = relu_outputs(stock_relu(name, model), batches)
    report = hlg.activation_sparsity(model, iter(batches))
    assert [site.name for site in report.sites] == list(expected)
    for site in report.sites:
        calls = expected[site.name]
        per_batch = len(calls) // 2
        mask = masked(model)["attention_mask"].numpy().astype(bool)
        rows = [c[mask] for c in calls[:per_batch]] + [c.reshape(-1, c.shape[-1]) for c in calls[per_batch:]]
        outputs = np.concatenate(rows)
        assert site.zeros == pytest.approx((outputs == 0).mean(), abs=1.5 / outputs.size)
        assert site.dead == tuple(np.flatnonzero((outputs == 0).all(0)))
        assert (site.units, site.tokens, site.padding) == (outputs.shape[1], len(outputs), 5 * per_batch)
    assert report.zeros == pytest.approx(np.mean([site.zeros for site in report.sites]))


def test_a_reloaded_folder(tmp_path: Path) -> None:
    """The sites are found without what `relu_ize` left in the process."""
    model = relu_model("vit")
    batches = [tiny.inputs(model)]
    hlg.save_relu_pretrained(model, tmp_path / "relu")
    reloaded = type(model).from_pretrained(tmp_path / "relu")
    assert hlg.activation_sparsity(reloaded, batches) == hlg.activation_sparsity(model, batches)


def test_channels_of_a_convolution() -> None:
    """Of (batch, channels, height, width) the units are the channels, and a token is a pixel."""
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")).eval()
    with torch.no_grad():
        model.get_submodule("embedder.embedder.normalization").bias.copy_(torch.tensor([-50.0, 0, 0, 0, 0, -50.0, 0, 0]))
    batches = [{"pixel_values": torch.randn(2, 3, 32, 32)}]
    report = hlg.activation_sparsity(model, batches)
    first = report.sites[0]
    assert (first.units, first.tokens, first.dead) == (8, 2 * 16 * 16, (0, 5))
    assert first.zeros == (relu_outputs(model, batches)[first.name][0] == 0).mean()


class Shared(nn.Module):
    """One ReLU between layers of unlike width, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2)
        self.relu, self.idle = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(self.relu(self.second(self.relu(self.first(x)))))
        return out


def test_calls_of_unlike_width_and_a_site_that_never_runs() -> None:
    report = hlg.activation_sparsity(Shared(), [torch.randn(5, 4)])
    shared, idle = report.sites
    assert (shared.units, shared.dead, shared.tokens) == (None, (), 10)
    assert (idle.tokens, idle.units) == (0, None)
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [site["zeros"] for site in record["sites"]] == [shared.zeros, None]
    assert record["zeros"] == report.zeros == shared.zeros
    lines = str(report).splitlines()
    assert lines[2].split() == ["relu", "10", "0", f"{shared.zeros:.1%}", "?", "?"]
    assert lines[3].split(maxsplit=1) == ["idle", "no batch reached it"]


def test_smooth_activations_are_named() -> None:
    """Whisper's convolutions call F.gelu, which no substitution reaches."""
    model = relu_model("whisper")
    report = hlg.activation_sparsity(model, [tiny.inputs(model)])
    assert [item.name for item in report.left] == ["model.encoder", "model.encoder"]
    assert "2 smooth activations put out none" in str(report)


def test_nothing_is_changed() -> None:
    model = relu_model("bert").train()
    before = tiny.snapshot(model)
    hlg.activation_sparsity(model, [tiny.inputs(model)])
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: converted("bert"), r"3 λ-GELUs .* call hf_lambda_gelu.relu_ize"),
        (lambda: tiny.build("bert"), r"is smooth .* call hf_lambda_gelu.convert\(model\), and then"),
        (lambda: nn.Linear(4, 4), "has no torch.nn.ReLU module"),
        (lambda: relu_model().to("meta"), "meta device"),
    ],
)
def test_refused(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hlg.activation_sparsity(model(), [torch.randn(2, 4)])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "yielded no batch"),
        ([torch.full((1, 4), torch.nan)], "batch 0: what enters relu is NaN"),
        ([torch.ones(1, 3)], "raised"),
    ],
)
def test_batches_that_cannot_be_used(batches: list[Any], message: str) -> None:
    with pytest.raises(hlg.CalibrationError, match=message):
        hlg.activation_sparsity(Shared(), batches)


def test_a_real_model(asset: Callable[[str], Path]) -> None:
    """Of MiniLM with ReLU about half of what the ReLUs put out is 0, and the counts are those of the hooks."""
    folder = asset("minilm")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    batch = dict(tokenizer(["a quiet film that stays with you", "dull"], padding=True, return_tensors="pt"))
    report = hlg.activation_sparsity(model, [batch])
    mask = batch["attention_mask"].numpy().astype(bool)
    for site, (calls,) in zip(report.sites, relu_outputs(model, [batch]).values(), strict=True):
        assert site.zeros == pytest.approx((calls[mask] == 0).mean(), abs=1e-4)
        assert (site.tokens, site.padding) == (int(mask.sum()), int((~mask).sum()))
    assert 0.4 < report.zeros < 0.95
