"""Files of a former network in a repository: weights that stock transformers would load in the place of what is uploaded
now, and the card."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from .card import CARD_FILES, REPORT_NAME

# in the folder itself transformers takes adapters first, one file before shards, and a variant where it is asked for
_LOADED = re.compile(
    r"adapter_config\.json|lambda_gelu_hardness\.safetensors|"
    r"(adapter_|pytorch_)?model[.-][^/]*(safetensors|bin)(\.index(\.\w+)?\.json)?"
)
# what other programs load
_OTHER_FORMATS = {".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite"}


@dataclass(frozen=True)
class StaleFiles:
    """Files of a repository that are not among those that are uploaded.

    Attributes:
        loaded: weights that stock transformers would load in their place, or beside them.
        others: weights in formats of other programs.
        card: the card of a ReLU network, with its record and plot; a card without a record is somebody's own, and stays.
    """

    loaded: list[str]
    others: list[str]
    card: list[str]

    def __str__(self) -> str:
        """What a person should know; empty where there is nothing."""
        told = (
            [f"Removed in the same commit, as weights of a former network: {', '.join(self.loaded)}"] if self.loaded else []
        )
        if self.card:
            told.append(f"Removed with the card of a former network: {', '.join(self.card)}")
        if self.others:
            told.append(f"They are not of this network unless you made them of it, make them anew: {', '.join(self.others)}")
        return ". ".join(told)


def stale_files(there: Iterable[str], uploaded: Collection[str]) -> StaleFiles:
    """Which files of a repository hold or describe another network than the one that is uploaded.

    Args:
        there: the paths in the repository.
        uploaded: paths of what goes up.
    """
    found = set(there)
    left = sorted(found - set(uploaded))
    loaded = [name for name in left if _LOADED.fullmatch(name)]
    others = [name for name in left if PurePosixPath(name).suffix in _OTHER_FORMATS]
    return StaleFiles(loaded, others, [name for name in left if name in CARD_FILES] if REPORT_NAME in found else [])
