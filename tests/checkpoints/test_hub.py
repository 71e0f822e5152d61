"""Publishing: the real Hub client against the local stand-in server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from support import tiny
from support.hub_server import HubServer
from support.publishing import TOKEN, not_proven, run_stock
from transformers import BertTokenizer, PreTrainedModel

import hf_lambda_gelu as hlg

DETAILS = hlg.CardDetails(
    base_model="someone/bert-tiny",
    dataset="someone/reviews",
    license="apache-2.0",
    results={"GELU": {"accuracy": 0.84}, "ReLU": {"accuracy": 0.83, "loss": 0.4}},
    final="ReLU",
    command="python scripts/finetune_text.py --seed 0",
)


def relu_model() -> PreTrainedModel:
    """A tiny classifier after substitution."""
    model = tiny.build("bert-classifier")
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    return model


def test_push_and_load_without_the_package(hub: HubServer, tmp_path: Path) -> None:
    """What a stranger loads from the Hub by stock transformers computes what the model in memory computes."""
    model = relu_model()
    batch = tiny.inputs(model)
    expected = tiny.outputs(model, batch)[0]
    api = HfApi(endpoint=hub.url, token=TOKEN)
    commit = hlg.push_relu_to_hub(model, "tester/relu-bert", processor=(), details=DETAILS, private=True, tag="v1", api=api)
    repo = hub.repos["tester/relu-bert"]
    assert repo.private
    assert len(repo.commits) == 1, "one commit"
    assert commit.oid == repo.resolve("main") == repo.resolve("v1")
    assert {"config.json", "model.safetensors", "README.md", "lambda_gelu.json"} <= set(repo.files)
    assert b"unclipped_hardness" not in repo.files["model.safetensors"]
    record = json.loads(repo.files["lambda_gelu.json"])
    assert record["checks"]["largest_difference_of_outputs"] == 0.0
    assert record["checks"]["identical_tensors"] == len(model.state_dict())
    assert record["checks"]["smooth_activations_left"] == []
    assert record["checks"]["activations_that_ran"] == {"relu": 2, "tanh": 1}
    assert record["details"]["results"] == DETAILS.results
    assert TOKEN.encode() not in b"".join(repo.files.values())

    save_file(batch, tmp_path / "batch.safetensors")
    run_stock(
        hub,
        tmp_path / "home",
        """
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForSequenceClassification
        torch.set_num_threads(1)
        model = AutoModelForSequenceClassification.from_pretrained("tester/relu-bert")
        assert model.config.hidden_act == "relu", model.config.hidden_act
        with torch.no_grad():
            save_file({"logits": model(**load_file(sys.argv[1])).logits}, sys.argv[2])
        """,
        str(tmp_path / "batch.safetensors"),
        str(tmp_path / "logits.safetensors"),
    )
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


def test_pipeline_without_the_package(hub: HubServer, tmp_path: Path) -> None:
    """`pipeline()` by the repository's name finds task, weights and tokenizer, and scores as the model here does."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(names)})
    model = relu_model().eval()
    api = HfApi(endpoint=hub.url, token=TOKEN)
    hlg.push_relu_to_hub(model, "tester/piped", processor=tokenizer, details=DETAILS, api=api)
    printed = run_stock(
        hub,
        tmp_path / "home",
        """
        import json
        from transformers import pipeline
        classify = pipeline(model="tester/piped")
        assert classify.task == "text-classification", classify.task
        print("SCORES" + json.dumps(classify("good film", top_k=None)))
        """,
    )
    scores = {entry["label"]: entry["score"] for entry in json.loads(printed.partition("SCORES")[2])}
    with torch.no_grad():
        logits = model(**tokenizer("good film", return_tensors="pt")).logits[0]
    expected = {model.config.id2label[i]: p for i, p in enumerate(logits.softmax(-1).tolist())}
    assert scores == pytest.approx(expected, abs=1e-6)


