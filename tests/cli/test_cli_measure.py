"""`audit`, `calibrate` and `sensitivity`: the library's numbers on the batches that the tokenizer makes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.cli import answer, bert, checkpoint, files, invoke, sentences, texts, tiny
from support.own_code import trap, write_own
from transformers import BertTokenizer

import hf_lambda_gelu as hlg


def tokenised(folder: Path, rows: list[str], size: int = 8) -> list[dict[str, Any]]:
    tokenizer = BertTokenizer.from_pretrained(folder)
    return [dict(tokenizer(rows[i : i + size], padding=True, return_tensors="pt")) for i in range(0, len(rows), size)]


def test_audit(tmp_path: Path) -> None:
    """What runs, and an exit code for scripts."""
    checkpoint(tmp_path / "gelu", "bert-classifier")
    checkpoint(tmp_path / "relu", "bert-classifier", hidden_act="relu")
    for name, counts in (("gelu", {"gelu": 2, "tanh": 1}), ("relu", {"relu": 2, "tanh": 1})):
        assert answer("audit", tmp_path / name)["counts"] == counts
    assert answer("audit", tmp_path / "relu", "--expect", "relu")["is_relu"] is True
    refused = invoke("audit", tmp_path / "gelu", "--expect", "relu", code=1)
    assert "2 smooth" in refused.stdout
    assert answer("audit", tmp_path / "gelu", "--expect", "relu", code=1)["is_relu"] is False


def test_calibrate(tmp_path: Path) -> None:
    """The numbers of `calibrate` on the same batches; a GELU model is measured at λ = 1, and stays as it is."""
    model = bert(tmp_path / "gelu")
    before = files(tmp_path / "gelu")
    data = ("--calibration", texts(tmp_path / "texts.txt"))
    found = answer("calibrate", tmp_path / "gelu", *data, "--tolerance", 0.05)
    hlg.convert(model)
    report = hlg.calibrate(model, tokenised(tmp_path / "gelu", sentences(24)))
    assert {key: found[key] for key in ("sites",)} == json.loads(json.dumps(report.to_dict()))
    assert found["targets"] == pytest.approx(report.targets(0.05))
    assert invoke("calibrate", tmp_path / "gelu", *data).stdout == f"{report}\n"
    assert files(tmp_path / "gelu") == before


def test_sensitivity_by_the_loss(tmp_path: Path) -> None:
    """Labels by their names in the config, from a table; ranks by the loss, which without labels is none."""
    model = bert(tmp_path / "src", hardness=2.0, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    rows = sentences(12)
    labels = [index % 2 for index in range(12)]
    table = tmp_path / "rows.csv"
    lines = [f"{row},{'good' if label else 'bad'}" for row, label in zip(rows, labels, strict=True)]
    table.write_text("\n".join(["review,grade", *lines]) + "\n")
    line = ("sensitivity", tmp_path / "src", "--calibration", table, "--column", "review")
    found = answer(*line, "--label-column", "grade")
    fed = tokenised(tmp_path / "src", rows)
    for start, batch in enumerate(fed):
        batch["labels"] = torch.tensor(labels[8 * start : 8 * start + 8])
    report = hlg.sensitivity(model, fed)
    assert found["loss"] == pytest.approx(report.loss)
    assert found["order"] == report.order
    assert [s["loss_change"] for s in found["sites"]] == pytest.approx([s.loss_change for s in report.sites])
    assert answer(*line)["loss"] is None

    def saved(name: str, numbers: list[int], names: list[str]) -> Path:
        columns = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        made = datasets.Dataset.from_dict({"text": rows, "label": numbers}, features=columns)
        made.save_to_disk(str(tmp_path / name))
        return tmp_path / name

    turned, numbered = [1 - label for label in labels], ["zero", "one"]
    for source in (saved("turned", turned, ["Good", "Bad"]), saved("numbered", labels, numbered)):
        line = ("sensitivity", tmp_path / "src", "--calibration", source, "--label-column", "label")
        assert answer(*line)["loss"] == pytest.approx(report.loss), "numbers are the data's, by names that both have"
    for source in (saved("missing", [*labels[:-1], -1], numbered), saved("more", [*labels[:-1], 2], [*numbered, "two"])):
        error = invoke(*line[:3], source, *line[4:], code=2).stderr
        assert re.search(r"the label (-1|2) is none of 0 to 1: leave out what has no label", error), error


@pytest.mark.parametrize("command", ["calibrate", "sensitivity"])
def test_no_data(tmp_path: Path, command: str) -> None:
    """Told before the model is looked for."""
    error = invoke(command, tmp_path / "nowhere", code=2).stderr
    assert "no calibration data: add --calibration" in error
    assert "nowhere" not in error


def test_own_code_runs_only_when_trusted(tmp_path: Path) -> None:
    """A checkpoint with code of its own: without --trust-remote-code the file is never run."""
    src, witness = write_own(tmp_path / "src"), tmp_path / "ran"
    trap(src, witness, "modeling_own.py")
    error = invoke("audit", src, code=1).stderr
    assert "has code of its own" in error
    assert not witness.exists()
    assert answer("audit", src, "--trust-remote-code")["counts"] == {"gelu": 3}
    assert witness.exists()


def test_the_code_of_this_package_is_not_needed(tmp_path: Path) -> None:
    """What save_with_code puts beside a model is not run here, whatever stands in it: the package has the activation."""
    model = tiny.build("bert-classifier")
    hlg.convert(model, 2.0)
    hlg.save_with_code(model, tmp_path / "src")
    trap(tmp_path / "src", tmp_path / "ran", "modeling_lambda_gelu.py")
    for trust in ((), ("--trust-remote-code",)):
        assert answer("audit", tmp_path / "src", *trust)["counts"]["lambda_gelu"] == 2
    assert not (tmp_path / "ran").exists()


def test_a_class_that_transformers_lacks(tmp_path: Path) -> None:
    """An unknown model type is a failure in one line."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_text(json.dumps({"model_type": "brand-new", "architectures": ["BrandNew"]}))
    assert "no model could be loaded" in invoke("audit", tmp_path / "src", code=1).stderr
