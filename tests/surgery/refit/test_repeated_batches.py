"""A batch that comes again says nothing new: what is held out must not be what was fitted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny
from support.calibration import calibration_set
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel
from transformers.utils import logging

import hf_lambda_gelu as hlg

ROWS = [{"input_ids": torch.randint(3, 99, (11,), generator=torch.Generator().manual_seed(seed))} for seed in range(12)]


class Whole(IterableDataset[Any]):
    """As it is often written: each worker of a loader gives all of it."""

    def __iter__(self) -> Any:
        return iter(ROWS)


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    logger = logging.get_logger("hf_lambda_gelu.surgery.refit.dealt_batches")
    monkeypatch.setattr(logger, "warning", found.append)
    return found


def refit(batches: Any) -> tuple[PreTrainedModel, hlg.SubstitutionReport]:
    model = tiny.enliven(tiny.build("bert"))
    hlg.convert(model)
    return model, hlg.relu_ize(model, calibration=batches, compensate="least_squares")


def test_workers_that_each_give_all(warned: list[str]) -> None:
    """To the bit what each batch once gives, with its rows, and its errors on what is held out."""
    once, expected = refit(DataLoader(Whole(), batch_size=4))
    assert warned == []
    twice, report = refit(DataLoader(Whole(), batch_size=4, num_workers=2))
    assert warned[0].startswith("3 of 6 calibration batches are the same as earlier ones and were left out")
    assert tiny.snapshot(once)["tensors"] == tiny.snapshot(twice)["tensors"]
    assert expected.compensation is not None
    assert report.compensation is not None
    assert report.compensation.sites == expected.compensation.sites
    assert [site.rows for site in report.compensation.sites] == [12 * 11] * 2
    assert report.relative_change == expected.relative_change


def test_batches_that_are_alike_in_part(warned: list[str]) -> None:
    """Another mask, another order: another batch."""
    model = tiny.build("bert")
    first, *others = calibration_set(model, 3)
    ones = torch.ones_like(first["input_ids"])
    ones[0, 8:] = 0
    _, report = refit([first, {"input_ids": first["input_ids"].flip(0)}, {**first, "attention_mask": ones}, *others])
    assert warned == []
    assert report.compensation is not None
    assert report.compensation.sites[0].rows == 11 * (2 + 2 + 2 + 1 + 2) - 3
