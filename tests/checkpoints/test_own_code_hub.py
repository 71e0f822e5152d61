"""A model of code of its own on the Hub: what goes up is what was proven, and a stranger finds the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from support.cli import answer, invoke
from support.hub_server import HubServer
from support.models import relu_model
from support.own_code import CODE, TOKENIZATION, rewrite, trap, trusted, write_own
from support.publishing import TOKEN, hub_with_a_cache, not_proven, run_stock
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import hf_lambda_gelu as hlg

ALL_CODE = {**CODE, "tokenization_own.py": TOKENIZATION}
STRANGER = """
import json, sys
from safetensors.torch import load_file, save_file
found = {"__name__": "stranger"}
exec(sys.argv[2], found)
model, tokenizer = found["model"].eval(), found["tokenizer"]
save_file({"logits": model(**load_file(sys.argv[1] + ".inputs")).logits.detach()}, sys.argv[1] + ".outputs")
print(json.dumps([type(model).__module__.split(".")[0], tokenizer("word1 word2")["input_ids"]]))
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    yield from hub_with_a_cache(monkeypatch, tmp_path / "cache")


def relu(folder: Path, **settings: object) -> PreTrainedModel:
    model = trusted(folder, **settings).eval()
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    return model


def test_the_whole_way(hub: HubServer, tmp_path: Path) -> None:
    """Pushed, loaded by the card's lines in a process without the package, verified by the command; tampering is told."""
    model, api = relu(write_own(tmp_path / "own")), HfApi(endpoint=hub.url, token=TOKEN)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "own", trust_remote_code=True)
    with pytest.raises(ValueError, match=r"is a class of a checkpoint's own code.*pass trust_remote_code=True"):
        hlg.push_relu_to_hub(model, "tester/own", processor=tokenizer, api=api)
    assert not hub.repos
    hlg.push_relu_to_hub(model, "tester/own", processor=tokenizer, api=api, trust_remote_code=True)
    files = hub.repos["tester/own"].files
    assert {name: data.decode() for name, data in files.items() if name.endswith(".py")} == ALL_CODE
    proven = json.loads(files["lambda_gelu.json"])["checks"]["files"]
    assert set(proven) == set(files) - {"lambda_gelu.json", ".gitattributes"}
    assert all(proven[name]["sha256"] == hashlib.sha256(files[name]).hexdigest() for name in proven)

    batch = {"input_ids": torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])}
    save_file(batch, tmp_path / "x.inputs")
    lines = files["README.md"].decode().partition("```python\n")[2].partition("```")[0]
    printed = run_stock(hub, tmp_path / "home", STRANGER, str(tmp_path / "x"), lines)
    assert json.loads(printed.splitlines()[-1]) == ["transformers_modules", tokenizer("word1 word2")["input_ids"]]
    assert torch.equal(load_file(tmp_path / "x.outputs")["logits"], model(**batch).logits)

    found = answer("verify", "tester/own", "--trust-remote-code")
    assert (found["holds"], found["as_proven"], found["largest_difference"]) == (True, True, 0.0)
    assert "has code of its own, which does not run unless you say so" in invoke("verify", "tester/own", code=1).stderr
    changed = {"layers_own.py": files["layers_own.py"] + b"\n"}
    hub.add_repo("tester/changed", dict(files) | changed)
    reason = answer("verify", "tester/changed", "--trust-remote-code", code=1)["reason"]
    assert "was proven: layers_own.py has other content" in reason


