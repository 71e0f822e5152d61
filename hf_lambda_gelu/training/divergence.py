"""Losses, λ and weights that are no numbers: the run is stopped before a checkpoint holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from ..activation.module import hardness_profile
from .resuming import last_good

_NO_LABEL = -100  # what transformers' losses leave out


class LossWatch:
    """Keeps the first loss that is NaN or infinite, and its step, where the losses are: nothing is waited for until `read`.

    transformers replaces such losses in its logs (`logging_nan_inf_filter`). A batch of which no label counts has a mean
    over nothing, NaN, and a gradient of 0: its loss is passed over.
    """

    def __init__(self) -> None:
        self._first: tuple[Tensor, Tensor] | None = None  # loss, step

    def see(self, loss: Tensor, step: int, inputs: Any) -> None:
        """Takes the loss of a batch, of the step that will be the run's `step`-th."""
        value = loss.detach().float().mean()
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            counts = (labels != _NO_LABEL).any().to(value.device, non_blocking=True)
            value = torch.where(counts, value, torch.zeros_like(value))
        now = torch.full_like(value, step)
        if self._first is not None:
            last, then = self._first
            bad = ~torch.isfinite(last)
            value, now = torch.where(bad, last, value), torch.where(bad, then, now)
        self._first = value, now

    def read(self) -> tuple[float, int] | None:
        """The loss and its step, if there is one that is no number."""
        if self._first is None:
            return None
        value, step = torch.stack(self._first).tolist()
        return None if math.isfinite(value) else (value, int(step))


def check_finite(
    model: nn.Module,
    state: TrainerState,
    args: TrainingArguments,
    losses: LossWatch | None = None,
    weights: bool = False,
) -> None:
    """FloatingPointError, with step, layer, value and the last good checkpoint, if training has diverged on any process.

    Args:
        losses: of the run since it began.
        weights: whether to read all weights too; else only λ, and the weights if a loss or a λ is no number.
    """
    profile = hardness_profile(model)
    hardness = {name: value for name, value in profile.items() if not math.isfinite(value)}
    loss = losses.read() if losses is not None else None
    broken = broken_weights(model) if weights or hardness or loss else []
    found = bool(hardness or loss or broken)
    if not _anywhere(found, args):
        return
    told = [f"the loss of step {loss[1]} is {loss[0]}"] if loss else []
    if hardness:
        name, value = next(iter(hardness.items()))
        told.append(f"λ of {name} is {value} after step {state.global_step}, {len(hardness)} sites in all")
    if broken:
        told.append(
            f"{len(broken)} weights hold values that are no numbers after step {state.global_step}, {broken[0]} first"
        )
    elif loss and not hardness:
        told.append("every λ and weight is still finite: look at the data of that step")
    if not found:
        told.append(f"another process has a loss or weights that are no numbers at step {state.global_step}")
    good = last_good(args.output_dir, args)
    kept = f"the last good checkpoint is {good}" if good else "no checkpoint was saved"
    raise FloatingPointError(
        f"{'; '.join(told)}: training has diverged; {kept}. Lower learning_rate or hardness_learning_rate, or "
        "set max_grad_norm"
    )


@torch.no_grad()
def broken_weights(model: nn.Module) -> list[str]:
    """The parameters, in network order, that hold NaN or infinity; of sharded ones, this process's part is looked at."""
    parts = {name: p.to_local() if hasattr(p, "to_local") else p for name, p in model.named_parameters()}
    parts = {name: p.detach() for name, p in parts.items() if p.is_floating_point() and p.numel() and not p.is_meta}
    if not parts:
        return []
    device = next(iter(parts.values())).device
    largest = torch.stack([torch.linalg.vector_norm(p, math.inf).float().to(device) for p in parts.values()])
    finite: list[bool] = torch.isfinite(largest).tolist()  # one transfer for all
    return [name for name, fine in zip(parts, finite, strict=True) if not fine]


def _anywhere(found: bool, args: TrainingArguments) -> bool:
    if args.world_size == 1 or not torch.distributed.is_initialized():
        return found
    flag = torch.tensor(float(found), device=args.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
