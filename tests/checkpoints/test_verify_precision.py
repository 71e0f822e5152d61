"""A model that runs in half precision only because of where it is run is proven in its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support import tiny
from support.models import converted

import hf_lambda_gelu as hlg


@pytest.mark.parametrize(("name", "how"), [("bert-classifier", "accelerate"), ("vit", "a user's autocast")])
def test_proof_within_autocast(name: str, how: str, tmp_path: Path) -> None:
    """What accelerate's bf16 leaves on the model's forward, and a user's own block, are not part of the folder."""
    model = converted(name, 1e5)
    if how == "accelerate":
        AcceleratorState._reset_state(reset_partial_state=True)
        Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    hlg.relu_ize(model)
    folder = hlg.save_relu_pretrained(model, tmp_path / "relu")
    wrapped = model.forward
    with torch.autocast("cpu", torch.bfloat16, enabled=how != "accelerate"):
        assert hlg.verify_relu_pretrained(model, folder) == 0.0
    assert model.forward == wrapped
    assert tiny.outputs(model, tiny.inputs(model))
