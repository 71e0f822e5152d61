"""Which files of a folder go to the Hub: those of the model, its processor and the package, and nothing behind a link."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from support.cli import answer, invoke
from support.hub_server import HubServer
from support.models import relu_model
from support.publishing import TOKEN, not_proven
from transformers import BertTokenizer, PreTrainedModel
from transformers.utils import logging

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.published_files import published_files
from hf_lambda_gelu.checkpoints.verify import Proof

OWN = {"README.md", "config.json", "hardness_profile.png", "lambda_gelu.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
FOREIGN = (
    ".env",
    ".git/config",
    "optimizer.pt",
    "scheduler.pt",
    "training_args.bin",
    "rng_state.pth",
    "pytorch_model.bin",
    "model.ckpt",
    "data.pkl",
    "trainer_state.json",
    "modeling_own.py",
    "notes.md",
    "adapter_model.safetensors",
    "model-00001-of-00002.safetensors",
    "checkpoint-8/model.safetensors",
    "own_tokenizer/.env",
    "id_rsa",
)


def saved(folder: Path) -> Path:
    """A ReLU model with its tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{index}" for index in range(94))]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    return hlg.save_relu_pretrained(relu_model("bert-classifier"), folder, processor=tokenizer)


def add(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("secret of mine")


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison in another process, which takes seconds and is not what these tests are about, is left out."""
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    monkeypatch.setattr(hlg, "verify_relu_pretrained", lambda *_, **__: 0.0)


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged as a warning."""
    found: list[str] = []
    monkeypatch.setattr(logging.get_logger("hf_lambda_gelu.checkpoints.upload"), "warning", found.append)
    return found


def test_what_else_lies_there_stays(hub: HubServer, tmp_path: Path, proven: None, warned: list[str]) -> None:
    folder = saved(tmp_path / "m")
    for name in FOREIGN:
        add(folder, name)
    (tmp_path / "key").write_text("secret of mine")
    for name in ("vocab.txt", "added_tokens.json", "link.json"):  # two have names that are uploaded otherwise
        (folder / name).symlink_to(tmp_path / "key")
    (folder / "linked_tokenizer").symlink_to(tmp_path, target_is_directory=True)
    hlg.push_relu_to_hub(folder, "tester/m", api=HfApi(endpoint=hub.url, token=TOKEN))
    uploaded = hub.repos["tester/m"].files
    assert set(uploaded) - {".gitattributes"} == OWN | TOKENIZER
    assert not [name for name, data in uploaded.items() if b"secret of mine" in data]
    (message,) = warned
    for name in (*FOREIGN, "vocab.txt", "link.json", "linked_tokenizer"):
        top = name.split("/")[0]
        assert name in message or f"{top}/" in message, name
    assert "vocab.txt (a link)" in message


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "chat_template.jinja"])
def test_bytes_that_were_not_proven(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What changes, or appears, between proof and upload is named, and nothing goes up; else all does, in one commit."""
    folder, api = saved(tmp_path / "relu"), HfApi(endpoint=hub.url, token=TOKEN)
    before = (folder / name).read_bytes() if (folder / name).exists() else None

    def prove(model: PreTrainedModel, place: Path, inputs: object = None, trust: bool = False) -> Proof:
        proof = not_proven(model, place)
        with (place / name).open("ab") as file:
            file.write(b" ")
        return proof

    with monkeypatch.context() as patch:
        patch.setattr("hf_lambda_gelu.checkpoints.hub.prove", prove)
        with pytest.raises(hlg.VerificationError, match=f"{name}' was changed after the proof: nothing was uploaded"):
            hlg.push_relu_to_hub(folder, "someone/relu", processor=(), api=api)
    assert not hub.repos
    if before is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(before)
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    hlg.push_relu_to_hub(folder, "someone/relu", processor=(), api=api)
    assert len(hub.repos["someone/relu"].commits) == 1


def test_nothing_is_said_where_nothing_stays(hub: HubServer, tmp_path: Path, proven: None, warned: list[str]) -> None:
    hlg.push_relu_to_hub(saved(tmp_path / "m"), "tester/m", api=HfApi(endpoint=hub.url, token=TOKEN))
    assert set(hub.repos["tester/m"].files) - {".gitattributes"} == OWN | TOKENIZER
    assert warned == []


def test_shards_and_processors(tmp_path: Path) -> None:
    """An index and what it names, chat templates, a second tokenizer, and the vocabulary that a class alone has."""
    folder = saved(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    relu_model("bert-classifier").save_pretrained(folder, max_shard_size="20KB")
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    add(folder, "model-stale.safetensors")
    for name in ("additional_chat_templates/tool.jinja", "qformer_tokenizer/vocab.txt", "chat_template.jinja", "emoji.json"):
        add(folder, name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPTNeoXJapaneseTokenizer"}))
    files = published_files(folder)
    extra = {"additional_chat_templates/tool.jinja", "qformer_tokenizer/vocab.txt", "chat_template.jinja", "emoji.json"}
    assert set(files.names) == OWN - {"model.safetensors"} | TOKENIZER | shards | extra | {"model.safetensors.index.json"}
    assert set(files.left_out) == {"model-stale.safetensors"}


def _link(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


def _outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "w.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "../w.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _token(folder: Path) -> None:
    with (folder / "README.md").open("a") as card:
        card.write("\nhf_" + "aBc4" * 8 + "\n")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "config behind a link": (_link("config.json"), "config.json is a link"),
    "weights behind a link": (_link("model.safetensors"), "model.safetensors is a link"),
    "shards elsewhere": (_outside, "it holds no model.safetensors"),
    "pickle alone": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "it holds no model.safetensors"),
    "token in the card": (_token, "holds a token of the Hub"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    change, message = REFUSED[case]
    change(folder)
    with pytest.raises(ValueError, match=message):
        published_files(folder)


def test_refused_before_any_request(hub: HubServer, tmp_path: Path, proven: None) -> None:
    folder = saved(tmp_path / "m")
    _link("config.json")(folder)
    with pytest.raises(ValueError, match=r"config\.json is a link"):
        hlg.push_relu_to_hub(folder, "tester/m", api=HfApi(endpoint=hub.url, token=TOKEN))
    assert not hub.requests


def test_snapshot_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are links into the cache's blobs; a link to something else in the cache's neighbourhood is none of them."""
    cache = tmp_path / "hub"
    blobs, snapshot = cache / "models--me--m" / "blobs", cache / "models--me--m" / "snapshots" / "abc"
    source = saved(tmp_path / "m")
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    (tmp_path / "token").write_text("secret")
    (snapshot / "vocab.txt").symlink_to(tmp_path / "token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    files = published_files(snapshot)
    assert set(files.names) == OWN | TOKENIZER
    assert files.left_out == {"vocab.txt": "a link"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="is a link"):
        published_files(snapshot)


def test_record_behind_a_link(tmp_path: Path) -> None:
    """The proof neither reads nor rewrites what the record's name points to."""
    folder, outside = saved(tmp_path / "m"), tmp_path / "mine.json"
    outside.write_text('{"mine": 1}')
    (folder / "lambda_gelu.json").unlink()
    (folder / "lambda_gelu.json").symlink_to(outside)
    assert hlg.verify_relu_pretrained(relu_model("bert-classifier"), folder) == 0.0
    assert outside.read_text() == '{"mine": 1}'
    assert (folder / "lambda_gelu.json").is_symlink()


def test_command_line_says_it(tmp_path: Path, proven: None) -> None:
    """A dry run lists what would go and what stays; what is kept is what would go."""
    folder = saved(tmp_path / "m")
    for name in (".env", "checkpoint-8/optimizer.pt"):
        add(folder, name)
    line = ("push", folder, "--repo-id", "tester/m", "--dry-run")
    stdout = invoke(*line).stdout
    assert "not uploaded to tester/m: .env (not a file of the model, its processor or this package)" in stdout
    assert "  model.safetensors  " in stdout
    assert "  .env  " not in stdout
    found = answer(*line, "--save-to", tmp_path / "kept")
    assert set(found["left_out"]["tester/m"]) == {".env", "checkpoint-8/"}
    assert {path.name for path in (tmp_path / "kept" / "m").iterdir()} == set(found["files"]["tester/m"]) == OWN | TOKENIZER


def test_failed_upload_names_a_command_that_leaves_them_out(hub: HubServer, tmp_path: Path, proven: None) -> None:
    folder = saved(tmp_path / "my model")
    add(folder, ".env")
    hub.fail_next("POST", "commit", 403, times=5)
    with pytest.raises(hlg.PushError) as caught:
        hlg.push_relu_to_hub(folder, "tester/m", revision=None, api=HfApi(endpoint=hub.url, token=TOKEN))
    assert f"hf-lambda-gelu push '{folder}' --repo-id tester/m" in str(caught.value)
    assert "Not for upload: .env" in str(caught.value)
