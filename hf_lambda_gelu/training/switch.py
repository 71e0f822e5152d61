"""What happens at the switch of a training run: where each site's λ shall end, and the refit that lets it go there at once.

Targets from data and the refit are derived, not the paper's (arXiv 2603.21991).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers.utils import logging

from ..activation.hardness import target_hardness
from ..activation.module import hardness_sites
from ..measurement.batches import CalibrationError, model_batches
from ..measurement.calibration import calibrate_by
from ..measurement.forward import measuring, run_batch
from ..measurement.team import Team, team_of
from ..structure.random_state import random_numbers_from
from ..structure.sharding import check_whole
from ..structure.transaction import transaction
from ..surgery.hardening import HardRefit, refit_for_hard_gates, rehearse_refit
from ..surgery.refit.report import Compensate
from .arguments import LambdaGELUTrainingArguments, wanted_hinges
from .retries import wants_smaller_batches

logger = logging.get_logger(__name__)

# each gives width × tokens pre-activations: with 64 other sentences, MiniLM's targets move by 1 %
CALIBRATION_EXAMPLES = 64
# a refit solves for as many unknowns an output as the layer is wide; of wider layers so many times as many
REFIT_EXAMPLES = 300


def refit_examples(args: LambdaGELUTrainingArguments) -> int:
    """How many the refit takes, if there are so many."""
    wanted = wanted_hinges(args)
    return round(REFIT_EXAMPLES * (1.0 if wanted is None else wanted.factor))


def l1_targets(model: nn.Module, args: LambdaGELUTrainingArguments) -> dict[str, float]:
    """{module name: λ} by the gate's ℓ1 distance to a step, `args.hardness_tolerance`."""
    return {name: target_hardness(args.hardness_tolerance, site.base) for name, site in hardness_sites(model).items()}


