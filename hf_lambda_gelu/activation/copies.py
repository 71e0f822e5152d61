"""Where an engine holds a parameter besides the parameter: DeepSpeed steps copies in fp32, and ZeRO-3 cuts both up.

After each step DeepSpeed writes its copies over the module's parameters, so what is written into these alone is undone. Here
the copies are found by what DeepSpeed leaves on a parameter. It is imported only where ZeRO-3 must gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def stepped_copy(parameter: Tensor) -> Tensor | None:
    """This process's part of the fp32 copy that ZeRO-1 or -2 steps; None where there is none, or no part of it here."""
    mapping = getattr(parameter, "_hp_mapping", None)
    return None if mapping is None else mapping.hp_fragment


@torch.no_grad()
def change(parameter: nn.Parameter, in_place: Callable[[Tensor], object]) -> None:
    """Changes a parameter and what an engine holds of it in this process; every process does the same on its own.

    Args:
        in_place: changes each element of a tensor by itself: a clamp, a fill.
    """
    in_place(parameter)
    copy = stepped_copy(parameter)
    if copy is not None:
        in_place(copy)
    if hasattr(parameter, "ds_tensor"):
        in_place(parameter.ds_tensor.data)
        optimizer: Any = getattr(parameter, "_z3_optimizer", None)
        if optimizer is not None and parameter.requires_grad:  # what is frozen it does not step
            part = optimizer.get_local_fp32_param(parameter)
            in_place(part)
            optimizer.set_local_hp_param(part, parameter)


@torch.no_grad()
def renew_stepped_copies(parameters: Iterable[nn.Parameter]) -> None:
    """Writes parameters that were changed in place into the copies that ZeRO-1 and -2 step; every process must call."""
    for parameter in parameters:
        if stepped_copy(parameter) is not None:
            parameter.set_full_hp_param(parameter.detach())  # type: ignore[attr-defined]  # DeepSpeed's


@torch.no_grad()
def whole(parameters: list[nn.Parameter]) -> list[Tensor]:
    """All of each parameter, also where FSDP2 or ZeRO-3 has cut it up; every process must ask."""
    away = [parameter for parameter in parameters if hasattr(parameter, "ds_id") and not is_here(parameter)]
    if away:
        import deepspeed

        with deepspeed.zero.GatheredParameters(away):
            return [_full(parameter).clone() for parameter in parameters]
    return [_full(parameter) for parameter in parameters]


def is_here(parameter: Any) -> bool:
    """Whether this process has all of the parameter at the moment."""
    if hasattr(parameter, "full_tensor"):
        return False
    return bool(parameter.numel() == parameter.ds_numel) if hasattr(parameter, "ds_id") else True


def _full(parameter: Tensor) -> Tensor:
    found: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
    return found
