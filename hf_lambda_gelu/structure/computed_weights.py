"""Weights that are no parameters: pruning, weight norm and their like compute them each time from others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


class Computed(NamedTuple):
    """A tensor of a module that is computed: from what, and what makes a parameter of it again."""

    module: nn.Module
    leaf: str
    name: str
    source: str
    undo: str

    def __str__(self) -> str:
        return f"{self.name} is computed from {self.source}: call torch.nn.utils.{self.undo}(module, {self.leaf!r}) before"


def computed_tensors(model: nn.Module) -> Iterator[Computed]:
    """Those that torch's own utilities have made so, in the order of the modules."""
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        if parametrize.is_parametrized(module):
            for leaf in module.parametrizations:
                source = "parametrizations (weight or spectral norm, for one)"
                yield Computed(module, leaf, start + leaf, source, "parametrize.remove_parametrizations")
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                leaf = hook._tensor_name
                yield Computed(module, leaf, start + leaf, f"{leaf}_orig and {leaf}_mask", "prune.remove")
            elif isinstance(hook, WeightNorm):
                leaf = hook.name
                yield Computed(module, leaf, start + leaf, f"{leaf}_g and {leaf}_v", "remove_weight_norm")
            elif isinstance(hook, SpectralNorm):
                yield Computed(module, hook.name, start + hook.name, f"{hook.name}_orig", "remove_spectral_norm")


def why_no_parameter(model: nn.Module, tensors: Iterable[Tensor | None]) -> str:
    """Why one of a linear map's tensors, as forward has just used them, is no parameter."""
    used = [tensor.detach() for tensor in tensors if tensor is not None]
    for computed in computed_tensors(model):
        now = getattr(computed.module, computed.leaf).detach()
        if any(now.shape == tensor.shape and torch.equal(now, tensor) for tensor in used):
            return str(computed)
    return "it feeds a weight that is no parameter of the model as it stands"
