"""README's code blocks, run as a stranger would run it, on a tiny model and a Hub on loopback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support import tiny
from support.hub_server import HubServer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]


def test_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only names of models and folders are put in place of the README's; the published config is a ReLU network's."""
    source = tmp_path / "bert"
    tiny.build("bert-classifier").save_pretrained(source)
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(source)
    rows = Dataset.from_dict({"text": ["a b c", "d e", "f g h a", "b"] * 4, "labels": [0, 1, 0, 1] * 4})
    data = rows.map(lambda row: tokenizer(row["text"]), remove_columns="text")

    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The steps")[0]
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 2
    assert all(len([line for line in block.splitlines() if line]) <= 10 for block in blocks), "ten lines"
    text = "".join(blocks).replace("google-bert/bert-base-uncased", str(source))
    text = text.replace("textattack/bert-base-uncased-SST-2", str(source))
    text = text.replace("you/", "tester/").replace("runs/bert", str(tmp_path / "run"))
    assert text.count(str(tmp_path)) == 4
    batches = [{"input_ids": torch.tensor([row])} for row in ([3, 4, 5], [6, 7, 8], [9, 10, 3], [4, 4, 9])]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with HubServer(token="hf_test") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        exec(compile(text, "README.md", "exec"), {"train": data, "test": data, "batches": batches})
        files = hub.repos["tester/bert-relu"].files
    assert b'"hidden_act": "relu"' in files["config.json"]
    assert b"raw_hardness" not in files["model.safetensors"]
    assert "hardness_profile.png" in files


@pytest.mark.parametrize("name", ["demo", "demo-vision", "test", "coverage", "bench", "lint", "assets"])
def test_commands_exist(name: str) -> None:
    """The make targets that the README and .ci/run name."""
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
