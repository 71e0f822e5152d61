"""The recipes that the study compares: ways to end with a ReLU network, and GELU itself.

Every recipe gets the same examples in the same order, the same head and the same number of optimizer steps; each is a
transformers Trainer with at most a callback of its own.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from study_tasks import Task
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_lambda_gelu as hlg
from hf_lambda_gelu.conversion import replace_module


@dataclass
class Run:
    """What a recipe is given: the task, its examples, and how to train."""

    task: Task
    seed: int
    rate: float
    train: datasets.Dataset
    judged: datasets.Dataset

    def model(self) -> PreTrainedModel:
        set_seed(self.seed)
        return self.task.model()

    def trainer(self, model: PreTrainedModel, callbacks: tuple[TrainerCallback, ...] = (), **hardness: Any) -> Trainer:
        cls, arguments = (
            (hlg.LambdaGELUTrainer, hlg.LambdaGELUTrainingArguments) if hardness else (Trainer, TrainingArguments)
        )
        args = arguments(
            output_dir=tempfile.mkdtemp(prefix="study-"),
            num_train_epochs=self.task.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=self.rate,
            warmup_steps=0.1,
            train_sampling_strategy="group_by_length" if self.task.by_length else "random",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=self.seed,
            **({"eval_relu": False} if hardness else {}),
            **hardness,
        )
        return cls(
            model=model,
            args=args,
            train_dataset=self.train,
            eval_dataset=self.judged,
            data_collator=self.task.collator(),
            compute_metrics=self.task.metrics,
            callbacks=list(callbacks),
        )

    def calibration(self) -> list[dict[str, Tensor]]:
        return self.task.batches(self.train)

    def judge(self, model: PreTrainedModel) -> dict[str, float]:
        found = self.trainer(model).evaluate()
        return {"accuracy": found["eval_accuracy"], "loss": found["eval_loss"]}


@dataclass
class Result:
    """The metrics of the final network, before its substitution where there was one, and λ per site as learned."""

    final: dict[str, float]
    before: dict[str, float] | None = None
    profile: list[float] = field(default_factory=list)


Recipe = Callable[[Run], dict[str, Result]]
RECIPES: dict[str, Recipe] = {}


def recipe(function: Recipe) -> Recipe:
    RECIPES[function.__name__] = function
    return function


# ------------------------------------------------------------------------------------------------ GELU and what follows it


@recipe
def gelu(run: Run) -> dict[str, Result]:
    """Fine-tune GELU; then three substitutions without training."""
    model = run.model()
    run.trainer(model).train()
    smooth = run.judge(model)
    hlg.convert(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = {"gelu": Result(smooth)}
    with hlg.gates_as_relu(model):
        results["swap"] = Result(run.judge(model), smooth)
    for method in ("bias", "least_squares"):
        again = run.model()
        hlg.convert(again)
        again.load_state_dict(weights)
        hlg.relu_ize(again, calibration=run.calibration(), compensate=method)
        results[f"{method}_after"] = Result(run.judge(again), smooth)
    return results


# ---------------------------------------------------------------------------------------------- ReLU first, then fine-tune


def _relu_first(run: Run, **options: Any) -> Result:
    model = run.model()
    hlg.convert(model)
    hlg.relu_ize(model, **options)
    run.trainer(model).train()
    return Result(run.judge(model))


@recipe
def relu_first(run: Run) -> dict[str, Result]:
    """Swap ReLU in, fine-tune as long."""
    return {"relu_first": _relu_first(run, force=True)}


@recipe
def bias_first(run: Run) -> dict[str, Result]:
    """Bias-compensated substitution, then fine-tune."""
    return {"bias_first": _relu_first(run, calibration=run.calibration(), compensate="bias")}


@recipe
def least_squares_first(run: Run) -> dict[str, Result]:
    """Compensated substitution, then fine-tune."""
    return {"least_squares_first": _relu_first(run, calibration=run.calibration(), compensate="least_squares")}


class _SubstituteAt(TrainerCallback):
    """Compensated substitution at a fraction of training; the optimizer goes on with the same parameters."""

    def __init__(self, run: Run, fraction: float, method: str) -> None:
        self.run, self.fraction, self.method, self.done = run, fraction, method, False

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.done and state.global_step >= self.fraction * state.max_steps:
            hlg.relu_ize(model, calibration=self.run.calibration(), compensate=self.method)
            self.done = True


def _midway(run: Run, fraction: float) -> Result:
    model = run.model()
    hlg.convert(model)
    for site in hlg.hardness_sites(model).values():  # λ stays 1: the gates are the model's own until they are ReLU
        site.raw_hardness.requires_grad_(False)
    run.trainer(model, (_SubstituteAt(run, fraction, "least_squares"),)).train()
    return Result(run.judge(model))


@recipe
def midway(run: Run) -> dict[str, Result]:
    """Fine-tune GELU for half of the steps, substitute with compensation, fine-tune ReLU for the rest."""
    return {"midway": _midway(run, 0.5)}


@recipe
def quarter(run: Run) -> dict[str, Result]:
    """The same at a quarter of the steps, where the hardness method has its switch point."""
    return {"quarter": _midway(run, 0.25)}


# ----------------------------------------------------------------------------------------------------- λ, learned and ramped


PAPER_START = 1.0 + math.log(2.0)


def _hardened(run: Run, start: float, **hardness: Any) -> Result:
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
    return {"paper": _hardened(run, PAPER_START, hardness_switch_point=0.25)}


@recipe
def unhardened(run: Run) -> dict[str, Result]:
    """The same without hardening: λ learned to the end, and ReLU in its place."""
    return {"unhardened": _hardened(run, PAPER_START, hardness_switch_point=1.0, hardness_hold=0.0)}


def _softer(run: Run, tolerance: float) -> dict[str, Result]:
    return {
        f"tolerance_{tolerance:g}": _hardened(run, PAPER_START, hardness_switch_point=0.25, hardness_tolerance=tolerance)
    }


# the paper's scheme with other ε: the ramp ends at λ = 0.798 / ε; 0.005 is `paper`
for _tolerance in (0.4, 0.1, 0.025):
    RECIPES[f"tolerance_{_tolerance:g}"] = functools.partial(_softer, tolerance=_tolerance)


@recipe
def lambda_one(run: Run) -> dict[str, Result]:
    """The same from λ₀ = 1, the model's own function."""
    return {"lambda_one": _hardened(run, 1.0, hardness_switch_point=0.25)}


