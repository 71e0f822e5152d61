"""Folders of release 0.1, which held s with λ = 1 + softplus(s / 0.1) under another name, in from_pretrained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

import hf_lambda_gelu as hlg

S = (-1.7, 0.31)
EXPECTED = [1 + np.logaddexp(0, s / 0.1) for s in S]


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A classifier of two layers as release 0.1 saved it."""
    model = tiny.build("bert-classifier")
    hlg.convert(model)
    model.save_pretrained(tmp_path / "older")
    path = tmp_path / "older" / "model.safetensors"
    state = load_file(path)
    names = [name for name in state if name.endswith("unclipped_hardness")]
    for name, s in zip(names, S, strict=True):
        del state[name]
        state[name.replace("unclipped_hardness", "raw_hardness")] = torch.tensor([s])
    save_file(state, path, metadata={"format": "pt"})
    return tmp_path / "older"


def values(model: PreTrainedModel) -> list[float]:
    return list(hlg.hardness_profile(model).values())


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loaded(older: Path, auto: type, dtype: torch.dtype) -> None:
    """With the head and without, in each dtype: λ is what it was, and nothing is missing."""
    model, info = auto.from_pretrained(older, dtype=dtype, output_loading_info=True)
    assert values(model) == pytest.approx(EXPECTED, rel=1e-6 if dtype is torch.float32 else 0.01)
    assert not info["missing_keys"] - {"pooler.dense.weight", "pooler.dense.bias"}
    assert not [name for name in info["unexpected_keys"] if "hardness" in name]
    assert all(site.unclipped_hardness.dtype is torch.float32 for site in hlg.hardness_sites(model).values())


def test_saved_as_today(older: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(older)
    model.save_pretrained(tmp_path / "today")
    state = load_file(tmp_path / "today" / "model.safetensors")
    assert not [name for name in state if "raw_hardness" in name]
    assert [state[name].item() for name in state if "unclipped" in name] == pytest.approx(EXPECTED, rel=1e-6)
    assert values(AutoModelForSequenceClassification.from_pretrained(tmp_path / "today")) == values(model)


def test_on_disk(older: Path, tmp_path: Path) -> None:
    """`relu_ize_checkpoint` reads λ of either name, and leaves neither."""
    report = hlg.relu_ize_checkpoint(older, tmp_path / "relu", force=True)
    assert list(report.model.profile.values()) == pytest.approx(EXPECTED, rel=1e-6)
    assert not [name for name in load_file(tmp_path / "relu" / "model.safetensors") if "hardness" in name]


def test_damaged(older: Path) -> None:
    """NaN is named, and the rest of transformers' table of conversions works as before."""
    state = load_file(older / "model.safetensors")
    name = next(name for name in state if "raw_hardness" in name)
    save_file({**state, name: torch.tensor([float("nan")])}, older / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"hardness is \[nan\]: expected finite numbers"):
        AutoModelForSequenceClassification.from_pretrained(older)


def test_saved_after_loading_for_zero3(tmp_path: Path) -> None:
    """transformers' loader for ZeRO-3 leaves every conversion with the model, used or not, and saving takes each back."""
    model = tiny.build("bert-classifier")
    hlg.convert(model, 3.0)
    model._weight_conversions = get_model_conversion_mapping(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert [value.item() for name, value in saved.items() if "hardness" in name] == [3.0, 3.0]
    assert {*hlg.hardness_profile(type(model).from_pretrained(tmp_path)).values()} == {3.0}
