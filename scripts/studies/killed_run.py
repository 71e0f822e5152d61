"""The tiny run that `kills` interrupts: two layers, dropout, shuffled data, AdamW; a refit or a ramp at the switch."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, set_seed

import hf_lambda_gelu as hlg
from hf_lambda_gelu import LambdaGELUTrainer, LambdaGELUTrainingArguments  # imported now, and not in each fork
from hf_lambda_gelu.training.resuming import checkpoint_to_resume

Engine = Literal["refit", "ramp", "two processes"]
STEPS, SAVES, SWITCH = 12, 3, 6
STARTED, BEGUN, ENDED = "training-begun", "refit-begun", "refit-ended"  # files beside the run's folder
END = "end.json"


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random tokens, with a label that can be learned."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(3, 2000, (64, 16), generator=generator)
        self.labels = (self.tokens[:, 0] > 1000).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


class Marks(TrainerCallback):
    """Makes files when training begins and when the switch comes: before what the trainer's callbacks do there, or after."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (self.path.parent / STARTED).touch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SWITCH:
            self.path.touch()


def train(folder: Path, engine: Engine, resume: bool) -> None:
    """Trains in `folder`; at the end, `end.json` has what can be compared, and from which checkpoint the run went on."""
    (folder / f"pid-{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    set_seed(1)
    config = BertConfig(
        vocab_size=2000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, num_labels=2
    )
    model = BertForSequenceClassification(config)
    hlg.convert(model, init_hardness=1.3)
    args = LambdaGELUTrainingArguments(
        str(folder / "run"),
        seed=7,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        hardness_learning_rate=0.05,
        hardness_compensate="none" if engine == "ramp" else "least_squares",
        hardness_switch_point=SWITCH / STEPS,
        logging_steps=1,
        save_strategy="steps",
        save_steps=SAVES,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = LambdaGELUTrainer(model, args, train_dataset=Rows(), callbacks=[Marks(folder / BEGUN)])
    trainer.add_callback(Marks(folder / ENDED))
    good = None
    with contextlib.suppress(ValueError):  # none is whole: a new run
        good = checkpoint_to_resume(True, args) if resume else None
    trainer.train(resume_from_checkpoint=True if isinstance(good, str) else None)  # True: there is none
    if trainer.is_world_process_zero():
        found = {"hardness": hlg.hardness_profile(model), "learned": trainer.learned_hardness, "weights": digest(model)}
        begun = Path(good).name if isinstance(good, str) else "the start"
        (folder / END).write_text(json.dumps({"from": begun, **found}), encoding="utf-8")


def digest(model: torch.nn.Module) -> str:
    """Of every bit of the weights, λ among them."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode() + value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def as_rank(rank: int, world: int, port: int) -> None:
    """Makes this process one of several, as torchrun would."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["ACCELERATE_USE_CPU"] = "true"


def main() -> None:
    """One process of those that torchrun starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    train(arguments.folder, "two processes", arguments.resume)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