def test_card_on_the_hub(hub: HubServer) -> None:
    """The card's metadata, as huggingface_hub's own reader sees it."""
    hlg.push_relu_to_hub(relu_model(), "tester/m", processor=(), details=DETAILS, api=HfApi(endpoint=hub.url, token=TOKEN))
    card = ModelCard(hub.repos["tester/m"].files["README.md"].decode())
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "someone/bert-tiny"
    assert data["datasets"] == ["someone/reviews"]
    assert data["pipeline_tag"] == "text-classification"
    assert data["library_name"] == "transformers"
    assert {"relu", "lambda-gelu", "arxiv:2603.21991"} <= set(data["tags"])
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"accuracy": 0.83, "loss": 0.4}
    assert "| **ReLU** | 0.8300 | 0.4000 |" in card.text
    assert "| GELU | 0.8400 | – |" in card.text
    assert DETAILS.command in card.text


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (1, hlg.VerificationError, "do not fit"),
        (3, hlg.CheckpointError, "lacks 16 tensors"),
    ],
)
def test_nothing_is_uploaded_when_the_folder_is_not_the_model(
    hub: HubServer, tmp_path: Path, layers: int, error: type[Exception], message: str
) -> None:
    """A folder whose weights differ from what its config and the reload say is caught before the first request."""
    folder = hlg.save_relu_pretrained(relu_model(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(error, match=message):
        hlg.push_relu_to_hub(folder, "tester/m", processor=(), api=HfApi(endpoint=hub.url, token=TOKEN))
    assert not hub.requests


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("name", "expected 'name' or 'owner/name'"),
        ("soft", "call relu_ize"),
        ("NaN", "hold NaN or infinity"),
        ("offline", "HF_HUB_OFFLINE is set"),
        ("no token", "no token for the Hub: run `hf auth login`"),
        ("no processor", r"pass processor=….*processor=\(\) publishes"),
        ("no processor in the folder", "holds no tokenizer, image processor or feature extractor"),
        ("tag of a pull request", "tag and create_pr exclude each other"),
    ],
)
def test_bad_input_before_any_request(
    hub: HubServer, case: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be known beforehand is refused before the first request, and before anything is written."""
    model, changes = relu_model(), {}
    if case == "soft":
        model = tiny.build("bert-classifier")
        hlg.convert(model)
    elif case == "NaN":
        model.classifier.bias.data[0] = torch.nan
    elif case == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    elif case == "no token":
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.get_token", lambda: None)
        changes["api"] = HfApi(endpoint=hub.url)
    elif case == "tag of a pull request":
        changes |= {"tag": "v1", "create_pr": True}
    source = hlg.save_relu_pretrained(model, tmp_path / "m") if case == "no processor in the folder" else model
    given = {"processor": None if case.startswith("no processor") else (), "api": HfApi(endpoint=hub.url, token=TOKEN)}
    kept = tmp_path / "kept"
    if source is model:
        changes["folder"] = kept
    with pytest.raises(ValueError, match=message):
        hlg.push_relu_to_hub(source, "a/b/c" if case == "name" else "tester/m", **(given | changes))
    assert not hub.requests
    assert not kept.exists()


@pytest.mark.parametrize(
    ("method", "route", "status"),
    [
        ("POST", "repos/create", 401),
        ("POST", "repos/create", 403),
        ("POST", "preupload", 403),
        ("POST", "commit", 0),
        ("POST", "commit", 409),
        ("POST", "commit", 413),
        ("POST", "commit", 429),
        ("POST", "commit", 500),
        ("POST", "lfs/objects/batch", 403),
        ("PUT", "^/lfs/", 403),
    ],
)
def test_failed_upload_keeps_the_folder(
    hub: HubServer, tmp_path: Path, method: str, route: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, too large, too often, failed or cut off: the saved model stays, and pushing the folder again succeeds."""
    # the comparison in another process, which takes seconds, is the same each time
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    api = HfApi(endpoint=hub.url, token=TOKEN)
    hub.fail_next(method, route, status, times=9 if status == 429 else 1, applied=False)
    with pytest.raises(hlg.PushError, match=r"hf-lambda-gelu push .*--repo-id tester/m") as caught:
        hlg.push_relu_to_hub(relu_model(), "tester/m", processor=(), folder=tmp_path / "kept", api=api)
    assert TOKEN not in str(caught.value)
    assert (tmp_path / "kept" / "model.safetensors").is_file()
    assert not [repo for repo in hub.repos.values() if repo.commits], "nothing half uploaded"
    hub._faults.clear()
    hlg.push_relu_to_hub(tmp_path / "kept", "tester/m", processor=(), api=api)
    assert "model.safetensors" in hub.repos["tester/m"].files


def test_a_tag_that_is_refused(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is up, and the message says so, with a command that sets the tag; nothing is kept for an upload again."""
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    api = HfApi(endpoint=hub.url, token=TOKEN)
    hub.fail_next("POST", "/tag/", 403, applied=False)
    with pytest.raises(
        hlg.PushError, match=r"the model is uploaded to tester/m, as http.*but the tag 'v 1' was not"
    ) as caught:
        hlg.push_relu_to_hub(relu_model(), "tester/m", processor=(), tag="v 1", api=api)
    assert len(hub.repos["tester/m"].commits) == 1
    oid = str(caught.value).rpartition("--revision ")[2]
    assert hub.repos["tester/m"].resolve("main") == oid
    assert str(caught.value).endswith(f"To set it: hf repos tag create tester/m 'v 1' --revision {oid}")
    assert list(tmp_path.iterdir()) == []


def test_card_that_the_hub_refuses(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata is validated before the first file is sent."""
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    details = hlg.CardDetails(license=["mit"])
    api = HfApi(endpoint=hub.url, token=TOKEN)
    with pytest.raises(hlg.PushError, match=r"license.* must be a string.*kept"):
        hlg.push_relu_to_hub(relu_model(), "tester/m", processor=(), details=details, folder=tmp_path / "kept", api=api)
    assert not hub.repos["tester/m"].commits
    assert not [request for request in hub.requests if request.method == "PUT"]


@pytest.mark.parametrize(("known", "licence"), [(True, "cc-by-4.0"), (False, None)])
def test_licence_of_the_base_model(
    hub: HubServer, known: bool, licence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the card of the base model, if the Hub has it."""
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    if known:
        hub.add_repo("someone/base", {"README.md": b"---\nlicense: cc-by-4.0\n---\n# Base\n"})
    details = hlg.CardDetails(base_model="someone/base")
    api = HfApi(endpoint=hub.url, token=TOKEN)
    hlg.push_relu_to_hub(relu_model(), "tester/m", processor=(), details=details, api=api)
    assert ModelCard(hub.repos["tester/m"].files["README.md"].decode()).data.license == licence


def test_wrong_token(hub: HubServer, tmp_path: Path) -> None:
    """A refused token is an error that names the folder and does not show the token."""
    with pytest.raises(hlg.PushError, match="kept") as caught:
        hlg.push_relu_to_hub(
            relu_model(),
            "tester/m",
            processor=(),
            folder=tmp_path / "kept",
            api=HfApi(endpoint=hub.url, token="hf_wrong"),
        )
    assert "hf_wrong" not in str(caught.value)
    assert "tester/m" not in hub.repos
