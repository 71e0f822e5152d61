"""Trainers and loops: transformers' own and other libraries', joined with LambdaGELUTrainer or given HardnessCallback.

Each run has six steps, without clipping of gradients. Its λ after every step is compared with that of the twin: the same
trainer as its library has it, or a plain loop, and a model in which modules x ↦ x · gate(λx), written here, have λ itself as
their parameter, in a group of its own. Losses are compared as well, in fp32.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_lambda_gelu as hlg
from scripts.matrix.cells import Cell, Outcome
from scripts.matrix.trainer_loops import LOOPS
from scripts.matrix.trainer_tasks import TASKS, Task

START, RATE, LEARNING_RATE, STEPS, BATCH = 1.5, {"AdamW": 0.02, "SGD": 0.5}, {"AdamW": 1e-3, "SGD": 1e-2}, 6, 8
# bf16 keeps 8 bits: two formulas for one gradient differ by their roundings
BOUND = {"fp32": 1e-5, "bf16": 2e-2}
CALLBACK = "Trainer + HardnessCallback"
TRAINERS = ("Trainer", CALLBACK, *[name for name in TASKS if name != "Trainer"], *LOOPS)
CELLS = [Cell(o, p, "one process", t) for t, o, p in product(TRAINERS, ("AdamW", "SGD"), ("fp32", "bf16"))]
Profile = dict[str, float]


class Gate(nn.Module):
    """x · gate(λx) with λ as the parameter, in float32 whatever the precision of x."""

    def __init__(self, base: str, hardness: float) -> None:
        super().__init__()
        self.base = base
        self.hardness = nn.Parameter(torch.tensor([hardness]))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        u = self.hardness * wide
        if self.base == "gelu":
            gate = torch.special.ndtr(u)
        elif self.base == "silu":
            gate = torch.sigmoid(u)
        else:
            gate = 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (u + 0.044715 * u**3)))
        return (wide * gate).to(x.dtype)


@dataclass
class Run:
    """λ after each step, and what was logged of the loss."""

    profiles: list[Profile] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Watch(TrainerCallback):
    """Writes down λ after each optimizer step."""

    def __init__(self) -> None:
        self.run = Run()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.profiles.append(profile(kwargs["model"]))


def profile(model: nn.Module) -> Profile:
    """λ of the sites, or of the twin's modules, by their names."""
    gates = {name: m.hardness.item() for name, m in model.named_modules() if isinstance(m, Gate)}
    return gates or hlg.hardness_profile(model)


def ours(model: nn.Module) -> nn.Module:
    hlg.convert(model, START)
    return model


def twin(model: nn.Module) -> nn.Module:
    for name, site in hlg.hardness_sites(ours(model)).items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, Gate(site.base, START))
    return model


def optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """With λ in a group of its own, of a model of either kind."""
    own = [m.hardness for m in model.modules() if isinstance(m, Gate)]
    inside = set(map(id, own))
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    groups = [{"params": others}, {"params": own, "lr": RATE[name]}] if own else hlg.parameter_groups(model, RATE[name])
    cls: Any = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[name]
    return cls(groups, lr=LEARNING_RATE[name], weight_decay=0.0)  # type: ignore[no-any-return]


def joined(task: Task) -> tuple[type[Trainer], type[TrainingArguments]]:
    """The trainer and its arguments, each with ours before it."""
    if task.trainer is Trainer:
        return hlg.LambdaGELUTrainer, hlg.LambdaGELUTrainingArguments
    trainer = type(f"Lambda{task.trainer.__name__}", (hlg.LambdaGELUTrainer, task.trainer), {})
    name, bases = f"Lambda{task.arguments.__name__}", (hlg.LambdaGELUTrainingArguments, task.arguments)
    if name not in globals():  # where pickle looks for it: a checkpoint holds the arguments
        globals()[name] = dataclass(type(name, bases, {}))
    return trainer, globals()[name]


def options(cell: Cell, task: Task, folder: str) -> dict[str, Any]:
    """Training arguments of a short run on the CPU that writes and reports nothing."""
    values: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE[cell.optimizer],
        "optim": {"AdamW": "adamw_torch", "SGD": "sgd"}[cell.optimizer],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "bf16": cell.precision == "bf16",
    }
    return values | task.options


LEARNING = {"hardness_compensate": "none", "hardness_switch_point": 1.0, "hardness_hold": 0.0}  # λ is learned to the end


def train_ours(cell: Cell, folder: str) -> Run:
    task = TASKS["Trainer" if cell.trainer == CALLBACK else cell.trainer]
    model, watch, values = ours(task.model()), Watch(), options(cell, task, folder)
    given = task.given()
    if cell.trainer == CALLBACK:
        callbacks: list[TrainerCallback] = [watch, hlg.HardnessCallback(**LEARNING)]  # type: ignore[arg-type]
        trainer = task.trainer(
            model=model,
            args=task.arguments(**values),
            callbacks=callbacks,
            optimizers=(optimizer(cell.optimizer, model), None),
            **given,
        )
    else:
        cls, arguments = joined(task)
        args = arguments(**values, **LEARNING, hardness_learning_rate=RATE[cell.optimizer])
        trainer = cls(model=model, args=args, callbacks=[watch], **given)
    trainer.train()
    return finished(watch, trainer)


def train_twin(cell: Cell, folder: str) -> Run:
    task = TASKS["Trainer" if cell.trainer == CALLBACK else cell.trainer]
    model, watch = twin(task.model()), Watch()
    args = task.arguments(**options(cell, task, folder))
    optimizers = (optimizer(cell.optimizer, model), None)
    trainer = task.trainer(model=model, args=args, callbacks=[watch], optimizers=optimizers, **task.given())
    trainer.train()
    return finished(watch, trainer)


def finished(watch: Watch, trainer: Trainer) -> Run:
    watch.run.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return watch.run


def run_loop(cell: Cell, model: nn.Module, loop: str) -> Run:
    run = Run()
    run.losses = LOOPS[loop](
        model, optimizer(cell.optimizer, model), cell.precision, STEPS, BATCH, lambda: run.profiles.append(profile(model))
    )
    return run


def difference(first: Run, second: Run) -> float:
    """The largest relative one of λ, over sites and steps."""
    pairs = [(a[name], b[name]) for a, b in zip(first.profiles, second.profiles, strict=True) for name in b]
    return max(abs(a - b) / b for a, b in pairs)


def measure(cell: Cell) -> Outcome:
    task = TASKS.get(cell.trainer, TASKS["Trainer"])
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, CI="1"):  # TRL sends telemetry from elsewhere
        try:
            got = run_loop(cell, ours(task.model()), cell.trainer) if cell.trainer in LOOPS else train_ours(cell, folder)
        except ValueError as error:
            return Outcome("refused", None, str(error))
        expected = run_loop(cell, twin(task.model()), "plain loop") if cell.trainer in LOOPS else train_twin(cell, folder)
    figure = difference(got, expected)
    moved = min(max(abs(p[name] - START) for p in expected.profiles) for name in expected.profiles[0])
    losses = max(abs(a - b) / max(abs(b), 1.0) for a, b in zip(got.losses, expected.losses, strict=True))
    same = figure <= BOUND[cell.precision] and losses <= BOUND[cell.precision] and len(got.profiles) == STEPS
    # a run whose λ stays shows nothing
    verdict = "equal" if same and moved > 1e-3 else "off"
    text = f"λ moved by {moved:.1e} or more; losses differ by {losses:.1e}"
    return Outcome(verdict, figure, text)
