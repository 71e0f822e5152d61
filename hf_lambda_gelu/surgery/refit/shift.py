"""What a block puts out once its last map is refit, without running it again.

Where the map's output y has become part of the block's output T, the block puts out T + scale ⊙ (r ΔW + c) with W + ΔW: a
product with the features r in place of attention and all maps. Only in fp32 and fp64, whose rounding is small. [derived]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .meeting_point import Meeting, Observed
from .ridge import Correction


@dataclass(frozen=True)
class Shift:
    """What is added to a block's output: scale ⊙ (r ΔW + c)."""

    correction: Correction
    scale: Tensor

    def applied(self, hidden: Tensor, features: Tensor) -> Tensor:
        """The block's output (…, k) with the refit map, from the one before and the map's features (…, d)."""
        bias = self.correction.bias.to(hidden)
        if self.correction.weight is None:
            return hidden + bias * self.scale
        return torch.addcmul(hidden, torch.matmul(features, self.correction.weight.to(hidden)) + bias, self.scale.to(hidden))


def features_of(seen: Observed, label: str, meeting: Meeting) -> Tensor | None:
    """(…, d), what the map got where the block's output (…, k) can be shifted; None where the block has to be run again."""
    calls = seen.calls.get(label, [])
    if meeting.module is not None or meeting.moved or len(calls) != 1 or seen.hidden is None:
        return None
    features, hidden = calls[0].input, seen.hidden
    if hidden.dtype not in (torch.float32, torch.float64) or {features.dtype, calls[0].output.dtype} != {hidden.dtype}:
        return None
    if calls[0].note.leading != hidden.shape[:-1]:
        return None
    return features.reshape(*hidden.shape[:-1], -1)
