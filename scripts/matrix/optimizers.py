"""Optimizers: every name that transformers' Trainer knows, optimizers that are handed to it, and those of own loops.

Each run has thirty steps. Its λ after every step, after `optimizer.eval()` where there is one, and in what is saved at the
end, are compared with those of the twin (see twin.py), which the plain Trainer or a plain loop trains with the same
optimizer, λ in a group of its own, without weight decay, clipped to ≥ 1 after each step. The twin gets the run's other
weights after each step. A run that clips nothing, or whose λ stays, shows nothing and counts as off.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_lambda_gelu as hlg
from scripts.matrix.cells import Cell, Outcome
from scripts.matrix.optimizers_of_others import MuonAndAdamW, MuonFactory, SharpnessAware
from scripts.matrix.twin import (
    BATCH,
    STEPS,
    Rows,
    clip,
    difference,
    ours,
    set_weights,
    twin,
    twin_groups,
    unchanged,
    weights,
)

RATE = 0.05  # of λ, in units of λ per step
BOUND = {"fp32": 1e-5, "bf16": 1e-5, "pure bf16": 1e-5}
Profile = list[float]
Make = Callable[[nn.Module, list[dict[str, Any]]], Any]


@dataclass
class Run:
    """λ after each step and at the end, all other weights after each step, and how often λ was clipped by the twin."""

    profiles: list[Profile] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    clipped: int = 0

    def after_step(self, model: nn.Module, profile: Profile, led_by: Run | None) -> None:
        """Writes down where the run is; the twin's other weights become those of the run that leads it."""
        if led_by is None:
            self.weights.append(weights(model))
        else:
            set_weights(model, led_by.weights[len(self.profiles)])
        self.profiles.append(profile)


# --- transformers' Trainer


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
    if issubclass(cls, hlg.LambdaGELUTrainingArguments):  # λ is learned to the end
        values |= {"hardness_compensate": "none", "hardness_switch_point": 1.0, "hardness_hold": 0.0}
        values |= {"hardness_learning_rate": RATE}
    return cls(**{**values, **options})


def _hardness_on_disk(folder: Path) -> Profile:
    tensors = load_file(folder / "model.safetensors")
    named = {name: value for name, value in tensors.items() if name.endswith((".unclipped_hardness", "act_fn.hardness"))}
    return [max(named[name].item(), 1.0) for name in sorted(named)]


def _train_ours(cell: Cell, way: Way, folder: str) -> Run:
    model = ours(_dtype(cell))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    watch = Watch(lambda: list(hlg.hardness_profile(model).values()), [])
    try:
        options = {k: v for k, v in way.options.items() if k not in way.late}
        arguments = _arguments(hlg.LambdaGELUTrainingArguments, folder, cell.precision, options)
        trainer = way.trainer(model, arguments, train_dataset=Rows(), callbacks=[watch], **way.given(model))
        for name, value in way.late.items():
            setattr(trainer.args, name, value)
        trainer.train()
    except Exception as error:
        if watch.steps or not unchanged(model, before):
            raise
        raise _Refusal(error) from error
    trainer.save_model(folder)
    watch.run.profiles.append(_hardness_on_disk(Path(folder)))
    return watch.run


def _twin_of_trainer(cell: Cell, way: Way, folder: str, led_by: Run | None) -> Run:
    model, hardness = twin(_dtype(cell))
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
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[watch], optimizers=(optimizer, None))
    trainer.train()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    watch.run.profiles.append([p.item() for p in hardness])
    return watch.run


class _Refusal(Exception):
    def __init__(self, error: Exception) -> None:
        self.error = error


def _with_trainer(cell: Cell) -> Outcome:
    way = TRAINER[cell.optimizer]
    with tempfile.TemporaryDirectory() as folder:
        try:
            mine = _train_ours(cell, way, folder)
        except _Refusal as refusal:
            return _refused(refusal.error, lambda: _twin_of_trainer(cell, way, folder, None))
        return _compared(cell, mine, _twin_of_trainer(cell, way, folder, mine), "plain Trainer")


def _refused(error: Exception, train_twin: Callable[[], Any]) -> Outcome:
    """Refused by name if the package says it, or if the stock Trainer and its libraries say the same of the twin."""
    text = str(error)
    if isinstance(error, (ValueError, TypeError)) and ("λ" in text or "hardness" in text):
        return Outcome("refused", None, text)
    try:
        train_twin()
    except Exception as stock:
        if (type(stock), str(stock)) == (type(error), text):
            return Outcome("refused", None, f"stock Trainer too, {type(stock).__name__}: {text}")
    return Outcome("off", None, f"not by name: {type(error).__name__}: {text}")


