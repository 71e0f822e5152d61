"""`convert`, `relu-ize` and `fold`: against the library's verbs and stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cli import answer, bert, files, invoke, sentences, texts, tiny
from transformers import (
    BertForSequenceClassification,
    BertTokenizer,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import hf_lambda_gelu as hlg


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.glob("*.safetensors")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def same_weights(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_convert_and_relu_ize_a_folder(tmp_path: Path) -> None:
    """Both ways with their options, as the verbs in memory have it; tokenizers come along; errors are refusals."""
    model = bert(tmp_path / "src")
    lam, relu = tmp_path / "lambda", tmp_path / "relu"
    text = invoke("convert", tmp_path / "src", lam, "--init-hardness", 90).stdout
    assert "converted 2 activations to λ-GELU at λ = 90" in text
    hlg.convert(model, 90.0)
    model.save_pretrained(tmp_path / "expected")
    assert same_weights(lam, tmp_path / "expected")
    assert json.loads((lam / "config.json").read_text())["hidden_act"] == "lambda_gelu"
    assert (lam / "tokenizer_config.json").is_file()
    assert inodes(tmp_path / "src") & inodes(lam)

    assert "gates are soft" in invoke("relu-ize", lam, relu, code=1).stderr
    assert not relu.exists()
    text = invoke("relu-ize", lam, relu, "--tolerance", 0.01, "--license", "mit").stdout
    assert "2 activations are ReLU now\n" in text
    hlg.relu_ize(model, tolerance=0.01)
    model.save_pretrained(tmp_path / "expected-relu")
    assert same_weights(relu, tmp_path / "expected-relu")
    assert "license: mit" in (relu / "README.md").read_text()
    assert (relu / "tokenizer_config.json").is_file()
    invoke("relu-ize", lam, tmp_path / "forced", "--force")
    assert same_weights(tmp_path / "forced", relu)


def test_copy(tmp_path: Path) -> None:
    """--copy links nothing."""
    bert(tmp_path / "src")
    found = answer("convert", tmp_path / "src", tmp_path / "dst", "--copy")
    assert not inodes(tmp_path / "src") & inodes(tmp_path / "dst")
    assert found["linked"] == []
    assert found["copied"]
    assert found["folder"] == str(tmp_path / "dst")
    assert [site["base"] for site in found["model"]["sites"]] == ["gelu", "gelu"]
    assert found["model"]["hardness"] == 1.0


@pytest.mark.parametrize(("start", "method"), [(None, "least_squares"), (1.5, "bias")])
def test_refit(tmp_path: Path, start: float | None, method: str) -> None:
    """A GELU model and a soft λ-GELU one: the weights are those of `relu_ize` on the tokenizer's batches."""
    model = bert(tmp_path / "src", hardness=start)
    arguments = ("--calibration", texts(tmp_path / "texts.txt"), "--compensate", method, "--batch-size", 5)
    found = answer("relu-ize", tmp_path / "src", tmp_path / "relu", *arguments)

    tokenizer = BertTokenizer.from_pretrained(tmp_path / "src")
    rows = sentences(24)
    fed = [dict(tokenizer(rows[i : i + 5], padding=True, return_tensors="pt")) for i in range(0, 24, 5)]
    if start is None:
        hlg.convert(model)
    report = hlg.relu_ize(model, calibration=fed, compensate=method)
    model.save_pretrained(tmp_path / "expected")
    assert same_weights(tmp_path / "relu", tmp_path / "expected")
    assert found["model"]["relative_change"] == pytest.approx(report.relative_change)
    assert [site["method"] for site in found["model"]["compensation"]["sites"]] == [method] * 2
    assert found["folder"] == str(tmp_path / "relu")
    assert BertTokenizer.from_pretrained(tmp_path / "relu").get_vocab() == tokenizer.get_vocab()
    stock = BertForSequenceClassification.from_pretrained(tmp_path / "relu").eval()
    assert stock.config.hidden_act == "relu"
    batch = tiny.inputs(model)
    assert tiny.relative_difference(tiny.outputs(model, batch), tiny.outputs(stock, batch)) <= 1e-6


def test_streamed_refit(tmp_path: Path) -> None:
    """The same weights as with all of the model in memory; without examples nothing could run."""
    bert(tmp_path / "src")
    data = ("--calibration", texts(tmp_path / "texts.txt"), "--compensate", "least_squares", "--batch-size", 5)
    found = answer("relu-ize", tmp_path / "src", tmp_path / "streamed", *data, "--stream")
    whole = answer("relu-ize", tmp_path / "src", tmp_path / "relu", *data)
    streamed, memory = weights(tmp_path / "streamed"), weights(tmp_path / "relu")
    assert streamed.keys() == memory.keys()
    for name, tensor in streamed.items():  # loaded weights lie where a product's last bit may be another
        torch.testing.assert_close(tensor, memory[name], rtol=1e-5, atol=1e-6)
    assert found["model"]["relative_change"] == pytest.approx(whole["model"]["relative_change"], rel=1e-5)
    assert found["rewritten"] == ["model.safetensors"]
    assert (tmp_path / "streamed" / "tokenizer_config.json").is_file()
    assert "add --calibration" in invoke("relu-ize", tmp_path / "src", tmp_path / "no", "--stream", code=2).stderr
    wider = answer("relu-ize", tmp_path / "src", tmp_path / "wider", *data, "--stream", "--budget", 1.5)["model"]["hinges"]
    assert [site["units"] for site in wider["sites"]] == [[37, 56]] * 2
    wider = answer("relu-ize", tmp_path / "src", tmp_path / "wide", "--stream", "--hinges", 4)["model"]["hinges"]
    assert wider["widths"] == {"intermediate_size": [37, 148]}
    assert weights(tmp_path / "wide")["bert.encoder.layer.0.intermediate.dense.weight"].shape == (148, 32)
    both = invoke("relu-ize", tmp_path / "src", tmp_path / "no", *data, "--stream", "--as-llama", code=2).stderr
    assert "--as-llama needs the model in memory" in both


