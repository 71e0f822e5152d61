"""DeepSpeed's optimizers: they hold one of torch's, and step flat copies of the parameters of each of its groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

# by stage 1 and 2, by those in bf16, and by stage 3, which cuts groups into smaller ones
_LISTS = ("bit16_groups", "bf16_groups", "fp16_groups")


def is_deepspeed(optimizer: object) -> bool:
    """Whether this is an optimizer of DeepSpeed's round another; what it offers in the place of torch's own is not."""
    return any(cls.__module__.startswith("deepspeed.runtime.") for cls in type(optimizer).__mro__)


def deepspeed_in(optimizer: Any) -> Any | None:
    """The optimizer of DeepSpeed's that this is, or that a wrapper round it holds; None where there is none."""
    while optimizer is not None and not is_deepspeed(optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def groups_of(optimizer: Any) -> dict[int, dict[str, Any]]:
    """{id of a model's parameter: the group that it is stepped in}.

    Raises:
        ValueError: DeepSpeed steps copies of the parameters that cannot be reached.
    """
    _check_reachable(optimizer)
    lists: list[list[nn.Parameter]] = next(getattr(optimizer, name) for name in _LISTS if hasattr(optimizer, name))
    numbers = getattr(optimizer, "sub_group_to_group_id", None) or dict(enumerate(range(len(lists))))
    return {id(p): optimizer.param_groups[numbers[i]] for i, parameters in enumerate(lists) for p in parameters}


def _check_reachable(optimizer: Any) -> None:
    """ValueError unless a parameter of the optimizer knows its copy."""
    if not any(hasattr(optimizer, name) for name in _LISTS) or type(optimizer).__name__ in (
        "FP16_Optimizer",
        "FP16_UnfusedOptimizer",
    ):
        raise ValueError(
            f"DeepSpeed's {type(optimizer).__name__}, which it takes for bf16 and fp16 without ZeRO, steps copies of the "
            "parameters in fp32 that cannot be reached: a clipped or a set λ, and a refit, would be undone by the next "
            'step. Set {"zero_optimization": {"stage": 1}} or a higher stage in DeepSpeed\'s config'
        )


def check_own_group(optimizer: Any, hardness: Iterable[nn.Parameter]) -> None:
    """ValueError if λ is in a group with weights, as where DeepSpeed makes the optimizer by its own config."""
    groups = groups_of(optimizer)
    own = {id(parameter) for parameter in hardness}
    theirs = {id(group) for parameter, group in groups.items() if parameter not in own}
    if any(id(groups[parameter]) in theirs for parameter in own if parameter in groups):
        raise ValueError(
            "λ is in a group with weights, with their learning rate and weight decay, as DeepSpeed made the optimizer by "
            "'optimizer' in its config: take 'optimizer' out of it, so that the Trainer makes the one of the argument optim "
            "with hardness_learning_rate for λ"
        )
