"""Engines: DDP, FSDP2 and DeepSpeed's ZeRO, on processes of this machine, each against one process with the whole batch.

Losses are means and the ranks' batches are of one size, so that the mean of their gradients is the gradient of one process.
λ starts at 1.1, is clipped to 1 on its way, and is learned for half of the steps. Then it goes to its target: at once, with
a refit of the weights, and where ZeRO-3 has cut these up along the ramp. Compared are λ of every site and the
loss of a batch, after every step: a refit that the next step undoes is seen in the loss.

With the Trainer, the run is also continued from a checkpoint of before the switch and from one of after it.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

import hf_lambda_gelu as hlg
from scripts.matrix.cells import Cell, Outcome
from scripts.matrix.ranks import RankError, on_ranks

STEPS, SWITCH, SAVED = 10, 5, (4, 8)
BATCH = 8  # of all processes together
START = 1.1
TARGET = hlg.target_hardness()
# (learning rate of the weights, of λ): λ moves by some tenths until the switch
RATES = {"SGD": (0.005, 1.0), "AdamW": (1e-3, 0.1)}
# of λ and of the loss. fp32: sums in another order. bf16: a gradient has 8 bits, and each engine rounds it elsewhere; one
# process in bf16 is 0.012 and 0.028 from one in fp32
BOUNDS = {"fp32": (1e-5, 1e-4), "bf16": (5e-2, 1e-1)}


@dataclass(frozen=True)
class Engine:
    """How many processes there are, and what makes one run of them.

    Attributes:
        kind: "" for one process, "ddp", "fsdp2" or "zero".
        stage: of ZeRO.
    """

    kind: str = ""
    processes: int = 1
    stage: int = 0

    @property
    def refits(self) -> bool:
        """Whether weights can be refit at the switch: each process has all of them, or can bring them together by blocks."""
        return self.stage < 3

    def share(self, batches: list[Any], rank: int) -> dict[str, Any]:
        """What `harden` is given on a process: all batches, or its own of them where processes have parts of the weights."""
        if self.kind != "fsdp2":
            return {"calibration": batches}
        return {"calibration": batches[rank :: self.processes], "processes": "all"}


ONE = Engine()
ENGINES = {
    "DDP × 2": Engine("ddp", 2),
    "DDP × 4": Engine("ddp", 4),
    "FSDP2 × 2": Engine("fsdp2", 2),
    **{f"ZeRO-{stage} × 2": Engine("zero", 2, stage) for stage in range(4)},
}
CELLS = [
    Cell(optimizer, precision, engine, trainer)
    for engine in ENGINES
    for trainer in ("own loop", "Trainer")
    for precision in ("fp32", "bf16")
    for optimizer in ("SGD", "AdamW")
]


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random token rows, with a label that can be learned."""

    def __init__(self, count: int = 32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(3, 99, (count, 12), generator=generator)
        self.labels = (self.tokens[:, 0] > 50).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}

    def batch(self, chosen: slice | list[int]) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[chosen], "labels": self.labels[chosen]}


def network() -> BertForSequenceClassification:
    """Two layers with λ-GELU, the same each time; without dropout, whose random numbers differ by process."""
    torch.manual_seed(3)  # one by which λ is clipped to 1 and rises again, with both optimizers
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,  # so that λ and the refit matter
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    hlg.convert(model, START)
    return model


def config_of(engine: Engine, precision: str) -> dict[str, Any]:
    """DeepSpeed's. ZeRO-3 cuts up every parameter, also the small ones that it would leave whole."""
    zero: dict[str, Any] = {"stage": engine.stage}
    if engine.stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "train_micro_batch_size_per_gpu": BATCH // engine.processes,
        "train_batch_size": BATCH,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }


Record = dict[str, Any]


def prepare() -> None:
    """What all processes need, done once before they are forked."""
    torch.set_num_threads(1)
    # with gloo, for what DeepSpeed would compile an extension in a minute and a half
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    network()  # reads transformers' source files
    gc.collect()
    gc.freeze()  # or each process looks through all that was imported


def look(model: nn.Module, forward: Callable[..., Any], record: Record) -> None:
    """Add λ of each site and the loss of a batch to the record; every process does."""
    record["hardness"].append(hlg.hardness_profile(model))
    training = model.training
    model.eval()
    with torch.no_grad():
        record["loss"].append(forward(**Rows(8, 1).batch(slice(8))).loss.item())
    model.train(training)


# ------------------------------------------------------------------------------------------------------------ own loop


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


# ------------------------------------------------------------------------------------------------------------- Trainer


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


# ----------------------------------------------------------------------------------------------------------- the cells


def apart(run: Record, twin: Record, skipped: int = 0) -> tuple[float, float]:
    """The largest relative difference of λ, and of the loss, to the twin, whose first steps are skipped."""
    pairs = list(zip(run["hardness"], twin["hardness"][skipped:], strict=True))
    hardness = max(abs(one[site] / other[site] - 1.0) for one, other in pairs for site in other)
    losses = zip(run["loss"], twin["loss"][skipped:], strict=True)
    return hardness, max(abs(one / other - 1.0) for one, other in losses)


def measure(cell: Cell) -> Outcome:
    """Train by the engine, on its processes, and in one process, and compare."""
    prepare()
    engine = ENGINES[cell.engine]
    run = partial(own_loop if cell.trainer == "own loop" else with_trainer, engine, cell.optimizer, cell.precision)
    same = {} if engine.refits else {"hardness_compensate": "none"}
    folder = Path(tempfile.mkdtemp(prefix="engines"))
    try:
        if cell.trainer == "own loop":
            twin = on_ranks(1, partial(own_loop, ONE, cell.optimizer, cell.precision, refit=engine.refits))[0]
            found = [apart(on_ranks(engine.processes, run)[0], twin)]
        else:
            twin = on_ranks(1, partial(with_trainer, ONE, cell.optimizer, cell.precision, **same))[0]
            found = [apart(on_ranks(engine.processes, partial(run, folder=folder))[0], twin)]
            found += [_continued(run, engine.processes, folder, step, twin) for step in SAVED]
    except RankError as error:
        last = str(error).strip().splitlines()[-1]
        refused = last.startswith("ValueError")
        return Outcome("refused" if refused else "off", None, last.removeprefix("ValueError: "))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _outcome(cell, engine, twin, found)


def _continued(run: Callable[..., Record], processes: int, folder: Path, step: int, twin: Record) -> tuple[float, float]:
    return apart(on_ranks(processes, partial(run, folder=folder, resume=step))[0], twin, step)


def _outcome(cell: Cell, engine: Engine, twin: Record, found: list[tuple[float, float]]) -> Outcome:
    hardness, loss = map(max, zip(*found, strict=True))
    learned = twin["hardness"][: SWITCH - 1]
    moved = min(max(abs(profile[site] - START) for profile in learned) for site in learned[0])
    text = f"one process: λ of {STEPS} steps, learned by {moved:.2f} and more; loss within {loss:.0e}"
    text += ", refit at the switch" if engine.refits else ", ramp"
    text += "" if cell.trainer == "own loop" else ", continued from checkpoints of before and after it"
    within = all(value <= bound for value, bound in zip((hardness, loss), BOUNDS[cell.precision], strict=True))
    equal = within and moved > 0.05
    return Outcome("equal" if equal else "off", hardness, text)
