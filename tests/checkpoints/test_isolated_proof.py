"""The proof runs no code of the current folder, of the checkpoint or of PYTHONPATH, and has no secret."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.models import relu_model

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.stock_process import _homes_of_packages

pytestmark = pytest.mark.own_process

NAMES = ("json.py", "torch.py", "transformers/__init__.py", "sitecustomize.py", "usercustomize.py", "numpy.py", "kernels.py")


def plant(folder: Path, mark: Path) -> None:
    """Modules that leave a mark and stop the process when they are imported."""
    for name in NAMES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(mark)!r}, 'a').write({name!r})\nraise SystemExit('foreign code ran')\n")


@pytest.mark.parametrize("place", ["checkpoint", "current folder", "PYTHONPATH"])
def test_no_foreign_code(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is named relative to the current one, which is another one for the process."""
    model, mark = relu_model("bert-classifier"), tmp_path / "ran"
    folder = hlg.save_relu_pretrained(model, tmp_path / "m")
    plant({"checkpoint": folder, "current folder": tmp_path}.get(place, tmp_path / "other"), mark)
    monkeypatch.chdir(folder if place == "checkpoint" else tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other") if place == "PYTHONPATH" else "")
    assert hlg.verify_relu_pretrained(model, "." if place == "checkpoint" else "m") == 0.0
    assert not mark.exists(), mark.read_text()


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets stay here, whatever their names are; the rest is handed on."""
    secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD")
    for name in secrets:
        monkeypatch.setenv(name, "Xq7secretvalue")
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    seen: dict[str, Any] = {}

    def watched(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.update(options, command=command, inside=os.listdir(options["cwd"]))
        return subprocess.CompletedProcess(command, 1, "", "stopped here")

    monkeypatch.setattr(subprocess, "run", watched)
    (tmp_path / "m").mkdir()
    with pytest.raises(hlg.VerificationError, match="stopped here"):
        hlg.verify_relu_pretrained(relu_model("bert-classifier"), tmp_path / "m")
    assert "Xq7secretvalue" not in str(seen)
    assert seen["env"]["SOMETHING_ELSE"] == "kept"
    assert (seen["env"]["HF_HUB_OFFLINE"], seen["env"]["HF_HUB_DISABLE_IMPLICIT_TOKEN"]) == ("1", "1")
    assert "-I" in seen["command"]
    assert not [name for name in seen["env"] if name.startswith("PYTHON") and name != "PYTHONSAFEPATH"]
    assert seen["inside"] == []
    assert Path(seen["cwd"]) != Path.cwd()
    assert str(tmp_path / "m") in seen["command"]


def test_packages_of_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch lies is told, for Pythons that know it by PYTHONPATH; never the checkpoint's or the current folder."""
    import torch

    home = Path(torch.__file__).parents[1]
    assert str(home) in _homes_of_packages(tmp_path).split(os.pathsep)
    assert str(home) not in _homes_of_packages(home).split(os.pathsep)
    monkeypatch.chdir(home)
    assert str(home) not in _homes_of_packages(tmp_path).split(os.pathsep)
