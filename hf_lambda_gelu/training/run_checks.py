"""What is looked at while a Trainer runs: that λ is in what is stepped, and that it ends hard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerState
from transformers.utils import logging

from ..activation.module import hardness_profile, hardness_sites
from .optimizer import attach_hardness_update

logger = logging.get_logger(__name__)


def attach_to_the_run(optimizer: Any, model: nn.Module) -> RemovableHandle | None:
    """Clips λ after each step of the optimizer that a Trainer steps, whoever made it, until the handle is removed.

    None where no λ is trained.

    Raises:
        ValueError: a λ is not in it, or in a group with weight decay.
    """
    frozen = not any(site.unclipped_hardness.requires_grad for site in hardness_sites(model).values())
    if frozen or type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":  # it steps its own copies; λ < 1 counts as 1
        return None
    return attach_hardness_update(optimizer, model)


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
