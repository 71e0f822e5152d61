"""A refit that is refused or fails, at whatever moment: the model is as it was."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from support import tiny
from support.calibration import calibration_set
from support.experts import experts_model
from support.handmade import Block, Handmade, HandmadeConfig
from support.models import converted, randomized
from support.states import full_snapshot, hooks, largest_difference, parameters
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

import hf_lambda_gelu as hlg


class Raises:
    """Makes the n-th call of any block raise, and knows whether the network's own forward was running then."""

    def __init__(self, model: PreTrainedModel, at: int, error: type[BaseException]) -> None:
        self.calls, self.at, self.error, self.model, self.in_network = 0, at, error, model, False
        self.handles = [block.register_forward_pre_hook(self) for block in blocks_of(model)]

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.in_network = any(frame.f_locals.get("self") is self.model for frame, _ in traceback.walk_stack(None))
            raise self.error("in the middle")

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)


@pytest.mark.parametrize("name", ["bert-classifier", "llama", "mixtral"])
def test_interrupted(name: str) -> None:
    """A block that raises at any moment of the compensation, up to the last measurement: the model is as it was to the bit,
    the gates smooth, added biases gone; and what is done afterwards comes out as on a fresh model.
    """

    def make() -> PreTrainedModel:
        return experts_model(name) if name == "mixtral" else converted(name, 2.0)

    fresh, batches = make(), calibration_set(make(), 4)
    counter = Raises(fresh, -1, KeyError)
    hlg.relu_ize(fresh, calibration=batches, compensate="least_squares")
    total = counter.calls
    assert total > 50
    counter.remove()
    model = make().train()
    before, outputs = full_snapshot(model), tiny.outputs(model.eval(), batches[0])
    moments = [1, 3, *range(9, total, total // 5), total - 2, total]
    in_network = set()
    for at, error in zip(moments, [RuntimeError, KeyboardInterrupt] * len(moments), strict=False):
        counter = Raises(model, at, error)
        with pytest.raises((error, hlg.CalibrationError), match="in the middle") as caught:
            hlg.relu_ize(model.train(), calibration=batches, compensate="least_squares")
        # a network whose forward fails is told with the batch; of a block that runs alone it is the block's own error
        told = error is RuntimeError and counter.in_network
        assert type(caught.value) is (hlg.CalibrationError if told else error)
        in_network.add(counter.in_network)
        counter.remove()
        assert full_snapshot(model) == before
        assert hooks(model) == []
    assert in_network == {True, False}
    assert tiny.relative_difference(outputs, tiny.outputs(model.eval(), batches[0])) == 0.0
    hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert largest_difference(parameters(fresh), parameters(model)) == 0.0


def test_interrupted_while_biases_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt after some of Llama's biases were added: they are gone, and the config says so."""
    model = converted("llama")
    before, original = full_snapshot(model), nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None and self is model.model.layers[1].mlp.up_proj:
            raise KeyboardInterrupt
        original(self, name, parameter)

    monkeypatch.setattr(nn.Module, "register_parameter", register)
    with pytest.raises(KeyboardInterrupt):
        hlg.relu_ize(model, calibration=calibration_set(model, 2), compensate="least_squares")
    monkeypatch.undo()
    assert full_snapshot(model) == before


def test_values_that_are_not_finite() -> None:
    """Activations that overflow are said, not fitted; the model is as it was."""
    for method in ("bias", "least_squares"):
        model = converted("bert-classifier")
        with torch.no_grad():
            model.bert.encoder.layer[1].intermediate.dense.bias[3] = float("inf")
        before = full_snapshot(model)
        with pytest.raises(hlg.CalibrationError, match=r"layer\.1\.intermediate.* not finite"):
            hlg.relu_ize(model, calibration=calibration_set(model, 6), compensate=method)  # type: ignore[arg-type]
        assert full_snapshot(model) == before


def test_arguments() -> None:
    """An unknown method, and a method without data, are refused before anything is done."""
    model = converted("bert-classifier")
    before = full_snapshot(model)
    with pytest.raises(ValueError, match="unknown compensate='ridge'"):
        hlg.relu_ize(model, calibration=[], compensate="ridge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learns from data"):
        hlg.relu_ize(model, compensate="bias")
    assert full_snapshot(model) == before


def test_no_site_can_be_refit() -> None:
    """A model in which nothing can be made up for is substituted only by force, and the report says why."""
    model = randomized(Handmade(HandmadeConfig("two")))
    batches = [{"inputs_embeds": torch.randn(2, 5, 8)} for _ in range(3)]
    before = tiny.snapshot(model)
    with pytest.raises(hlg.SoftGateError, match=r"can be refit \(act: it feeds several linear maps"):
        hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert tiny.snapshot(model) == before
    report = hlg.relu_ize(model, force=True, calibration=batches, compensate="least_squares").compensation
    assert report is not None
    assert (report.sites, list(report.uncompensated)) == ([], ["act"])
    assert str(report).splitlines()[1:] == [
        "  act not compensated: it feeds several linear maps: second.weight, third.weight"
    ]
    assert type(model.act) is type(ACT2FN["relu"])
    assert isinstance(Block("pre", "relu").act, nn.ReLU)