def test_calibration_alone_measures(tmp_path: Path) -> None:
    """Without --compensate the change is measured, and soft gates are refused all the same."""
    bert(tmp_path / "hard", hardness=300.0)
    data = ("--calibration", texts(tmp_path / "texts.txt"))
    found = answer("relu-ize", tmp_path / "hard", tmp_path / "relu", *data)
    assert 0.0 < found["model"]["relative_change"] < 0.01
    assert found["model"]["compensation"] is None
    bert(tmp_path / "gelu")
    assert "gates are soft" in invoke("relu-ize", tmp_path / "gelu", tmp_path / "no", *data, code=1).stderr
    assert not (tmp_path / "no").exists()


def test_fold(tmp_path: Path) -> None:
    """A stock GELU model with the function of the λ-GELU one."""
    model = bert(tmp_path / "src", hardness=3.0)
    found = answer("fold", tmp_path / "src", tmp_path / "folded")
    assert list(found["model"]["sites"].values()) == pytest.approx([3.0] * 2)
    stock = BertForSequenceClassification.from_pretrained(tmp_path / "folded").eval()
    assert stock.config.hidden_act == "gelu"
    assert not [name for name in stock.state_dict() if "hardness" in name]
    batch = tiny.inputs(model)
    assert tiny.relative_difference(tiny.outputs(model, batch), tiny.outputs(stock, batch)) <= 1e-5
    assert (tmp_path / "folded" / "tokenizer_config.json").is_file()


def test_targets_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is read or loaded; nothing in them changes."""
    bert(tmp_path / "src", hardness=300.0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")

    def never(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("hf_lambda_gelu.cli.transform.resolved", never)
    monkeypatch.setattr("hf_lambda_gelu.cli.transform.examples", never)
    data = ("--calibration", texts(tmp_path / "texts.txt"), "--compensate", "bias")
    for line in (("convert",), ("relu-ize",), ("relu-ize", *data), ("fold",)):
        result = invoke(line[0], tmp_path / "src", tmp_path / "full", *line[1:], code=2)
        assert "exists and is not empty: choose another folder" in result.stderr
        assert result.stdout == ""
    assert files(tmp_path / "full") == ["note"]


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("relu", "convert", "is a ReLU network already"),
        ("lambda", "convert", "converted already"),
        ("gelu", "relu-ize", "call convert(model) first"),
        ("gelu", "fold", "call convert(model) first"),
        ("relu", "fold", "has no λ-GELU to fold"),
    ],
)
def test_nothing_to_do(tmp_path: Path, kind: str, line: str, message: str) -> None:
    """A model that the command has nothing to do for is wrong use; nothing is written."""
    bert(tmp_path / "src", hardness=2.0 if kind == "lambda" else None, **({"hidden_act": "relu"} if kind == "relu" else {}))
    before = files(tmp_path)
    assert message in invoke(line, tmp_path / "src", tmp_path / "dst", code=2).stderr
    assert files(tmp_path) == before


def test_hinges(tmp_path: Path) -> None:
    """Without data by minimax, with data refit; both are the verb's, and bad numbers are refused before any work."""
    bert(tmp_path / "src")
    text = invoke("relu-ize", tmp_path / "src", tmp_path / "relu", "--hinges", 4).stdout
    assert "2 layers are wider now" in text
    model = BertForSequenceClassification.from_pretrained(tmp_path / "src")
    hlg.convert(model)
    hlg.relu_ize(model, hinges=4)
    model.save_pretrained(tmp_path / "expected")
    assert same_weights(tmp_path / "relu", tmp_path / "expected")
    config = json.loads((tmp_path / "relu" / "config.json").read_text())
    assert config["intermediate_size"] == model.config.intermediate_size
    assert (
        "are alternatives"
        in invoke(
            *("relu-ize", tmp_path / "src", tmp_path / "no", "--calibration", texts(tmp_path / "lines.txt")),
            *("--compensate", "bias", "--hinges", 2, "--budget", 1.5),
            code=2,
        ).stderr
    )
    assert not (tmp_path / "no").exists()


def test_as_llama(tmp_path: Path) -> None:
    """Qwen2's gates can have no bias; a Llama's can. What another architecture has is wrong use."""
    config = Qwen2Config(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "src")
    line = ("relu-ize", tmp_path / "src", tmp_path / "relu", "--hinges", 4)
    assert "hlg.as_llama(model), or --as-llama" in invoke(*line, code=2).stderr
    assert "1 layers are wider now" in invoke(*line, "--as-llama").stdout
    model = LlamaForCausalLM.from_pretrained(tmp_path / "relu")
    assert (model.config.model_type, model.config.intermediate_size, model.config.mlp_bias) == ("llama", 96, True)
    bert(tmp_path / "bert")
    error = invoke("relu-ize", tmp_path / "bert", tmp_path / "no", "--as-llama", code=2).stderr
    assert "(bert) cannot be saved as a Llama" in error
    assert not (tmp_path / "no").exists()
