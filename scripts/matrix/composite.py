"""Optimizers in the shapes in which papers and users write them: one that wraps another, and one that is two."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class SharpnessAware(Optimizer):
    """Foret et al. 2020: climbs first, takes the gradient there, steps from where it was, by another optimizer's step."""

    def __init__(self, parameters: Iterable[Any], base: type[Optimizer] = torch.optim.SGD, **options: Any) -> None:
        super().__init__(parameters, {"rho": 0.05, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """`closure` takes the gradient; it is called at the place that was climbed to, gradients being there already."""
        moved = [(p, group["rho"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        kept = [p.clone() for p, _ in moved]
        for p, rho in moved:
            p.add_(p.grad * rho / (p.grad.norm() + 1e-12))
        self.zero_grad()
        with torch.enable_grad():
            loss = closure() if closure else None
        for (p, _), old in zip(moved, kept, strict=True):
            p.copy_(old)
        self.base_optimizer.step()
        return loss


class MuonAndAdamW(Optimizer):
    """Muon for matrices of hidden layers, AdamW for all else: two optimizers that look like one."""

    def __init__(self, parameters: Iterable[Any], lr: float = 1e-3) -> None:
        groups = [dict(g) if isinstance(g, dict) else g for g in parameters]
        groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
        flat, rest = [], []
        for group in groups:
            flat.append({**group, "params": [p for p in group["params"] if p.ndim == 2]})
            rest.append({**group, "params": [p for p in group["params"] if p.ndim != 2]})
        self.both: list[Optimizer] = [
            torch.optim.Muon([g for g in flat if g["params"]], lr=lr, weight_decay=0.0),
            torch.optim.AdamW([g for g in rest if g["params"]], lr=lr, weight_decay=0.0),
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self.both for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        return {key: value for optimizer in self.both for key, value in optimizer.state.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"both": [optimizer.state_dict() for optimizer in self.both]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.both, state_dict["both"], strict=True):
            optimizer.load_state_dict(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.both:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for optimizer in self.both:
            optimizer.step()


class MuonFactory:
    """What transformers' Trainer takes as `optimizer_cls_and_kwargs` where an optimizer needs the model."""

    def __call__(self, model: nn.Module, lr: float) -> MuonAndAdamW:
        return MuonAndAdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
