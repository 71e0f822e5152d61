"""The same training as a plain loop, as one with accelerate, and by Lightning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import lightning
import torch
from accelerate import Accelerator  # type: ignore[attr-defined]  # it ships no types
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hf_lambda_gelu as hlg
from scripts.matrix.trainer_tasks import classified

Optimizer = torch.optim.Optimizer
Loop = Callable[[nn.Module, Optimizer, str, int, int, Callable[[], None]], list[float]]


def _loader(batch: int) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(classified(), batch)  # type: ignore[arg-type]


def _attach(optimizer: Optimizer, model: nn.Module) -> None:
    if hlg.hardness_sites(model):
        hlg.attach_hardness_update(optimizer, model)


def _cycled(loader: Any, steps: int) -> list[Any]:
    batches = list(loader)
    return [batches[step % len(batches)] for step in range(steps)]


def plain(
    model: nn.Module, optimizer: Optimizer, precision: str, steps: int, batch: int, watch: Callable[[], None]
) -> list[float]:
    """No library."""
    _attach(optimizer, model)
    model.train()
    losses = []
    for inputs in _cycled(_loader(batch), steps):
        low = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        optimizer.zero_grad()
        with low:
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        watch()
    return losses


def accelerated(
    model: nn.Module, optimizer: Optimizer, precision: str, steps: int, batch: int, watch: Callable[[], None]
) -> list[float]:
    """Two batches of half the size for each step."""
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no", cpu=True, gradient_accumulation_steps=2
    )
    prepared, stepped, loader = accelerator.prepare(model, optimizer, _loader(batch // 2))
    _attach(stepped, model)
    prepared.train()
    losses: list[float] = []
    halves: list[float] = []
    while len(losses) < steps:
        for inputs in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**inputs).loss
                accelerator.backward(loss)
                stepped.step()
                stepped.zero_grad()
            halves.append(loss.item())
            if accelerator.sync_gradients and len(losses) < steps:
                losses.append(sum(halves) / len(halves))
                halves = []
                watch()
    return losses


class _Module(lightning.LightningModule):
    def __init__(self, model: nn.Module, optimizer: Optimizer, watch: Callable[[], None]) -> None:
        super().__init__()
        self.model, self.optimizer, self.watch = model, optimizer, watch
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        _attach(self.optimizer, self.model)
        return self.optimizer

    def on_train_batch_end(self, *args: Any) -> None:
        self.watch()


def by_lightning(
    model: nn.Module, optimizer: Optimizer, precision: str, steps: int, batch: int, watch: Callable[[], None]
) -> list[float]:
    """A LightningModule."""
    module = _Module(model, optimizer, watch)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, _loader(batch))
    return module.losses


LOOPS: dict[str, Loop] = {"plain loop": plain, "Accelerate loop": accelerated, "Lightning loop": by_lightning}
