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


def warn_if_soft(model: nn.Module, targets: Mapping[str, float], state: TrainerState, switched: bool) -> None:
    """Says so if the run has ended before λ reached its targets.

    Args:
        switched: whether the run has come to its switch.
    """
    profile = hardness_profile(model)
    soft = [name for name, value in profile.items() if not value >= 0.999 * targets.get(name, math.inf)]
    if not soft or not state.is_world_process_zero:
        return
    worst = min(soft, key=lambda name: profile[name] / targets.get(name, 1.0))
    wanted = f"{targets[worst]:.4g} is wanted" if worst in targets else "its target is measured at the switch"
    before = "" if switched else ", before the switch (hardness_switch_point), where λ would have gone to its target"
    logger.warning(
        f"training ended at step {state.global_step} of {state.max_steps} with {len(soft)} of {len(profile)} gates soft"
        f"{before}: they are not ReLU yet, and relu_ize(model) alone will refuse them. Softest is {worst} with "
        f"λ = {profile[worst]:.4g}; {wanted}. Train to the end (trainer.train(resume_from_checkpoint=True)), or let a "
        "refit make up for the soft gates: relu_ize(model, calibration=…, compensate='least_squares')"
    )
