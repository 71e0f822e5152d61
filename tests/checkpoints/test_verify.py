"""`verify_relu_pretrained` on good and on damaged folders."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import relu_model
from torch import Tensor

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.verify import _compare


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Edit the weights of a saved checkpoint."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def perturb(folder: Path) -> None:
    """One number, by a thousandth."""
    rewrite(folder, lambda state: state["bert.encoder.layer.0.output.dense.bias"][3].add_(0.001))


def perturb_rest(folder: Path) -> None:
    """A whole row, of a position that a short batch has no token at."""
    rewrite(folder, lambda state: state["bert.embeddings.position_embeddings.weight"][40].add_(1.0))


def drop(folder: Path) -> None:
    """One tensor is gone."""
    rewrite(folder, lambda state: state.pop("bert.encoder.layer.0.output.dense.bias"))


def say_gelu(folder: Path) -> None:
    """The config names the activation that the model no longer has."""
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))


CASES: dict[str, Callable[[Path], None]] = {
    "good": lambda folder: None,
    "good encoder-decoder": lambda folder: None,
    "perturbed": perturb,
    "perturbed elsewhere": perturb_rest,
    "tensor missing": drop,
    "config says gelu": say_gelu,
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | Exception]:
    """What verify_relu_pretrained says of good and of damaged folders, two processes at a time."""
    root = tmp_path_factory.mktemp("verify")

    def verify(case: str) -> float | Exception:
        folder, model = root / case, models[case].train()
        CASES[case](folder)
        try:
            return hlg.verify_relu_pretrained(model, folder)
        except hlg.VerificationError as error:
            return error
        finally:
            assert model.training

    models = {case: relu_model("whisper" if "decoder" in case else "bert-classifier") for case in CASES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        for case, model in models.items():
            hlg.save_relu_pretrained(model, root / case)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(verify, CASES), strict=True))


def test_verify(verdicts: dict[str, float | Exception]) -> None:
    """A good folder has difference 0.0, whatever the order of its outputs' names."""
    assert verdicts["good"] == verdicts["good encoder-decoder"] == 0.0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("perturbed", r"computes something else in stock transformers: outputs differ by \d"),
        ("perturbed elsewhere", "computes something else in stock transformers: 1 tensors differ"),
        ("tensor missing", r"does not load .*keys that do not fit: bert\.encoder\.layer\.0\.output\.dense\.bias"),
        ("config says gelu", r"computes something else in stock transformers: outputs differ by \d"),
    ],
)
def test_verify_fails(case: str, message: str, verdicts: dict[str, float | Exception]) -> None:
    """Damage to the folder is found, and named."""
    assert isinstance(verdicts[case], hlg.VerificationError)
    assert re.search(message, str(verdicts[case]), re.DOTALL)


HIDDEN = torch.linspace(-2.0, 2.0, 12).reshape(3, 4)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ([HIDDEN, HIDDEN + 1e-3], "outputs differ by 0.001 at a scale of 2"),
        ([HIDDEN], r"shapes \[\(3, 4\)\] in stock transformers, the model \[\(3, 4\), \(3, 4\)\]"),
        ([HIDDEN, HIDDEN[:, :1]], "puts out tensors of shapes"),
        ([HIDDEN, HIDDEN.where(HIDDEN < 2.0, torch.nan)], "outputs differ by nan"),
        ([HIDDEN, HIDDEN.where(HIDDEN < 2.0, -torch.inf)], "outputs differ by inf"),
    ],
)
def test_every_output_counts(got: list[Tensor], message: str) -> None:
    with pytest.raises(hlg.VerificationError, match=message):
        _compare([HIDDEN, HIDDEN], got, "folder")


def test_outputs_that_are_infinite() -> None:
    """Logits that a model masks out are −∞ on both sides; they neither count as different nor hide what differs."""
    masked = HIDDEN.where(HIDDEN > 0, -torch.inf)
    assert _compare([masked], [masked.clone()], "folder") == (0.0, 2.0)
    with pytest.raises(hlg.VerificationError, match=r"differ by 0\.1 at a scale of 2"):
        _compare([masked], [masked.where(masked < 2.0, 1.9)], "folder")
    with pytest.raises(hlg.VerificationError, match="shapes"):
        _compare([], [], "folder")


def test_verify_message(verdicts: dict[str, float | Exception]) -> None:
    """The message holds the reason and nothing else."""
    assert "\n" not in str(verdicts["tensor missing"])


@pytest.mark.own_process
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        pytest.param(5, hlg.VerificationError, "stock transformers does not load '.*here': not run", id="good batch"),
        pytest.param(1000, IndexError, "index out of range", id="bad batch"),
    ],
)
def test_verify_keeps_modes(
    ids: int, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever happens, each module is in the mode it was in."""
    model = relu_model("bert-classifier").train()
    model.bert.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "not run"))
    with pytest.raises(hlg.VerificationError, match=r"there is no folder '.*here': save_relu_pretrained makes one"):
        hlg.verify_relu_pretrained(model, tmp_path / "here")
    (tmp_path / "here").mkdir()
    with pytest.raises(error, match=message):
        hlg.verify_relu_pretrained(model, tmp_path / "here", {"input_ids": torch.full((1, 4), ids)})
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_attention_of_each_part_and_inputs_that_forward_writes_into(tmp_path: Path) -> None:
    """The stock process computes attention as each part of the model does, and is given the inputs as they were."""
    model = relu_model("clip")
    model.config.text_config._attn_implementation = "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"
    folder = hlg.save_relu_pretrained(model, tmp_path / "clip")
    assert hlg.verify_relu_pretrained(model, folder) == 0.0
    record = json.loads((folder / "lambda_gelu.json").read_text())
    assert record["checks"]["inputs"].keys() >= {"input_ids", "pixel_values"}
    model = relu_model("bert-classifier")
    folder, forward = hlg.save_relu_pretrained(model, tmp_path / "bert"), model.forward

    def writing(input_ids: Tensor) -> Any:
        output = forward(input_ids)
        input_ids.zero_()
        return output

    model.forward = writing  # type: ignore[method-assign]
    ids = torch.arange(5, 13)[None]
    assert hlg.verify_relu_pretrained(model, folder, {"input_ids": ids}) == 0.0
    assert torch.equal(ids, torch.arange(5, 13)[None])
