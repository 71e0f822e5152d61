"""What is looked at while a Trainer runs: that λ is in what is stepped, that it is a number, that it ends hard."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from ..activation.module import hardness_profile, hardness_sites
from ..structure.sharding import is_sharded
from .optimizer import attach_hardness_update, inside
from .zero import check_own_group, is_deepspeed

logger = logging.get_logger(__name__)


def attach_to_the_run(optimizer: Any, model: nn.Module) -> RemovableHandle | None:
    """Clips λ after each step of the optimizer that a Trainer steps, whoever made it, until the handle is removed.

    None where no λ is trained.

    Raises:
        ValueError: a λ is not in it, or in a group with weight decay, or in one that DeepSpeed's config made.
    """
    trained = [s.unclipped_hardness for s in hardness_sites(model).values() if s.unclipped_hardness.requires_grad]
    if not trained:
        return None
    if is_deepspeed(inside(optimizer)):
        check_own_group(inside(optimizer), trained)
    return attach_hardness_update(optimizer, model)


def warn_if_not_sharded(args: TrainingArguments, model: nn.Module, state: TrainerState) -> None:
    """Says so if FSDP was asked for and is not what runs: accelerate drops it on CPUs without a word."""
    asked = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and not is_sharded(model) and state.is_world_process_zero:
        logger.warning(
            "FSDP was asked for, and accelerate has not sharded the model, as it does that on accelerators alone: each "
            "process holds whole weights, in DistributedDataParallel where there are several"
        )


def check_finite(model: nn.Module, state: TrainerState, last: str | None) -> None:
    """FloatingPointError, with step and layer, if a λ is NaN or infinite."""
    broken = {name: value for name, value in hardness_profile(model).items() if not math.isfinite(value)}
    if broken:
        name, value = next(iter(broken.items()))
        kept = f"the last checkpoint is {last}" if last else "no checkpoint was saved"
        raise FloatingPointError(
            f"λ of {name} is {value} after step {state.global_step}, {len(broken)} sites in all: training has diverged; "
            f"{kept}. Lower learning_rate or hardness_learning_rate, or set max_grad_norm"
        )


def warn_if_soft(model: nn.Module, targets: Mapping[str, float], state: TrainerState) -> None:
    """Says so if the run has ended before λ reached its targets."""
    profile = hardness_profile(model)
    soft = [name for name, value in profile.items() if not value >= 0.999 * targets.get(name, math.inf)]
    if soft and state.is_world_process_zero:
        target = f"{targets[soft[0]]:.4g}" if soft[0] in targets else "not calibrated yet"
        logger.warning(
            f"training ended at step {state.global_step} of {state.max_steps} with {len(soft)} of {len(profile)} gates "
            f"soft: {soft[0]} has λ = {profile[soft[0]]:.4g}, its target is {target}. relu_ize(model, calibration=…, "
            "compensate='least_squares') refits what soft gates leave; or train on"
        )
