"""Keeps the states of both networks on disk, so that memory holds one batch at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..._compat import pytree


@dataclass
class Store:
    """Nested arguments with their tensors in files, so that memory holds one batch at a time."""

    folder: Path
    device: torch.device
    _specs: dict[str, tuple[list[Any], Any]] = field(default_factory=dict)

    def put(self, name: str, value: Any) -> None:
        """Keep `value` under `name`, in place of what was there. A tensor that occurs several times is written once."""
        leaves, spec = pytree.tree_flatten(value)
        tensors: dict[str, Tensor] = {}
        seen: dict[Any, str] = {}
        kept: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                identity = (leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype)
                key = seen.setdefault(identity, str(len(seen)))
                tensors[key] = leaf.detach()
                leaf = _Stored(key)
            kept.append(leaf)
        path = self.folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
        self._specs[name] = (kept, spec)

    def get(self, name: str) -> Any:
        kept, spec = self._specs[name]
        tensors = load_file(self.folder / f"{name}.safetensors", device=str(self.device))
        return pytree.tree_unflatten([tensors[x.key] if isinstance(x, _Stored) else x for x in kept], spec)

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def discard(self, name: str) -> None:
        self._specs.pop(name, None)

    def rename(self, name: str, new: str) -> None:
        (self.folder / f"{name}.safetensors").replace(self.folder / f"{new}.safetensors")
        self._specs[new] = self._specs.pop(name)


@dataclass(frozen=True)
class _Stored:
    key: str
