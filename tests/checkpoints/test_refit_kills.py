"""A refit in files that is killed: nothing is half, and the same call goes on where it was, to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.folders import read, same_tensors, stored

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import folders, on_disk_files
from hf_lambda_gelu.surgery import substitution
from hf_lambda_gelu.surgery.refit import engine
from hf_lambda_gelu.surgery.refit.sources import RefitWeights
from hf_lambda_gelu.surgery.refit.store import Store

# (what the process is killed in, at which call, blocks that are done by then)
MOMENTS: list[tuple[Any, str, int, int]] = [
    (Store, "put", 3, 0),
    (RefitWeights, "_write", 1, 0),
    (RefitWeights, "note", 1, 0),
    (engine, "decide", 2, 1),
    (RefitWeights, "_write", 4, 1),
    (RefitWeights, "note", 3, 2),
    (substitution, "measure_change", 1, 4),
    (on_disk_files, "write_changed", 2, 4),
    (folders, "flush", 1, 4),
]


def batches() -> list[dict[str, torch.Tensor]]:
    model = tiny.build("llama", num_hidden_layers=4)
    torch.manual_seed(0)
    return [tiny.inputs(model) for _ in range(2)]


def refit(root: Path) -> hlg.CheckpointReport:
    return hlg.relu_ize_checkpoint(root / "src", root / "dst", calibration=batches(), compensate="least_squares")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source, and what an uninterrupted run makes of it."""
    root = tmp_path_factory.mktemp("whole")
    tiny.build("llama", num_hidden_layers=4).save_pretrained(root / "src", max_shard_size="20KB")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        refit(root)
    return root


def killed(owner: Any, name: str, call: int, run: Callable[[], object]) -> None:
    """Run in a process of its own, which is killed at a call of a function."""
    pid = os.fork()
    if not pid:
        try:
            function, calls = getattr(owner, name), [0]

            def deadly(*args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                if calls[0] == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            setattr(owner, name, deadly)
            torch.set_num_threads(1)
            run()
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(("owner", "name", "call", "done"), MOMENTS)
def test_a_kill(
    owner: Any, name: str, call: int, done: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shutil.copytree(whole / "src", tmp_path / "src")
    killed(owner, name, call, lambda: refit(tmp_path))
    assert not (tmp_path / "dst").exists()
    solved: list[None] = []
    decide = engine.decide
    monkeypatch.setattr(engine, "decide", lambda *args, **kwargs: solved.append(None) or decide(*args, **kwargs))
    report = refit(tmp_path)
    assert len(solved) == 4 - done
    same_tensors(stored(tmp_path / "dst"), stored(whole / "dst"))
    assert read(tmp_path / "dst") == read(whole / "dst")
    assert len(report.model.compensation.sites) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def other_batches(root: Path) -> dict[str, Any]:
    return {"calibration": batches()[:1], "compensate": "least_squares"}


def other_method(root: Path) -> dict[str, Any]:
    return {"calibration": batches(), "compensate": "bias"}


def other_source(root: Path) -> dict[str, Any]:
    path = next((root / "src").glob("*.safetensors"))
    path.write_bytes(path.read_bytes())
    return {"calibration": batches(), "compensate": "least_squares"}


@pytest.mark.parametrize("other", [other_batches, other_method, other_source])
def test_other_work_starts_anew(
    other: Callable[[Path], dict[str, Any]], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process did with another calibration set, in another way or of another checkpoint is not used."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shutil.copytree(whole / "src", tmp_path / "src")
    killed(RefitWeights, "note", 3, lambda: refit(tmp_path))
    solved: list[None] = []
    decide = engine.decide
    monkeypatch.setattr(engine, "decide", lambda *args, **kwargs: solved.append(None) or decide(*args, **kwargs))
    hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", **other(tmp_path))
    assert len(solved) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_two_at_once(whole: Path, tmp_path: Path) -> None:
    """The second is refused while the first works."""
    shutil.copytree(whole / "src", tmp_path / "src")

    def beside() -> Any:
        with pytest.raises(ValueError, match="another process is making"):
            refit(tmp_path)
        yield from batches()

    hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", calibration=beside(), compensate="least_squares")
    same_tensors(stored(tmp_path / "dst"), stored(whole / "dst"))
