"""The stand-in Hub against the real client: what the publishing tests rely on."""

import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, HfApi, ModelCardData
from support.hub_card import check_card
from support.hub_server import HubServer
from support.versions import newer_hub

CARD = "---\nlicense: mit\nlibrary_name: transformers\ntags:\n- gelu\n---\n# A model\n"
CLIENT = """
    import sys
    from huggingface_hub import *
    from huggingface_hub.errors import *

    def push(summary="one"):
        repo = create_repo("m", private=True, exist_ok=True).repo_id
        try:
            return upload_folder(repo_id=repo, folder_path=sys.argv[1], commit_message=summary).oid
        except Exception as error:
            return f"{type(error).__name__} {getattr(getattr(error, 'response', None), 'status_code', '')}"
"""
RESULT = EvalResult(
    task_type="fill-mask",
    dataset_type="glue",
    dataset_name='GLUE: "MNLI" # matched, and a name so long that it has to be folded over several lines of the card',
    metric_type="accuracy",
    metric_value=0.5,
)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A server with nothing on it."""
    with HubServer(token="hf_test") as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A card, a configuration in a folder, and a safetensors file of 1 MiB."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "sub" / "config.json").write_text('{"hidden_act": "gelu"}')
    size = 2**20
    head = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + random.Random(0).randbytes(size))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def client(hub: HubServer, home: Path, code: str, *args: object) -> list[str]:
    """Run `code` in a client process; the lines it printed. Its errors end the test."""
    command = [sys.executable, "-c", textwrap.dedent(CLIENT) + textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, env=hub.env(home), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_upload_folder_and_back(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """One commit holds all files, and they come back byte for byte."""
    back = """
        print(push())
        snapshot_download("tester/m", local_dir=sys.argv[2])
        print(HfApi().model_info("tester/m").sha)
    """
    sent = contents(folder)
    pushed, head = client(hub, tmp_path / "home", back, folder, tmp_path / "back")
    repo = hub.repos["tester/m"]
    assert repo.private
    assert pushed == head == repo.branches["main"]
    assert [(c.summary, sorted(c.paths), c.revision) for c in repo.commits] == [("one", sorted(sent), "main")]
    assert repo.lfs == {"model.safetensors"}
    assert {path: data for path, data in repo.files.items() if path != ".gitattributes"} == sent
    received = contents(tmp_path / "back")
    assert {path: received[path] for path in sent} == sent
    assert [request.path.split("/")[-2:] for request in hub.requests if request.method in ("POST", "PUT")] == [
        ["repos", "create"],
        ["api", "validate-yaml"],
        ["api", "validate-yaml"],
        ["preupload", "main"],
        ["objects", "batch"],
        ["lfs", hashlib.sha256(sent["model.safetensors"]).hexdigest()],
        ["commit", "main"],
    ]
    # the client asks the Hub for more than it needs: /api/agent-harnesses, once a day
    assert {request.status for request in hub.requests if "harnesses" not in request.path} == {200}


def test_bert_model(hub: HubServer, tmp_path: Path) -> None:
    """`push_to_hub` of a model, and `from_pretrained` of what it pushed."""
    code = """
        import torch
        from transformers import AutoModel, BertConfig, BertModel
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
        model = BertModel(BertConfig(**sizes))
        model.push_to_hub("tester/bert", revision="try")
        again = AutoModel.from_pretrained("tester/bert", revision="try").state_dict()
        assert model.state_dict().keys() == again.keys()
        print(all(torch.equal(value, again[name]) for name, value in model.state_dict().items()))
    """
    assert client(hub, tmp_path, code)[-1] == "True"
    repo = hub.repos["tester/bert"]
    assert {"config.json", "model.safetensors"} <= repo.snapshots[repo.branches["try"]].keys()
    assert [commit.revision for commit in repo.commits] == ["try"]
    assert set(repo.files) == {".gitattributes"}


def test_token(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """A wrong token writes nothing, no token writes nothing and sees no private repository."""
    hub.add_repo("tester/m", {"a.txt": b"a"}, private=True)
    code = """
        def status(call, **kwargs):
            try:
                call(**kwargs)
            except HfHubHTTPError as error:
                return type(error).__name__, error.response.status_code
        for token in ("hf_wrong", False):
            print(status(create_repo, repo_id="new", token=token))
            print(status(upload_folder, repo_id="tester/m", folder_path=sys.argv[1], token=token))
            print(status(hf_hub_download, repo_id="tester/m", filename="a.txt", token=token, dry_run=True))
        print(status(hf_hub_download, repo_id="tester/m", filename="b.txt"))
        print(status(hf_hub_download, repo_id="tester/m", filename="a.txt", revision="v1"))
        print(status(hf_hub_download, repo_id="tester/n", filename="a.txt"))
    """
    lines = client(hub, tmp_path / "home", code, folder)
    assert [int(line.split()[-1].rstrip(")")) for line in lines] == [401] * 6 + [404] * 3
    names = ["RemoteEntryNotFoundError", "RevisionNotFoundError", "RepositoryNotFoundError"]
    assert [line.split("'")[1] for line in lines[-3:]] == names
    assert list(hub.repos) == ["tester/m"]
    assert not hub.repos["tester/m"].commits


def test_faults(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """The client repeats what it may; a commit it does not repeat, and its second try sends no object again."""
    hub.fail_next("POST", "/preupload/", 429)
    hub.fail_next("PUT", "^/lfs/", 0, applied=False)
    hub.fail_next("POST", "/commit/main$", 500)
    hub.fail_next("GET", "/resolve/.*safetensors$", 0)
    code = """
        print(push())
        print(push())
        snapshot_download("tester/m", local_dir=sys.argv[2])
    """
    failed, pushed = client(hub, tmp_path / "home", code, folder, tmp_path / "back")
    repo = hub.repos["tester/m"]
    assert failed == "HfHubHTTPError 500"
    assert pushed == repo.branches["main"]
    assert len(repo.commits) == 1
    statuses = {
        word: [r.status for r in hub.requests if word in r.method + r.path] for word in ("preupload", "PUT", "/commit/")
    }
    assert statuses == {"preupload": [429, 200, 200], "PUT": [0, 200], "/commit/": [500, 200]}
    gets = [request.status for request in hub.requests if request.method == "GET" and "safetensors" in request.path]
    assert gets == [0, 200]
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("applied", [True, False])
def test_dropped_commit(hub: HubServer, folder: Path, tmp_path: Path, applied: bool) -> None:
    """A commit whose answer is lost is there; the repeat makes one only where it is not."""
    hub.fail_next("POST", "/commit/main$", 0, applied=applied)
    failed, pushed = client(hub, tmp_path / "home", "print(push('one'), push('two'), sep='\\n')", folder)
    repo = hub.repos["tester/m"]
    assert failed.startswith("RemoteProtocolError")
    assert pushed == repo.branches["main"]
    assert [commit.summary for commit in repo.commits] == ["one" if applied else "two"]


@newer_hub
def test_cards(hub: HubServer, tmp_path: Path) -> None:
    """Cards are pushed, updated and, with metadata that cannot be right, refused."""
    code = """
        repo = create_repo("m").repo_id
        data = ModelCardData(license="mit", model_name="m", eval_results=[EvalResult("t", "d", "n", "acc", 0.5)])
        ModelCard(f"---\\n{data}\\n---\\n# m\\n").push_to_hub(repo)
        metadata_update(repo, {"tags": ["gelu"]})
        print(ModelCard.load(repo).data.tags)
        for bad in ("license: [mit]", "model-index: m", "license: [mit", "- mit", "license: a: b"):
            text = f"---\\n{bad}\\n---\\n"
            calls = [lambda: upload_file(repo_id=repo, path_or_fileobj=text.encode(), path_in_repo="README.md")]
            if bad in ("license: [mit]", "model-index: m"):  # the card class itself reads no worse YAML
                calls.append(lambda: RepoCard(text, ignore_metadata_errors=True).validate())
            for call in calls:
                try:
                    call()
                    print("accepted", bad)
                except ValueError as error:
                    print(str(error).replace("\\n", " "))
        create_tag(repo, tag="v1")
        delete_file("README.md", repo)
        print(file_exists(repo, "README.md"), file_exists(repo, "README.md", revision="v1"))
    """
    tags, *refused, last = client(hub, tmp_path, code)
    assert tags == "['gelu']"
    assert len(refused) == 7
    assert not [line for line in refused if line.startswith("accepted")]
    assert all('"license" must be a string' in line for line in refused[:2])
    assert all('"model-index" must be an array' in line for line in refused[2:4])
    assert last == "False True"
    assert len(hub.repos["tester/m"].commits) == 3


def test_in_process(hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`HfApi` with an endpoint works without a subprocess, LFS included, where hf_xet is installed too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=hub.url, token=hub.token)
    repo_id = api.create_repo("m").repo_id
    assert repo_id == "tester/m"
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    file = api.hf_hub_download(repo_id, "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(file).read_bytes() == hub.repos[repo_id].files["model.safetensors"]
    assert {item.path for item in api.list_repo_tree(repo_id)} == {".gitattributes", *os.listdir(folder)}
    assert [item.path for item in api.list_repo_tree(repo_id, "sub")] == ["sub/config.json"]


def test_check_card() -> None:
    """A good model-index passes; what it lacks is named."""
    data = ModelCardData(license="mit", language="en", model_name="m", eval_results=[RESULT])
    good = f"---\n{data.to_yaml()}\n---\n# m\n"
    assert check_card(good) == ([], [])
    assert check_card(good.replace("value: 0.5", "other: 0.5"))[0] == [
        '"model-index[0].results[0].metrics[0].value" is required'
    ]
    assert check_card(good.replace("results:", "result:"))[0] == ['"model-index[0].results" is required']
    assert check_card("# no metadata")[1]
