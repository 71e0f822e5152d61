"""The verbs that measure show how far they are, on a terminal only, and measure the same with and without."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor
from transformers.utils import logging

import hf_lambda_gelu as hlg

SITES, BATCHES = 2, 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def batches(model: Any) -> list[dict[str, Tensor]]:
    return [tiny.inputs(model, seed) for seed in range(BATCHES)]


def calibrated(loader: Callable[[Any], Any]) -> Any:
    model = tiny.build("bert-classifier")
    hlg.convert(model)
    return hlg.calibrate(model, loader(batches(model))).to_dict()


def sensitive(loader: Callable[[Any], Any]) -> Any:
    model = tiny.build("bert-classifier")
    hlg.convert(model)
    return hlg.sensitivity(model, loader(batches(model))).to_dict()


def substituted(loader: Callable[[Any], Any]) -> Any:
    model = tiny.build("bert-classifier")
    hlg.convert(model)
    return hlg.relu_ize(model, force=True, calibration=loader(batches(model))).to_dict()


VERBS = {
    "calibration": (calibrated, BATCHES),
    "sensitivity": (sensitive, BATCHES * (1 + SITES)),
    "measuring the change": (substituted, BATCHES),
}


@pytest.mark.parametrize("description", VERBS)
@pytest.mark.parametrize("known", [True, False])
def test_bars(description: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar with the right total, or with none for a generator; wiped at the end; nothing without a terminal or when
    transformers' bars are off; the results are bit for bit the same each time."""
    verb, total = VERBS[description]
    loader: Callable[[Any], Any] = list if known else iter
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    results, texts = [], []
    try:
        for stream, enabled in ((Terminal(), True), (Terminal(), False), (io.StringIO(), True)):
            (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
            monkeypatch.setattr(sys, "stderr", stream)
            torch.manual_seed(0)
            results.append(verb(loader))
            texts.append(stream.getvalue())
    finally:
        logging.enable_progress_bar()
    assert results[0] == results[1] == results[2]
    assert texts[1:] == ["", ""]
    shown = texts[0].strip("\r").split("\r")
    assert shown[-1].strip() == ""  # wiped
    assert all(text.strip() == "" or text.startswith(description + ":") for text in shown)
    assert set(re.findall(r"\d+/(\d+) \[", texts[0])) == ({str(total)} if known else set())
    assert known or re.search(r"\d+it \[", texts[0])
