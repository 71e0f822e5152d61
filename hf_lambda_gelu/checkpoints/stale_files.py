"""Weights of a former network in a repository: what stock transformers would load in the place of what is uploaded now."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

# in the folder itself transformers takes adapters first, one file before shards, and a variant where it is asked for
_LOADED = re.compile(r"adapter_config\.json|(adapter_|pytorch_)?model[.-][^/]*(safetensors|bin)(\.index(\.\w+)?\.json)?")
# what other programs load
_OTHER_FORMATS = {".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite"}


@dataclass(frozen=True)
class StaleFiles:
    """Files of a repository that are not among those that are uploaded.

    Attributes:
        loaded: weights that stock transformers would load in their place, or beside them.
        others: weights in formats of other programs.
    """

    loaded: list[str]
    others: list[str]

    def __str__(self) -> str:
        """What a person should know; empty where there is nothing."""
        told = (
            [f"Removed in the same commit, as weights of a former network: {', '.join(self.loaded)}"] if self.loaded else []
        )
        if self.others:
            told.append(f"They are not of this network unless you made them of it, make them anew: {', '.join(self.others)}")
        return ". ".join(told)


def stale_files(there: Iterable[str], uploaded: Collection[str]) -> StaleFiles:
    """Which files of a repository hold weights that are not those that are uploaded.

    Args:
        there: the paths in the repository.
        uploaded: paths of what goes up.
    """
    left = sorted(set(there) - set(uploaded))
    loaded = [name for name in left if _LOADED.fullmatch(name)]
    return StaleFiles(loaded, [name for name in left if PurePosixPath(name).suffix in _OTHER_FORMATS])
