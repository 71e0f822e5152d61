"""The files of a checkpoint folder that is made of another: weights linked, copied or rewritten, the rest carried along."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..structure.loading import CheckpointError, load_without_reading, saved_class
from ..structure.own_code import code_files
from .carried_code import settle_code
from .folders import check_new
from .shards import Replacement, Shard, can_link, put, read_shards, shard_names, side_files, write_changed, write_index


@dataclass(frozen=True)
class WeightFile:
    """A weight file of the source, what it is called in the new folder, and how it gets there."""

    shard: Shard
    name: str
    way: Literal["linked", "copied", "rewritten"]

    def write(self, folder: Path, dropped: Collection[str], replaced: Mapping[str, Replacement]) -> None:
        if self.way == "rewritten":
            write_changed(self.shard.path, folder / self.name, dropped, replaced)
        else:
            put(self.shard.path, folder / self.name, self.way == "linked")

    def size(self, replaced: Mapping[str, Replacement]) -> int:
        """How many bytes will be written, about: some less where tensors are left out."""
        if self.way == "linked":
            return 0
        grown = sum(replaced[name].size - tensor.nbytes for name, tensor in self.shard.tensors.items() if name in replaced)
        return self.shard.path.stat().st_size + grown


@dataclass(frozen=True)
class WrittenFiles:
    """Names of the weight files of the new folder by how they got there, and the size of all files but the links."""

    linked: tuple[str, ...]
    copied: tuple[str, ...]
    rewritten: tuple[str, ...]
    bytes_written: int


class Source:
    """A checkpoint folder that was found to be whole, and the folder to make of it."""

    def __init__(
        self,
        src: str | os.PathLike[str],
        dst: str | os.PathLike[str],
        overwrite: bool | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder, self.target = Path(src), Path(os.path.abspath(dst))
        self.trust_remote_code = trust_remote_code
        self.config, self.cls = saved_class(self.folder, trust_remote_code=trust_remote_code)
        if self.folder.resolve() in (self.target.resolve(), *self.target.resolve().parents):
            raise ValueError(f"{str(self.target)!r} is {str(self.folder)!r} or lies in it: choose another folder")
        check_new(self.target, overwrite)
        self.shards = read_shards(self.folder, self.cls.__name__)

    def load(self) -> PreTrainedModel:
        """The model on the meta device."""
        tensors = {name: tensor for shard in self.shards for name, tensor in shard.tensors.items()}
        return load_without_reading(self.folder, self.config, self.cls, tensors)

    def finish(
        self,
        temporary: Path,
        model: PreTrainedModel,
        links: set[str],
        *,
        added: Mapping[str, Tensor] | None = None,
        dropped: Collection[str] = (),
        replaced: Mapping[str, Replacement] | None = None,
        link: bool,
    ) -> WrittenFiles:
        """Fills the temporary folder with the weight files and their index.

        Args:
            links: what of the folder are hard links already.
            added, dropped: λ, or biases, to write into a file of its own; names of tensors to leave out of the weight files.
            replaced: {tensor: its new bytes}.
            link: make hard links where nothing changes.
        """
        replaced = replaced or {}
        weights = self._weight_files(temporary, {*dropped, *replaced}, dropped, bool(added), link)
        _check_space(temporary, sum(file.size(replaced) for file in weights))
        sizes: dict[str, int] = {}
        places: dict[str, str] = {}
        for file in weights:
            file.write(temporary, dropped, replaced)
            kept = {name: tensor.nbytes for name, tensor in file.shard.tensors.items() if name not in dropped}
            sizes |= kept | {name: replaced[name].size for name in kept if name in replaced}
            places.update(dict.fromkeys(kept, file.name))
        if added:
            name = shard_names(len(weights) + 1)[-1]
            save_file(dict(added), temporary / name, metadata={"format": "pt"})
            sizes |= {key: tensor.nbytes for key, tensor in added.items()}
            places.update(dict.fromkeys(added, name))
        if len(weights) + bool(added) > 1:
            total = {"total_parameters": model.num_parameters(), "total_size": sum(sizes.values())}
            write_index(temporary, places, total)
        links = links | {file.name for file in weights if file.way == "linked"}
        files = [path for path in temporary.rglob("*") if path.is_file() and str(path.relative_to(temporary)) not in links]
        return WrittenFiles(
            linked=_names(weights, "linked"),
            copied=_names(weights, "copied"),
            rewritten=_names(weights, "rewritten"),
            bytes_written=sum(path.stat().st_size for path in files),
        )

    def _weight_files(
        self, temporary: Path, other: Collection[str], dropped: Collection[str], one_more: bool, link: bool
    ) -> list[WeightFile]:
        """What becomes of each weight file. One that holds nothing but dropped tensors becomes nothing."""
        shards = [shard for shard in self.shards if any(name not in dropped for name in shard.tensors)]
        weights = []
        for shard, name in zip(shards, shard_names(len(shards) + one_more), strict=False):
            linked = link and can_link(shard.path, temporary)
            changed = any(tensor in other for tensor in shard.tensors)
            weights.append(WeightFile(shard, name, "rewritten" if changed else "linked" if linked else "copied"))
        return weights

    def carry_along(self, temporary: Path, left_out: Collection[str], link: bool) -> set[str]:
        """Puts the tokenizer and whatever else belongs to the checkpoint into the folder; the paths that are links.

        Of Python files, with trust alone, those that loading it would run; the config then names these and no others.

        Args:
            left_out: files that do not come along, as paths in the folder.
            link: make hard links where nothing changes.
        """
        links: set[str] = set()
        code = code_files(self.folder) if self.trust_remote_code else []
        for path in side_files(self.folder):
            if str(path) not in left_out and (path.suffix != ".py" or path.as_posix() in code):
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                # weights of a module of its own, such as the Dense layer after a sentence transformer
                linked = link and path.suffix == ".safetensors" and can_link(self.folder / path, temporary)
                put(self.folder / path, temporary / path, linked)
                links |= {str(path)} if linked else set()
        settle_code(temporary, self.trust_remote_code)
        return links


def _names(weights: list[WeightFile], way: str) -> tuple[str, ...]:
    return tuple(file.name for file in weights if file.way == way)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{needed:,} bytes of weights have to be written, and {free:,} are free in {str(folder.parent)!r}: make room, "
            "or choose a folder on the file system of the source, where weight files without λ are hard links"
        )
