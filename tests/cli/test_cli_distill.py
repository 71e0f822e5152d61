"""`distill`: against the trainer in a loop of its own, stock transformers, a kill and its twin; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.cli import answer, bert, files, invoke, texts
from support.folders import load, read
from transformers import BertForMaskedLM, BertForSequenceClassification, BertTokenizer

import hf_lambda_gelu as hlg

SHORT = ("--steps", 6, "--batch-size", 4, "--max-length", 16)


def models(root: Path, name: str = "bert-classifier") -> tuple[Path, Path]:
    """Folders of a ReLU network and of the smooth one that it was made from, with their tokenizer."""
    model = bert(root / "smooth", name, hidden_dropout_prob=0.1)
    tokenizer = BertTokenizer.from_pretrained(root / "smooth")
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    details = hlg.CardDetails(base_model="google-bert/bert-base-uncased", license="mit")
    return hlg.save_relu_pretrained(model, root / "relu", processor=tokenizer, details=details), root / "smooth"


def predictions(folder: Path, cls: Any) -> torch.Tensor:
    """Log probabilities of the folder's model, by stock transformers, on a fixed batch."""
    model = load(cls, folder)
    with torch.no_grad():
        return model(**tiny.inputs(model)).logits.log_softmax(-1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("name", "cls"), [("bert-classifier", BertForSequenceClassification), ("bert", BertForMaskedLM)])
def test_it_comes_nearer(name: str, cls: Any, tmp_path: Path) -> None:
    """The folder is a stock ReLU network with a tokenizer and a card; held-out divergence falls, and is a recount's."""
    student, smooth = models(tmp_path, name)
    data = texts(tmp_path / "texts.txt", 60)
    line = ("distill", student, smooth, "--data", data, "--output", tmp_path / "out", "--learning-rate", 3e-4)
    found = answer(*line, "--steps", 20, "--batch-size", 8, "--max-length", 16)
    apart = found["divergence"]
    assert found["examples"] == {"learned": 48, "held_out": 12}
    assert apart["after"] < 0.7 * apart["before"]
    assert found["resumed_from"] is None
    assert read(tmp_path / "out")["hidden_act"] == "relu"
    assert BertTokenizer.from_pretrained(tmp_path / "out").get_vocab() == BertTokenizer.from_pretrained(smooth).get_vocab()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: google-bert/bert-base-uncased" in card
    assert f"{apart['before']:.4g} → {apart['after']:.4g}" in card
    ours, old, wanted = (predictions(folder, cls) for folder in (tmp_path / "out", student, smooth))
    if cls is BertForSequenceClassification:
        near, far = ((wanted.exp() * (wanted - each)).sum(-1).mean() for each in (ours, old))
        assert near < far
    assert not torch.equal(ours, old)
    assert not [path for path in files(tmp_path) if "hf_lambda_gelu-" in path]


def test_a_rate_that_is_too_high_is_said(tmp_path: Path) -> None:
    """Where the predictions are further apart afterwards, the last line says so."""
    student, smooth = models(tmp_path)
    line = ("distill", student, smooth, "--data", texts(tmp_path / "texts.txt"), "--output", tmp_path / "out", *SHORT)
    assert "further apart than before: lower --learning-rate" in invoke(*line, "--learning-rate", 0.1).stdout


