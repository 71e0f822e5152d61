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


class WhyNoParameter:
    """Why a linear map's tensors are no parameters. Made for one run of a model, in which its weights stay.

    What a hook computes before each forward is the tensor that the map gets. Parametrizations compute another one at each
    look, so theirs are looked at once, and told by their sums.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._by_hooks: list[Computed] = []
        self._by_sums: dict[tuple[torch.Size, float], Computed] | None = None

    def __call__(self, tensors: Iterable[Tensor | None]) -> str:
        """Why one of these, as forward has just used them, is no parameter."""
        if self._by_sums is None:
            self._by_sums = self._looked_at()
        used = [tensor.detach() for tensor in tensors if tensor is not None]
        places = {tensor.data_ptr() for tensor in used if tensor.numel()}
        for computed in self._by_hooks:
            if getattr(computed.module, computed.leaf).data_ptr() in places:
                return str(computed)
        found = next((self._by_sums[key] for key in map(_sum, used) if key in self._by_sums), None)
        return "it feeds a weight that is no parameter of the model as it stands" if found is None else str(found)

    def _looked_at(self) -> dict[tuple[torch.Size, float], Computed]:
        sums: dict[tuple[torch.Size, float], Computed] = {}
        for computed in computed_tensors(self._model):
            if parametrize.is_parametrized(computed.module, computed.leaf):
                sums.setdefault(_sum(getattr(computed.module, computed.leaf).detach()), computed)
            else:
                self._by_hooks.append(computed)
        return sums


def _sum(tensor: Tensor) -> tuple[torch.Size, float]:
    return tensor.shape, float(tensor.sum(dtype=torch.float64))
