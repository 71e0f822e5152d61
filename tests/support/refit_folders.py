"""A checkpoint of four blocks in many shards, and the refit that makes a ReLU checkpoint of it, block by block."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

import hf_lambda_gelu as hlg
from support import tiny

BLOCKS = 4


def save(root: Path) -> None:
    """Into root/src."""
    tiny.build("llama", num_hidden_layers=BLOCKS).save_pretrained(root / "src", max_shard_size="20KB")


def batches() -> list[dict[str, Tensor]]:
    model = tiny.build("llama", num_hidden_layers=BLOCKS)
    return [tiny.inputs(model, seed) for seed in range(12)]


def refit(root: Path) -> hlg.CheckpointReport:
    """From root/src into root/dst."""
    return hlg.relu_ize_checkpoint(root / "src", root / "dst", calibration=batches(), compensate="least_squares")