def test_which_files(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder: the code that its files name and no other; a link in its place is refused; the command that goes on."""
    api = HfApi(endpoint=hub.url, token=TOKEN)
    model = relu(write_own(tmp_path / "own", tokenizer=False))
    folder = hlg.save_relu_pretrained(model, tmp_path / "relu", trust_remote_code=True)
    trap(folder, tmp_path / "ran", "setup.py", "modeling_other.py", "kernels/kernel.py")
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    hub.fail_next("POST", r"/commit/", 500, times=50)
    with pytest.raises(
        hlg.PushError, match=r"hf-lambda-gelu push \S+ --repo-id tester/m --no-processor --trust-remote-code"
    ):
        hlg.push_relu_to_hub(folder, "tester/m", processor=(), api=api, trust_remote_code=True)
    hub._faults.clear()
    hlg.push_relu_to_hub(folder, "tester/m", processor=(), api=api, trust_remote_code=True)
    assert {name for name in hub.repos["tester/m"].files if name.endswith(".py")} == set(CODE)
    assert not (tmp_path / "ran").exists()
    text = (folder / "layers_own.py").read_text()
    (folder / "layers_own.py").unlink()
    (tmp_path / "elsewhere.py").write_text(text)
    (folder / "layers_own.py").symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(
        ValueError, match=r"cannot be published: layers_own\.py.* is a link"
    ):  # what it leads to is not the folder's
        hlg.push_relu_to_hub(folder, "tester/m", processor=(), api=api, trust_remote_code=True)


def test_code_of_a_bert(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers has the class, the model goes up without trust, its code does not, and that is told."""
    warned: list[str] = []
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.upload.logger.warning", warned.append)
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    folder = hlg.save_relu_pretrained(relu_model("bert-classifier"), tmp_path / "relu")
    trap(folder, tmp_path / "ran", "evil.py")
    rewrite(folder / "config.json", auto_map={"AutoModelForSequenceClassification": "evil.Evil"})
    hlg.push_relu_to_hub(folder, "tester/m", processor=(), api=HfApi(endpoint=hub.url, token=TOKEN))
    assert "evil.py" not in hub.repos["tester/m"].files
    assert "evil.py (code, which goes up with trust_remote_code=True alone)" in warned[0]
    assert not (tmp_path / "ran").exists()


def test_a_pinned_revision(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that comes along is that of the commit that the model was loaded from, not the newest."""
    first = {path.name: path.read_bytes() for path in write_own(tmp_path / "own", tokenizer=False).iterdir()}
    hub.add_repo("tester/pinned", dict(first))
    commit = hub.repos["tester/pinned"].branches["main"]
    newer = first["modeling_own.py"].replace(b"FACTOR = 1.0", b"FACTOR = 2.0")
    hub.repos["tester/pinned"].add("main", dict(first) | {"modeling_own.py": newer})
    code = {"trust_remote_code": True, "revision": commit, "code_revision": commit}
    model = AutoModelForSequenceClassification.from_pretrained("tester/pinned", cache_dir=tmp_path / "cache", **code).eval()
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    folder = hlg.save_relu_pretrained(model, tmp_path / "relu", trust_remote_code=True)
    assert (folder / "modeling_own.py").read_bytes() == first["modeling_own.py"]
    assert hlg.verify_relu_pretrained(model, folder, trust_remote_code=True) == 0.0


def test_a_trainer(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`trainer.push_to_hub` takes the parameter and hands it on: trained, substituted, published with its code."""
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    model = trusted(write_own(tmp_path / "own", tokenizer=False))
    hlg.convert(model)
    rows = [{"input_ids": torch.arange(5 + i % 3, 13 + i % 3), "labels": i % 3} for i in range(8)]
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    arguments = hlg.LambdaGELUTrainingArguments(
        str(tmp_path / "run"), max_steps=4, hub_model_id="tester/trained", hub_token=TOKEN, **quiet
    )
    trainer = hlg.LambdaGELUTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    with pytest.raises(ValueError, match=r"is a class of a checkpoint's own code"):
        trainer.push_to_hub()
    trainer.push_to_hub(trust_remote_code=True)
    assert {name for name in hub.repos["tester/trained"].files if name.endswith(".py")} == set(CODE)
    card = hub.repos["tester/trained"].files["README.md"].decode()
    assert 'from_pretrained("tester/trained", trust_remote_code=True)' in card
