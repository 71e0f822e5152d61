"""Layers that become wider at the switch of a run: what of the run can follow them, and a checkpoint's widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, TrainingArguments

from ..structure.config import get_attribute
from ..surgery.hinges.layers import Layers, prepare_layers
from ..surgery.hinges.plan import HingeError
from ..surgery.hinges.report import HingeReport
from .arguments import LambdaGELUTrainingArguments, wanted_hinges
from .averaging import optimizers_in
from .whole_checkpoints import stored_hardening
from .zero import deepspeed_in

_INSTEAD = (
    "Set hardness_hinges=1 here, and make the layers wider before training or after it, by relu_ize(model, calibration=…, "
    "compensate='least_squares', hinges=…)"
)


def layers_of(model: nn.Module, args: LambdaGELUTrainingArguments, give_biases: bool = True) -> Layers | None:
    """The layers that the switch will make wider, with biases where they lack them; None for layers as they are.

    Raises:
        HingeError: they cannot be.
    """
    wanted = wanted_hinges(args)
    if wanted is None:
        return None
    try:
        return prepare_layers(model, wanted, give_biases)
    except HingeError as error:
        raise HingeError(f"the switch cannot make layers wider: {error}") from error


def check_run(args: TrainingArguments, engine: bool) -> None:
    """Raises ValueError where a run keeps copies of its parameters, or programs, that know their shapes.

    Args:
        engine: whether FSDP or DeepSpeed is asked for.
    """
    found = None
    if engine or args.fsdp or args.deepspeed:
        found = "FSDP and DeepSpeed keep flat copies of the parameters"
    elif args.world_size > 1:
        found = f"DistributedDataParallel, over {args.world_size} processes, keeps buckets of the gradients"
    elif args.torch_compile:
        found = "torch_compile=True keeps programs for the parameters"
    if found is not None:
        raise ValueError(
            f"layers cannot become wider at the switch: {found}, whose shapes are those of the start. {_INSTEAD}"
        )


def check_optimizer(optimizer: Any, at_start: bool) -> None:
    """Raises ValueError unless the optimizer makes what it keeps of a parameter when it first steps it.

    Args:
        at_start: whether the run has made no step yet.
    """
    held = optimizers_in(optimizer)
    name = type(held[-1]).__name__
    reason = None
    if deepspeed_in(optimizer) is not None:
        reason = "steps flat copies of the parameters"
    elif any("k" in group for one in held for group in one.param_groups):  # schedule-free ones and Prodigy
        reason = "counts its steps for all parameters together, so that none can start anew"
    elif any(isinstance(one, torch.optim.LBFGS | torch.optim.Adagrad) for one in held) or (
        at_start and any(one.state for one in held if isinstance(getattr(one, "state", None), dict))
    ):
        reason = "makes its state, which has the parameters' shapes, when it is built"
    if reason is not None:
        raise ValueError(f"layers cannot become wider at the switch: {name} {reason}. Take adamw_torch, or: {_INSTEAD}")


def forget(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Lets what the optimizer keeps of these parameters begin anew, as of such that it has not stepped yet."""
    for one in optimizers_in(optimizer):
        state = getattr(one, "state", None)
        if isinstance(state, dict):
            for parameter in parameters:
                state.pop(parameter, None)


def narrower(model: nn.Module, report: HingeReport) -> tuple[str, object, float] | None:
    """(config path, value, value where hinges made layers wider) of a layer that is not so wide here; None if all are."""
    config = getattr(model, "config", None)
    for path, (_, now) in report.widths.items():
        held = get_attribute(config, path) if isinstance(config, PreTrainedConfig) else now
        if held != now:
            return path, held, now
    return None


def check_as_wide(model: nn.Module, stored: HingeReport, checkpoint: str) -> None:
    """Raises ValueError where a run without hinges goes on from a checkpoint with wider layers, and its model has none."""
    found = narrower(model, stored)
    if found is not None:
        path, held, now = found
        raise ValueError(
            f"{checkpoint} was saved after its switch had made layers wider: config.{path} is {now:g} there, and {held} "
            "here. Set hardness_hinges and hardness_budget as in the run that wrote it"
        )


def check_once(model: nn.Module, earlier: HingeReport | None) -> None:
    """Raises ValueError where an earlier run of the same trainer has made the layers wider already.

    Args:
        earlier: what hinges did in it.
    """
    if earlier is not None and narrower(model, earlier) is None:
        raise ValueError(
            "an earlier run of this trainer has made the layers wider already, and its switch would make them wider "
            "once more: build another trainer, with hardness_hinges=1"
        )


def stored_hinges(folder: str | Path) -> HingeReport | None:
    """What hinges had done when a checkpoint was saved; None for nothing."""
    stored = stored_hardening(folder).get("hinges")
    return None if stored is None else HingeReport.of(stored)
