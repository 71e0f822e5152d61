"""The optimizer-aware update: every optimizer steps in λ, though the parameter it holds is s.

With λ = 1 + softplus(s/t), dλ/ds = σ(s/t)/t. A plain step of size η on s moves λ by η (σ/t)² ∂L/∂λ under SGD and by
η (σ/t) m̂/√v̂ under Adam: almost nothing near λ = 1, 25 times too far at s = 0, t = 0.1. The step on s that moves λ by the
optimizer's own step at learning rate η carries the factor (t/σ)² (optimizers linear in the gradient) or t/σ (normalised
ones), to first order; near λ = 1, where that factor exceeds any cap, first order is no longer true. [derived; the paper has
an optimizer-aware scheme whose exact form is not public]

So the change of variables is done exactly, which needs neither factor nor cap nor a list of optimizers: around each
`optimizer.step()`, the parameter holds λ and its gradient is ∂L/∂λ; afterwards it holds s(λ) again, with λ clipped to ≥ 1.
Momentum and second moments thereby live in units of λ as well.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .._compat import step_pre_hooks
from ..activation.hardness import MIN_EXCESS, inverse_softplus
from ..activation.module import LambdaGELU


def attach_hardness_update(optimizer: torch.optim.Optimizer, modules: Iterable[LambdaGELU]) -> list[RemovableHandle]:
    """Makes `optimizer` step in λ for the hardness parameters of `modules`, in fp32; twice is once. [derived]

    Around each step the parameter s, shape (1,), holds λ − 1 = softplus(s/t) and its gradient is ∂L/∂λ = ∂L/∂s · t/σ(s/t);
    after it, λ is clipped to ≥ 1 and s is what gives it. The optimizer's other parameters are untouched.

    Works with any `torch.optim.Optimizer`, in the Trainer or in a loop of one's own. The learning rate of the parameter's
    group is then η_λ, in units of λ per step; give the group no weight decay.

    Returns:
        Handles; `handle.remove()` undoes it.

    Raises:
        ValueError: a hardness parameter is in none of the optimizer's groups, or in one with weight decay.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> gate = hlg.LambdaGELU()
        >>> optimizer = torch.optim.SGD([gate.raw_hardness], lr=0.5)
        >>> handles = hlg.attach_hardness_update(optimizer, [gate])
        >>> (-gate.hardness.sum()).backward()  # ∂L/∂λ = −1
        >>> optimizer.step()
        >>> round(gate.hardness.item(), 3)  # from 1, by 0.5 in λ
        1.5
    """
    modules = list(dict.fromkeys(modules))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for module in modules:
        group = groups.get(id(module.raw_hardness))
        if group is None:
            raise ValueError(
                "a hardness parameter is in none of the optimizer's groups, so it would never move: "
                "optimizer.add_param_group({'params': [m.raw_hardness for m in hlg.hardness_sites(model).values()], "
                "'lr': 0.01, 'weight_decay': 0.0})"
            )
        if group.get("weight_decay"):
            raise ValueError(
                f"a hardness parameter is in a group with weight decay {group['weight_decay']}, which would pull λ to 0: "
                "put the hardness parameters into a group of their own with weight_decay=0.0"
            )

    attached = {id(m) for hook in step_pre_hooks(optimizer) for m in getattr(hook, "modules", ())}
    modules = [module for module in modules if id(module) not in attached]  # twice is once
    before, after = _IntoHardness(modules), _IntoRaw(modules)
    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


class _IntoHardness:
    """Before a step: the parameter holds λ − 1, which near 1 has 25 more bits than λ, and its gradient is ∂L/∂λ."""

    def __init__(self, modules: list[LambdaGELU]) -> None:
        self.modules = modules

    @torch.no_grad()
    def __call__(self, *_: object) -> None:
        for module in self.modules:
            if module.holds_excess:  # the last step raised half-way
                continue
            raw = module.raw_hardness
            if raw.grad is not None:
                raw.grad.div_(_slope(raw, module.temperature))
            raw.copy_(F.softplus(raw / module.temperature))
            module.holds_excess = True  # a closure runs the model within the step


class _IntoRaw:
    """After a step: the parameter holds s again, λ clipped to ≥ 1, and its gradient is one with respect to s."""

    def __init__(self, modules: list[LambdaGELU]) -> None:
        self.modules = modules

    @torch.no_grad()
    def __call__(self, *_: object) -> None:
        for module in self.modules:
            raw = module.raw_hardness
            raw.copy_(inverse_softplus(raw.clamp(min=MIN_EXCESS)) * module.temperature)
            if raw.grad is not None:
                raw.grad.mul_(_slope(raw, module.temperature))
            module.holds_excess = False


def _slope(raw: Tensor, temperature: float) -> Tensor:
    # dλ/ds. σ ≥ MIN_EXCESS / 2 as λ is kept ≥ 1 + MIN_EXCESS; the clamp serves an s that was loaded from elsewhere
    return torch.sigmoid(raw / temperature).clamp(min=MIN_EXCESS / 2) / temperature