def test_adapters(tmp_path: Path) -> None:
    """With --lora the maps have moved by a matrix of rank 16 at most, and biases and embeddings not at all."""
    student, smooth = models(tmp_path)
    line = ("distill", student, smooth, "--data", texts(tmp_path / "texts.txt"), "--output", tmp_path / "out", *SHORT)
    text = invoke(*line, "--lora").stdout
    assert "6 steps of 4 examples; divergence from the smooth model on 4 examples held out" in text
    before, after = weights(student), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    moved = {name: after[name] - value for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved
    assert all(name.endswith("weight") and value.dim() == 2 for name, value in moved.items())
    assert max(int(torch.linalg.matrix_rank(value, tol=1e-5)) for value in moved.values()) <= 16
    assert "bert.embeddings.word_embeddings.weight" not in moved
    load(BertForSequenceClassification, tmp_path / "out")


@pytest.mark.parametrize("options", [(), ("--lora",)], ids=["all weights", "adapters"])
def test_frozen(options: tuple[str, ...], tmp_path: Path) -> None:
    """Modules of a name that is given keep their weights to the bit; others learn."""
    student, smooth = models(tmp_path)
    line = ("distill", student, smooth, "--data", texts(tmp_path / "texts.txt"), "--output", tmp_path / "out", *SHORT)
    invoke(*line, *options, "--freeze", "query", "--freeze", "word_embeddings")
    before, after = weights(student), weights(tmp_path / "out")
    frozen = {name for name in before if ".query." in name or ".word_embeddings." in name}
    assert len(frozen) > 2
    same = {name for name, value in before.items() if torch.equal(after[name], value)}
    assert frozen <= same
    assert {name for name in before if name.endswith("key.weight")}.isdisjoint(same)


def test_killed_and_called_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill after the second checkpoint would leave: the same command goes on from there, and its weights are those of
    an uninterrupted one, to the bit. With other options it starts anew."""
    student, smooth = models(tmp_path)
    data, out, kept = texts(tmp_path / "texts.txt", 40), tmp_path / "out", tmp_path / "kept"
    left = tmp_path / ".out.hf_lambda_gelu-unfinished"
    line: tuple[Any, ...] = ("distill", student, smooth, "--data", data, "--output", out, *SHORT)
    save = hlg.DistillationTrainer._save_checkpoint

    def killed(trainer: Any, *args: Any) -> None:
        save(trainer, *args)
        if trainer.state.global_step == 2:
            shutil.copytree(left, kept)

    with monkeypatch.context() as patch:
        patch.setattr(hlg.DistillationTrainer, "_save_checkpoint", killed)
        assert answer(*line)["resumed_from"] is None
    twin = weights(out)
    assert not left.exists()

    def again(*options: object, moved: float = 0.0) -> tuple[int | None, dict[str, torch.Tensor]]:
        """The command on what was left, with its weights moved."""
        shutil.rmtree(out)
        shutil.copytree(kept, left)
        file = left / "checkpoint-2" / "model.safetensors"
        save_file({name: value + moved for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
        return answer(*line, *options)["resumed_from"], weights(out)

    step, found = again()
    assert step == 2
    assert all(torch.equal(found[name], value) for name, value in twin.items())
    step, found = again(moved=0.5)  # which it goes on from
    assert step == 2
    assert not torch.equal(found["classifier.bias"], twin["classifier.bias"])
    step, _ = again("--learning-rate", 1e-5)
    assert step is None


def test_refused(tmp_path: Path) -> None:
    """Before a step is made, with the exit code of wrong use; nothing is written."""
    student, smooth = models(tmp_path)
    bert(tmp_path / "other", vocab_size=120)
    bert(tmp_path / "lambda", hardness=2.0)
    data = texts(tmp_path / "texts.txt")
    shutil.copytree(smooth, tmp_path / "words")
    vocabulary = [*reversed(BertTokenizer.from_pretrained(smooth).get_vocab())]
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(tmp_path / "words")
    before = files(tmp_path)
    for first, second, options, message in (
        (smooth, student, (), "STUDENT, which comes first"),
        (tmp_path / "lambda", smooth, (), "call relu_ize(model) first"),
        (student, student, (), "TEACHER is the smooth model it was made from"),
        (student, tmp_path / "other", (), "its vocabulary size is 120, the student's is 99"),
        (student, tmp_path / "words", (), "have other vocabularies"),
        (student, tmp_path / "nowhere" / "x", (), "there is no folder"),
        (student, smooth, ("--device", "tpu"), "--device tpu: expected cpu or cuda"),
        (student, smooth, ("--steps", 0), "--steps"),
        (student, smooth, ("--freeze", "up_proj"), "--freeze up_proj: no module of the student is called so"),
    ):
        line = ("distill", first, second, "--data", data, "--output", tmp_path / "out", *options)
        assert message in invoke(*line, code=2).stderr, message
        assert files(tmp_path) == before
    assert "exists and is not empty" in invoke("distill", student, smooth, "--data", data, "--output", smooth, code=2).stderr
    assert "--data" in invoke("distill", student, smooth, "--output", tmp_path / "out", code=2).stderr
    assert json.loads((smooth / "config.json").read_text())["hidden_act"] == "gelu"
