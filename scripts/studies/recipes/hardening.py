"""Recipes of the study with λ-GELU: learned, ramped, refit, and what can be combined with that."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback

import hf_lambda_gelu as hlg
from scripts.studies.recipes.recipe import RECIPES, Result, Run, recipe

PAPER_START = 1.0 + math.log(2.0)
# λ is learned to the end, and stays what it is at the end too: this ε has its target below any λ
TO_THE_END = {"hardness_switch_point": 1.0, "hardness_hold": 0.0, "hardness_tolerance": 100.0}


def hardened(run: Run, start: float, **hardness: Any) -> Result:
    """λ-GELU from λ = `start`, trained with these arguments of the Trainer, ReLU in its place at the end."""
    model = run.model()
    hlg.convert(model, start)
    trainer = run.trainer(model, **{"hardness_compensate": "none", **hardness})
    trainer.train()
    before, profile = run.judge(model), list(trainer.learned_hardness.values())
    hlg.relu_ize(model, force=True)
    return Result(run.judge(model), before, profile)


@recipe
def paper(run: Run) -> dict[str, Result]:
    """The paper's scheme as reported: λ₀ = 1 + ln 2, learned for a quarter, ramped to 160."""
    return {"paper": hardened(run, PAPER_START, hardness_switch_point=0.25)}


@recipe
def unhardened(run: Run) -> dict[str, Result]:
    """The same without hardening: λ learned to the end, and ReLU in its place."""
    return {"unhardened": hardened(run, PAPER_START, **TO_THE_END)}


def _softer(run: Run, tolerance: float) -> dict[str, Result]:
    return {f"tolerance_{tolerance:g}": hardened(run, PAPER_START, hardness_switch_point=0.25, hardness_tolerance=tolerance)}


# the paper's scheme with other ε: the ramp ends at λ = 0.798 / ε; 0.005 is `paper`
for _tolerance in (0.4, 0.1, 0.025):
    RECIPES[f"tolerance_{_tolerance:g}"] = functools.partial(_softer, tolerance=_tolerance)


@recipe
def lambda_one(run: Run) -> dict[str, Result]:
    """The same from λ₀ = 1, the model's own function."""
    return {"lambda_one": hardened(run, 1.0, hardness_switch_point=0.25)}


@recipe
def ramp_only(run: Run) -> dict[str, Result]:
    """A fixed ramp from λ = 1 at the first step on, nothing learned."""
    return {"ramp_only": hardened(run, 1.0, hardness_switch_point=0.0)}


@recipe
def ramp_reciprocal(run: Run) -> dict[str, Result]:
    """λ learned for a quarter, then a ramp that is linear in 1/λ."""
    return {"ramp_reciprocal": hardened(run, 1.0, hardness_switch_point=0.25, hardness_ramp="reciprocal")}


def _refit(run: Run, switch: float) -> Result:
    return hardened(run, 1.0, hardness_switch_point=switch, hardness_compensate="least_squares")


@recipe
def refit_half(run: Run) -> dict[str, Result]:
    """λ learned for half of the steps; then the refit, and λ = 160 at once."""
    return {"refit_half": _refit(run, 0.5)}


@recipe
def refit_late(run: Run) -> dict[str, Result]:
    """λ learned for three quarters; then the refit, and λ = 160 at once."""
    return {"refit_late": _refit(run, 0.75)}


class _Distilling(hlg.LambdaGELUTrainer):
    """From the refit on, the loss also has KL(teacher ‖ model): the teacher is the smooth network of before the refit."""

    teacher: PreTrainedModel | None = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        if self.teacher is not None and model.training:
            with torch.no_grad():
                wanted = self.teacher(**inputs).logits.log_softmax(-1)
            loss = loss + F.kl_div(outputs.logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
        return (loss, outputs) if return_outputs else loss


class _KeepTeacher(TrainerCallback):
    """Copies the model after the last optimizer step before the switch; runs ahead of the callback that refits."""

    def __init__(self, fraction: float) -> None:
        self.fraction, self.trainer = fraction, None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.trainer.teacher is None and state.global_step + 1 >= math.ceil(self.fraction * state.max_steps):
            self.trainer.teacher = copy.deepcopy(model).eval().requires_grad_(False)


@recipe
def refit_distilled(run: Run) -> dict[str, Result]:
    """As `refit_half`, and what is left of training also learns from the smooth network's outputs at the switch."""
    model = run.model()
    hlg.convert(model)
    keep = _KeepTeacher(0.5)
    trainer = run.trainer(model, (keep,), cls=_Distilling, hardness_switch_point=0.5)
    keep.trainer = trainer
    trainer.train()
    before, profile = run.judge(model), list(trainer.learned_hardness.values())
    hlg.relu_ize(model)
    return {"refit_distilled": Result(run.judge(model), before, profile)}


class _Averaging(TrainerCallback):
    """The mean of the weights over the last eighth of the steps takes their place at the end."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        if state.global_step > 0.875 * state.max_steps:
            self.count += 1
            for name, parameter in model.named_parameters():
                self.sums[name] = self.sums.get(name, 0.0) + parameter.detach()

    def on_train_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.sums[name] / self.count)


@recipe
def refit_averaged(run: Run) -> dict[str, Result]:
    """As `refit_late`, with the weights averaged over the last eighth of the steps."""
    model = run.model()
    hlg.convert(model)
    trainer = run.trainer(model, (_Averaging(),), hardness_switch_point=0.75)
    trainer.train()
    before, profile = run.judge(model), list(trainer.learned_hardness.values())
    hlg.relu_ize(model)
    return {"refit_averaged": Result(run.judge(model), before, profile)}


@recipe
def half_hardened(run: Run) -> dict[str, Result]:
    """Ramped to λ = 8 only, then substituted with compensation."""
    model = run.model()
    hlg.convert(model)
    trainer = run.trainer(model, hardness_switch_point=0.25, hardness_tolerance=0.79788456 / 8, hardness_compensate="none")
    trainer.train()
    before, profile = run.judge(model), list(trainer.learned_hardness.values())
    hlg.relu_ize(model, calibration=run.calibration(), compensate="least_squares")
    return {"half_hardened": Result(run.judge(model), before, profile)}
