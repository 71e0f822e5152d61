"""With trust a model of code of its own goes the whole way: converted, refit, saved with its code, proven, reloaded."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.cli import answer, invoke, sentences, texts
from support.models import relu_model
from support.own_code import CODE, TOKENIZATION, rewrite, trusted, write_own
from transformers import AutoTokenizer, PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.loading import load_saved

ALL_CODE = {**CODE, "tokenization_own.py": TOKENIZATION}


class Own(NamedTuple):
    """The smooth folder, the ReLU model in memory, the folder that it was saved to and proven in, and batches."""

    source: Path
    model: PreTrainedModel
    folder: Path
    batches: list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    root = tmp_path_factory.mktemp("own")
    source = write_own(root / "source")
    model, tokenizer = trusted(source).eval(), AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    batches = []
    for seed in range(4):
        batch = tokenizer(sentences(8, seed), padding=True, return_tensors="pt")
        batches.append({name: batch[name] for name in ("input_ids", "attention_mask")})
    smooth = model(**batches[0]).logits
    report = hlg.convert(model, hard_coded=True)
    assert [site.name for site in report.sites] == ["layers.0.act", "layers.1.act", "own_act"]
    torch.testing.assert_close(model(**batches[0]).logits, smooth)
    hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    model.eval()
    folder = hlg.save_relu_pretrained(model, root / "relu", processor=tokenizer, trust_remote_code=True)
    assert hlg.verify_relu_pretrained(model, folder, trust_remote_code=True) == 0.0
    return Own(source, model, folder, batches)


def copied(own: Own, target: Path) -> Path:
    return Path(shutil.copytree(own.folder, target))


def test_the_code_comes_along(own: Own) -> None:
    """Byte by byte, relative imports too, and nothing else; the proof lists each file with its SHA-256."""
    assert {path.name: path.read_text() for path in own.folder.glob("*.py")} == ALL_CODE
    record = json.loads((own.folder / "lambda_gelu.json").read_text())
    for name, text in ALL_CODE.items():
        entry = {"size": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        assert record["checks"]["files"][name] == entry
    assert record["checks"]["code_that_was_trusted"] == sorted(ALL_CODE)
    assert record["checks"]["activations_that_ran"] == {"relu": 2, "gelu": 1}  # its own at λ = 16384, in the weights


def test_the_card(own: Own) -> None:
    """It says that code runs, which, and how to load; the lines do what they say."""
    card = (own.folder / "README.md").read_text()
    assert "`configuration_own.py`, `layers_own.py`, `modeling_own.py`, `tokenization_own.py`" in card
    assert "It runs only with `trust_remote_code=True`. Read it first" in card
    assert "nothing else is needed" not in card
    assert "- custom_code\n" in card
    lines = card.partition("```python\n")[2].partition("```")[0]
    assert "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n" in lines
    found: dict[str, Any] = {}
    exec(lines.replace('"relu"', repr(str(own.folder))), found)
    assert torch.equal(found["model"].eval()(**own.batches[0]).logits, own.model(**own.batches[0]).logits)
    assert type(found["tokenizer"]).__name__ == "OwnTokenizer"


@pytest.mark.parametrize("name", ["modeling_own.py", "layers_own.py"])
def test_what_is_proven_is_the_folder_s(own: Own, tmp_path: Path, name: str) -> None:
    """Other code than that of the model in memory is found out, though this process has the right one in its cache."""
    folder = copied(own, tmp_path / "relu")
    text = (folder / name).read_text()
    changed = text.replace("FACTOR = 1.0", "FACTOR = 1.5").replace("hidden_states + self", "1.5 * hidden_states + self")
    (folder / name).write_text(changed)
    assert changed != text
    with pytest.raises(hlg.VerificationError, match="computes something else in stock transformers"):
        hlg.verify_relu_pretrained(own.model, folder, trust_remote_code=True)
    # the package loads what lies there; transformers' own Auto classes would take the class that this process knows already
    outputs = load_saved(folder, trust_remote_code=True)(**own.batches[0]).logits
    assert not torch.allclose(outputs, own.model(**own.batches[0]).logits)


def test_a_cache_that_was_changed(own: Own, tmp_path: Path) -> None:
    """transformers saves the code from its cache of modules; where that is another by now, the proof says so."""
    cached = Path(str(sys.modules[type(own.model).__module__].__file__))
    text = cached.read_text()
    try:
        cached.write_text(text.replace("FACTOR = 1.0", "FACTOR = 1.5"))
        folder = hlg.save_relu_pretrained(own.model, tmp_path / "relu", trust_remote_code=True)
    finally:
        cached.write_text(text)
    with pytest.raises(hlg.VerificationError, match="computes something else"):
        hlg.verify_relu_pretrained(own.model, folder, trust_remote_code=True)


def test_without_trust(own: Own, tmp_path: Path) -> None:
    """A model in memory has run its code; that it is written and published is asked for all the same."""
    with pytest.raises(ValueError, match=r"OwnModelForSequenceClassification is a class of a checkpoint's own code"):
        hlg.save_relu_pretrained(own.model, tmp_path / "relu")
    tokenizer = AutoTokenizer.from_pretrained(own.source, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"OwnTokenizer is a class of a checkpoint's own code"):
        hlg.save_relu_pretrained(relu_model("bert-classifier"), tmp_path / "relu", processor=tokenizer)
    assert not (tmp_path / "relu").exists()


def test_folders_on_disk(own: Own, tmp_path: Path) -> None:
    """Without the weights in memory: converted, made hard, and substituted, with the code of the folder."""
    made = hlg.convert_checkpoint(own.source, tmp_path / "lambda", 300.0, trust_remote_code=True)
    assert (len(made.linked), made.copied, made.rewritten) == (1, (), ())
    assert {path.name: path.read_text() for path in (tmp_path / "lambda").glob("*.py")} == ALL_CODE
    hlg.relu_ize_checkpoint(tmp_path / "lambda", tmp_path / "relu", trust_remote_code=True)
    assert {path.name: path.read_text() for path in (tmp_path / "relu").glob("*.py")} == ALL_CODE
    assert "tokenizer = AutoTokenizer.from_pretrained" in (tmp_path / "relu" / "README.md").read_text()
    model = trusted(tmp_path / "relu").eval()
    assert hlg.audit(model).counts == {"relu": 2, "gelu": 1}
    assert hlg.verify_relu_pretrained(model, tmp_path / "relu", trust_remote_code=True) == 0.0


def test_streamed(own: Own, tmp_path: Path) -> None:
    """A refit in files runs the folder's code, and makes what memory makes; the command does so too, and asks for trust."""
    options: dict[str, Any] = {"calibration": own.batches, "compensate": "least_squares"}
    hlg.relu_ize_checkpoint(own.source, tmp_path / "relu", **options, trust_remote_code=True)
    assert {path.name: path.read_text() for path in (tmp_path / "relu").glob("*.py")} == ALL_CODE
    model, memory = trusted(tmp_path / "relu").eval(), load_saved(own.source, trust_remote_code=True)
    hlg.convert(memory)
    hlg.relu_ize(memory, **options)
    assert torch.equal(model(**own.batches[0]).logits, memory(**own.batches[0]).logits)
    data = ("--calibration", texts(tmp_path / "texts.txt"), "--compensate", "bias", "--stream")
    assert "has code of its own" in invoke("relu-ize", own.source, tmp_path / "other", *data, code=1).stderr
    answer("relu-ize", own.source, tmp_path / "other", *data, "--trust-remote-code")
    assert {path.name: path.read_text() for path in (tmp_path / "other").glob("*.py")} == ALL_CODE


