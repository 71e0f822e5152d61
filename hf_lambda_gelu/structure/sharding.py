"""Weights that FSDP or DeepSpeed has cut up, so that no process holds them whole."""

from __future__ import annotations

from typing import Any

from torch import distributed, nn

from .transaction import if_it_fails


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter is a DTensor (FSDP2) or partitioned (ZeRO-3), or a module is FSDP's of either kind."""
    cut = any(hasattr(p, "full_tensor") for p in model.parameters()) or any(map(is_fsdp2, model.modules()))
    return cut or _is_cut_otherwise(model)


def _is_cut_otherwise(model: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP1 has cut something up."""
    return any(hasattr(p, "ds_id") for p in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


def is_fsdp2(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on the module. After a forward it may hold whole weights, which go again."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def fsdp2_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules within the model on which `fully_shard` was called."""
    found: dict[nn.Module, None] = {}
    stack = list(model.children())
    while stack:
        module = stack.pop()
        if is_fsdp2(module):
            found[module] = None
        else:
            stack += module.children()
    return list(found)


def is_cut_by_fsdp2(model: nn.Module) -> bool:
    """Whether all that is cut up was so by `fully_shard`."""
    return any(map(is_fsdp2, model.modules())) and not _is_cut_otherwise(model)


def check_whole(model: nn.Module, what: str, instead: str) -> None:
    """ValueError if weights of the model are cut up, by which `what` cannot be done; `instead` says what to do."""
    if is_sharded(model):
        raise ValueError(f"{what} needs whole weights, which FSDP or DeepSpeed has cut up here: {instead}")


def check_by_blocks(model: nn.Module, what: str, instead: str) -> None:
    """ValueError if weights of the model are cut up in a way by which they cannot be brought together block by block.

    To be called by every process. A module that has whole weights since its last forward gives them back.

    Args:
        what, instead: as for `check_whole`.
    """
    if not is_cut_by_fsdp2(model):
        check_whole(model, what, instead)
        return
    reshard(model)
    if not fsdp2_blocks(model):
        raise ValueError(
            f"{what} brings one block's weights together at a time, and fully_shard was called on the whole of "
            f"{type(model).__name__} alone: call it on each of its layers before, as in "
            "`for layer in model.model.layers: fully_shard(layer)`"
        )
    for name, parameter in model.named_parameters():
        reason = _why_not(parameter)
        if reason:
            raise ValueError(f"{what} cannot bring {name} together, {reason}: {instead}")


def reshard(model: nn.Module) -> None:
    """Let FSDP2 take back whole weights that it keeps from a forward to the backward that follows.

    A verb that fails must not put these back, whose memory is gone.
    """
    fsdp2: Any
    for fsdp2 in filter(is_fsdp2, model.modules()):
        fsdp2.reshard()
    parts = [(m, leaf, p) for m in model.modules() for leaf, p in m._parameters.items() if hasattr(p, "full_tensor")]

    def put_back() -> None:
        for module, leaf, part in parts:
            module._parameters[leaf] = part

    if_it_fails(put_back)


def _why_not(parameter: Any) -> str:
    """Why the parameter cannot be put together from the parts that all processes have; "" if it can."""
    if not hasattr(parameter, "full_tensor"):
        return ""
    mesh, placements = parameter.device_mesh, parameter.placements
    if mesh.ndim != 1 or not placements[0].is_shard():
        return f"which is placed as {tuple(placements)} on a mesh of {mesh.ndim} dimensions (tensor or hybrid parallelism)"
    if mesh.size() != distributed.get_world_size():
        return f"whose mesh has {mesh.size()} of {distributed.get_world_size()} processes"
    return ""
