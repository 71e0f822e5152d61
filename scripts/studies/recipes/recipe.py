"""What a recipe of the study is given and gives, and the list that recipes enter.

Every recipe gets the same examples in the same order, the same head and the same number of optimizer steps; each is a
transformers Trainer with at most a callback of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_lambda_gelu as hlg
from scripts.studies.tasks import Task


class _WithoutAutocast(TrainerCallback):
    """accelerate leaves its autocast around the model's forward after a training in bf16; what follows is fp32."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        extract_model_from_parallel(model, keep_fp32_wrapper=False)


@dataclass
class Run:
    """What a recipe is given: the task, its examples, and how to train."""

    task: Task
    seed: int
    rate: float
    train: datasets.Dataset
    judged: datasets.Dataset
    trial: bool = False  # whether only the learning rate is tried: what follows a training is left out then

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
            bf16=self.task.bf16,
            use_cpu=not torch.cuda.is_available(),  # or bf16 is refused
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
            callbacks=[*callbacks, _WithoutAutocast()],
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
