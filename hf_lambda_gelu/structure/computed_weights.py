"""Why a weight that forward uses is no parameter: pruning, weight norm and their like compute it each time."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize, prune


def why_no_parameter(model: nn.Module) -> str:
    """The reason, with the first module that computes its weight and what makes a parameter of it again."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            return (
                f"{name}.weight is computed from parametrizations (weight or spectral norm, for one): call "
                "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') before"
            )
        if any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            return (
                f"{name}.weight is computed from weight_orig and weight_mask: call "
                "torch.nn.utils.prune.remove(module, 'weight') before"
            )
    return "it feeds a weight that is no parameter of the model as it stands"
