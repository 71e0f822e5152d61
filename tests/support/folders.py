"""What a checkpoint's folder holds: tensors, configs, digests, the files themselves; and one in shards to begin with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from support import tiny

LEAF = "unclipped_hardness"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the weight files, each of which must be in the index if there is one."""
    found: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not set(tensors) & set(found)
        found |= tensors
        places |= dict.fromkeys(tensors, path.name)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    index = folder / "model.safetensors.index.json"
    assert index.is_file() == (len(set(places.values())) > 1)
    assert not index.is_file() or json.loads(index.read_text())["weight_map"] == places
    return found


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """The same keys, dtypes and bits."""
    assert set(first) == set(second)
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of the folder."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def digests(folder: Path) -> dict[str, str]:
    """{path: digest} of every file below a folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def inodes(folder: Path) -> set[int]:
    """The weight files themselves, whatever they are called."""
    return {path.stat().st_ino for path in folder.glob("*.safetensors")}


def load(cls: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """With no key too few or too many, and parameters where their products are to the last bit the same."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def sharded(root: Path) -> Path:
    """A tiny BERT in five shards."""
    tiny.build("bert").save_pretrained(root / "src", max_shard_size="20KB")
    return root / "src"


FIRST = "model-00001-of-00005.safetensors"