@recipe
def ramp_only(run: Run) -> dict[str, Result]:
    """A fixed ramp from λ = 1 at the first step on, nothing learned."""
    return {"ramp_only": _hardened(run, 1.0, hardness_switch_point=0.0)}


@recipe
def ramp_reciprocal(run: Run) -> dict[str, Result]:
    """λ learned for a quarter, then a ramp that is linear in 1/λ."""
    return {"ramp_reciprocal": _hardened(run, 1.0, hardness_switch_point=0.25, hardness_ramp="reciprocal")}


def _refit(run: Run, switch: float) -> Result:
    return _hardened(run, 1.0, hardness_switch_point=switch, hardness_compensate="least_squares")


@recipe
def refit_quarter(run: Run) -> dict[str, Result]:
    """λ learned for a quarter; then the refit, and λ = 160 at once."""
    return {"refit_quarter": _refit(run, 0.25)}


@recipe
def refit_half(run: Run) -> dict[str, Result]:
    """λ learned for half of the steps; then the refit, and λ = 160 at once."""
    return {"refit_half": _refit(run, 0.5)}


@recipe
def refit_late(run: Run) -> dict[str, Result]:
    """λ learned for three quarters; then the refit, and λ = 160 at once."""
    return {"refit_late": _refit(run, 0.75)}


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


# ------------------------------------------------------------------------------------------------------------ other people's


class _Lerp(nn.Module):
    """mix · smooth(x) + (1 − mix) · ReLU(x), as nn_pruning mixes; here the mix is a function of the step."""

    def __init__(self, smooth: nn.Module) -> None:
        super().__init__()
        self.smooth, self.mix = smooth, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.mix == 0.0 else torch.lerp(F.relu(x), self.smooth(x), self.mix)


class _MixDown(TrainerCallback):
    """mix 1 → 0, linearly, over the first nine tenths of training: as long as the default ramp takes to be hard."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, _Lerp):
                module.mix = max(0.0, 1.0 - state.global_step / (0.9 * state.max_steps))


@recipe
def lerp(run: Run) -> dict[str, Result]:
    """A linear mix from GELU to ReLU, as nn_pruning has it."""
    model = run.model()
    names = [site.name for site in hlg.convert(model).sites]
    for name in names:
        replace_module(model, name, _Lerp(nn.GELU()))
    run.trainer(model, (_MixDown(),)).train()
    return {"lerp": Result(run.judge(model))}


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # B-SiLU, (x + 1.67) σ(x) − 0.835, whose derivative SUGAR takes in place of the step
        gate = torch.sigmoid(x)
        return grad * (gate + (x + 1.67) * gate * (1.0 - gate))


class _Sugar(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Surrogate.apply(x)


@recipe
def sugar(run: Run) -> dict[str, Result]:
    """ReLU forward from the first step on, a smooth surrogate backward (SUGAR, arXiv 2505.22074)."""
    model = run.model()
    for site in hlg.convert(model).sites:
        replace_module(model, site.name, _Sugar())
    run.trainer(model).train()
    return {"sugar": Result(run.judge(model))}
