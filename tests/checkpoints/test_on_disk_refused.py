"""Sources that are damaged, soft or strange, and places that are in use: told before anything is made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.folders import FIRST, LEAF, digests, load, read, sharded, stored
from transformers import BertForMaskedLM

import hf_lambda_gelu as hlg


def test_refusals_of_relu_ize(tmp_path: Path) -> None:
    """Word for word those of relu_ize, decided by the λ in the file; nothing is made."""
    model = tiny.build("bert")
    model.save_pretrained(tmp_path / "gelu")
    hlg.convert(model)
    wanted = tiny.set_hardness(model, 50.0, step=60.0)
    model.save_pretrained(tmp_path / "soft")
    for folder, options, error in [
        ("soft", {}, hlg.SoftGateError),
        ("soft", {"targets": {"x": 1.0}}, ValueError),
        ("gelu", {}, ValueError),
    ]:
        memory = BertForMaskedLM.from_pretrained(tmp_path / folder)
        with pytest.raises(error) as expected:
            hlg.relu_ize(memory, **options)
        with pytest.raises(error) as caught:
            hlg.relu_ize_checkpoint(tmp_path / folder, tmp_path / "dst", **options)
        assert type(caught.value) is type(expected.value) is error
        assert str(caught.value) == str(expected.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["gelu", "soft"]
    report = hlg.relu_ize_checkpoint(tmp_path / "soft", tmp_path / "forced", force=True)
    assert report.model.forced
    assert not hlg.relu_ize_checkpoint(tmp_path / "soft", tmp_path / "tolerant", tolerance=0.02).model.forced
    targets = {name: value * 0.9 for name, value in wanted.items()}
    assert not hlg.relu_ize_checkpoint(tmp_path / "soft", tmp_path / "targets", targets=targets).model.forced
    details = hlg.CardDetails(base_model="google-bert/bert-base-uncased", license="apache-2.0")
    hlg.relu_ize_checkpoint(tmp_path / "soft", tmp_path / "card", force=True, details=details)
    assert "base_model: google-bert/bert-base-uncased" in (tmp_path / "card" / "README.md").read_text()


def edited_hardness(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_hardness_that_is_damaged_or_strange(tmp_path: Path) -> None:
    """NaN; none at all, which is λ = 1 as for from_pretrained; of another class's name; beside a config of GELU."""
    model = tiny.build("bert")
    hlg.convert(model, 200.0)
    model.save_pretrained(tmp_path / "good")
    names = [key for key in stored(tmp_path / "good") if LEAF in key]

    def variant(name: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        shutil.copytree(tmp_path / "good", tmp_path / name)
        edited_hardness(tmp_path / name, edit)
        return tmp_path / name

    nan = variant("nan", lambda tensors: tensors[names[0]].fill_(torch.nan))
    with pytest.raises(ValueError, match="finite"):
        hlg.relu_ize_checkpoint(nan, tmp_path / "dst")
    gone = variant("gone", lambda tensors: [tensors.pop(name) for name in names])
    torch.use_deterministic_algorithms(True)  # with which memory that nobody has set is NaN
    try:
        with pytest.raises(hlg.SoftGateError, match="has λ = 1,"):
            hlg.relu_ize_checkpoint(gone, tmp_path / "dst")
    finally:
        torch.use_deterministic_algorithms(False)
    other = variant("other", lambda tensors: tensors.update({f"x.{names[0]}": tensors.pop(names[0])}))
    with pytest.raises(hlg.CheckpointError, match=r"holds x\.bert.* knows nothing, and lacks bert"):
        hlg.relu_ize_checkpoint(other, tmp_path / "dst")
    (tmp_path / "good" / "config.json").write_text(json.dumps(read(tmp_path / "good") | {"hidden_act": "gelu"}))
    with pytest.raises(hlg.CheckpointError, match=r"hold bert\..*unclipped_hardness already"):
        hlg.convert_checkpoint(tmp_path / "good", tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gone", "good", "nan", "other"]


def pickled(src: Path) -> None:
    for path in src.glob("model*"):
        path.unlink()
    torch.save(tiny.build("bert").state_dict(), src / "pytorch_model.bin")


def retold(src: Path, **values: Any) -> None:
    (src / "config.json").write_text(json.dumps(read(src) | values))


def say_places(src: Path, **places: str) -> None:
    path = src / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= places
    path.write_text(json.dumps(index))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda src: (src / "config.json").unlink(), "holds no config.json"),
    "broken config": (lambda src: (src / "config.json").write_text("{"), "makes no config"),
    "unknown type": (lambda src: retold(src, model_type="nonesuch"), "makes no config.*nonesuch"),
    "unknown class": (lambda src: retold(src, architectures=["NoSuchModel"]), "'NoSuchModel', which transformers"),
    "no class": (lambda src: retold(src, architectures=None), "'none', which transformers"),
    "other sizes": (lambda src: retold(src, intermediate_size=38), "BertForMaskedLM does not load"),
    "pickle": (pickled, r"\(pytorch_model\.bin\).*BertForMaskedLM\.from_pretrained\(.*\)\.save_pretrained"),
    "adapters": (lambda src: (src / "adapter_config.json").write_text("{}"), r"merge_and_unload\(\)"),
    "no weights": (
        lambda src: [path.unlink() for path in src.glob("model*")],
        "holds no weights: expected model.safetensors",
    ),
    "shard missing": (lambda src: (src / FIRST).unlink(), f"1 of [0-9]+ shards are missing .*{FIRST}"),
    "shard truncated": (lambda src: truncate(src / FIRST), f"{FIRST}' is damaged"),
    "header corrupted": (lambda src: (src / FIRST).write_bytes(b"\xff" * 100), f"{FIRST}' is damaged"),
    "empty file": (lambda src: (src / FIRST).write_bytes(b""), f"{FIRST}' is damaged"),
    "tensor absent": (lambda src: say_places(src, ghost=FIRST), f"says that {FIRST} holds ghost, which it does not"),
    "index outside": (lambda src: say_places(src, ghost="../other.safetensors"), r"'\.\./other\.safetensors'"),
    "index damaged": (
        lambda src: (src / "model.safetensors.index.json").write_text("[]"),
        "expected JSON with a weight_map",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_sources(what: str, tmp_path: Path) -> None:
    """Each is told before anything is made, for both verbs."""
    src = sharded(tmp_path)
    assert (src / FIRST).is_file()
    damage, message = DAMAGE[what]
    damage(src)
    before = digests(src)
    for verb in (hlg.convert_checkpoint, hlg.relu_ize_checkpoint):
        with pytest.raises(hlg.CheckpointError, match=message):
            verb(src, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert digests(src) == before


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources that are no folder and targets that are in use; an empty folder is taken."""
    src = sharded(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for verb in (hlg.convert_checkpoint, hlg.relu_ize_checkpoint):
        with pytest.raises(hlg.CheckpointError, match=r"no folder 'google-bert/bert-base-uncased'.*snapshot_download"):
            verb("google-bert/bert-base-uncased", tmp_path / "dst")
        with pytest.raises(hlg.CheckpointError, match="pass the folder that it lies in"):
            verb(src / FIRST, tmp_path / "dst")
        for target in (src, src / "inside" / "it", tmp_path / "full" / ".." / "src"):
            with pytest.raises(ValueError, match="or lies in it"):
                verb(src, target)
        for target, message in ((tmp_path / "full", "not empty"), (tmp_path / "full" / "file", "a file")):
            with pytest.raises(ValueError, match=message):
                verb(src, target)
    with pytest.raises(ValueError, match="cannot write into"):
        hlg.convert_checkpoint(src, tmp_path / "full" / "file" / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "src"]
    assert not (src / "inside").exists()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    hlg.convert_checkpoint("src", "empty")
    load(BertForMaskedLM, tmp_path / "empty")
    with pytest.raises(hlg.ConversionError, match="already: it has 3"):
        hlg.convert_checkpoint("empty", "twice")
    hlg.relu_ize_checkpoint("empty", "relu", force=True)
    with pytest.raises(hlg.ConversionError, match="ReLU network already"):
        hlg.convert_checkpoint("relu", "twice")
    assert not (tmp_path / "twice").exists()
