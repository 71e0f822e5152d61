"""`demo`: its numbers against stock transformers, in a process without network, terminal or arguments."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from support.cli import files, forked, invoke, pictures, vit
from transformers import BertForSequenceClassification, BertTokenizer

from hf_lambda_gelu.cli.demo import SENTENCES, tiny


@torch.no_grad()
def logits(folder: Path, texts: tuple[str, ...]) -> torch.Tensor:
    """By stock transformers, text by text."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = BertTokenizer.from_pretrained(folder)
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts]).double()


def test_without_arguments(tmp_path: Path) -> None:
    """Pure JSON on stdout, an empty stderr, no files left; the numbers are those of the folder that it keeps."""
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "HF_HUB_OFFLINE": "1"}
    process = forked("demo", "--json", "--save-to", "relu", env=env, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    found = json.loads(process.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["relu", "tmp"]
    assert files(tmp_path / "tmp") == []

    tiny(tmp_path / "gelu")
    held_out = SENTENCES[: sum(found["examples"].values())][1::2]
    assert len(held_out) == found["examples"]["held_out"]
    before, after = (logits(folder, held_out) for folder in (tmp_path / "gelu", tmp_path / "relu"))
    same, converted, swapped, refit = (step["change"] for step in found["steps"])
    assert refit == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    assert (same, found["stock_difference"]) == (0.0, 0.0)
    assert converted < 1e-5
    assert refit < swapped / 2
    config = tmp_path / "gelu" / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"relu"'))
    naive = logits(tmp_path / "gelu", held_out)
    assert swapped == pytest.approx(float((naive - before).norm() / before.norm()), rel=1e-4)
    assert [step["activations"].get("relu", 0) for step in found["steps"]] == [0, 0, 2, 2]


def test_table_and_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vision model with its pictures; a table for people; the source stays as it was."""
    vit(tmp_path / "src")
    before = files(tmp_path / "src")
    text = invoke("demo", tmp_path / "src", "--calibration", pictures(tmp_path / "pictures", 8)).stdout
    assert "ViTForImageClassification: 4 examples for the refit, 4 others" in text
    assert "ReLU swapped in, unprepared" in text
    assert text.rstrip().endswith("outputs differ by 0")
    assert files(tmp_path / "src") == before
    assert "data are texts" in invoke("demo", tmp_path / "src", code=2).stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    assert "not empty" in invoke("demo", "--save-to", tmp_path / "full", code=2).stderr
