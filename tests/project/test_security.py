"""The threat model of docs/security.md: what each promise names is there; and what no other test shows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from support import tiny

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.loading import load_saved
from scripts.tools.processes import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
PROMISES = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]


def test_each_promise_has_a_module_and_a_test() -> None:
    assert len(PROMISES) > 10
    for line in PROMISES:
        _, promise, modules, tests, _ = (cell.strip() for cell in line.split("|"))
        assert re.findall(r"`(hf_lambda_gelu/\S+\.py)`", modules), promise
        for module in re.findall(r"`(\S+)`", modules):
            assert (ROOT / module).is_file(), module
        named = re.findall(r"`(\S+?)::(\S+?)`", tests)
        assert named, promise
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, name)


class Evil:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.place,)  # type: ignore[return-value]


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    """Weights that are a pickle with code in it: refused by each way that a folder is read, and the code has not run."""
    model = tiny.build("bert-classifier")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    evil = {**model.state_dict(), "evil": Evil(tmp_path / "ran")}
    torch.save(evil, tmp_path / "model" / "pytorch_model.bin")
    torch.load(tmp_path / "model" / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would
    (tmp_path / "ran").unlink()
    with pytest.raises(hlg.CheckpointError, match="Weights only load failed"):
        load_saved(tmp_path / "model")
    with pytest.raises(hlg.CheckpointError, match="as a pickle"):
        hlg.convert_checkpoint(tmp_path / "model", tmp_path / "out")
    with pytest.raises(hlg.CheckpointError, match="Weights only load failed"):
        hlg.audit(tmp_path / "model")
    assert not (tmp_path / "ran").exists()
