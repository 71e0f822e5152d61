"""One run by an engine, on one of its processes: in a loop of one's own, or with the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

import hf_lambda_gelu as hlg
from scripts.matrix.engine_setup import (
    BATCH,
    RATES,
    SAVED,
    STEPS,
    SWITCH,
    TARGET,
    Engine,
    Record,
    Rows,
    config_of,
    look,
    network,
)


def own_loop(engine: Engine, optimizer: str, precision: str, rank: int, refit: bool | None = None) -> Record:
    """Train in a loop of one's own on this process; what it saw after every step, and what it would save."""
    model, rows = network(), Rows()
    forward, optimizer_, step = _engine(engine, optimizer, precision, model)
    hlg.attach_hardness_update(optimizer_, model)
    record: Record = {"hardness": [], "loss": []}
    schedule = hlg.HardeningSchedule(STEPS, SWITCH / STEPS, 0.2)
    learned: dict[str, float] = {}
    per_rank = BATCH // engine.processes
    for number in range(1, STEPS + 1):
        chosen = [(number * BATCH + rank * per_rank + i) % len(rows) for i in range(per_rank)]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16" and engine.kind != "zero"):
            loss = forward(**rows.batch(chosen)).loss
        step(loss)
        if number == SWITCH and (engine.refits if refit is None else refit):
            hlg.harden(model, **engine.share([rows.batch(slice(i, i + 8)) for i in range(0, 32, 8)], rank))
        learned = learned or (hlg.hardness_profile(model) if number == SWITCH else {})
        if learned:
            for name, site in hlg.hardness_sites(model).items():
                site.set_hardness(schedule.hardness(number, learned[name], TARGET))
        look(model, forward, record)
    if engine.kind == "fsdp2":
        record["saved"] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return record


def _engine(
    engine: Engine, optimizer: str, precision: str, model: nn.Module
) -> tuple[Callable[..., Any], Any, Callable[[Tensor], None]]:
    """What to call for an output, the optimizer, and what to do with a loss."""
    rate, own = RATES[optimizer]
    if engine.kind == "zero":
        return _deepspeed(engine, optimizer, precision, model)
    forward: nn.Module = model
    if engine.kind:
        torch.distributed.init_process_group("gloo")
    if engine.kind == "ddp":
        forward = DistributedDataParallel(model)
    if engine.kind == "fsdp2":
        mesh = init_device_mesh("cpu", (engine.processes,))
        for layer in model.bert.encoder.layer:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    stepped = _optimizer(optimizer)(hlg.parameter_groups(model, own), lr=rate, weight_decay=0.0)

    def step(loss: Tensor) -> None:
        loss.backward()
        stepped.step()
        stepped.zero_grad()

    return forward, stepped, step


def _deepspeed(
    engine: Engine, optimizer: str, precision: str, model: nn.Module
) -> tuple[Callable[..., Any], Any, Callable[[Tensor], None]]:
    rate, own = RATES[optimizer]
    stepped = _optimizer(optimizer)(hlg.parameter_groups(model, own), lr=rate, weight_decay=0.0)
    started, *_ = deepspeed.initialize(model=model, optimizer=stepped, config=config_of(engine, precision))

    def step(loss: Tensor) -> None:
        started.backward(loss)
        started.step()

    return started, started.optimizer, step


def _optimizer(name: str) -> Any:
    return {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[name]


class Looking(TrainerCallback):
    """Looks after every step."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        look(kwargs["model"], kwargs["model"], self.record)


def with_trainer(
    engine: Engine,
    optimizer: str,
    precision: str,
    rank: int,
    folder: Path | None = None,
    resume: int | None = None,
    **changes: Any,
) -> Record:
    """Train with `LambdaGELUTrainer` on this process; what it saw after every step.

    Args:
        folder: for checkpoints of the steps `SAVED`; None for none.
        resume: a step whose checkpoint to go on from.
        changes: arguments that shall be others.
    """
    model = network()
    if engine.kind == "zero":
        changes = {"deepspeed": config_of(engine, precision), **changes}
    rate, own = RATES[optimizer]
    values: dict[str, Any] = {
        "output_dir": "unused" if folder is None else str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // engine.processes,
        "learning_rate": rate,
        "hardness_learning_rate": own,
        "hardness_switch_point": SWITCH / STEPS,
        "hardness_compensate": "least_squares" if engine.refits else "none",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "optim": {"SGD": "sgd", "AdamW": "adamw_torch"}[optimizer],
        "bf16": precision == "bf16",
        "save_strategy": "no" if folder is None or resume else "steps",
        "save_steps": SAVED[0],
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "fsdp": engine.kind == "fsdp2",
        "fsdp_config": {"fsdp_version": 2} if engine.kind == "fsdp2" else None,
        "use_cpu": True,
        "seed": 3,
    }
    record: Record = {"hardness": [], "loss": []}
    trainer = Averaging(model, hlg.LambdaGELUTrainingArguments(**{**values, **changes}), train_dataset=Rows())
    trainer.add_callback(Looking(record))
    trainer.train(None if resume is None else str(folder / f"checkpoint-{resume}"))
    record["engine"] = type(trainer.model_wrapped).__name__
    record["logged"] = [{k: v for k, v in entry.items() if "hardness" in k} for entry in trainer.state.log_history]
    return record


class Averaging(hlg.LambdaGELUTrainer):
    """The loss is the mean of a process's examples: stock BERT's, which Trainer multiplies by the number of processes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
