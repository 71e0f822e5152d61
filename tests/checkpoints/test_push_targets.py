"""Repositories that are not empty, not named in full, or not there yet: what stands in them is what was proven."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from support import tiny
from support.hub_server import HubServer
from support.models import relu_model
from support.publishing import TOKEN, not_proven, run_stock
from transformers import BertForSequenceClassification, PreTrainedModel
from transformers.utils import logging

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.stale_files import stale_files

SHARD = "20KB"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "tester/base", "target_modules": ["query"], "r": 1}


@pytest.fixture(autouse=True)
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison in another process, which takes seconds and is not what these tests are about, is left out."""
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(logging.get_logger("hf_lambda_gelu.checkpoints.upload"), "warning", found.append)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def former(folder: Path, **saving: str) -> dict[str, bytes]:
    """The files of another network of the same architecture."""
    model = tiny.build("bert-classifier")
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    model.save_pretrained(folder, **saving)
    return files(folder)


def in_shards(folder: Path) -> Path:
    """The ReLU network's folder, with its weights in several files, as of what is converted on disk."""
    model = BertForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=SHARD)
    return folder


def adapter(folder: Path) -> dict[str, bytes]:
    """What a Trainer with `hub_strategy="every_save"` has pushed of a model with adapters."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"base_model.model.classifier.weight": torch.ones(2, 32)}, folder / "adapter_model.safetensors")
    return files(folder)


def test_what_stock_transformers_loads_is_what_was_pushed(hub: HubServer, tmp_path: Path, warned: list[str]) -> None:
    """It would take adapters before weights, and one file before shards: those of a former network go."""
    model: PreTrainedModel = relu_model("bert-classifier").eval()
    batch = tiny.inputs(model)
    save_file(batch, tmp_path / "batch.safetensors")
    hub.add_repo("tester/base", former(tmp_path / "base"))
    hub.add_repo("tester/adapter", adapter(tmp_path / "adapter"))
    hub.add_repo("tester/single", former(tmp_path / "former"))
    folder = in_shards(hlg.save_relu_pretrained(model, tmp_path / "relu"))
    api = HfApi(endpoint=hub.url, token=TOKEN)
    hlg.push_relu_to_hub(model, "tester/adapter", processor=(), api=api)
    hlg.push_relu_to_hub(folder, "tester/single", processor=(), api=api)
    assert ["adapter_config.json, adapter_model.safetensors" in warned[0], "model.safetensors" in warned[1]] == [True, True]
    run_stock(
        hub,
        tmp_path / "home",
        """
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForSequenceClassification
        torch.set_num_threads(1)
        for name in ("adapter", "single"):
            model = AutoModelForSequenceClassification.from_pretrained("tester/" + name)
            with torch.no_grad():
                logits = model(**load_file(sys.argv[1] + "/batch.safetensors")).logits
            save_file({"logits": logits}, sys.argv[1] + "/logits-" + name)
        """,
        str(tmp_path),
    )
    for name in ("adapter", "single"):
        assert len(hub.repos[f"tester/{name}"].commits) == 1
        assert torch.equal(load_file(tmp_path / f"logits-{name}")["logits"], tiny.outputs(model, batch)[0]), name


def test_what_goes_and_what_stays(hub: HubServer, tmp_path: Path, warned: list[str]) -> None:
    """Weights of other names go; formats of other programs are named, and all else stays as it is, unnamed."""
    gone = {
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "lambda_gelu_hardness.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    named = {"onnx/model.onnx", "model.Q4_K.gguf", "tf_model.h5"}
    kept = {
        "training_args.bin",
        "vocab.txt",
        "model_card.json",
        "modules.json",
        "last-checkpoint/model.safetensors",
        "model-drafts/first.safetensors",
        "data.bin",
    }
    hub.add_repo("tester/m", dict.fromkeys(gone | named | kept, b"{}"))
    hlg.push_relu_to_hub(relu_model("bert-classifier"), "tester/m", processor=(), api=HfApi(endpoint=hub.url, token=TOKEN))
    there = set(hub.repos["tester/m"].files)
    assert not there & gone
    assert named | kept | {"model.safetensors", "config.json"} <= there
    (told,) = warned
    assert all(name in told for name in gone | named)
    assert not any(name in told for name in kept)


def test_its_own_files_are_not_stale() -> None:
    names = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    found = stale_files([*names, "model.safetensors", "README.md"], names)
    assert (found.loaded, found.others, found.card) == (["model.safetensors"], [], [])
    card = ["README.md", "lambda_gelu.json"]
    assert stale_files([*card, "hardness_profile.png"], card).card == ["hardness_profile.png"]
    assert str(stale_files([*names, "README.md"], names)) == ""


@pytest.mark.parametrize("record", [True, False])
def test_a_network_without_a_card(hub: HubServer, tmp_path: Path, warned: list[str], record: bool) -> None:
    """The card of a former ReLU network goes with its weights; somebody's own, which no record is of, stays."""
    relu_model("bert-classifier").save_pretrained(tmp_path / "plain")
    card = {"README.md": b"# Its accuracy is 0.9", "hardness_profile.png": b"png", "model.safetensors": b"former"}
    hub.add_repo("tester/m", {**card, "notes.md": b"mine", **({"lambda_gelu.json": b"{}"} if record else {})})
    hlg.push_relu_to_hub(tmp_path / "plain", "tester/m", processor=(), api=HfApi(endpoint=hub.url, token=TOKEN))
    repo = hub.repos["tester/m"]
    left = {"config.json", "model.safetensors", "notes.md"} | (set() if record else {"README.md", "hardness_profile.png"})
    assert set(repo.files) - {".gitattributes"} == left
    assert repo.files["model.safetensors"] == (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert len(repo.commits) == 1
    assert ["README.md, hardness_profile.png, lambda_gelu.json" in each for each in warned] == [True] * record


def test_a_name_without_an_owner(hub: HubServer, tmp_path: Path) -> None:
    """It is the token's; the card names the repository in full, as a stranger loads it."""
    api = HfApi(endpoint=hub.url, token=TOKEN)
    hlg.push_relu_to_hub(relu_model("bert-classifier"), "mine", processor=(), api=api)
    assert b"tester/mine" in hub.repos["tester/mine"].files["README.md"]
    refused = HfApi(endpoint=hub.url, token="hf_wrong")
    with pytest.raises(ValueError, match="'mine' names no owner, and the Hub does not say"):
        hlg.push_relu_to_hub(relu_model("bert-classifier"), "mine", processor=(), folder=tmp_path / "kept", api=refused)
    assert not (tmp_path / "kept").exists()


def test_a_branch_that_is_not_there(hub: HubServer) -> None:
    """It is made, from main; main stays as it is."""
    hub.add_repo("tester/m", {"README.md": b"# Mine\n"})
    api = HfApi(endpoint=hub.url, token=TOKEN)
    hlg.push_relu_to_hub(relu_model("bert-classifier"), "tester/m", processor=(), revision="relu", api=api)
    repo = hub.repos["tester/m"]
    assert [commit.revision for commit in repo.commits] == ["relu"]
    assert "model.safetensors" in repo.snapshots[repo.resolve("relu")]
    assert repo.files["README.md"] == b"# Mine\n"


@pytest.mark.parametrize(("asked", "expected"), [(None, True), (False, False), (True, True)])
def test_who_sees_it(hub: HubServer, asked: bool | None, expected: bool) -> None:
    """Where nothing is said, the owner's own rule holds: an organisation may have its repositories private."""
    hub.private_by_default = True
    api = HfApi(endpoint=hub.url, token=TOKEN)
    hlg.push_relu_to_hub(relu_model("bert-classifier"), "tester/m", processor=(), private=asked, api=api)
    assert hub.repos["tester/m"].private == expected


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        ({"input_ids": [[5, 6]]}, r"inputs\['input_ids'\]: got a list"),
        ([{"input_ids": torch.ones(1, 2)}], "inputs: got a list"),
    ],
)
def test_inputs_that_are_no_tensors(hub: HubServer, tmp_path: Path, inputs: object, got: str) -> None:
    """As a tokenizer returns them that was not asked for tensors: refused before anything is saved."""
    api = HfApi(endpoint=hub.url, token=TOKEN)
    options = {"processor": (), "folder": tmp_path / "kept", "inputs": inputs, "api": api}
    with pytest.raises(ValueError, match=got + ".*return_tensors='pt'"):
        hlg.push_relu_to_hub(relu_model("bert-classifier"), "tester/m", **options)
    assert not hub.requests
    assert not (tmp_path / "kept").exists()