def _compared(cell: Cell, mine: Run, theirs: Run, trained_by: str) -> Outcome:
    figure = difference(mine.profiles, theirs.profiles)
    moved = max(abs(a - b) for a, b in zip(theirs.profiles[0], theirs.profiles[-1], strict=True))
    said = f"{trained_by}, own group; λ moved by {moved:.2g}, clipped {theirs.clipped} times"
    if moved < 1e-3 or not theirs.clipped:
        return Outcome("off", figure, f"shows nothing: {said}")
    return Outcome("equal" if figure <= BOUND[cell.precision] else "off", figure, said)


def _dtype(cell: Cell) -> torch.dtype:
    return torch.bfloat16 if cell.precision == "pure bf16" else torch.float32


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


TRAINER: dict[str, Way] = {f'optim="{name.value}"': Way(_options(name.value)) for name in OptimizerNames} | {
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


# --- loops


def _of(module: str, name: str, **options: Any) -> Make:
    """An optimizer of a library that is imported when it is wanted."""

    def make(model: nn.Module, groups: list[dict[str, Any]]) -> Any:
        from importlib import import_module

        return getattr(import_module(module), name)(groups, **options)

    return make


def _of_torch(name: str, **options: Any) -> Make:
    return _of("torch.optim", name, **options)


def _low_rank(module: str, name: str, **options: Any) -> Make:
    def make(model: nn.Module, groups: list[dict[str, Any]]) -> Any:
        matrices = {id(p) for key, p in model.named_parameters() if ".self." in key and p.ndim == 2}
        first, *rest = groups
        apart = {"params": [p for p in first["params"] if id(p) in matrices], "rank": 4, "update_proj_gap": 10, **options}
        others = {**first, "params": [p for p in first["params"] if id(p) not in matrices]}
        return _of(module, name, lr=1e-3)(model, [others, *rest, apart])

    return make


def _in_accelerate(model: nn.Module, groups: list[dict[str, Any]]) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(_adamw(model, groups))


def _two(model: nn.Module, groups: list[dict[str, Any]]) -> list[Optimizer]:
    return MuonAndAdamW(groups, lr=1e-3).both


def _schedule_free_wrapper(model: nn.Module, groups: list[dict[str, Any]]) -> Any:
    from schedulefree import ScheduleFreeWrapper

    return ScheduleFreeWrapper(torch.optim.RMSprop(groups, lr=1e-3))


def _of_model(name: str) -> Make:
    return lambda model, groups: _of("lomo_optim", name)(model, model)  # type: ignore[arg-type]


LOOP: dict[str, Make] = {
    "AdamW": _of_torch("AdamW", lr=1e-3),
    "AdamW, fused": _of_torch("AdamW", lr=1e-3, fused=True),
    "Adam": _of_torch("Adam", lr=1e-3),
    "SGD, momentum": _of_torch("SGD", lr=0.01, momentum=0.9),
    "Adafactor (torch)": _of_torch("Adafactor", lr=1e-3),
    "Adafactor (transformers)": _of("transformers.optimization", "Adafactor", lr=1e-3, relative_step=False),
    "RMSprop": _of_torch("RMSprop", lr=1e-3),
    "NAdam": _of_torch("NAdam", lr=1e-3),
    "RAdam": _of_torch("RAdam", lr=1e-3),
    "Adagrad": _of_torch("Adagrad", lr=1e-3),
    "Adadelta": _of_torch("Adadelta", lr=0.1),
    "Adamax": _of_torch("Adamax", lr=1e-3),
    "ASGD": _of_torch("ASGD", lr=0.01),
    "Rprop": _of_torch("Rprop", lr=1e-3),
    "Lion": _of("lion_pytorch", "Lion", lr=1e-3),
    "AdamW, 8 bit (bitsandbytes)": _of("bitsandbytes.optim", "AdamW8bit", lr=1e-3),
    "AdamW, paged 32 bit (bitsandbytes)": _of("bitsandbytes.optim", "PagedAdamW32bit", lr=1e-3),
    "Lion, 8 bit (bitsandbytes)": _of("bitsandbytes.optim", "Lion8bit", lr=1e-3),
    "Muon + AdamW, two optimizers": _two,
    "Muon + AdamW in one": lambda model, groups: MuonAndAdamW(groups, lr=1e-3),
    "schedule-free AdamW": _of("schedulefree", "AdamWScheduleFree", lr=1e-3),
    "schedule-free RAdam": _of("schedulefree", "RAdamScheduleFree", lr=1e-3),
    "schedule-free SGD": _of("schedulefree", "SGDScheduleFree", lr=0.01),
    "schedule-free wrapper of RMSprop": _schedule_free_wrapper,
    "SAM of SGD": lambda model, groups: SharpnessAware(groups, lr=0.01),
    "SAM of AdamW": lambda model, groups: SharpnessAware(groups, torch.optim.AdamW, lr=1e-3),
    "GaLore AdamW": _low_rank("galore_torch", "GaLoreAdamW", scale=0.25, proj_type="std"),
    "APOLLO AdamW": _low_rank(
        "apollo_torch", "APOLLOAdamW", scale=1.0, proj_type="std", proj="random", scale_type="channel"
    ),
    "LOMO": _of_model("Lomo"),
    "AdaLOMO": _of_model("AdaLomo"),
    "AdamW in accelerate's wrapper": _in_accelerate,
}
SLOW = {"SGD, momentum": 5.0, "schedule-free SGD": 20.0, "SAM of SGD": 20.0, "ASGD": 20.0, "Adadelta": 5.0}  # η of λ


def _loop(
    model: nn.Module,
    optimizers: list[Any],
    read: Callable[[], Profile],
    clip_now: Callable[[], int] = lambda: 0,
    led_by: Run | None = None,
) -> Run:
    run = Run()
    data = Rows()
    _set_mode(optimizers, "train")
    for step in range(STEPS):
        batch = default_collate([data[(step * BATCH + i) % len(data)] for i in range(BATCH)])

        def backward(batch: dict[str, Tensor] = batch) -> Tensor:
            loss: Tensor = model(**batch).loss
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        backward()
        for optimizer in optimizers:
            optimizer.step(*[backward] * isinstance(optimizer, SharpnessAware))
        for optimizer in optimizers:
            optimizer.zero_grad()
        run.clipped += clip_now()
        run.after_step(model, read(), led_by)
    _set_mode(optimizers, "eval")
    run.profiles.append(read())
    return run


def _set_mode(optimizers: list[Any], name: str) -> None:
    for optimizer in optimizers:
        if inspect.ismethod(getattr(optimizer, name, None)):
            getattr(optimizer, name)()


def _with_loop(cell: Cell) -> Outcome:
    make, rate = LOOP[cell.optimizer], SLOW.get(cell.optimizer, RATE)
    model = ours(_dtype(cell))
    other, hardness = twin(_dtype(cell))
    try:
        optimizers = _made(make, model, hlg.parameter_groups(model, rate))
        hlg.attach_hardness_update(optimizers[-1], model)
    except Exception as error:
        return _refused(error, lambda: _made(make, other, twin_groups(other, hardness, rate)))
    mine = _loop(model, optimizers, lambda: list(hlg.hardness_profile(model).values()))
    optimizers = _made(make, other, twin_groups(other, hardness, rate))
    clip_now = partial(clip, hardness, optimizers[-1])
    if hasattr(optimizers[-1], "base"):  # a wrapper makes its average of what the optimizer that it wraps has stepped
        clip_now = _clipping_inside(optimizers[-1].base, hardness)
    theirs = _loop(other, optimizers, lambda: [p.item() for p in hardness], clip_now, mine)
    return _compared(cell, mine, theirs, "plain loop")


def _made(make: Make, model: nn.Module, groups: list[dict[str, Any]]) -> list[Any]:
    made = make(model, groups)
    return made if isinstance(made, list) else [made]


def _clipping_inside(optimizer: Any, hardness: list[nn.Parameter]) -> Callable[[], int]:
    """Has the optimizer clip λ after its own step; returns what tells how many the last one has clipped."""
    step = optimizer.step
    counts = [0]

    def clipped_step() -> None:
        step()
        counts.append(clip(hardness, torch.optim.SGD(hardness)))

    optimizer.step = clipped_step
    return lambda: counts[-1]


COMMON = tuple(f'optim="{name}"' for name in ("adamw_torch_fused", "sgd", "adafactor", "lion_32bit", "schedule_free_adamw"))
COMMON_LOOP = ("AdamW", "SGD, momentum", "Adafactor (torch)", "Lion", "Muon + AdamW in one", "schedule-free AdamW")
HALF = ("bf16", "pure bf16")
CELLS = (
    *(Cell(name, "fp32", "one process", "Trainer") for name in TRAINER),
    *(Cell(name, precision, "one process", "Trainer") for precision in HALF for name in COMMON),
    *(Cell(name, "fp32", "one process", "own loop") for name in LOOP),
    *(Cell(name, "pure bf16", "one process", "own loop") for name in COMMON_LOOP),
)


def measure(cell: Cell) -> Outcome:
    """λ of that way of training beside that of its twin."""
    torch.set_num_threads(1)
    return _with_trainer(cell) if cell.trainer == "Trainer" else _with_loop(cell)
