"""`HardeningCallback`: takes λ from what was learned to its target while a Trainer runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from torch import nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..activation.module import hardness_profile, hardness_sites
from ..structure.forwards import bypassed_by_code, refusal
from ..surgery.refit.report import CompensationReport
from .arguments import LambdaGELUTrainingArguments
from .run_checks import attach_to_the_run, check_engine, check_finite, warn_if_soft
from .schedule import HardeningSchedule
from .switch import SwitchData, calibrated_targets, check_calibratable, l1_targets, refit_at_switch, try_a_batch

logger = logging.get_logger(__name__)


class HardeningCallback(TrainerCallback, ExportableState):
    """Sets λ by the schedule once learning is over.

    Its state is λ per site at the switch and, if they were calibrated there, the targets per site. `trainer_state.json`
    carries both: with them, λ is a function of the step.
    """

    def __init__(self) -> None:
        self.at_switch: dict[str, float] | None = None
        self.calibrated: dict[str, float] | None = None
        self.inputs: Callable[[Any], Iterable[Any]] = lambda batch: [batch]
        self._clipping: RemovableHandle | None = None
        self._floor: dict[str, float] = {}  # λ of a run that was resumed after its switch
        self.refit: CompensationReport | None = None  # in this process; a resumed run has the weights, not the report

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"at_switch": self.at_switch, "calibrated": self.calibrated}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        args = cast(LambdaGELUTrainingArguments, args)  # LambdaGELUTrainer takes no others
        # read from the state directly: the Trainer restores callbacks only with restore_callback_states_from_checkpoint
        states = cast("Mapping[str, Any]", state.stateful_callbacks)  # while a Trainer runs, by the names of their classes
        stored = states.get(type(self).__name__) if state.global_step else None
        attributes = stored["attributes"] if stored else {}
        self.at_switch = attributes.get("at_switch")
        self.calibrated = attributes.get("calibrated")  # absent in older checkpoints
        args.check()
        check_engine(args, kwargs["model"], kwargs["optimizer"])
        check_calibratable(args, kwargs["model"], kwargs["train_dataloader"].dataset)
        reasons = bypassed_by_code(kwargs["model"], hardness_sites(kwargs["model"]))
        if reasons:
            raise ValueError(f"{refusal(reasons)}. λ would not be learned there")
        sites = hardness_sites(kwargs["model"])
        if self.at_switch is not None and not all(map(math.isfinite, self.at_switch.values())):
            raise ValueError(f"the checkpoint holds λ that are no numbers: {self.at_switch}. Resume from an earlier one")
        if self.at_switch is not None and set(self.at_switch) != set(sites):
            raise ValueError(
                f"the checkpoint was hardening {sorted(self.at_switch)}, the model has λ-GELU at {sorted(sites)}: resume "
                "with the model that was converted for this run"
            )
        self._floor = hardness_profile(kwargs["model"]) if self.at_switch is not None else {}
        self._clipping = attach_to_the_run(kwargs["optimizer"], kwargs["model"])
        self._apply(args, state, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log or control.should_save:
            check_finite(kwargs["model"], state, get_last_checkpoint(args.output_dir))
        self._apply(cast(LambdaGELUTrainingArguments, args), state, **kwargs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        args = cast(LambdaGELUTrainingArguments, args)
        if self._clipping is not None:
            self._clipping.remove()
        warn_if_soft(kwargs["model"], self.targets(args, kwargs["model"]), state)

    def _apply(
        self,
        args: LambdaGELUTrainingArguments,
        state: TrainerState,
        model: nn.Module,
        train_dataloader: DataLoader[Any],
        **kwargs: Any,
    ) -> None:
        ramp = args.hardness_compensate == "none"
        hold = args.hardness_hold if ramp else 0.0
        schedule = HardeningSchedule(state.max_steps, args.hardness_switch_point, hold, args.hardness_ramp)
        if schedule.learning(state.global_step) and self.at_switch is None:
            return  # a run that goes on for more steps than were meant does not learn again
        data = SwitchData(train_dataloader.dataset, train_dataloader.collate_fn, self.inputs)
        switching = self.at_switch is None
        if self.at_switch is None:
            self.at_switch = hardness_profile(model)
        if args.hardness_target == "calibrated" and self.calibrated is None:
            self.calibrated = calibrated_targets(model, args, data)
        if switching and not ramp:
            self.refit = refit_at_switch(model, args, data)
            if state.is_world_process_zero:
                logger.info(str(self.refit))
        targets = self.targets(args, model)
        for name, site in hardness_sites(model).items():
            start = self.at_switch[name]
            ramped = schedule.hardness(state.global_step, start, targets[name]) if ramp else targets[name]
            site.set_hardness(max(start, ramped, self._floor.get(name, 1.0)))

    def try_a_batch(self, args: LambdaGELUTrainingArguments, model: nn.Module, loader: DataLoader[Any]) -> None:
        """CalibrationError if the switch is still to come and could not use a batch; see `switch.try_a_batch`."""
        if self.at_switch is None:
            try_a_batch(model, args, SwitchData(loader.dataset, loader.collate_fn, self.inputs))

    def targets(self, args: LambdaGELUTrainingArguments, model: nn.Module) -> dict[str, float]:
        """{module name: the λ to ramp to}; empty while it is still to be calibrated."""
        return l1_targets(model, args) if args.hardness_target == "l1" else self.calibrated or {}
