"""Folders that are not what they seem: links out of them, missing weights, targets that appear, other activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support import tiny
from support.models import relu_model
from transformers import BertForSequenceClassification

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.loading import load_saved

LACKING = "bert.encoder.layer.1.output.dense.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny.build("bert-classifier").save_pretrained(tmp_path / "src")
    return tmp_path / "src"


def hardened(folder: Path) -> Path:
    model = tiny.build("bert-classifier")
    hlg.convert(model, init_hardness=300.0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("place", ["notes.txt", "1_Pooling/config.json"])
def test_a_link_out_of_the_checkpoint(source: Path, tmp_path: Path, place: str) -> None:
    """Named and not followed, nothing is made; a link within the folder, or into the Hub's cache, is a file."""
    (tmp_path / "secret").write_text("key")
    link = source / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "secret")
    with pytest.raises(hlg.CheckpointError, match=rf"{place}.* is a link to .*secret.* out of the checkpoint"):
        hlg.convert_checkpoint(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    link.unlink()
    (source / "vocab.txt").write_text("a")
    link.symlink_to(source / "vocab.txt")
    hlg.convert_checkpoint(source, tmp_path / "dst")
    assert (tmp_path / "dst" / place).read_text() == "a"
    assert not (tmp_path / "dst" / place).is_symlink()


def test_a_link_into_the_cache(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    blob = tmp_path / "cache" / "models--someone--bert" / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    blob.write_text("words")
    (source / "vocab.txt").symlink_to(blob)
    hlg.convert_checkpoint(source, tmp_path / "dst")
    assert (tmp_path / "dst" / "vocab.txt").read_text() == "words"


def without(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", [LACKING, "classifier.bias", "bert.embeddings.word_embeddings.weight"])
def test_missing_weights(source: Path, tmp_path: Path, name: str) -> None:
    """They would be drawn at random. λ may be missing: it is 1 then."""
    without(source, name)
    for verb in (lambda: hlg.convert_checkpoint(source, tmp_path / "dst"), lambda: load_saved(source)):
        with pytest.raises(hlg.CheckpointError, match=rf"lacks 1 tensors of BertForSequenceClassification, {name}"):
            verb()
    assert not (tmp_path / "dst").exists()
    hard = hardened(tmp_path / "hard")
    without(hard, name)
    with pytest.raises(hlg.CheckpointError, match="lacks 1 tensors"):
        hlg.relu_ize_checkpoint(hard, tmp_path / "dst")


def test_hardness_may_be_missing(tmp_path: Path) -> None:
    hard = hardened(tmp_path / "hard")
    without(hard, "bert.encoder.layer.0.intermediate.intermediate_act_fn.unclipped_hardness")
    report = hlg.relu_ize_checkpoint(hard, tmp_path / "dst", force=True)
    assert list(report.model.profile.values()) == [1.0, 300.0]


def test_more_layers_than_weights(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 30}))
    with pytest.raises(hlg.CheckpointError, match=r"lacks 448 tensors"):
        hlg.convert_checkpoint(source, tmp_path / "dst")


@pytest.mark.parametrize("value", [1e38, float("inf"), float("nan")])
def test_a_hardness_that_is_none(tmp_path: Path, value: float) -> None:
    hard = hardened(tmp_path / "hard")
    state = load_file(hard / "model.safetensors")
    for name in [name for name in state if name.endswith("hardness")]:
        state[name] = torch.full_like(state[name], value)
    save_file(state, hard / "model.safetensors", metadata={"format": "pt"})
    for load in (
        lambda: BertForSequenceClassification.from_pretrained(hard),
        lambda: hlg.relu_ize_checkpoint(hard, tmp_path / "dst", force=True),
    ):
        with pytest.raises(ValueError, match=r"unclipped_hardness is \[.*expected finite numbers, of 1e\+30 at most"):
            load()


Verb = Callable[[Path, Path, Callable[[], None]], Any]


def convert(src: Path, dst: Path, meanwhile: Callable[[], None]) -> None:
    hlg.convert_checkpoint(src, dst, only=lambda name, module: meanwhile() is None)


def save(src: Path, dst: Path, meanwhile: Callable[[], None]) -> None:
    model = relu_model("bert-classifier")
    written = model.save_pretrained

    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        written(*args, **kwargs)
        meanwhile()

    vars(model)["save_pretrained"] = save_pretrained
    hlg.save_relu_pretrained(model, dst)


@pytest.mark.parametrize("verb", [convert, save])
def test_a_target_that_appears(source: Path, tmp_path: Path, verb: Verb) -> None:
    """What somebody else made there meanwhile stays, and nothing else is left; an empty folder is taken."""
    out = tmp_path / "out"

    def meanwhile() -> None:
        out.mkdir(exist_ok=True)
        (out / "results.txt").write_text("weeks of work")

    with pytest.raises(ValueError, match="has appeared meanwhile, made by somebody else, and was not touched"):
        verb(source, out, meanwhile)
    assert [path.name for path in out.iterdir()] == ["results.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]
    verb(source, tmp_path / "empty", lambda: (tmp_path / "empty").mkdir(exist_ok=True))
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("activation", ["mish", "tanh", "relu2", "sigmoid", "laplace"])
def test_not_a_relu_network(tmp_path: Path, activation: str) -> None:
    with pytest.raises(ValueError, match=rf"config.hidden_act = '{activation}': no activation of the model is ReLU"):
        hlg.save_relu_pretrained(tiny.build("bert-classifier", hidden_act=activation), tmp_path / "out")
    assert not (tmp_path / "out").exists()