def test_commands(own: Own, tmp_path: Path) -> None:
    """`relu-ize` with data, `verify` and `fold`, by the folder's own tokenizer; `verify` without trust says what to do."""
    data = ("--calibration", texts(tmp_path / "texts.txt"), "--compensate", "least_squares")
    answer("relu-ize", own.source, tmp_path / "relu", *data, "--trust-remote-code")
    assert {path.name: path.read_text() for path in (tmp_path / "relu").glob("*.py")} == ALL_CODE
    assert answer("verify", tmp_path / "relu", "--trust-remote-code")["largest_difference"] == 0.0
    error = invoke("verify", tmp_path / "relu", code=1).stderr
    assert "config.json names 'configuration_own.OwnConfig' as its AutoConfig. Read configuration_own.py there" in error
    assert "--trust-remote-code" in error
    dry = ("push", tmp_path / "relu", "--repo-id", "someone/own", "--dry-run")
    assert set(answer(*dry, "--trust-remote-code")["files"]["someone/own"]) > set(ALL_CODE)
    assert "has code of its own" in invoke(*dry, code=1).stderr
    answer("convert", own.source, tmp_path / "lambda", "--trust-remote-code")
    answer("fold", tmp_path / "lambda", tmp_path / "folded", "--trust-remote-code")
    assert {path.name: path.read_text() for path in (tmp_path / "folded").glob("*.py")} == ALL_CODE


def test_a_class_without_code_in_the_folder(own: Own, tmp_path: Path) -> None:
    """Such as one of a user's own script that was never registered."""
    folder = copied(own, tmp_path / "relu")
    rewrite(folder / "config.json", auto_map=None)
    with pytest.raises(hlg.VerificationError, match=r"has no class 'OwnModelForSequenceClassification'.*register_for_auto"):
        hlg.verify_relu_pretrained(own.model, folder, trust_remote_code=True)


def test_entries_of_elsewhere(own: Own, tmp_path: Path) -> None:
    """Of an auto_map those stay whose code lies in the folder, as the folder's; the others go, with a word."""
    model = own.model
    before = dict(model.config.auto_map)
    messages: list[str] = []
    try:
        model.config.auto_map.update(
            AutoModel="someone/else--modeling_own.OwnModel",
            AutoModelForCausalLM="someone/else--modeling_own.NotThere",
            AutoModelForMaskedLM="modeling_gone.Gone",
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hf_lambda_gelu.checkpoints.carried_code.logger.warning", messages.append)
            folder = hlg.save_relu_pretrained(model, tmp_path / "relu", trust_remote_code=True)
    finally:
        model.config.auto_map = before
    assert json.loads((folder / "config.json").read_text())["auto_map"] == before
    assert len(messages) == 2
    assert "config.json does not name 'modeling_gone.Gone' as its AutoModelForMaskedLM any more" in "".join(messages)


def test_a_class_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not loaded from anywhere, but registered: its file is saved, and makes the model in the other process."""
    lines = [line for text in CODE.values() for line in text.splitlines() if not line.startswith("from .")]
    (tmp_path / "modeling_mine.py").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    mine: Any = importlib.import_module("modeling_mine")
    model = mine.OwnModelForSequenceClassification(mine.OwnConfig()).eval()
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    alone = hlg.save_relu_pretrained(model, tmp_path / "alone")
    with pytest.raises(hlg.VerificationError, match=r"holds no code that makes it: keep the class in a Python file"):
        hlg.verify_relu_pretrained(model, alone)
    mine.OwnConfig.register_for_auto_class()
    mine.OwnModelForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
    folder = hlg.save_relu_pretrained(model, tmp_path / "relu", trust_remote_code=True)
    assert [path.name for path in folder.glob("*.py")] == ["modeling_mine.py"]
    assert hlg.verify_relu_pretrained(model, folder, trust_remote_code=True) == 0.0
