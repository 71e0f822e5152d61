"""A task that a tiny classifier can learn, a trainer for it, and callbacks, data and collators that disturb it."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import hf_lambda_gelu as hlg
from support import tiny

SITES = [f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in (0, 1)]
STEPS, SWITCH, HOLD = 20, 5, 18  # of the ramp that is tested here: 0.25 · 20 and (1 − 0.1) · 20
TARGET = 2.0 / (0.005 * math.sqrt(2.0 * math.pi))


class Rows(Dataset):
    """Random token rows with a label that can be learned."""

    def __init__(self, count: int = 32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(3, 99, (count, 11), generator=generator)
        self.labels = (self.tokens[:, 0] > 50).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


class StopAfterSaving(TrainerCallback):
    """The process dies right after the checkpoint of one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def converted(seed: int = 0, hardness: float = 1.0, **overrides: Any) -> PreTrainedModel:
    """A tiny classifier with λ-GELU."""
    model = tiny.build("bert-classifier", seed, **overrides)
    hlg.convert(model, hardness)
    return model


def arguments(folder: Path, cls: type[TrainingArguments] = hlg.LambdaGELUTrainingArguments, **changes: Any) -> Any:
    """Arguments for a short run on the CPU that writes and reports nothing."""
    values = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    if cls is hlg.LambdaGELUTrainingArguments:  # the ramp; training/test_switch.py has the refit, which is the default
        values |= {"hardness_compensate": "none", "hardness_switch_point": 0.25}
    return cls(**{**values, **changes})


def logged(trainer: Trainer, key: str = "loss") -> dict[int, float]:
    """{step: value} of everything that was logged under that key."""
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


class NoisyRows(Rows):
    """Every access draws from all three sources of random numbers; one column would not go into a batch."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        tokens = row["input_ids"].clone()
        tokens[random.randrange(11)] = np.random.randint(3, 99)
        tokens[torch.randint(11, ())] = 5
        return {**row, "input_ids": tokens, "words": torch.zeros(index + 1)}


class Masking:
    """A collator with a generator of its own, as that of masked language models has."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = default_collate(rows)
        hidden = torch.rand(batch["input_ids"].shape, generator=self.generator) < 0.2
        return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 4)}


class At(TrainerCallback):
    """Calls a function after the callbacks of one step, or of each."""

    def __init__(self, call: Callable[[PreTrainedModel], None], step: int | None = None) -> None:
        self.call, self.step = call, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step in (None, state.global_step):
            self.call(kwargs["model"])


def trainer_of(model: PreTrainedModel, folder: Path, **changes: Any) -> hlg.LambdaGELUTrainer:
    """A trainer for the tiny task."""
    return hlg.LambdaGELUTrainer(model, arguments(folder, **changes), train_dataset=Rows(), eval_dataset=Rows(16, 1))


def trained(model: PreTrainedModel, folder: Path, **changes: Any) -> hlg.LambdaGELUTrainer:
    """A trainer that has run to its end."""
    trainer = trainer_of(model, folder, **changes)
    trainer.train()
    return trainer


def stock_twin(model: PreTrainedModel, activation: str, weights: dict[str, Tensor] | None = None) -> PreTrainedModel:
    """A model that transformers builds with a stock activation, with the weights of `model` and no λ."""
    config = copy.deepcopy(model.config)
    config.hidden_act = activation
    twin = type(model)(config)
    state = model.state_dict() if weights is None else weights
    twin.load_state_dict({name: value for name, value in state.items() if "unclipped_hardness" not in name}, strict=True)
    return twin.eval()
