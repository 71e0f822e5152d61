"""Without trust no verb runs code of a folder: a trapped one is refused by name, nobody is asked, nothing is made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from support import tiny
from support.cli import bert, invoke, texts
from support.models import relu_model
from support.own_code import AUTOS, TOKENIZATION, rewrite, trap
from transformers import CONFIG_MAPPING, MODEL_MAPPING

import hf_lambda_gelu as hlg

PLACES = ("model", "tokenizer", "image processor", "processor", "part of a processor", "old tokenizer", "subfolder")


class NoInput:
    """In the place of stdin: whoever reads it asks."""

    asked = False

    def readline(self, *_: object) -> str:
        type(self).asked = True
        return "y\n"

    read = readline

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError


@pytest.fixture(autouse=True)
def nobody_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(NoInput, "asked", False)
    monkeypatch.setattr(sys, "stdin", NoInput())
    yield
    assert not NoInput.asked


def trapped(folder: Path, place: str, mark: Path) -> Path:
    """A BERT as ReLU, of which one file names code that leaves a mark."""
    model = relu_model("bert-classifier")
    bert(folder)
    model.save_pretrained(folder)
    trap(folder, mark, "evil.py", "modeling_own.py", "configuration_own.py")
    if place == "model":
        rewrite(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=AUTOS)
    elif place == "tokenizer":
        autos = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
        rewrite(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=autos)
    elif place == "old tokenizer":
        rewrite(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=["evil.EvilTokenizer", None])
    elif place == "image processor":
        autos = {"AutoImageProcessor": "evil.EvilImageProcessor"}
        rewrite(folder / "preprocessor_config.json", image_processor_type="EvilImageProcessor", auto_map=autos)
    elif place == "processor":
        rewrite(folder / "processor_config.json", processor_class="EvilProcessor", auto_map={"AutoProcessor": "evil.Evil"})
    elif place == "part of a processor":
        part = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": {"pil": "evil.Evil"}}}
        rewrite(folder / "processor_config.json", processor_class="CLIPProcessor", image_processor=part)
    else:
        (folder / "qformer_tokenizer").mkdir()
        autos = {"AutoTokenizer": ["evil.Evil", None]}
        rewrite(folder / "qformer_tokenizer" / "tokenizer_config.json", tokenizer_class="Evil", auto_map=autos)
    return folder


VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "convert_checkpoint": lambda src, dst: hlg.convert_checkpoint(src, dst),
    "relu_ize_checkpoint": lambda src, dst: hlg.relu_ize_checkpoint(src, dst),
    "audit": lambda src, dst: hlg.audit(src),
    "export_onnx": lambda src, dst: hlg.export_onnx(src, dst),
    "verify_relu_pretrained": lambda src, dst: hlg.verify_relu_pretrained(relu_model("bert-classifier"), src),
    "push_relu_to_hub": lambda src, dst: hlg.push_relu_to_hub(
        src, "tester/evil", processor=(), api=HfApi(endpoint="http://127.0.0.1:9", token="hf_test")
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_verbs(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    mark = tmp_path / "ran"
    src = trapped(tmp_path / "src", place, mark)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for name, verb in VERBS.items():
        with pytest.raises(
            hlg.CheckpointError, match=r"src' has code of its own.* names '(evil|configuration_own)\..*Read "
        ) as e:
            verb(src, tmp_path / "dst")
        assert "trust_remote_code=True (--trust-remote-code)" in str(e.value), name
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before, name
    assert not mark.exists(), mark.read_text()


@pytest.mark.parametrize("place", ["model", "tokenizer"])
def test_commands(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command, with data, as it would tokenise them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    mark, dst = tmp_path / "ran", tmp_path / "dst"
    src, data = trapped(tmp_path / "src", place, mark), ("--calibration", texts(tmp_path / "texts.txt"))
    for line in (
        ("convert", src, dst),
        ("relu-ize", src, dst),
        ("relu-ize", src, dst, *data),
        ("fold", src, dst),
        ("audit", src),
        ("calibrate", src, *data),
        ("sensitivity", src, *data),
        ("verify", src),
        ("push", src, "--repo-id", "tester/evil"),
        ("export", "onnx", src, dst),
        ("demo", src),
    ):
        assert "src' has code of its own, which does not run unless you say so" in invoke(*line, code=1).stderr, line
        assert not dst.exists()
    assert not mark.exists(), mark.read_text()


def test_what_nobody_names(tmp_path: Path) -> None:
    """Python files that no auto_map names, and a custom_generate: nothing runs, also with trust; they do not come along."""
    mark = tmp_path / "ran"
    tiny.build("gpt2").save_pretrained(tmp_path / "src")
    trap(tmp_path / "src", mark, "modeling_gpt2.py", "configuration_gpt2.py", "tokenization.py", "kernels/kernel.py")
    for trust in (False, True):
        hlg.audit(tmp_path / "src", trust_remote_code=trust)
        hlg.convert_checkpoint(tmp_path / "src", tmp_path / f"dst-{trust}", trust_remote_code=trust)
        assert not list((tmp_path / f"dst-{trust}").rglob("*.py"))
    trap(tmp_path / "src", mark, "custom_generate/generate.py")
    hlg.audit(tmp_path / "src")
    hlg.convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert not list((tmp_path / "dst").rglob("*.py"))
    assert not mark.exists(), mark.read_text()
    with pytest.raises(hlg.CheckpointError, match="has no attribute 'generate'"):  # the trap has no such function
        hlg.audit(tmp_path / "src", trust_remote_code=True)
    assert mark.read_text() == "custom_generate/generate.py "
    (tmp_path / "src" / "custom_generate" / "generate.py").write_text("def generate(model, **kwargs):\n    return 7\n")
    hlg.convert_checkpoint(tmp_path / "src", tmp_path / "kept", trust_remote_code=True)
    assert [path.name for path in (tmp_path / "kept").rglob("*.py")] == ["generate.py"]


def test_classes_that_transformers_has(tmp_path: Path) -> None:
    """Its own classes are taken then, as transformers does; what is made names no code that does not come along."""
    mark = tmp_path / "ran"
    bert(tmp_path / "src", hardness=300.0)
    trap(tmp_path / "src", mark, "evil.py")
    (tmp_path / "src" / "tokenization_own.py").write_text(TOKENIZATION)
    rewrite(tmp_path / "src" / "config.json", auto_map={"AutoModelForSequenceClassification": "evil.Evil"})
    autos = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    rewrite(tmp_path / "src" / "tokenizer_config.json", auto_map=autos)
    assert hlg.audit(tmp_path / "src").model == "BertForSequenceClassification"
    hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert not mark.exists()
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "dst" / name).read_text()), name
    assert not list((tmp_path / "dst").glob("*.py"))


def test_a_kernel_of_the_hub(tmp_path: Path) -> None:
    """A config may name one, which transformers would download and run."""
    bert(tmp_path / "src")
    rewrite(tmp_path / "src" / "config.json", attn_implementation="someone/attention")
    with pytest.raises(hlg.CheckpointError, match=r"names a kernel of the Hub, 'someone/attention'"):
        hlg.audit(tmp_path / "src")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("someone/else--modeling_own.OwnModel", r"code of another repository, which may be another tomorrow"),
        ("../modeling_own.OwnModel", r"expected module\.Class, of a Python file beside it"),
        ("sub/modeling_own.OwnModel", r"expected module\.Class"),
    ],
)
def test_code_that_is_not_the_folder_s(tmp_path: Path, target: str, message: str) -> None:
    """Refused with trust too: what runs and is proven is the folder's."""
    mark = tmp_path / "ran"
    src = trapped(tmp_path / "src", "model", mark)
    rewrite(src / "config.json", auto_map={**AUTOS, "AutoModel": target})
    for verb in (hlg.audit, lambda folder, **trust: hlg.convert_checkpoint(folder, tmp_path / "dst", **trust)):
        with pytest.raises(hlg.CheckpointError, match=message):
            verb(src, trust_remote_code=True)
    assert not mark.exists()


def test_a_kind_of_model_without_a_base_class(tmp_path: Path) -> None:
    """transformers knows the config and has no AutoModel for it: there `from_pretrained` asks unless it is told."""
    mark = tmp_path / "ran"
    src = trapped(tmp_path / "src", "model", mark)
    kind = next(kind for kind in sorted(CONFIG_MAPPING) if CONFIG_MAPPING[kind] not in MODEL_MAPPING)
    rewrite(src / "config.json", model_type=kind, architectures=None, auto_map={"AutoModel": "evil.Evil"})
    with pytest.raises(hlg.CheckpointError, match=r"no model could be loaded"):
        hlg.audit(src)
    assert not mark.exists()
