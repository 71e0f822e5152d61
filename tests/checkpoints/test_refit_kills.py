"""A refit in files that is killed: nothing is half, and the same call goes on where it was, to the bit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.folders import digests, read, same_tensors, stored
from support.processes import killed
from support.refit_folders import batches, refit, save

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import folders, on_disk_files
from hf_lambda_gelu.surgery import substitution
from hf_lambda_gelu.surgery.refit import engine
from hf_lambda_gelu.surgery.refit.refit_files import RefitFiles
from hf_lambda_gelu.surgery.refit.store import Store

# (what the process is killed in, at which call, blocks that are done by then)
MOMENTS: list[tuple[Any, str, int, int]] = [
    (Store, "put", 3, 0),
    (RefitFiles, "_write", 1, 0),
    (RefitFiles, "note", 1, 0),
    (engine, "decide", 2, 1),
    (RefitFiles, "_write", 4, 1),
    (RefitFiles, "note", 3, 2),
    (substitution, "measure_change", 1, 4),
    (on_disk_files, "write_changed", 2, 4),
    (folders, "flush", 1, 4),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source, and what an uninterrupted run makes of it."""
    root = tmp_path_factory.mktemp("whole")
    save(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        refit(root)
    return root


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


@pytest.mark.parametrize(
    ("other", "what"),
    [(other_batches, "calibration data"), (other_method, "compensate"), (other_source, "weight files")],
)
def test_other_work_is_refused(
    other: Callable[[Path], dict[str, Any]], what: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a killed process had another calibration set, another way or another checkpoint: its work is kept, and what it
    was given goes on with it; once its folder is deleted the other work begins."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shutil.copytree(whole / "src", tmp_path / "src")
    killed(RefitFiles, "note", 3, lambda: refit(tmp_path))
    left = digests(tmp_path)
    unfinished = tmp_path / ".dst.hf_lambda_gelu-unfinished"
    message = f"'{unfinished}' holds 2 blocks that a killed process has refit, begun with other {what}: pass what it was"
    with pytest.raises(hlg.CheckpointError, match=message):
        hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", **other(tmp_path))
    assert digests(tmp_path) == left
    solved: list[None] = []
    decide = engine.decide
    monkeypatch.setattr(engine, "decide", lambda *args, **kwargs: solved.append(None) or decide(*args, **kwargs))
    if what == "weight files":
        shutil.rmtree(unfinished)
        hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", **other(tmp_path))
        assert len(solved) == 4
    else:
        refit(tmp_path)
        assert len(solved) == 2
        same_tensors(stored(tmp_path / "dst"), stored(whole / "dst"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_an_error_keeps_earlier_work(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process has done stays, and what was added is gone on with, where the next process fails by an error."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shutil.copytree(whole / "src", tmp_path / "src")
    killed(RefitFiles, "note", 2, lambda: refit(tmp_path))
    decide, solved = engine.decide, list[None]()

    def failing(*args: Any, **kwargs: Any) -> Any:
        solved.append(None)
        if len(solved) == 3:
            raise KeyboardInterrupt
        return decide(*args, **kwargs)

    monkeypatch.setattr(engine, "decide", failing)
    with pytest.raises(KeyboardInterrupt):
        refit(tmp_path)
    refit(tmp_path)
    assert len(solved) == 3 + 1  # of four blocks one was done, then two, then the last
    same_tensors(stored(tmp_path / "dst"), stored(whole / "dst"))
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
