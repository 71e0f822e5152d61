"""What `export_onnx` refuses, in words; whatever is refused, no file is left and the model is as it was."""

from __future__ import annotations

import builtins
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.cli import files
from support.models import converted
from torch import Tensor, nn

import hf_lambda_gelu as hlg
from hf_lambda_gelu.downstream.onnx import export
from hf_lambda_gelu.downstream.onnx import files as onnx_files

SMALL = {"num_hidden_layers": 1}


class Branching(nn.Module):
    """Its path depends on what it computes, which no graph has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if y.sum().item() > 0 else -y


def refused(kind: type[Exception], message: str, model: nn.Module, path: Path, *args: Any, **kwargs: Any) -> None:
    """The error, and that nothing changed."""
    before, there = tiny.snapshot(model), files(path.parent) if path.parent.exists() else None  # type: ignore[arg-type]
    with pytest.raises(kind, match=message):
        hlg.export_onnx(model, path, *args, **kwargs)
    assert tiny.snapshot(model) == before  # type: ignore[arg-type]
    assert (files(path.parent) if path.parent.exists() else None) == there


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_an_absent_package(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install, before any work."""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == missing and not (args and args[3:4] and args[3]):
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"No module named '{missing}'\): pip install 'hf_lambda_gelu\[onnx\]'"):
        hlg.export_onnx(nn.Linear(2, 2), tmp_path / "m.onnx", torch.ones(1, 2))
    assert files(tmp_path) == []


def test_paths(tmp_path: Path) -> None:
    """A folder, an existing file, one whose weights' file exists, and where nothing can be written."""
    model = tiny.build("vit", **SMALL)
    refused(ValueError, "is a folder: give the name of a file to make", model, tmp_path)
    (tmp_path / "there.onnx").write_text("mine")
    refused(ValueError, r"there\.onnx' exists: remove it", model, tmp_path / "there.onnx")
    (tmp_path / "big.onnx.data").write_text("mine")
    refused(ValueError, r"big\.onnx\.data' exists: remove it", model, tmp_path / "big.onnx")
    refused(ValueError, r"cannot write into .*Choose another folder", model, tmp_path / "there.onnx" / "m.onnx")
    assert (tmp_path / "there.onnx").read_text() == "mine"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"words": torch.ones(2, 3)}, "inputs=… holds 'words': no tensor in it is an input of BertForMaskedLM.forward"),
        (
            {"input_ids": torch.ones(2, 3)},
            r"does not take inputs of \{'input_ids': \(2, 3\)\}: RuntimeError: Expected tensor",
        ),
        ({"input_ids": torch.ones(2, 99, dtype=torch.long)}, r"does not take inputs of \{'input_ids': \(2, 99\)\}"),
        ("a text", "inputs=… is a str: expected a mapping"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "position_ids": [0, 1, 2]}, "is a list: expected tensors alone"),
    ],
)
def test_inputs(given: Any, message: str, tmp_path: Path) -> None:
    """Of another name, dtype or length, or no inputs at all."""
    refused(ValueError, message, tiny.build("bert", **SMALL), tmp_path / "new" / "bert.onnx", given)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"ids": {0: "batch"}}, "names the input 'ids': the inputs are input_ids, attention_mask"),
        ({"input_ids": {2: "x"}}, r"names dimension 2: its shape is \(2, 8\)"),
        ({"input_ids": {0: "x", 1: "x"}}, "calls two sizes 'x', 2 and 8"),
    ],
)
def test_dynamic(dynamic: Any, message: str, tmp_path: Path) -> None:
    refused(ValueError, message, tiny.build("bert", **SMALL), tmp_path / "bert.onnx", dynamic=dynamic)


