"""What the runs of all engines share: processes and configs of each engine, the network, its rows, the look after a step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import hf_lambda_gelu as hlg

STEPS, SWITCH, SAVED = 10, 5, (4, 8)
BATCH = 8  # of all processes together
START = 1.1
TARGET = hlg.target_hardness()
# (learning rate of the weights, of λ): λ moves by some tenths until the switch
RATES = {"SGD": (0.005, 1.0), "AdamW": (1e-3, 0.1)}


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
