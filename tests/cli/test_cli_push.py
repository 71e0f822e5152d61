"""`verify` and `push`: proofs in stock transformers, uploads to the Hub on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from support.cli import HubServer, answer, bert, checkpoint, files, invoke, tiny
from support.publishing import not_proven

import hf_lambda_gelu as hlg

TOKEN = "hf_test"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with nothing on it, to which the commands of this process go."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HubServer(token=TOKEN) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("hf_lambda_gelu.cli.batch.HfApi", lambda: HfApi(endpoint=server.url))
        yield server


def relu_folder(folder: Path, seed: int = 0, accuracy: float | None = None) -> Path:
    """A saved ReLU model, with a result in its card."""
    model = tiny.build("bert-classifier", seed)
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    results = {} if accuracy is None else {"ReLU": {"accuracy": accuracy}}
    details = hlg.CardDetails(results=results, final="ReLU" if results else None)
    return hlg.save_relu_pretrained(model, folder, details=details)


def test_verify(tmp_path: Path) -> None:
    """A folder that holds, and is marked so; a weight that was changed does not hold, nor do smooth models."""
    folder = relu_folder(tmp_path / "relu")
    found = answer("verify", folder)
    assert (found["holds"], found["largest_difference"]) == (True, 0.0)
    assert json.loads((folder / "lambda_gelu.json").read_text())["checks"]["largest_difference_of_outputs"] == 0.0
    for hardness in (None, 300.0):
        smooth = tmp_path / f"smooth-{hardness}"
        checkpoint(smooth, "bert-classifier", hardness)
        found = answer("verify", smooth, code=1)
        assert found["holds"] is False
        assert "relu_ize(model) first" in found["reason"]
        assert "is no ReLU checkpoint of stock transformers" in invoke("verify", smooth, code=1).stdout
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] = torch.full_like(weights["classifier.bias"], float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "NaN or infinity" in answer("verify", folder, code=1)["reason"]


def test_verify_that_stock_transformers_contradicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded here differs from what stock transformers makes of the same folder."""
    folder = relu_folder(tmp_path / "relu")
    import hf_lambda_gelu.cli.publish as publish

    load = publish.loaded

    def edited(path: Path, trust_remote_code: bool) -> object:
        model = load(path, trust_remote_code)
        model.classifier.bias.data += 1.0
        return model

    monkeypatch.setattr(publish, "loaded", edited)
    before = (folder / "lambda_gelu.json").read_bytes()
    assert "computes something else" in answer("verify", folder, code=1)["reason"]
    assert (folder / "lambda_gelu.json").read_bytes() == before


def test_pushes_a_hardened_checkpoint(hub: HubServer, tmp_path: Path) -> None:
    """From a λ checkpoint folder; what it published is a stock ReLU model, with the card's details."""
    bert(tmp_path / "hard", hardness=160.0)
    line = ("push", tmp_path / "hard", "--repo-id", "tester/m", "--license", "mit", "--tag", "v1", "--private")
    result = invoke(*line)
    assert "2 activations are ReLU now" in result.stderr
    repo = hub.repos["tester/m"]
    assert json.loads(repo.files["config.json"])["hidden_act"] == "relu"
    assert ModelCard(repo.files["README.md"].decode()).data.license == "mit"
    record = json.loads(repo.files["lambda_gelu.json"])
    assert record["substitution"]["sites"][0]["hardness"] == pytest.approx(160.0, rel=1e-5)
    assert "tokenizer_config.json" in repo.files
    assert (len(repo.commits), repo.private, list(repo.tags)) == (1, True, ["v1"])
    assert f"{hub.url}/tester/m/commit/" in result.stdout
    assert TOKEN not in result.output


