"""`export onnx`: the file computes what the checkpoint does, on the tokenizer's own batches."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from support.cli import answer, bert, checkpoint, files, invoke, sentences, texts
from transformers import BertTokenizer

import hf_lambda_gelu as hlg

SMALL = {"num_hidden_layers": 1}


def test_a_text_model_with_its_tokenizer(tmp_path: Path) -> None:
    """λ-GELU in bf16: the inputs are the tokenizer's; token types too, which the made-up example has not."""
    model = bert(tmp_path / "src", hardness=3.0, **SMALL)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "src")
    arguments = ("--calibration", texts(tmp_path / "texts.txt"), "--batch-size", 5)
    found = answer("export", "onnx", tmp_path / "src", tmp_path / "out" / "bert.onnx", *arguments)
    assert found["path"] == str(tmp_path / "out" / "bert.onnx")
    assert found["inputs"]["token_type_ids"] == ["batch", "sequence"]
    assert [shapes["input_ids"][0] for shapes in found["checked"]] == [5, 1]
    assert found["operators"]["Gelu"] == 1
    assert len(found["folded"]) == 1
    batch = BertTokenizer.from_pretrained(tmp_path / "src")(sentences(7, seed=9), padding=True, return_tensors="pt")
    ready = onnxruntime.InferenceSession(found["path"], providers=["CPUExecutionProvider"])
    got = torch.from_numpy(ready.run(["logits"], {name: value.numpy() for name, value in batch.items()})[0])
    with torch.no_grad():
        expected = model.float()(**batch).logits
    assert float((got - expected).abs().max() / expected.abs().max()) <= 2e-5


def test_int8(tmp_path: Path) -> None:
    """The ranges come from all of the data, in as many batches as it makes."""
    bert(tmp_path / "src", hidden_act="relu", **SMALL)
    arguments = ("--calibration", texts(tmp_path / "texts.txt"), "--batch-size", 5, "--int8")
    shown = invoke("export", "onnx", tmp_path / "src", tmp_path / "int8.onnx", *arguments).stdout
    count = -(-len((tmp_path / "texts.txt").read_text().splitlines()) // 5)
    assert f"linear maps, ranges from {count} batches" in shown
    assert "in float between one and the next: 1 Tanh\n" in shown, "the pooler's"
    assert shown.count("warning") == 1, "llama.cpp's BERT has GELU"


def test_an_encoder(tmp_path: Path) -> None:
    """Without data, with what the decoder's steps take; as text."""
    checkpoint(tmp_path / "src", "whisper", encoder_layers=1, decoder_layers=1, activation_function="relu")
    shown = invoke("export", "onnx", tmp_path / "src", tmp_path / "encoder.onnx", "--encoder", "--cache").stdout
    assert shown.startswith(f"{tmp_path / 'encoder.onnx'}: ")
    assert "1 Relu" in shown
    assert "input_features: batch × 8 × 32" in shown
    assert "→ cross.0.key: batch × 4 × 16 × 8" in shown


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong use before anything is loaded; an export that fails is exit code 1. Nothing is left."""
    checkpoint(tmp_path / "src", "vit", **SMALL)
    (tmp_path / "there.onnx").write_text("mine")
    (tmp_path / "numbers.jsonl").write_text('{"size": 1}\n{"size": 2}\n')
    before = files(tmp_path)
    line = ("export", "onnx", tmp_path / "src")
    assert "exists: remove it" in invoke(*line, tmp_path / "there.onnx", code=2).stderr
    assert "there is no folder" in invoke("export", "onnx", tmp_path / "none", tmp_path / "m.onnx", code=2).stderr
    assert "has no encoder beside a decoder" in invoke(*line, tmp_path / "m.onnx", "--encoder", code=2).stderr
    assert "no calibration data: add --calibration" in invoke(*line, tmp_path / "m.onnx", "--int8", code=2).stderr
    data = ("--calibration", tmp_path / "numbers.jsonl")
    assert "columns could hold the examples" in invoke(*line, tmp_path / "m.onnx", *data, code=2).stderr

    def fails(*_: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: fails())
    message = "error: torch.onnx.export does not take ViTForImageClassification: RuntimeError: no such operator"
    assert message in invoke(*line, tmp_path / "m.onnx", code=1).stderr
    assert issubclass(hlg.ExportError, RuntimeError)
    assert files(tmp_path) == before
