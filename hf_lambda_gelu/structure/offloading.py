"""Models whose weights accelerate keeps elsewhere: on disk or in the CPU's memory, and on the meta device between calls."""

from __future__ import annotations

from typing import Any

from torch import nn


def offloaded_module(model: nn.Module) -> str | None:
    """The first module whose weights a hook of accelerate brings in for its forward alone; "" for the model itself."""
    name: str
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        several: list[Any] = list(getattr(hook, "hooks", [hook]))
        # a device map that offloads nothing leaves hooks too, which only move inputs
        if any(getattr(one, "offload", False) or type(one).__name__ == "CpuOffload" for one in several):
            return name
    return None


def check_not_offloaded(model: nn.Module) -> None:
    """ValueError if weights of the model are offloaded: what is on the meta device has no value to work on."""
    name = offloaded_module(model) if isinstance(model, nn.Module) else None
    if name is not None:
        raise ValueError(
            f"weights of {type(model).__name__} are offloaded by accelerate, from {name or 'the model itself'} on: they are "
            "in memory only while a module runs. Load it without device_map and offload_folder (or by a device_map that "
            "names neither 'disk' nor a 'cpu' beside a GPU); a checkpoint too large for memory is converted on disk by "
            "convert_checkpoint, and refit a block at a time by relu_ize_checkpoint(src, dst, calibration=…, compensate=…)"
        )
