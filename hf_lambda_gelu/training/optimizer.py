"""The optimizer-aware update: the parameter is λ, so every optimizer steps in λ.

With λ = 1 + softplus(s/t), dλ/ds = σ(s/t)/t. A plain step of size η on s moves λ by η (σ/t)² ∂L/∂λ under SGD and by
η (σ/t) m̂/√v̂ under Adam: almost nothing near λ = 1, 25 times too far at s = 0, t = 0.1. The step on s that moves λ by the
optimizer's own step at learning rate η carries the factor (t/σ)² (optimizers linear in the gradient) or t/σ (normalised
ones), to first order; near λ = 1, where that factor exceeds any cap, first order is no longer true. [derived; the paper has
an optimizer-aware scheme whose exact form is not public]

So the change of variables is made once: the parameter is λ itself (`LambdaGELU`), which needs neither factor nor cap nor a
list of optimizers, nor a hook around a step that an optimizer may take elsewhere. Momentum, second moments and averages of
parameters live in units of λ as well. λ ≥ 1 is kept by projection. [derived]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..activation.copies import change
from ..activation.module import LambdaGELU, hardness_sites
from .zero import groups_of, is_deepspeed


def attach_hardness_update(optimizer: torch.optim.Optimizer, model: nn.Module | Iterable[LambdaGELU]) -> RemovableHandle:
    """Keeps λ ≥ 1 in a loop of one's own: after each `optimizer.step()` it is set to max(λ, 1). [derived]

    An optimizer that moves the parameter below 1 by its momentum would otherwise have to bring it back before λ rises. The
    optimizer's other parameters are untouched. The learning rate of the parameter's group is η_λ, in units of λ per
    step; give the group no weight decay.

    Args:
        optimizer: any; also inside of accelerate's wrapper, and DeepSpeed's, `engine.optimizer`.
        model: with λ-GELU; or the modules themselves. Frozen λ are left out.

    Returns:
        A handle; `handle.remove()` undoes it.

    Raises:
        ValueError: a hardness parameter is in none of the optimizer's groups, or in one with weight decay; there is no λ;
            DeepSpeed steps copies in fp32 that cannot be reached, as it does in bf16 and fp16 without ZeRO.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> gate = hlg.LambdaGELU()
        >>> optimizer = torch.optim.SGD(hlg.parameter_groups(gate, 0.5))
        >>> handle = hlg.attach_hardness_update(optimizer, gate)
        >>> (-gate.hardness.sum()).backward()  # ∂L/∂λ = −1
        >>> optimizer.step()
        >>> round(gate.hardness.item(), 3)  # from 1, by 0.5 in λ
        1.5
    """
    found = hardness_sites(model).values() if isinstance(model, nn.Module) else model
    trained = [module.unclipped_hardness for module in dict.fromkeys(found) if module.unclipped_hardness.requires_grad]
    if not trained:
        raise ValueError("there is no λ to train: call convert(model) first, and leave unclipped_hardness its requires_grad")
    inner = inside(optimizer)
    groups = groups_of(inner)
    for parameter in trained:
        _check_group(groups.get(id(parameter)))
    stepped = inner.optimizer if is_deepspeed(inner) else inner  # before DeepSpeed writes its copies over the parameters
    handle: RemovableHandle = stepped.register_step_post_hook(_Projection(trained))
    return handle


def parameter_groups(model: nn.Module, hardness_learning_rate: float = 0.01) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the model's other parameters, with its defaults, and λ, without weight decay. [derived]

    Args:
        model: with λ-GELU.
        hardness_learning_rate: η_λ ≥ 0, in units of λ per step; 0.01 is what `LambdaGELUTrainingArguments` has.

    Returns:
        What `torch.optim.Optimizer` takes; parameters without `requires_grad` are left out, and a group without any.

    Raises:
        ValueError: the model has no λ-GELU.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), hlg.LambdaGELU(), torch.nn.Linear(4, 1))
        >>> optimizer = torch.optim.AdamW(hlg.parameter_groups(model), lr=5e-5, weight_decay=0.01)
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(4, 5e-05, 0.01), (1, 0.01, 0.0)]
    """
    sites = hardness_sites(model)
    if not sites:
        raise ValueError(f"{type(model).__name__} has no λ-GELU: call convert(model) first")
    own = {id(site.unclipped_hardness) for site in sites.values()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) not in own]},
        {"params": [p for p in trained if id(p) in own], "lr": hardness_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class _Projection:
    """After a step: λ ≥ 1."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def __call__(self, *_: object) -> None:
        for parameter in self.parameters:
            change(parameter, lambda held: held.clamp_(min=1.0))


def inside(optimizer: Any) -> Any:
    """The optimizer that steps, or DeepSpeed's round it, in accelerate's or another wrapper, whose own hooks never run."""
    inner = getattr(optimizer, "optimizer", None)
    wrapped = isinstance(inner, torch.optim.Optimizer) or is_deepspeed(inner)
    return inside(inner) if wrapped and not is_deepspeed(optimizer) else optimizer


def _check_group(group: dict[str, object] | None) -> None:
    """Raises ValueError unless a hardness parameter may be in this group."""
    if group is None:
        raise ValueError(
            "a hardness parameter is in none of the optimizer's groups, so it would never move: "
            "optimizer.add_param_group({'params': [m.unclipped_hardness for m in hlg.hardness_sites(model).values()], "
            "'lr': 0.01, 'weight_decay': 0.0})"
        )
    if group.get("weight_decay"):
        raise ValueError(
            f"a hardness parameter is in a group with weight decay {group['weight_decay']}, which would pull λ to 1: "
            "put the hardness parameters into a group of their own with weight_decay=0.0"
        )
