"""Models whose weights accelerate keeps elsewhere: on disk or in the CPU's memory, and on the meta device between calls."""

from __future__ import annotations

from pathlib import Path
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
            "names neither 'disk' nor a 'cpu' beside a GPU). If it is too large for that, work on the folder that it was "
            f"loaded from, a block at a time: {_call(model)}"
        )


def _call(model: nn.Module) -> str:
    """What refits the saved model, without offloading."""
    name = str(getattr(model, "name_or_path", "") or "")
    saved = repr(name) if Path(name).is_dir() else f"huggingface_hub.snapshot_download({name!r})"
    source = saved if name else "src"
    devices = {str(value) for value in (getattr(model, "hf_device_map", None) or {}).values()}
    device = "cuda" if any(value.isdigit() or value.startswith("cuda") for value in devices) else "cpu"
    return (
        f"hf_lambda_gelu.relu_ize_checkpoint({source}, 'NEW-FOLDER', calibration=batches, compensate='least_squares', "
        f"device={device!r}). It takes GELU and λ-GELU checkpoints, and changes no file of the source; "
        f"convert_checkpoint({source}, 'NEW-FOLDER') makes a λ-GELU one"
    )
