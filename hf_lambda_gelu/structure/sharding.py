"""Weights that FSDP or DeepSpeed has cut up, so that no process holds them whole."""

from __future__ import annotations

from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter is a DTensor (FSDP2) or partitioned (ZeRO-3), or a module is FSDP1's."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


def check_whole(model: nn.Module, what: str, instead: str) -> None:
    """ValueError if weights of the model are cut up, by which `what` cannot be done; `instead` says what to do."""
    if is_sharded(model):
        raise ValueError(f"{what} needs whole weights, which FSDP or DeepSpeed has cut up here: {instead}")
