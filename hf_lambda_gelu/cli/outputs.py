"""What a model puts out on batches, and how much that changed.

Imports torch: the command imports it when run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .inner import call, main_output, model_batches, output_rows


@torch.no_grad()
def outputs(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """The main output on each batch, (rows, features) without padding, fp64."""
    found = []
    for batch in model_batches(model, batches):
        found.append(output_rows(main_output(call(model, batch)), batch, model).double())
    return found


def change(before: list[Tensor], after: list[Tensor]) -> float:
    """‖after − before‖ / ‖before‖ over all batches."""
    moved = sum(float((b - a).square().sum()) for a, b in zip(before, after, strict=True))
    size = sum(float(a.square().sum()) for a in before)
    return float((moved / size) ** 0.5) if size else 0.0
