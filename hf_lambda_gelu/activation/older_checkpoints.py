"""Lets `from_pretrained` read checkpoints of release 0.1, which hold s where λ is held now."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform

from .hardness import hardness_from_raw

OLDER, NAME = "raw_hardness", "unclipped_hardness"


class HardnessFromRaw(ConversionOps):
    """raw_hardness, s → unclipped_hardness, λ."""

    def convert(
        self, input_dict: dict[str, list[Tensor]], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, list[Tensor]]:
        return {target_patterns[0]: [hardness_from_raw(raw) for raws in input_dict.values() for raw in raws]}


class _FromOlder(WeightConverter):
    def was_used(self) -> bool:
        return False  # asked by what saves, which would write s again

    def reverse_transform(self) -> WeightTransform:
        """λ under its own name: what was loaded for ZeRO-3 asks for the way back of all that was tried, used or not."""
        return WeightRenaming([NAME], [NAME])


def register() -> None:
    """Adds the conversion to those that transformers tries on every checkpoint; a second call changes nothing."""
    known = get_checkpoint_conversion_mapping("legacy") or []
    if not any(NAME in conversion.target_patterns for conversion in known):
        mapping = [*known, _FromOlder([OLDER], [NAME], [HardnessFromRaw()])]
        register_checkpoint_conversion_mapping("legacy", mapping, overwrite=True)
