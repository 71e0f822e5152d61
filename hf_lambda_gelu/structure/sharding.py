"""Weights that FSDP or DeepSpeed has cut up, so that no process holds them whole."""

from __future__ import annotations

from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter is a DTensor (FSDP2), flat (FSDP1) or partitioned (ZeRO-3)."""
    return any(
        hasattr(p, "full_tensor") or hasattr(p, "ds_id") or type(p).__name__ == "FlatParameter" for p in model.parameters()
    )
