"""What is looked at while a Trainer runs: that λ is in what is stepped, and that it ends hard."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from ..activation.module import hardness_profile, hardness_sites
from ..structure.sharding import is_sharded
from .averaging import optimizers_in
from .optimizer import WITHIN_BACKWARD, HardnessUpdate, attach_hardness_update
from .zero import check_own_group, deepspeed_in

logger = logging.get_logger(__name__)


def check_name(optim: str) -> None:
    """Raises ValueError for an `optim` of transformers whose optimizer steps each parameter within backward."""
    name = str(getattr(optim, "value", optim))
    if name in ("lomo", "adalomo") or name.endswith("_layerwise"):  # before they hang themselves on the parameters
        raise ValueError(f"optim={name!r} {WITHIN_BACKWARD}")


def attach_to_the_run(optimizer: Any, model: nn.Module) -> HardnessUpdate | None:
    """Clips λ after each step of the optimizer that a Trainer steps, whoever made it, until the handle is removed.

    None where no λ is trained.

    Raises:
        ValueError: a λ is not in it, or in a group with weight decay, or it steps within backward, or DeepSpeed's config
            made it.
    """
    trained = {id(hardness) for hardness in _trained(model)}
    if not trained:
        return None
    deepspeed = deepspeed_in(optimizer)
    if deepspeed is not None:
        check_own_group(deepspeed, _trained(model))
        return attach_hardness_update(optimizer, model)
    handle = attach_hardness_update(optimizer, model)
    for group in (group for one in optimizers_in(optimizer)[-1:] for group in one.param_groups):
        inside = sum(id(parameter) in trained for parameter in group["params"])
        if 0 < inside < len(group["params"]):
            rate = group.get("initial_lr", group["lr"])
            logger.warning(
                f"λ is in a group with other parameters and has their learning rate, {rate:g}, in units of λ per step; "
                "hardness_learning_rate is not used. Make the optimizer from "
                "hlg.parameter_groups(model, hardness_learning_rate)"
            )
    return handle


def check_gradient(optimizer: Any, model: nn.Module) -> None:
    """Raises ValueError if λ is trained and no parameter has a gradient left when the optimizer is to step."""
    if type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":  # its engine has stepped by now, and emptied the gradients
        return
    # λ alone may have none: of a vision tower, when a batch of text comes first
    if _trained(model) and all(parameter.grad is None for parameter in model.parameters()):
        raise ValueError(
            f"no parameter has a gradient when {type(optimizers_in(optimizer)[-1]).__name__} is to step, so λ would never "
            f"move: an optimizer that {WITHIN_BACKWARD}"
        )


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


def check_on_ramp(profile: Mapping[str, float], targets: Mapping[str, float], compensate: str) -> None:
    """ValueError if a run that left its checkpoint on the ramp goes on without: the gates would be hard at once, and no map
    refit, which belongs to the switch.

    Args:
        targets: empty where they are still to be calibrated.
    """
    soft = [name for name, value in profile.items() if not value >= 0.999 * targets.get(name, math.inf)]
    if soft:
        name = min(soft, key=lambda each: profile[each])
        raise ValueError(
            f"the checkpoint is on its way along hardness_ramp, with λ = {profile[name]:.4g} at {name}, and "
            f"hardness_compensate={compensate!r} would make its gates hard at once, past the switch, which is when maps are "
            "refit: set hardness_compensate='none', as in the run that wrote it"
        )


def _asked(argument: object, variable: str) -> bool:
    """By the training arguments, or by accelerate's own config."""
    return bool(argument) or os.environ.get(variable, "false").lower() == "true"


def _trained(model: nn.Module) -> list[nn.Parameter]:
    sites = hardness_sites(model).values()
    return [site.unclipped_hardness for site in sites if site.unclipped_hardness.requires_grad]


def warn_if_hard(model: nn.Module, targets: Mapping[str, float], state: TrainerState) -> None:
    """Says so if a run that is to learn λ begins with every λ at its target: there is nothing left to learn.

    Args:
        targets: of the earlier run of this trainer; without one, of this one.
    """
    least: dict[str, float] = {}
    for name, site in hardness_sites(model).items():
        value = site.unclipped_hardness.detach()
        value = value.to_local() if hasattr(value, "to_local") else value
        if not value.numel() or float(value.min()) < 0.999 * targets.get(name, math.inf):  # or on another process
            return
        least[name] = float(value.min())
    if least and state.is_world_process_zero:
        name = min(least, key=lambda each: least[each])
        logger.warning(
            f"every λ is at its target already (an earlier run, or harden), the softest {least[name]:.4g} at {name}: "
            "the gates are hard from the first step of this run, and it learns nothing of λ"
        )


def warn_if_soft(
    model: nn.Module, targets: Mapping[str, float], state: TrainerState, args: TrainingArguments, switched: bool
) -> None:
    """Says so if the run has ended before λ reached its targets, or has brought back a checkpoint of before that.

    Args:
        switched: whether what the model now is had come to the switch.
    """
    profile = hardness_profile(model)
    soft = [name for name, value in profile.items() if not value >= 0.999 * targets.get(name, math.inf)]
    if not soft or not state.is_world_process_zero:
        return
    worst = min(soft, key=lambda name: profile[name] / targets.get(name, 1.0))
    wanted = f"{targets[worst]:.4g} is wanted" if worst in targets else "its target is measured at the switch"
    before = "" if switched else ", before the switch (hardness_switch_point), where λ goes to its target"
    ended = f"training ended at step {state.global_step} of {state.max_steps}"
    way = "Train to the end (trainer.train(resume_from_checkpoint=True))"
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        ended += f", and load_best_model_at_end brought back {Path(state.best_model_checkpoint).name},"
        way = "Set load_best_model_at_end=False for the network of the end"
        if "relu_" in (args.metric_for_best_model or ""):
            way += f", take what {args.metric_for_best_model} has measured by relu_ize(model, force=True)"
    logger.warning(
        f"{ended} with {len(soft)} of {len(profile)} gates soft{before}: they are not ReLU yet, and relu_ize(model) alone "
        f"will refuse them. Softest is {worst} with λ = {profile[worst]:.4g}; {wanted}. {way}, or let a refit make up for "
        "the soft gates: relu_ize(model, calibration=…, compensate='least_squares')"
    )
