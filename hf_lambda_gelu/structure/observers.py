"""Observers of torch's quantisation-aware training: they note the range of all that passes, in eval mode too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def observers_off(model: nn.Module) -> Iterator[None]:
    """Within the block, fake quantisation rounds by what has been noted so far, and notes no more: the function stays, and
    other gates than those that are trained leave no trace. What has seen nothing yet must, to round at all."""
    switches = [switch for module in model.modules() if (switch := _switch(module)) is not None]
    before = [switch.clone() for switch in switches]
    try:
        for switch in switches:
            switch.zero_()
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.copy_(value)


def _switch(module: nn.Module) -> Tensor | None:
    """What turns the module's observer on, where it has one that has seen something."""
    least = getattr(getattr(module, "activation_post_process", None), "min_val", None)
    fresh = isinstance(least, Tensor) and not (least.numel() and bool(torch.isfinite(least).all()))
    return None if fresh else module._buffers.get("observer_enabled")
