"""Recipes of the study that harden in stages: along a ramp or site by site, each step followed by the refit; λ by neuron."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.refit.engine import compensation
from scripts.studies.recipes.recipe import Result, Run, recipe

STAGES = 4  # of the ramp


class _Staged(hlg.LambdaGELU):
    """What a refit takes as the hard gate is here the gate of the next stage; without one, the gate as it is."""

    following: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        hardness = self.following if self.as_relu and self.following is not None else self.hardness
        return hlg.lambda_gelu(x, hardness, self.base)


def _refit(run: Run, model: PreTrainedModel) -> None:
    training = model.training
    model.eval()
    with compensation(model, run.calibration()) as work:
        work.run("least_squares", biases=False)
    model.train(training)


def _harden(run: Run, model: PreTrainedModel, ends: dict[str, float]) -> None:
    """Refit for these sites at these λ, and set them."""
    sites = hlg.hardness_sites(model)
    for name, site in sites.items():
        site.following = ends.get(name)
    _refit(run, model)
    for name, end in ends.items():
        sites[name].set_hardness(end)


class _InStages(TrainerCallback):
    """Calls `stages` one after the other, evenly between a quarter and three quarters of the steps."""

    def __init__(self, stages: list[Callable[[PreTrainedModel], None]]) -> None:
        self.stages, self.done = stages, 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        span = max(1, len(self.stages) - 1)
        while self.done < len(self.stages) and state.global_step >= (0.25 + 0.5 * self.done / span) * state.max_steps:
            self.stages[self.done](model)
            self.done += 1


def _staged(run: Run, stages: Callable[[PreTrainedModel], list[Callable[[PreTrainedModel], None]]]) -> Result:
    model = run.model()
    hlg.convert(model)
    profile = list(hlg.hardness_profile(model).values())
    for site in hlg.hardness_sites(model).values():
        site.__class__ = _Staged
        site.unclipped_hardness.requires_grad_(False)
    run.trainer(model, (_InStages(stages(model)),)).train()
    before = run.judge(model)
    hlg.relu_ize(model)
    return Result(run.judge(model), before, profile)


@recipe
def refit_ramp(run: Run) -> dict[str, Result]:
    """λ from 1 to 160 in four equal factors, each followed by the refit that keeps the function."""
    end = hlg.target_hardness()

    def stage(index: int) -> Callable[[PreTrainedModel], None]:
        return lambda model: _harden(run, model, dict.fromkeys(hlg.hardness_sites(model), end ** ((index + 1) / STAGES)))

    return {"refit_ramp": _staged(run, lambda model: [stage(index) for index in range(STAGES)])}


@recipe
def by_sensitivity(run: Run) -> dict[str, Result]:
    """One site after the other goes to λ = 160 with the refit, first the one whose loss suffers least."""

    def stages(model: PreTrainedModel) -> list[Callable[[PreTrainedModel], None]]:
        order: list[str] = []

        def stage(index: int) -> Callable[[PreTrainedModel], None]:
            def run_stage(model: PreTrainedModel) -> None:
                if not order:
                    order.extend(_order(run, model))
                _harden(run, model, {order[index]: hlg.target_hardness()})

            return run_stage

        return [stage(index) for index in range(len(hlg.hardness_sites(model)))]

    return {"by_sensitivity": _staged(run, stages)}


def _order(run: Run, model: PreTrainedModel) -> list[str]:
    for site in hlg.hardness_sites(model).values():
        site.following = hlg.target_hardness()
    return hlg.sensitivity(model, run.calibration()).order


class _ScalarAtSwitch(TrainerCallback):
    """Refits before the callback of the hardening sees the switch, and leaves it one hard λ a site."""

    def __init__(self, run: Run, fraction: float) -> None:
        self.run, self.fraction = run, fraction
        self.profile: list[float] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.profile or state.global_step + 1 < self.fraction * state.max_steps:
            return
        sites = hlg.hardness_sites(model).values()
        self.profile = [float(site.hardness.detach().mean()) for site in sites]
        _refit(self.run, model)
        for site in sites:
            site.unclipped_hardness = nn.Parameter(torch.tensor([hlg.target_hardness()]), requires_grad=False)


@recipe
def per_neuron(run: Run) -> dict[str, Result]:
    """As `refit_late`, with a λ of its own for every neuron until the refit."""
    model = run.model()
    hlg.convert(model)
    widths: dict[hlg.LambdaGELU, int] = {}
    hooks = [
        site.register_forward_pre_hook(lambda module, args: widths.__setitem__(module, args[0].shape[-1]))
        for site in hlg.hardness_sites(model).values()
    ]
    with torch.no_grad():
        model(**run.calibration()[0])
    for hook in hooks:
        hook.remove()
    for site, width in widths.items():
        site.unclipped_hardness = nn.Parameter(site.unclipped_hardness.data.expand(width).clone())
    switch = _ScalarAtSwitch(run, 0.75)
    run.trainer(model, (switch,), hardness_compensate="none", hardness_hold=0.0).train()
    before = run.judge(model)
    hlg.relu_ize(model)
    return {"per_neuron": Result(run.judge(model), before, switch.profile)}
