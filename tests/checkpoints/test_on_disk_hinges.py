"""Checkpoints whose layers get wider in their files: what memory makes, to the bit, with one block of weights at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.folders import digests, load, read, same_tensors, stored
from torch import Tensor

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import folders, on_disk_files, on_disk_refit
from hf_lambda_gelu.surgery.refit import engine
from hf_lambda_gelu.surgery.refit.sources import RefitWeights
from hf_lambda_gelu.surgery.refit.store import Store

REFIT: dict[str, Any] = {"compensate": "least_squares"}
# a gated FFN that gets biases, with and without data; a head that keeps one ReLU; images; Conv1D and λ; a shared block
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**REFIT, "budget": 1.5}),
    "bert": ("bert", {**REFIT, "hinges": 2}),
    "vit": ("vit", {**REFIT, "hinges": 2}),
    "gpt2": ("gpt2", {**REFIT, "hinges": 2}),
    "albert": ("albert", {**REFIT, "hinges": 2}),
    "llama without data": ("llama", {"hinges": 4}),
    "gpt2 without data": ("gpt2", {"hinges": 5}),
}


def build(name: str, **config: Any) -> Any:
    return tiny.build(name, **({"n_inner": 37} if name == "gpt2" else {}), **config)


def batches(name: str) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(5):  # 110 tokens for 74 units
        torch.manual_seed(seed)
        made.append(tiny.inputs(build(name)))
    return made


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # drawing takes longer than all else


@pytest.mark.parametrize("case", CASES)
def test_is_what_memory_makes(case: str, tmp_path: Path) -> None:
    """Tensors to the bit, config with its widths, report and index; the folder loads; the source is as it was."""
    name, options = CASES[case]
    model = build(name)
    if name == "gpt2":
        hlg.convert(model, 3.0)
    model.save_pretrained(tmp_path / "src", max_shard_size="20KB")
    before = digests(tmp_path / "src")
    if "compensate" in options:
        options = {**options, "calibration": batches(name)}
    report = hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", **options)
    assert digests(tmp_path / "src") == before
    memory = load(type(model), tmp_path / "src")
    if name != "gpt2":
        hlg.convert(memory)
    expected = hlg.relu_ize(memory, **options)
    assert expected.hinges is not None
    hlg.save_relu_pretrained(memory, tmp_path / "memory")
    same_tensors(stored(tmp_path / "dst"), stored(tmp_path / "memory"))
    assert read(tmp_path / "dst") == read(tmp_path / "memory")
    assert report.model.hinges == expected.hinges
    assert str(report.model.hinges) == str(expected.hinges)
    same_tensors(load(type(model), tmp_path / "dst").state_dict(), memory.state_dict())
    index = read(tmp_path / "dst", "model.safetensors.index.json")["metadata"]
    sizes = [tensor.nbytes for tensor in stored(tmp_path / "dst").values()]
    assert index == {"total_parameters": memory.num_parameters(), "total_size": sum(sizes)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "memory", "src"]
