"""How many examples a batch holds, whatever else is in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_lambda_gelu.measurement.batches import batch_size


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("main", "batch", "expected"),
    [
        ("x", {"x": zeros(3, 2)}, 3),
        ("x", {"other": zeros(5), "x": zeros(3, 2)}, 3),
        ("x", {"x": zeros(16, 2), "labels": zeros(4)}, 4),  # patches of four images, in one row
        ("x", {"x": zeros(3, 2), "labels": None}, 3),
        (["x", "y"], {"other": zeros(5), "y": zeros(3, 2)}, 3),  # OneFormer names several
        (None, {"step": torch.tensor(7), "x": zeros(3)}, 3),
        ("x", {"x": zeros(0, 2)}, 1),
    ],
)
def test_batch_size(main: str | list[str] | None, batch: dict[str, Tensor], expected: int) -> None:
    model = nn.Identity()
    if main is not None:
        model.main_input_name = main
    assert batch_size(model, batch) == expected
