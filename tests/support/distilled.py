"""A smooth model and the ReLU network that learns from it, tiny; batches and trainers for them; the loss in float64."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

import hf_lambda_gelu as hlg
from support import tiny


def pair(name: str, cls: type[PreTrainedModel] | None = None, **overrides: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(student, teacher): the teacher with GELU or SiLU, the student with ReLU swapped in; new ones each time."""
    student, teacher = copy.deepcopy(_made(name, cls, tuple(overrides.items())))
    return student, teacher


@functools.cache
def _made(name: str, cls: Any, overrides: tuple[tuple[str, Any], ...]) -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = tiny.build(name, **dict(overrides))
    if cls is not None:
        torch.manual_seed(1)
        teacher = cls(teacher.config).eval()
    student = copy.deepcopy(teacher)
    hlg.convert(student)
    hlg.relu_ize(student, force=True)
    return student, teacher


def texts(count: int = 12, labels: bool = False, seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows of 11 tokens, of which the last ones are padding, another number in each; labels are −100 here and there."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(3, 99, (11,), generator=generator)
        mask = (torch.arange(11) < 11 - index % 5).long()
        row = {"input_ids": ids, "attention_mask": mask}
        if labels:
            row["labels"] = torch.where(torch.rand(11, generator=generator) < 0.3, -100, ids)
        rows.append(row)
    return rows


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Of a short run on the CPU: SGD, which hides no factor, without clipping."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    return TrainingArguments(**{**values, **changes})


def trainer(
    student: Any, teacher: Any, folder: Path, rows: list[Any] | None = None, **changes: Any
) -> hlg.DistillationTrainer:
    """Of a short run, with these changes of the arguments."""
    return hlg.DistillationTrainer(
        student, arguments(folder, **changes), teacher=teacher, train_dataset=rows, data_collator=stacked
    )


def adapted(student: PreTrainedModel) -> Any:
    """With adapters, which have dropout."""
    torch.manual_seed(3)
    return get_peft_model(student, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))


def run_in_double(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state, of a copy of the model in float64."""
    twin = copy.deepcopy(model).double().eval()
    fed = {
        n: v.double() if v.is_floating_point() else v for n, v in batch.items() if n != "labels" or "input_ids" not in batch
    }
    if model.config.is_encoder_decoder:
        fed["labels"] = batch["labels"]
    found = twin(**fed)
    return found["logits"] if "logits" in found else found["last_hidden_state"]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def kl(teacher: np.ndarray, student: np.ndarray) -> float:
    """KL(softmax t ‖ softmax s), term by term."""
    return sum(float(p) * (math.log(p) - math.log(q)) for p, q in zip(softmax(teacher), softmax(student), strict=True))


def bernoulli_kl(teacher: np.ndarray, student: np.ndarray) -> float:
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        p, q = 1.0 / (1.0 + math.exp(-t)), 1.0 / (1.0 + math.exp(-s))
        total += p * math.log(p / q) + (1.0 - p) * math.log((1.0 - p) / (1.0 - q))
    return total


def relative(teacher: np.ndarray, student: np.ndarray) -> float:
    return float(((teacher - student) ** 2).sum() / (teacher**2).sum())
