"""What `prune_dead_units` leaves whole because the config or the weights cannot say less, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import tiny
from support.dead_units import batches, kill
from support.models import converted, relu_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement.examples.choice import example_inputs
from scripts.architectures.tiny_models import tiny_model


def test_tied_layers_are_left_whole() -> None:
    """One weight under two names; a third layer, which is not tied, has the same width in the config, and stays too."""
    model = converted("bert", 160.0, num_hidden_layers=3)
    hlg.relu_ize(model, force=True)
    layers = model.bert.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    for layer in range(3):
        kill(model, f"bert.encoder.layer.{layer}.intermediate.dense", [1, 2])
    before = tiny.snapshot(model)
    report = hlg.prune_dead_units(model, batches(model))
    tied = "bert.encoder.layer.0.output.dense.weight is tied to bert.encoder.layer.1.output.dense.weight"
    assert report.whole["bert.encoder.layer.0.intermediate.intermediate_act_fn"] == tied
    assert report.whole["bert.encoder.layer.2.intermediate.intermediate_act_fn"].startswith(
        "config.intermediate_size is the width of bert.encoder.layer.0.intermediate.dense.weight too"
    )
    assert not report.widths
    assert tiny.snapshot(model) == before


def test_a_ratio_is_left_whole() -> None:
    """DINOv2's config has a ratio in place of a width."""
    model = relu_model("dinov2")
    kill(model, "dinov2.encoder.layer.0.mlp.fc1", [0])
    before = tiny.snapshot(model)
    report = hlg.prune_dead_units(model, batches(model))
    assert report.whole["dinov2.encoder.layer.0.mlp.activation_fn"].startswith("no number in the config is its width alone")
    assert [s.kept for s in report.sites] == [64, 64]
    assert tiny.snapshot(model) == before
    assert "0 units removed" in str(report)


def test_number_that_is_divided_elsewhere() -> None:
    """VideoPrism's pooling head has (number // heads) · heads features, so its layers stay whole."""
    model = tiny_model("videoprism", "AutoModel").eval()
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    gates = [name for name in model.state_dict() if name.endswith("mlp.fc1.bias") and "text" not in name]
    assert len(gates) == 6
    with torch.no_grad():
        for name in gates:
            model.get_parameter(name)[:4] = -1000.0
    before = {name: tensor.shape for name, tensor in model.state_dict().items() if "text" not in name}
    report = hlg.prune_dead_units(model, [example_inputs(model)])
    assert sum("is the width of video_model.head." in reason for reason in report.whole.values()) == len(gates)
    assert {name: tensor.shape for name, tensor in model.state_dict().items() if name in before} == before


class TwoUses(nn.Module):
    """Pre-activations that are summed up besides: `times` decides whether that counts."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.first, self.relu, self.second, self.times = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), times

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        return self.second(self.relu(h)) + self.times * h.sum(-1, keepdim=True)


def test_units_that_something_else_uses() -> None:
    model = TwoUses(1.0)
    kill(model, "first", [2, 5])
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"would change by .* something else uses these units.* The model is as it was"):
        hlg.prune_dead_units(model, [torch.rand(3, 4)])
    assert tiny.snapshot(model) == before
    assert model.second.in_features == 8
    hlg.prune_dead_units(TwoUses(0.0), [torch.rand(3, 4)])


def with_adapters() -> nn.Module:
    config = LoraConfig(target_modules=["intermediate.dense"], r=2)
    model: nn.Module = get_peft_model(relu_model("bert"), config)
    return model


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(relu_model("bert"), {nn.Linear}, torch.qint8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: converted("bert"), "call hf_lambda_gelu.relu_ize"),
        (lambda: tiny.build("bert"), "is smooth"),
        (lambda: relu_model().to("meta"), "meta device"),
        (with_adapters, "merge_and_unload"),
        (quantised, "prune first, then quantise"),
    ],
)
def test_refused(model: Callable[[], PreTrainedModel], message: str) -> None:
    built = model()
    with pytest.raises(ValueError, match=message):
        hlg.prune_dead_units(built, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "yielded no batch"),
        ([torch.ones(1, 3)], "batch 0: .* raised"),
        ([torch.ones(1, 4), torch.ones(1, 3)], "batch 1"),
    ],
)
def test_batches_that_cannot_be_used(data: list[Tensor], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    before = tiny.snapshot(model)
    with pytest.raises(hlg.CalibrationError, match=message):
        hlg.prune_dead_units(model, data)
    assert tiny.snapshot(model) == before
