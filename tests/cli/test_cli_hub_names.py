"""Hub names in place of folders, in processes whose Hub is on loopback: downloads, broken ones, and errors in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cli import HubServer, answer, bert, invoke, texts
from support.publishing import hub_with_a_cache

import hf_lambda_gelu as hlg


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub from which the commands of this process download into a cache of their own."""
    yield from hub_with_a_cache(monkeypatch, tmp_path / "cache")


def published(hub: HubServer, folder: Path, name: str, **more: bytes) -> None:
    hub.add_repo(name, {path.name: path.read_bytes() for path in folder.iterdir()} | more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def test_from_a_name_to_a_relu_folder(hub: HubServer, tmp_path: Path) -> None:
    """convert, calibrate and relu-ize by name; other frameworks' weights are not downloaded; the cache stays as it was."""
    model = bert(tmp_path / "local")
    published(hub, tmp_path / "local", "someone/bert", **{"tf_model.h5": b"tf", "pytorch_model.bin": b"pickle"})
    assert answer("convert", "someone/bert", tmp_path / "lambda")["model"]["hardness"] == 1.0
    fetched = {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path}
    assert "model.safetensors" in fetched
    assert not fetched & {"tf_model.h5", "pytorch_model.bin"}
    hlg.convert(model)
    assert torch.equal(weights(tmp_path / "lambda")["classifier.weight"], model.classifier.weight)

    data = ("--calibration", texts(tmp_path / "texts.txt"))
    answer("relu-ize", "someone/bert", tmp_path / "relu", *data, "--compensate", "least_squares")
    published(hub, tmp_path / "relu", "someone/bert-relu")
    assert answer("audit", "someone/bert-relu", "--expect", "relu")["is_relu"]
    found = answer("verify", "someone/bert-relu")
    assert (found["holds"], found["as_proven"]) == (True, False)  # its record says nothing of files
    (cached,) = (tmp_path / "cache").glob("models--someone--bert-relu/snapshots/*/lambda_gelu.json")
    assert cached.read_bytes() == (tmp_path / "relu" / "lambda_gelu.json").read_bytes()


def test_a_stranger_finds_the_files_that_were_proven(hub: HubServer, tmp_path: Path) -> None:
    """By the SHA-256 of each; one that was changed since is named, and the proof is not made."""
    model = bert(tmp_path / "local")
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    folder = hlg.save_relu_pretrained(model, tmp_path / "relu")
    assert answer("verify", folder)["as_proven"] is None
    files = json.loads((folder / "lambda_gelu.json").read_text())["checks"]["files"]
    assert set(files) == {path.name for path in folder.iterdir()} - {"lambda_gelu.json"}
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    published(hub, folder, "someone/proven")
    found = answer("verify", "someone/proven")
    assert (found["holds"], found["as_proven"]) == (True, True)
    card = (folder / "README.md").read_bytes()
    published(hub, folder, "someone/changed", **{"README.md": card + b"best of all", "chat_template.jinja": b"{{ evil }}"})
    found = answer("verify", "someone/changed", code=1)
    assert (found["holds"], found["as_proven"]) == (False, None)
    assert "was proven: README.md has other content, 2 such files. Fetch it again" in found["reason"]


def test_pickles(hub: HubServer, tmp_path: Path) -> None:
    """A model on the Hub with pickles alone loads; without loading it, the message has the line that converts it."""
    model = bert(tmp_path / "local")
    (tmp_path / "local" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "local" / "pytorch_model.bin")
    published(hub, tmp_path / "local", "someone/old")
    assert answer("audit", "someone/old")["counts"]["gelu"] == 2
    error = invoke("convert", "someone/old", tmp_path / "dst", code=1).stderr
    assert "BertForSequenceClassification.from_pretrained(" in error
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(("status", "code"), [(0, 1), (500, 1)])
def test_interrupted_download(hub: HubServer, tmp_path: Path, status: int, code: int) -> None:
    """Exit code 1 and what to do; nothing is written; the same command again succeeds."""
    bert(tmp_path / "local")
    published(hub, tmp_path / "local", "someone/bert")
    hub.fail_next("GET", r"model\.safetensors", status, times=50)
    error = invoke("convert", "someone/bert", tmp_path / "dst", code=code).stderr
    assert "the download of 'someone/bert' broke off" in error
    assert "The same command again" in error
    assert not (tmp_path / "dst").exists()
    hub._faults.clear()
    assert answer("convert", "someone/bert", tmp_path / "dst")["folder"] == str(tmp_path / "dst")


def test_names_that_are_nothing(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that the Hub does not know, one that cannot be, a file, an empty folder, and one offline."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    hub.add_repo("someone/notes", {"README.md": b"# Notes"})
    for name, message in {
        "someone/nothing": "there is no folder 'someone/nothing', and no model of that name on the Hub",
        "runs/bert/relu": "there is no folder 'runs/bert/relu', and a Hub name is",
        str(tmp_path / "file"): "is a file: pass the folder",
        str(tmp_path / "empty"): "holds no config.json",
        "someone/notes": "holds no config.json: it is no model",
    }.items():
        error = invoke("convert", name, tmp_path / "dst", code=2).stderr
        assert message in error, error
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in invoke("audit", "someone/bert", code=2).stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub cannot be reached" in invoke("audit", "someone/bert", code=1).stderr
    assert not (tmp_path / "dst").exists()


def test_private_models_need_a_token(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token they are unknown, and the message says what to do; no command takes a token."""
    bert(tmp_path / "local")
    hub.add_repo("someone/secret", {p.name: p.read_bytes() for p in (tmp_path / "local").iterdir()}, private=True)
    assert json.loads(invoke("audit", "someone/secret", "--json").stdout)["counts"]
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other"))
    error = invoke("audit", "someone/secret", code=2).stderr
    assert "`hf auth login`, or set HF_TOKEN" in error
    assert "No such option" in invoke("audit", "someone/secret", "--token", "hf_test", code=2).stderr
