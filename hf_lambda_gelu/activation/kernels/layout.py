"""How the kernels see a tensor: in the order of its memory, with the place of λ in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# how cpu.cpp and cuda_programs.py know the gates; any other base runs on torch's operations
BASE_NUMBERS = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2, "silu": 3}


def view(dense: Tensor, hardness: Tensor) -> tuple[int, int, int] | None:
    """`dense` in the order of its memory as (outer, channels, inner) with one λ per channel, or None if it is not so.

    λ of shape (1,) gives (1, 1, n); (features,) gives (rows, features, 1); (channels, 1, 1) over images gives
    (batch, channels, height · width), or (batch · height · width, channels, 1) in channels_last.
    """
    if hardness.numel() == 1:
        return 1, 1, dense.numel()
    shape = [1] * (dense.dim() - hardness.dim()) + list(hardness.shape)
    order = sorted((dim for dim in range(dense.dim()) if dense.shape[dim] > 1), key=dense.stride, reverse=True)
    own = [place for place, dim in enumerate(order) if shape[dim] > 1]
    block = order[own[0] : own[-1] + 1]
    if len(own) < len(block) or block != sorted(block):
        return None
    outer = math.prod(dense.shape[dim] for dim in order[: own[0]])
    return outer, hardness.numel(), dense.numel() // (outer * hardness.numel())


def known_view(dense: Tensor, hardness: Tensor) -> tuple[int, int, int]:
    """`view` where it must exist, since the choice of the kernel asked for it before.

    Raises:
        ValueError: λ does not lie over `dense` in such a way.
    """
    found = view(dense, hardness)
    if found is None:
        raise ValueError(f"no fused kernel takes λ of shape {tuple(hardness.shape)} over x of shape {tuple(dense.shape)}")
    return found


def in_layout_of(tensor: Tensor, dense: Tensor) -> Tensor:
    """`tensor`, or a copy of it with the strides of `dense`."""
    return tensor if tensor.stride() == dense.stride() else torch.empty_like(dense).copy_(tensor)