def test_several_as_a_collection(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run shows what would be uploaded; a collection and an item that are there already are no mistake."""
    folders = [relu_folder(tmp_path / f"seed{seed}" / "relu", seed, (0.81, 0.83)[seed]) for seed in (0, 1)]
    line = ("push", *folders, "--repo-id", "tester/bert-{run}", "--no-processor", "--collection", "Two BERTs")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    dry = invoke(*line, "--dry-run", "--save-to", tmp_path / "kept").stdout
    assert not hub.requests
    monkeypatch.setattr(hlg, "verify_relu_pretrained", lambda *_, **__: 0.0)  # slow, and proven by the dry run
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    first = answer(*line)
    expected = ["| tester/bert-seed0 | 0.8100 |", "| tester/bert-seed1 | 0.8300 |"]
    assert [row for row in dry.splitlines() if row.startswith("| tester")] == expected
    assert first["metrics"] == {"tester/bert-seed0": {"accuracy": 0.81}, "tester/bert-seed1": {"accuracy": 0.83}}
    assert re.search(r"^  model.safetensors  [\d,]+ bytes$", dry, re.MULTILINE)
    assert "http" not in dry
    for seed in (0, 1):
        kept, pushed = tmp_path / f"kept/bert-seed{seed}", hub.repos[f"tester/bert-seed{seed}"].files
        assert (kept / "model.safetensors").read_bytes() == pushed["model.safetensors"]
        assert first["files"][f"tester/bert-seed{seed}"]["model.safetensors"] == len(pushed["model.safetensors"])
    assert (tmp_path / "kept" / "results.md").read_text().splitlines()[2:] == expected
    assert first["collection"].startswith(f"{hub.url}/collections/tester/two-berts")
    answer("push", folders[1], "--repo-id", "tester/bert-seed1", "--no-processor", "--collection", "Two BERTs")
    assert files(tmp_path / "tmp") == []
    (collection,) = hub.collections.values()
    assert (collection.title, collection.items) == ("Two BERTs", ["tester/bert-seed0", "tester/bert-seed1"])
    weights = [hub.repos[name].files["model.safetensors"] for name in collection.items]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        ("tester/same", ["--no-processor"], "let --repo-id hold {run}"),
        ("tester/{run}", [], "holds no tokenizer"),
        ("a/b/{run}", ["--no-processor"], "expected 'name' or 'owner/name'"),
        ("tester/{run}", ["--no-processor", "--save-to", "."], "--save-to: 'a' exists"),
        ("tester/{run}", ["--no-processor", "--license", "mit"], "is a ReLU checkpoint, which is uploaded as it is"),
        ("tester/{run}", ["--no-processor", "--tag", "v1", "--create-pr"], "exclude each other"),
    ],
)
def test_several_refused(
    hub: HubServer, tmp_path: Path, repo_id: str, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first request, and before the first upload of several."""
    monkeypatch.chdir(tmp_path)
    folders = [relu_folder(tmp_path / name) for name in ("a", "b")]
    before = files(tmp_path)
    assert message in invoke("push", *folders, "--repo-id", repo_id, *options, code=2).stderr
    assert not hub.requests
    assert files(tmp_path) == before


def test_without_a_token(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is loaded; soft gates are told before the upload."""
    bert(tmp_path / "soft", hardness=3.0)
    assert "gates are soft" in invoke("push", tmp_path / "soft", "--repo-id", "tester/m", code=1).stderr
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.get_token", lambda: None)
    error = invoke("push", tmp_path / "nowhere", "--repo-id", "tester/m", code=2).stderr
    assert "no token for the Hub: run `hf auth login`, or set HF_TOKEN" in error
    assert not hub.requests


def test_upload_that_fails_keeps_the_model(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names a folder that is there, for a model that was made on the way too."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bert(tmp_path / "hard", hardness=160.0)
    hub.fail_next("POST", "commit", 403, times=5)
    error = invoke("push", tmp_path / "hard", "--repo-id", "tester/m", code=1).stderr
    kept = Path(re.search(r"saved and verified in '([^']*)'", error)[1])
    assert json.loads((kept / "config.json").read_text())["hidden_act"] == "relu"
    assert TOKEN not in error