def test_models(tmp_path: Path) -> None:
    """Half precision, without weights, without an encoder, outputs of NaN, a plain module without inputs."""
    path, model = tmp_path / "m.onnx", tiny.build("vit", **SMALL)
    refused(ValueError, r"is torch.float16: export in float32, .*model\.float\(\)", copy.deepcopy(model).half(), path)
    refused(ValueError, "is on the meta device", copy.deepcopy(model).to("meta"), path)
    refused(ValueError, "has no encoder beside a decoder: leave encoder=True out", model, path, encoder=True)
    refused(ValueError, "no inputs can be guessed for Linear: pass inputs=", nn.Linear(2, 2), path)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    refused(ValueError, "logits has NaN, which nothing can be compared with", model, path)
    with pytest.raises(hlg.CheckpointError, match="there is no folder"):
        hlg.export_onnx(tmp_path / "none", path)


def test_a_forward_that_torch_cannot_export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Said in the error's own words, and nowhere else."""
    refused(
        hlg.ExportError,
        "does not take Branching: .*data-dependent",
        Branching(),
        tmp_path / "a" / "b.onnx",
        torch.ones(2, 3),
    )
    assert files(tmp_path) == [], "no folder either"
    assert capfd.readouterr() == ("", "")


def test_a_size_that_cannot_change(tmp_path: Path) -> None:
    """Two names for what must be one size; the error says how to keep it."""
    named = {"input_ids": {1: "first"}, "attention_mask": {0: "batch"}}
    refused(
        hlg.ExportError,
        r"keep that one fixed: dynamic=\{…\}",
        tiny.build("bert", **SMALL),
        tmp_path / "m.onnx",
        dynamic=named,
    )


def test_lambda_that_has_nowhere_to_go(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act = nn.Linear(4, 4), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.act(self.up(x))

    model = Bare()
    hlg.convert(model, init_hardness=2.0)
    refused(hlg.FoldError, "nowhere to go", model, tmp_path / "m.onnx", torch.randn(2, 4))


def test_another_network_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is compared with the model that was given, not with the copy that was folded."""
    model, folded = converted("vit", 3.0, **SMALL), export._folded

    def wrong(*args: Any) -> Any:
        made, sites = folded(*args)
        with torch.no_grad():
            made.classifier.bias += 1e-3 * made.classifier.bias.abs().max()
        return made, sites

    monkeypatch.setattr(export, "_folded", wrong)
    refused(hlg.ExportError, "the file would be another network", model, tmp_path / "m.onnx")


@pytest.mark.parametrize("fails", ["session", "run"])
def test_a_runtime_that_fails(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("NOT_IMPLEMENTED : Could not find\nan implementation")

    monkeypatch.setattr(f"hf_lambda_gelu.downstream.onnx.comparison.{fails}", broken)
    message = "onnxruntime (does not load|fails on inputs of).*Could not find an implementation"
    refused(hlg.ExportError, message, tiny.build("vit", **SMALL), tmp_path / "m.onnx")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_stop_when_the_file_is_put_in_place(
    stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the file of weights was moved, before the graph was."""
    monkeypatch.setattr("hf_lambda_gelu.downstream.onnx.tracing.IN_ONE_FILE", 1000)
    real = onnx_files.os.replace

    def stopped(source: Path, target: Path) -> None:
        if str(target).endswith(".onnx"):
            raise stop
        real(source, target)

    monkeypatch.setattr(onnx_files.os, "replace", stopped)
    with pytest.raises(stop):
        hlg.export_onnx(tiny.build("vit", **SMALL), tmp_path / "m.onnx")
    monkeypatch.undo()
    assert files(tmp_path) == []


def test_the_older_exporter_points_to_fold(tmp_path: Path) -> None:
    """torch.onnx.export(dynamo=False) has no operator for λ-GELU; the message says what to do."""
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    hlg.convert(model, init_hardness=2.0)
    with pytest.raises(RuntimeError, match=r"put λ into the weights first, by hlg\.fold\(model\), or call hlg\.export_onnx"):
        torch.onnx.export(model, (torch.randn(2, 4),), str(tmp_path / "m.onnx"), dynamo=False)
