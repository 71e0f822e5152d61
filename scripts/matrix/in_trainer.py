"""Optimizers of transformers' Trainer: by name, by class, by a factory, made before, made by a subclass."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_lambda_gelu as hlg
from scripts.matrix.cells import Cell, Outcome
from scripts.matrix.comparison import RATE, Make, Profile, Refusal, Run, compared, dtype_of, parameters_of, refused
from scripts.matrix.composite import MuonAndAdamW, MuonFactory
from scripts.matrix.twin import BATCH, STEPS, Rows, clip, ours, twin, twin_groups, unchanged


@dataclass(frozen=True)
class Way:
    """How a Trainer gets its optimizer.

    Attributes:
        options: training arguments.
        given: the Trainer's `optimizers` or `optimizer_cls_and_kwargs`, of model and groups.
        trainer: the class that trains ours.
        late: arguments that are set once the trainer is made, as searches for hyperparameters do.
    """

    options: dict[str, Any] = field(default_factory=dict)
    given: Callable[[nn.Module], dict[str, Any]] = lambda model: {}
    make: Make | None = None
    trainer: type[hlg.LambdaGELUTrainer] = hlg.LambdaGELUTrainer
    late: dict[str, Any] = field(default_factory=dict)


class Watch(TrainerCallback):
    """Writes down where a run is after each step, and ends it; of the twin, clips λ after the optimizer's step."""

    def __init__(self, read: Callable[[], Profile], hardness: list[nn.Parameter], led_by: Run | None = None) -> None:
        self.run = Run()
        self.read, self.hardness, self.led_by = read, hardness, led_by
        self.steps = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        inner = kwargs["optimizer"]
        self.run.clipped += clip(self.hardness, getattr(inner, "optimizer", inner))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.after_step(kwargs["model"], self.read(), self.led_by)
        control.should_training_stop = state.global_step == STEPS


def _arguments(cls: type[TrainingArguments], folder: str, precision: str, options: dict[str, Any]) -> Any:
    values: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": STEPS + 10,  # the switch is at their end, where no run comes
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "bf16": precision == "bf16",
    }
    values |= {} if precision == "fp32" else {"max_grad_norm": 0.0}  # a factor made of all gradients, with their roundings
    if issubclass(cls, hlg.LambdaGELUTrainingArguments):  # λ is learned to the end
        values |= {"hardness_compensate": "none", "hardness_switch_point": 1.0, "hardness_hold": 0.0}
        values |= {"hardness_learning_rate": RATE}
    return cls(**{**values, **options})


def _hardness_on_disk(folder: Path) -> Profile:
    tensors = load_file(folder / "model.safetensors")
    named = {name: value for name, value in tensors.items() if name.endswith((".unclipped_hardness", "act_fn.hardness"))}
    return [max(named[name].item(), 1.0) for name in sorted(named)]


def _train_ours(cell: Cell, way: Way, folder: str) -> Run:
    model = ours(dtype_of(cell))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    watch = Watch(lambda: list(hlg.hardness_profile(model).values()), [])
    if cell.precision != "fp32":
        watch.run.watch_gradients(parameters_of(model), None)
    try:
        options = {k: v for k, v in way.options.items() if k not in way.late}
        arguments = _arguments(hlg.LambdaGELUTrainingArguments, folder, cell.precision, options)
        trainer = way.trainer(model, arguments, train_dataset=Rows(), callbacks=[watch], **way.given(model))
        for name, value in way.late.items():
            setattr(trainer.args, name, value)
        trainer.train()
    except Exception as error:
        if watch.steps:
            raise
        raise Refusal(error, unchanged(model, before)) from error
    trainer.save_model(folder)
    watch.run.profiles.append(_hardness_on_disk(Path(folder)))
    return watch.run