@dataclass(frozen=True)
class SwitchData:
    """Where the switch takes its batches from.

    Attributes:
        dataset: with length and index, its columns reduced to those that the model takes.
        collate: makes a batch of examples.
        inputs: batch → the batches of what the model's forward takes, see `LambdaGELUTrainer.calibration_inputs`.
        batch_size: examples in a batch.
    """

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Any]
    inputs: Callable[[Any], Iterable[Any]]
    batch_size: int

    def share(self, examples: int, team: Team) -> Iterator[Any]:
        """This process's share of `batches`; each process makes them all, as collators may draw random numbers."""
        return itertools.islice(self.batches(examples), team.rank, None, team.size)

    def batches(self, examples: int) -> Iterator[Any]:
        """Batches of up to so many examples, spread evenly over the data set."""
        length = len(cast("Sized", self.dataset))  # `check_calibratable` has seen to it
        count = min(examples, length)
        chosen = Subset(self.dataset, [i * length // count for i in range(count)])
        for batch in DataLoader(chosen, self.batch_size, collate_fn=_own_copy(self.collate)):
            yield from self.inputs(batch)


def try_a_batch(model: nn.Module, args: LambdaGELUTrainingArguments, data: SwitchData) -> None:
    """Run the model on a batch like those of the switch, and look for the maps to refit, before a step is taken.

    What the refit will leave as it is, because its map is not found, is a warning.

    Raises:
        CalibrationError: there is none that the model takes, its forward raises, or a refit cannot find its way.
    """
    if args.hardness_target == "l1" and args.hardness_compensate == "none":
        return
    left: dict[str, str] = {}
    try:
        with random_numbers_from(args.seed, args.device):
            with measuring(model, in_run=True), torch.no_grad():
                run_batch(model, next(model_batches(model, data.batches(data.batch_size))), 0)
            if args.hardness_compensate != "none":
                count = min(refit_examples(args), len(cast("Sized", data.dataset)))
                left = rehearse_refit(model, data.batches(data.batch_size), wanted_hinges(args), count)
    except CalibrationError as error:
        if wants_smaller_batches(args, error.__cause__):
            raise cast(Exception, error.__cause__) from None  # nothing has changed yet
        raise CalibrationError(
            f"the switch at {args.hardness_switch_point:g} of the run will measure or refit the model on training batches, "
            f"and cannot: {error}. Override LambdaGELUTrainer.calibration_inputs, or give HardnessCallback one, which makes "
            "of a batch what forward takes, or set hardness_target='l1' and hardness_compensate='none'"
        ) from error
    if left and args.process_index == 0:
        name, reason = next(iter(left.items()))
        logger.warning(
            f"the switch will refit nothing for {len(left)} of {len(hardness_sites(model))} gates, {name} the first "
            f"({reason}): they become ReLU all the same, and training must make up for it"
        )


def calibrated_targets(model: nn.Module, args: LambdaGELUTrainingArguments, data: SwitchData) -> dict[str, float]:
    """{module name: λ} at which each site's relative error is `args.hardness_relative_tolerance`. [derived]

    Measured by `calibrate` on up to 64 examples, spread evenly over the data set. Several processes deal the batches out,
    and all get the same. A site that none of them reaches gets its ℓ1 target. The run's random numbers and the order of its
    data are not touched.

    Raises:
        CalibrationError: see `calibrate`.
    """
    team = _team(model, args)
    with random_numbers_from(args.seed, args.device):
        report = calibrate_by(model, data.share(CALIBRATION_EXAMPLES, team), team, in_run=True)
    targets = l1_targets(model, args)
    targets |= {site.name: site.target_hardness(args.hardness_relative_tolerance) for site in report.sites if site.count}
    return team.given(0, targets, "the targets of all sites")  # another device may round otherwise


@transaction
def refit_at_switch(model: nn.Module, args: LambdaGELUTrainingArguments, data: SwitchData) -> HardRefit:
    """Refits, in place, the linear maps after the sites as `relu_ize(compensate=…)` does, for gates that become hard now.

    On up to 300 examples, in wider layers so many times as many, spread evenly over the data set. Several processes deal out
    the batches, and all end with the same bits. The optimizer goes on with the same parameters, some of another shape in
    wider layers. None is added: where a map has no bias, its weights alone are refit. The run's random numbers and the order
    of its data are not touched.

    Raises:
        CalibrationError: see `relu_ize`; the model is as it was, on every process.
    """
    team, method = _team(model, args), cast("Compensate", args.hardness_compensate)
    with random_numbers_from(args.seed, args.device), team.whole():
        return refit_for_hard_gates(model, data.share(refit_examples(args), team), method, wanted_hinges(args), team)


def _team(model: nn.Module, args: LambdaGELUTrainingArguments) -> Team:
    return team_of("all" if args.world_size > 1 else "one", model, dealt=True)


def check_calibratable(args: LambdaGELUTrainingArguments, model: nn.Module, dataset: Any) -> None:
    """Raises ValueError unless the switch can do its part: examples by index, and parameters in one piece for a refit."""
    if args.hardness_target == "l1" and args.hardness_compensate == "none":
        return
    check_whole(
        model,
        f"hardness_compensate={args.hardness_compensate!r} with hardness_target={args.hardness_target!r}",
        "set hardness_compensate='none' and hardness_target='l1', for a ramp, or substitute before training by "
        "relu_ize(model, calibration=…, compensate=…)",
    )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset)):
        raise ValueError(
            "hardness_compensate and hardness_target='calibrated' take examples by their index, but the training set is a "
            f"{type(dataset).__name__} without length or index: use a map-style data set, or hardness_target='l1' and "
            "hardness_compensate='none'"
        )


def _own_copy(collate: Any) -> Any:
    """A collator like this one, with generators of its own, as masking for language models has; the rest is shared."""
    own = copy.copy(collate)
    for name, value in vars(own).items() if hasattr(own, "__dict__") else ():
        if isinstance(value, (torch.Generator, np.random.Generator)):
            setattr(own, name, copy.deepcopy(value))
        elif name == "data_collator":  # inside the Trainer's wrapper that removes columns
            setattr(own, name, _own_copy(value))
    return own
