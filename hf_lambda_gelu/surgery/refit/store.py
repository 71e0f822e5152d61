"""Keeps the states of both networks on disk, so that memory holds one batch at a time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..._compat import pytree


@dataclass
class Store:
    """Nested arguments with their tensors in files, so that memory holds one batch at a time.

    The dimensions of a tensor keep their order in memory: the same sums round otherwise in another one.
    """

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
                order = tuple(sorted(range(leaf.dim()), key=leaf.stride, reverse=True))
                tensors[key] = leaf.detach().permute(order)
                leaf = _Stored(key, order)
            kept.append(leaf)
        path = self.folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
        self._specs[name] = (kept, spec)

    def get(self, name: str) -> Any:
        kept, spec = self._specs[name]
        tensors = load_file(self.folder / f"{name}.safetensors", device=str(self.device))
        return pytree.tree_unflatten([x.of(tensors[x.key]) if isinstance(x, _Stored) else x for x in kept], spec)

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def discard(self, name: str) -> None:
        self._specs.pop(name, None)

    def rename(self, name: str, new: str) -> None:
        (self.folder / f"{name}.safetensors").replace(self.folder / f"{new}.safetensors")
        self._specs[new] = self._specs.pop(name)

    def copy_to(self, name: str, path: Path) -> list[int]:
        """Copy the file of a single tensor; the order in which its dimensions lie there, which `take` has to know."""
        (leaf,), _ = self._specs[name]
        shutil.copyfile(self.folder / f"{name}.safetensors", path)
        return list(leaf.order)

    def take(self, name: str, path: Path, order: Sequence[int]) -> None:
        """Keep under `name` what `copy_to` left at `path`, with the order that it gave."""
        shutil.copyfile(path, self.folder / f"{name}.safetensors")
        self._specs[name] = ([_Stored("0", tuple(order))], pytree.tree_flatten(0)[1])


@dataclass(frozen=True)
class _Stored:
    """A tensor in the file.

    Attributes:
        key: its name there.
        order: its dimensions, from the one with the largest stride on, as they are there.
    """

    key: str
    order: tuple[int, ...]

    def of(self, stored: Tensor) -> Tensor:
        return stored.permute(tuple(self.order.index(place) for place in range(len(self.order))))
