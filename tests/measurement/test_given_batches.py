"""Batches that mean something else to the model than to who gives them: refused or said, and right ones are taken."""

from __future__ import annotations

import pytest
import torch
from support import tiny
from support.calibration import assert_same, labelled
from support.models import converted
from torch import Tensor, nn
from transformers.utils import logging

import hf_lambda_gelu as hlg

MASK = torch.arange(11)[None] < torch.tensor([[11], [7]])


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(logging.get_logger("hf_lambda_gelu.measurement.batches"), "warning", found.append)
    return found


class Scaled(nn.Module):
    """With an argument that it does not need, which labels of a loader would come into."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.layers(x)
        return y if scale is None else y * scale[:, None]


def test_labels_are_not_taken_for_an_argument() -> None:
    model = Scaled()
    hlg.convert(model)
    x, labels = torch.randn(16, 4), torch.zeros(16)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(hlg.CalibrationError, match=r"batch 0 is 2 tensors, and Scaled\.forward takes x, scale, not all"):
        hlg.relu_ize(model, calibration=[(x, labels)], compensate="least_squares")
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    reference = hlg.calibrate(model, [{"x": x}])
    for batch in (x, (x,), {"x": x, "scale": labels}):
        assert_same(reference, hlg.calibrate(model, [batch]))


@pytest.mark.parametrize("kind", ["additive", "additive for all heads", "bool", "whole"])
def test_masks_of_other_kinds(kind: str) -> None:
    """The same tokens count by each; an additive one without padding is 0 everywhere, and no padding."""
    model = converted("bert-classifier")
    mask = torch.ones_like(MASK) if kind == "whole" else MASK
    given = {"bool": mask}.get(kind, torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None, None])
    if kind == "additive for all heads":
        given = given.expand(2, 1, 11, 11)
    reference = hlg.calibrate(model, [{**labelled(), "attention_mask": mask.long()}])
    assert_same(reference, hlg.calibrate(model, [{**labelled(), "attention_mask": given}]))


def test_padding_that_no_mask_says(warned: list[str]) -> None:
    """It counts as text, which is said; not where the padding token ends texts too, nor where there is none."""
    model = converted("bert-classifier")
    ids = torch.where(MASK, labelled()["input_ids"], 0)
    hlg.calibrate(model, [{"input_ids": ids, "attention_mask": MASK.long()}, labelled()])
    assert warned == []
    report = hlg.calibrate(model, [{"input_ids": ids}, {"input_ids": ids.flip(1)}])
    assert (report.sites[0].tokens, report.sites[0].padding) == (44, 0)
    (told,) = warned
    assert told.startswith("2 rows of input_ids begin or end with the padding token")
    model.config.eos_token_id = model.config.pad_token_id
    hlg.calibrate(model, [{"input_ids": ids}])
    assert len(warned) == 1
    assert tiny.inputs(model)["input_ids"].min() > 0
