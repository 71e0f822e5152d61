"""The state of a model: its weights and hooks, what must be as it was after a failure, how far two models are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg
from support import tiny

Batches = list[dict[str, Tensor]]


def hooks(model: nn.Module) -> list[str]:
    """The modules that have any hook."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in kinds)]


def change(first: PreTrainedModel, second: PreTrainedModel, batches: Batches) -> float:
    """Relative root mean square difference of all outputs, each tensor counting the same."""
    total: list[float] = []
    for batch in batches:
        pairs = zip(tiny.outputs(first, batch), tiny.outputs(second, batch), strict=True)
        total += [float((a - b).square().sum() / a.square().sum()) for a, b in pairs]
    return float(np.sqrt(np.mean(total)))


def parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of all tensors but λ."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if not k.endswith("unclipped_hardness")}


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """max over tensors of max|a − b| / max|a|."""
    assert first.keys() == second.keys()
    return max(float((a - second[k]).abs().max() / a.abs().max().clamp(min=1e-9)) for k, a in first.items() if a.numel())


def whole_numbers(model: nn.Module) -> dict[str, dict[str, int]]:
    """Of every module, the attributes that are integers: widths above all."""
    return {n: {k: v for k, v in vars(m).items() if type(v) is int} for n, m in model.named_modules()}


def full_snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """What must be as it was: also which parameters there are and whether they take gradients."""
    return {
        **tiny.snapshot(model),
        "parameters": {n: (id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "gates": {n: site.as_relu for n, site in hlg.hardness_sites(model).items()},
        "config": model.config.to_dict(),
    }
