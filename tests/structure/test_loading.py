"""`load_saved`: the one way from a folder to a model with its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.loading import load_saved

CONFIG = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    BertForMaskedLM(CONFIG).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_class_and_weights(saved: Path) -> None:
    model = load_saved(saved)
    assert type(model) is BertForMaskedLM
    assert not model.training
    expected = BertForMaskedLM.from_pretrained(saved).state_dict()
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"]])
def test_otherwise(saved: Path, architectures: list[str] | None) -> None:
    rewrite(saved, architectures=architectures)
    assert type(load_saved(saved, otherwise=AutoModel)) is BertModel
    with pytest.raises(hlg.CheckpointError, match=r"config\.json names the class '.*', which transformers .* lacks"):
        load_saved(saved)


def test_code_of_the_folder_does_not_run(saved: Path) -> None:
    (saved / "evil.py").write_text("raise SystemExit('it ran')")
    auto_map = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
    rewrite(saved, auto_map=auto_map, architectures=None)
    assert type(load_saved(saved, otherwise=AutoModel)) is BertModel
    rewrite(saved, auto_map=auto_map, model_type="unheard_of")
    with pytest.raises(hlg.CheckpointError, match=r"has code of its own, .* names 'evil\.Model' as its AutoModel"):
        load_saved(saved)


def test_without_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(
        hlg.CheckpointError, match=r"BertForMaskedLM does not load .*expected a folder with config\.json and weights"
    ):
        load_saved(saved)


def test_weights_of_another_size(saved: Path) -> None:
    rewrite(saved, intermediate_size=24)
    with pytest.raises(hlg.CheckpointError, match="BertForMaskedLM does not load"):
        load_saved(saved)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(hlg.CheckpointError, match="there is no folder"):
        load_saved(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(hlg.CheckpointError, match="is a file"):
        load_saved(tmp_path / "file")
    with pytest.raises(hlg.CheckpointError, match=r"holds no config\.json"):
        load_saved(tmp_path)
