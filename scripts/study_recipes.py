"""The recipes that the study compares: ways to end with a ReLU network, and GELU itself.

Every recipe gets the same examples in the same order, the same head and the same number of optimizer steps; each is a
transformers Trainer with at most a callback of its own. Here: GELU and what follows it, and ReLU first; λ-GELU is in
study_hardening.py, other people's in study_rivals.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
from study_tasks import Task
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_lambda_gelu as hlg


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

    def trainer(
        self,
        model: PreTrainedModel,
        callbacks: tuple[TrainerCallback, ...] = (),
        cls: type[Trainer] | None = None,
        **hardness: Any,
    ) -> Trainer:
        """A Trainer; a LambdaGELUTrainer if it is given arguments of the hardness."""
        cls = cls or (hlg.LambdaGELUTrainer if hardness else Trainer)
        arguments = hlg.LambdaGELUTrainingArguments if hardness else TrainingArguments
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