def _twin_of_trainer(cell: Cell, way: Way, folder: str, led_by: Run | None) -> Run:
    model, hardness = twin(dtype_of(cell))
    options = {**way.options, **way.late}
    rate = options.pop("hardness_learning_rate", RATE)
    arguments = _arguments(TrainingArguments, folder, cell.precision, options)
    if way.make is not None:
        optimizer = way.make(model, twin_groups(model, hardness, rate))
    else:
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        kwargs.pop("model", None)
        optimizer = cls(twin_groups(model, hardness, rate, kwargs.pop("params", None)), **kwargs)
    watch = Watch(lambda: [p.item() for p in hardness], hardness, led_by)
    if led_by is not None and cell.precision != "fp32":
        watch.run.watch_gradients(hardness, led_by)
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[watch], optimizers=(optimizer, None))
    trainer.train()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    watch.run.profiles.append([p.item() for p in hardness])
    return watch.run


def with_trainer(cell: Cell) -> Outcome:
    way = WAYS[cell.optimizer]
    with tempfile.TemporaryDirectory() as folder:
        try:
            mine = _train_ours(cell, way, folder)
        except Refusal as refusal:
            return refused(refusal, lambda: _twin_of_trainer(cell, way, folder, None))
        return compared(cell, mine, _twin_of_trainer(cell, way, folder, mine), "plain Trainer")


LOW_RANK = {"optim_target_modules": ["query", "key", "value"], "optim_args": "rank=4,update_proj_gap=10"}


def _options(name: str) -> dict[str, Any]:
    options: dict[str, Any] = {"optim": name}
    if name.startswith(("galore", "apollo")):
        options |= LOW_RANK
    if name in ("sgd", "schedule_free_sgd"):  # no factor hides
        options |= {"hardness_learning_rate": 5.0, "learning_rate": 0.01, "max_grad_norm": 0.0}
    return options


class OwnGroups(hlg.LambdaGELUTrainer):
    """With a `create_optimizer` that does not call its base's."""

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        self.optimizer = torch.optim.AdamW(hlg.parameter_groups(self.model, RATE), lr=1e-3, weight_decay=0.0)
        return self.optimizer


class Decayed(hlg.LambdaGELUTrainer):
    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)
        return self.optimizer


class LeftOut(hlg.LambdaGELUTrainer):
    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        others = [p for name, p in self.model.named_parameters() if "hardness" not in name]
        self.optimizer = torch.optim.AdamW(others, lr=1e-3)
        return self.optimizer


def _adamw(model: nn.Module, groups: list[dict[str, Any]]) -> Optimizer:
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)


def _lion(model: nn.Module, groups: list[dict[str, Any]]) -> Optimizer:
    from lion_pytorch import Lion

    return Lion(groups, lr=1e-3)


def _lomo(model: nn.Module) -> Optimizer:
    from lomo_optim import Lomo

    return Lomo(model, lr=1e-3)


def _cls_of_lion(model: nn.Module) -> dict[str, Any]:
    from lion_pytorch import Lion

    return {"optimizer_cls_and_kwargs": (Lion, {"lr": 1e-3})}


WAYS: dict[str, Way] = {name.value: Way(_options(name.value)) for name in OptimizerNames} | {
    "create_optimizer of one's own": Way(trainer=OwnGroups, make=_adamw),
    "create_optimizer of one's own, λ decayed": Way(trainer=Decayed, make=_adamw),
    "create_optimizer of one's own, λ left out": Way(trainer=LeftOut, make=_adamw),
    "optimizers=(AdamW, None)": Way(
        given=lambda model: {"optimizers": (_adamw(model, hlg.parameter_groups(model, RATE)), None)}, make=_adamw
    ),
    "optimizers=(LOMO, None)": Way(given=lambda model: {"optimizers": (_lomo(model), None)}),
    "optimizer_cls_and_kwargs: Lion": Way(given=_cls_of_lion, make=_lion),
    "optimizer_cls_and_kwargs: a factory of Muon + AdamW": Way(
        given=lambda model: {"optimizer_cls_and_kwargs": (MuonFactory, {"lr": 1e-3})},
        make=lambda model, groups: MuonAndAdamW(groups, lr=1e-3),
    ),
    "arguments set late, as by a search": Way(
        options={"optim": "sgd"}, late={"optim": "adamw_torch", "learning_rate": 2e-3, "hardness_learning_rate": 0.03}
    ),
    "arguments set late, to what is not valid": Way(late={"hardness_learning_rate": -1.0}),
}
