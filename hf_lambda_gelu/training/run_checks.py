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


def check_engine(args: TrainingArguments, model: nn.Module, optimizer: Any) -> None:
    """ValueError if FSDP or DeepSpeed was asked for and is not what runs: accelerate drops them on CPUs without a word."""
    if _asked(args.fsdp, "ACCELERATE_USE_FSDP") and not is_sharded(model):
        raise ValueError(
            "FSDP was asked for, and accelerate has not sharded the model: it does that on accelerators alone, and on CPUs "
            "runs DistributedDataParallel. Take fsdp and ACCELERATE_USE_FSDP away, or shard by fully_shard in a loop of "
            "your own"
        )
    if _asked(args.deepspeed, "ACCELERATE_USE_DEEPSPEED") and type(optimizer).__name__ != "DeepSpeedOptimizerWrapper":
        raise ValueError(
            "DeepSpeed was asked for, and accelerate does not run it: where ACCELERATE_USE_CPU is set it runs "
            "DistributedDataParallel. Unset that (use_cpu=True and DS_ACCELERATOR=cpu are enough on a CPU), or take "
            "deepspeed and ACCELERATE_USE_DEEPSPEED away"
        )


def _asked(argument: object, variable: str) -> bool:
    """By the training arguments, or by accelerate's own config."""
    return bool(argument) or os.environ.get(variable, "false").lower() == "true"


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
