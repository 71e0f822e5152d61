"""`save_relu_pretrained`: stock transformers, without the package, computes the same to the last bit; what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.models import relu_model
from support.stock import Saved, reload_in_stock
from transformers import PreTrainedModel, XLMConfig, XLMModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import folders
from hf_lambda_gelu.checkpoints.save import check_relu
from hf_lambda_gelu.measurement.examples.choice import example_inputs
from hf_lambda_gelu.measurement.forward import main_output


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Every tiny model, exported and reloaded."""
    models = {name: relu_model(name, 1e4) for name in tiny.MODELS}
    return reload_in_stock({n: (m, tiny.inputs(m)) for n, m in models.items()}, tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_stock_reload(name: str, saved: dict[str, Saved]) -> None:
    """Difference 0.0 in every output; safetensors only, no λ in keys or config."""
    model, folder, batch, stock = saved[name]
    assert tiny.relative_difference(tiny.outputs(model, batch), stock) == 0.0
    assert tiny.relative_difference(tiny.outputs(tiny.build(name), batch), stock) > 1e-3, "smooth and ReLU are alike here"
    files = {path.name for path in folder.iterdir()} - {"generation_config.json"}
    assert files == {"model.safetensors", "config.json", "README.md", "lambda_gelu.json"}
    keys = set(load_file(folder / "model.safetensors"))
    assert keys
    assert not any("unclipped_hardness" in key for key in keys)
    assert "lambda" not in (folder / "config.json").read_text()
    assert main_output(model(**example_inputs(model))).std() > 0.0  # verify_relu_pretrained's own batch fits


def tree(root: Path) -> dict[str, str]:
    """Every path below a folder, hidden ones too, with the digest of its content."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in root.rglob("*")
    }


def converted() -> PreTrainedModel:
    """λ-GELU in place."""
    model = tiny.build("bert")
    hlg.convert(model)
    return model


def with_key() -> PreTrainedModel:
    """ReLU modules, but the config says otherwise."""
    model = relu_model()
    model.config.hidden_act = "lambda_gelu_tanh"
    return model


def with_value(value: float) -> PreTrainedModel:
    """One weight is not a number, or not finite."""
    model = relu_model()
    model.bert.encoder.layer[1].output.dense.bias.data[3] = value
    return model


class Broken:
    """A processor that fails after it has written half."""

    def save_pretrained(self, folder: str) -> None:
        """Write and fail."""
        (Path(folder) / "vocab.txt").write_text("[PAD]")
        raise RuntimeError("no more vocabulary")


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str, dict[str, Any], str]] = {
    "λ left": (converted, "new", {}, r"still has 3 λ-GELU modules, from bert\..* call relu_ize\(model\) first"),
    "λ in the config": (with_key, "new", {}, r"config\.hidden_act = 'lambda_gelu_tanh': stock transformers does not know"),
    "NaN": (lambda: with_value(float("nan")), "new", {}, r"1 tensors hold NaN .*layer\.1\.output\.dense\.bias"),
    "infinity": (lambda: with_value(float("-inf")), "new", {}, r"1 tensors hold NaN .*layer\.1\.output\.dense\.bias"),
    "NaN over": (lambda: with_value(float("nan")), "full", {"overwrite": True}, "1 tensors hold NaN"),
    "not empty": (relu_model, "full", {}, "'.*full' exists and is not empty: .*overwrite=True"),
    "a file": (relu_model, "file", {}, "'.*file' exists"),
    "below a file": (relu_model, "file/a/b", {}, "cannot write into '.*file/a': .* Choose another folder"),
    "processor": (relu_model, "new", {"processor": Broken()}, "no more vocabulary"),
    "processor over": (relu_model, "full", {"processor": [Broken()], "overwrite": True}, "no more vocabulary"),
}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: tiny.build("bert"), id="bert"),
        pytest.param(
            lambda: XLMModel(XLMConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4, gelu_activation=True)),
            id="xlm",
        ),
    ],
)
def test_smooth_model_refused(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    """A GELU model that never went through relu_ize is no ReLU network, whatever folder it is saved to."""
    with pytest.raises(ValueError, match="relu_ize"):
        hlg.save_relu_pretrained(make(), tmp_path / "new")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    """The message says why; below and beside the folder everything is as before, nothing more and nothing less."""
    make, name, arguments, message = REFUSED[case]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep me")
    (tmp_path / "full" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("me too")
    before = tree(tmp_path)
    with pytest.raises(RuntimeError if "processor" in case else ValueError, match=message):
        hlg.save_relu_pretrained(make(), tmp_path / name, **arguments)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "by two renames"])
def test_overwrite(at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new folder replaces the old one as a whole, and an empty one without being asked; a failed move brings it back."""
    folder = tmp_path / "model"
    folder.mkdir()
    hlg.save_relu_pretrained(relu_model(), folder)
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    (folder / "old").mkdir()
    before = tree(tmp_path)
    move = Path.rename

    def fail(one: Path, other: Path) -> bool:
        raise OSError("disk on fire")

    def fail_once(self: Path, target: Path) -> Path:
        return fail(self, target) if Path(target) == folder and "partial" in self.name else move(self, target)

    if not at_once:
        monkeypatch.setattr(folders, "exchange", lambda *_: False)
    with monkeypatch.context() as patch:
        patch.setattr(*((folders, "exchange", fail) if at_once else (Path, "rename", fail_once)))
        with pytest.raises(OSError, match="disk on fire"):
            hlg.save_relu_pretrained(relu_model("gpt2"), folder, overwrite=True)
    assert tree(tmp_path) == before
    hlg.save_relu_pretrained(relu_model("gpt2"), folder, overwrite=True)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    assert {path.name for path in folder.iterdir()} & {"pytorch_model.bin", "old"} == set()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_overwrite_a_file(tmp_path: Path) -> None:
    """A regular file is no folder to replace: refused also where it may be overwritten, and it stays what it was."""
    (tmp_path / "model").write_text("a file")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="model' exists and is a file: give the name of a folder to make"):
        hlg.save_relu_pretrained(relu_model(), tmp_path / "model", overwrite=True)
    assert tree(tmp_path) == before


def test_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder cannot be replaced as a whole: refused, empty as it is, and nothing is made beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="here' exists and is the current folder: give the name of a folder to make"):
        hlg.save_relu_pretrained(relu_model(), ".")
    assert tree(tmp_path) == {"here": ""}


def test_infinity_as_a_bound() -> None:
    """Buffers may hold it, as the bounds of Gemma 4's clipping do; running statistics, weights and NaN may not."""
    model = relu_model("bert-classifier")
    model.classifier.register_buffer("bound", torch.tensor([-torch.inf, torch.inf]))
    check_relu(model)
    model.classifier.register_buffer("running_mean", torch.tensor(torch.inf))
    with pytest.raises(ValueError, match=r"1 tensors hold NaN or infinity, e\.g\. classifier\.running_mean"):
        check_relu(model)
    del model.classifier.running_mean
    model.classifier.bound[0] = torch.nan
    with pytest.raises(ValueError, match=r"e\.g\. classifier\.bound"):
        check_relu(model)
