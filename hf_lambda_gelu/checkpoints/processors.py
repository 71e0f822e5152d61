"""The tokenizer, image processor or feature extractor that lies beside a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from ..structure.loading import quietly

_CONFIGS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def has_processor(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, an image processor or a feature extractor."""
    return any((folder / name).is_file() for name in _CONFIGS)


def saved_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """The processor of a folder, for inputs like those of its users; None where it has none, or none that loads here.

    Nothing comes from a network, and no code of the folder runs that is not trusted.
    """
    if not has_processor(folder):
        return None
    try:
        with quietly():
            return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception:  # it lacks a library here: inputs are made otherwise
        return None
