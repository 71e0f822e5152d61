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
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..activation.copies import change
from ..activation.module import LambdaGELU, hardness_sites
from ..surgery.adapter_hardness import save_hardness_with_adapters
from .averaging import clip, optimizers_in
from .movement import Movement
from .zero import deepspeed_in, groups_of


class HardnessUpdate:
    """What `attach_hardness_update` has attached."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Detaches it."""
        for handle in self._handles:
            handle.remove()


def attach_hardness_update(optimizer: Any, model: nn.Module | Iterable[LambdaGELU]) -> HardnessUpdate:
    """Keeps λ ≥ 1 in a loop of one's own: after each `optimizer.step()` it is set to max(λ, 1). [derived]

    An optimizer that moves the parameter below 1 by its momentum would otherwise have to bring it back before λ rises. The
    optimizer's other parameters are untouched. The learning rate of the parameter's group is η_λ, in units of λ per
    step; give the group no weight decay. A λ that stays where it is over the first steps, though its gradients call for
    steps, is a warning in the log. Of a model with adapters, `save_pretrained` writes λ beside them from now on.

    Args:
        optimizer: any that has λ in its groups and a `step`; also one that holds others, such as accelerate's wrapper, SAM,
            two in one, or DeepSpeed's, `engine.optimizer`. Of schedule-free ones both points are clipped, the stepped one
            and the average.
        model: with λ-GELU; or the modules themselves. Frozen λ are left out.

    Returns:
        A handle; `handle.remove()` undoes it.

    Raises:
        ValueError: a hardness parameter is in none of the optimizer's groups, or in one with weight decay, or in none of the
            optimizers that it holds; the optimizer steps within backward (LOMO, layer-wise GaLore) or has no step hooks;
            there is no λ; DeepSpeed steps copies in fp32 that cannot be reached, as it does in bf16 and fp16 without ZeRO.

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
    if isinstance(model, nn.Module):
        save_hardness_with_adapters(model)
    found = hardness_sites(model).values() if isinstance(model, nn.Module) else model
    trained = [module.unclipped_hardness for module in dict.fromkeys(found) if module.unclipped_hardness.requires_grad]
    if not trained:
        raise ValueError("there is no λ to train: call convert(model) first, and leave unclipped_hardness its requires_grad")
    deepspeed = deepspeed_in(optimizer)
    if deepspeed is not None:
        groups = groups_of(deepspeed)
        for parameter in trained:
            _check_group(groups.get(id(parameter)))
        # before DeepSpeed writes its copies over the parameters
        return HardnessUpdate([deepspeed.optimizer.register_step_post_hook(partial(_change_after_step, trained))])
    held = optimizers_in(optimizer)
    check_steps_after_backward(held)
    stepping = [one for one in held if len(optimizers_in(one)) == 1]  # that hold no others
    for parameter in trained:
        _check_groups(parameter, held, stepping)
    hooked = [one for one in held if hasattr(one, "_optimizer_step_post_hooks")]  # which Optimizer.__init__ makes
    if any(all(_group(one, parameter) is None for one in hooked) for parameter in trained):
        raise ValueError(
            f"{type(optimizer).__name__} has no step hooks of torch, so λ cannot be clipped after its step: derive it from "
            "torch.optim.Optimizer and call super().__init__"
        )
    return HardnessUpdate([handle for one in hooked for handle in _attach(one, trained)])


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


def own_group(optimizer: Optimizer, parameters: list[nn.Parameter], learning_rate: float) -> None:
    """Moves parameters out of the groups that they are in, into one with a learning rate of its own and no weight decay.

    It has all other options of the group that they come from, and is stepped by the optimizer that stepped that one.
    """
    own = {id(parameter) for parameter in parameters}
    held = optimizers_in(optimizer)
    groups = list({id(group): group for one in held for group in one.param_groups}.values())
    moved: set[int] = set()
    for group in groups:
        taken = [parameter for parameter in group["params"] if id(parameter) in own]
        if not taken:
            continue
        holding = [one for one in held if any(group is other for other in one.param_groups)]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        new = {**group, "params": taken, "lr": learning_rate, "weight_decay": 0.0}
        holding[-1].add_param_group(new)
        for one in holding:  # a list of its own that has the group must have the new one, which a schedule sets too
            if not any(new is other for other in one.param_groups):
                one.param_groups.append(new)
        moved |= {id(parameter) for parameter in taken}
    left = [parameter for parameter in parameters if id(parameter) not in moved]
    if left:
        optimizer.add_param_group({"params": left, "lr": learning_rate, "weight_decay": 0.0})


def check_steps_after_backward(optimizers: Iterable[Any]) -> None:
    """Raises ValueError for an optimizer that steps each parameter within backward."""
    for one in optimizers:
        name = type(one).__name__
        # LOMO's, and transformers' stand-in for layer-wise ones, whose step does nothing
        if hasattr(type(one), "fused_backward") or name == "LayerWiseDummyOptimizer":
            raise ValueError(f"{name} {WITHIN_BACKWARD}")


WITHIN_BACKWARD = (
    "steps each parameter within backward, all at one learning rate and before λ can be clipped: take an optimizer that "
    "steps after backward (adamw_torch, galore_adamw, apollo_adamw), or freeze λ by site.requires_grad_(False) for each of "
    "hlg.hardness_sites(model)"
)


def _attach(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[RemovableHandle]:
    inside = [parameter for parameter in parameters if _group(optimizer, parameter) is not None]
    if not inside:
        return []
    movement = Movement(inside)
    return [
        optimizer.register_step_pre_hook(movement.before_step),
        optimizer.register_step_post_hook(movement.after_step),  # before it is clipped
        optimizer.register_step_post_hook(partial(_clip_after_step, inside)),
    ]


def _clip_after_step(parameters: list[nn.Parameter], optimizer: Optimizer, *_: object) -> None:
    clip(optimizer, parameters)


def _change_after_step(parameters: list[nn.Parameter], *_: object) -> None:
    for parameter in parameters:
        change(parameter, lambda held: held.clamp_(min=1.0))


def _group(optimizer: Any, parameter: nn.Parameter) -> dict[str, Any] | None:
    """The group that a parameter is in."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    return next((group for group in groups if any(parameter is other for other in group["params"])), None)


def _check_groups(parameter: nn.Parameter, held: list[Any], stepping: list[Any]) -> None:
    """Raises ValueError unless a hardness parameter is in groups that it may be in."""
    inside = [group for one in held if (group := _group(one, parameter)) is not None]
    if not inside:
        _check_group(None)
    for group in inside:
        _check_group(group)
    if all(_group(one, parameter) is None for one in stepping):
        names = ", ".join(dict.fromkeys(type(one).__name__ for one in stepping))
        raise ValueError(
            f"a hardness parameter is in the groups of {type(held[0]).__name__}, but in none of the optimizers that it "
            f"steps ({names}), so it would never move: make these from hlg.parameter_groups(model)"
        )


def _check_group(group: dict[str, Any] | None) -> None:
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
