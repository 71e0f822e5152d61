"""The folder that is made: links and copies, what comes along, what is left of it when it fails; and its report."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.folders import digests, inodes, load, read, sharded
from support.processes import in_fork
from transformers import BertForMaskedLM

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import on_disk_files


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_crash(error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the weight files are in place and the index is not: nothing is left of the target."""
    src = sharded(tmp_path)
    hlg.convert_checkpoint(src, tmp_path / "lambda")
    before = digests(tmp_path)
    seen: list[int] = []

    def crash(folder: Path, *args: Any) -> None:
        seen.append(len(list(folder.glob("model-*"))))
        raise error("crash")

    monkeypatch.setattr(on_disk_files, "write_index", crash)
    with pytest.raises(error, match="crash"):
        hlg.convert_checkpoint(src, tmp_path / "dst")
    with pytest.raises(error, match="crash"):
        hlg.relu_ize_checkpoint(tmp_path / "lambda", tmp_path / "dst", force=True)
    count = len(list(src.glob("*.safetensors")))
    assert seen == [count + 1, count]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lambda", "src"]
    assert digests(tmp_path) == before


KILLED = """
import os, signal, sys
import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import on_disk_files
on_disk_files.write_index = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
hlg.convert_checkpoint(*sys.argv[1:])
"""


def test_kill(tmp_path: Path) -> None:
    """What is left has a name that says so, and the next call removes it."""
    src = sharded(tmp_path)
    before = digests(src)
    assert in_fork(KILLED, str(src), str(tmp_path / "dst")).returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".dst.hf_lambda_gelu-partial", "src"]
    assert digests(src) == before
    hlg.convert_checkpoint(src, tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]
    load(BertForMaskedLM, tmp_path / "dst")


def test_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On request, and where the file system has none: copies; and too little room for them is told before."""
    src = sharded(tmp_path)
    asked = hlg.convert_checkpoint(src, tmp_path / "asked", link=False)
    linked = hlg.convert_checkpoint(src, tmp_path / "linked")

    def no_link(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    forced = hlg.convert_checkpoint(src, tmp_path / "forced")
    for report, folder in ((asked, "asked"), (forced, "forced")):
        assert (report.linked, len(report.copied)) == ((), len(list(src.glob("*.safetensors"))))
        assert not inodes(src) & inodes(tmp_path / folder)
        assert digests(tmp_path / folder) == digests(tmp_path / "linked")
        assert report.bytes_written == sum(path.stat().st_size for path in (tmp_path / folder).iterdir())
    weights = sum(path.stat().st_size for path in src.glob("*.safetensors"))
    assert asked.bytes_written - linked.bytes_written == weights

    def full(path: Any) -> Any:
        return shutil._ntuple_diskusage(1, 1, weights - 1)

    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(hlg.CheckpointError, match=rf"{weights:,} bytes of weights .* {weights - 1:,} are free"):
        hlg.convert_checkpoint(src, tmp_path / "dst")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", full)
    hlg.convert_checkpoint(src, tmp_path / "dst")  # links need no room


def test_symbolic_links(tmp_path: Path) -> None:
    """The Hub's cache: a folder of symbolic links. The files themselves are linked, not the way to them."""
    src = sharded(tmp_path)
    (tmp_path / "cache").mkdir()
    for path in src.iterdir():
        (tmp_path / "cache" / path.name).symlink_to(Path("..") / "src" / path.name)
    hlg.convert_checkpoint(tmp_path / "cache", tmp_path / "dst")
    assert not any(path.is_symlink() for path in (tmp_path / "dst").iterdir())
    assert inodes(src) < inodes(tmp_path / "dst")


def test_side_files(tmp_path: Path) -> None:
    """Tokenizer, card and modules of their own come along; other formats, pickles, a Trainer's state and exports do not."""
    src = sharded(tmp_path)
    carried = ["tokenizer.json", "merges.txt", "README.md", "LICENSE", "1_Pooling/config.json", "2_Dense/model.safetensors"]
    stale = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "tf_model.h5",
        "optimizer.pt",
        "rng_state.pth",
        "training_args.bin",
        "trainer_state.json",
        "checkpoint-10/config.json",
        "checkpoint-10/model.safetensors",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        ".git/config",
        ".gitattributes",
    ]
    for name in carried + stale:
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_text(name)
    report = hlg.convert_checkpoint(src, tmp_path / "dst")
    own = {"config.json", "model.safetensors.index.json", *(path.name for path in (tmp_path / "dst").glob("model-*"))}
    assert set(digests(tmp_path / "dst")) - own == set(carried)
    assert all((tmp_path / "dst" / name).read_text() == name for name in carried)
    dense = Path("2_Dense/model.safetensors")
    assert (src / dense).stat().st_ino == (tmp_path / "dst" / dense).stat().st_ino
    assert (src / "README.md").stat().st_ino != (tmp_path / "dst" / "README.md").stat().st_ino
    sizes = {path.stat().st_ino: path.stat().st_size for path in (tmp_path / "dst").rglob("*") if path.is_file()}
    links = {path.stat().st_ino for path in src.rglob("*") if path.is_file()}
    assert report.bytes_written == sum(size for inode, size in sizes.items() if inode not in links)
    hlg.relu_ize_checkpoint(tmp_path / "dst", tmp_path / "relu", force=True)
    assert "LICENSE" in digests(tmp_path / "relu")
    assert (tmp_path / "relu" / "README.md").read_text() != "README.md"


def test_checkpoint_with_code(tmp_path: Path) -> None:
    """The ReLU checkpoint neither has the code nor asks for it."""
    model = tiny.build("bert")
    hlg.convert(model, 200.0)
    hlg.save_with_code(model, tmp_path / "src")
    hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert "auto_map" in read(tmp_path / "src")
    assert "auto_map" not in read(tmp_path / "dst")
    assert not list((tmp_path / "dst").glob("*.py"))


def test_report(tmp_path: Path) -> None:
    """The printed tables, and a frozen report."""
    src = sharded(tmp_path)
    count = len(list(src.glob("*.safetensors")))
    first = hlg.convert_checkpoint(src, tmp_path / "dst")
    assert str(first).splitlines()[0] == "converted 3 activations to λ-GELU at λ = 1"
    size = f"{first.bytes_written:,} bytes written in all"
    assert str(first).splitlines()[-1] == f"weight files in '{tmp_path / 'dst'}': {count} linked; {size}"
    with pytest.raises(AttributeError):
        first.folder = tmp_path  # type: ignore[misc]
    model = tiny.build("bert")
    hlg.convert(model, 160.0)
    model.save_pretrained(tmp_path / "whole")
    second = hlg.relu_ize_checkpoint(tmp_path / "whole", tmp_path / "relu")
    assert str(second).splitlines()[0] == "3 activations are ReLU now"
    assert "': 1 rewritten without λ; " in str(second).splitlines()[-1]
    assert second.folder == tmp_path / "relu"
