"""`HardeningCallback`: takes λ from what was learned to its target while a Trainer runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, cast

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..activation.module import hardness_profile, hardness_sites
from ..structure.forwards import bypassed_by_code, refusal
from ..surgery.hinges.report import HingeReport
from ..surgery.refit.report import CompensationReport
from .arguments import LambdaGELUTrainingArguments, wanted_hinges
from .averaging import go_on_from, to_average
from .console import refit_line, say, switch_lines
from .divergence import LossWatch, check_finite
from .optimizer import HardnessUpdate
from .retries import batch_size_now, check_not_begun_anew, not_begun_anew
from .run_checks import attach_to_the_run, check_engine, check_gradient, check_on_ramp, warn_if_hard, warn_if_soft
from .schedule import HardeningSchedule
from .switch import SwitchData, calibrated_targets, check_calibratable, l1_targets, refit_at_switch, try_a_batch
from .whole_checkpoints import stored_hardening
from .wider import check_once, check_optimizer, check_run, forget

logger = logging.get_logger(__name__)


def as_it_is(batch: Any) -> Iterable[Any]:
    """A training batch as what forward takes."""
    return [batch]


def stored_attributes(state: TrainerState) -> dict[str, Any]:
    """What the callback of a run that is resumed had stored, `LambdaGELUTrainer`'s or a `HardnessCallback`; else nothing."""
    # while a Trainer runs, by the names of their classes
    states = cast("Mapping[str, Any]", state.stateful_callbacks) if state.global_step else {}
    stored = next((states[name] for name in ("HardeningCallback", "HardnessCallback") if name in states), None)
    return dict(stored["attributes"]) if stored else {}


class HardeningCallback(TrainerCallback, ExportableState):
    """Sets λ by the schedule once learning is over.

    Its state is λ per site at the switch and, if they were calibrated there, the targets per site. `trainer_state.json`
    carries both: with them, λ is a function of the step.
    """

    def __init__(self) -> None:
        self.at_switch: dict[str, float] | None = None
        self.calibrated: dict[str, float] | None = None
        self.inputs: Callable[[Any], Iterable[Any]] = as_it_is
        self.losses = LossWatch()
        self.processes: int | None = None  # that write a checkpoint: each its own random state
        self._clipping: HardnessUpdate | None = None
        self._gradient_seen = False
        self._floor: dict[str, float] = {}  # λ of a run that was resumed after its switch
        self._set: dict[str, float] = {}  # λ as last set, while a run is past its switch
        self.ramped: bool | None = None  # whether λ follows a ramp from the switch on; None before
        self.refit: CompensationReport | None = None  # in this process; a resumed run has the weights, not the report
        self.hinges: HingeReport | None = None  # of layers that the switch made wider

    def settings(self, args: TrainingArguments) -> LambdaGELUTrainingArguments:
        """The run's arguments, with those of hardening among them."""
        return cast(LambdaGELUTrainingArguments, args)  # LambdaGELUTrainer takes no others

    def check(self, run: LambdaGELUTrainingArguments) -> None:
        """Raises ValueError for settings out of their range: searches set them after the class was made."""
        run.check()

    def state(self) -> dict[str, Any]:
        return {
            "args": {},
            "attributes": {
                "at_switch": self.at_switch,
                "calibrated": self.calibrated,
                "ramped": self.ramped,
                "processes": self.processes,
                "hinges": None if self.hinges is None else asdict(self.hinges),
            },
        }

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        run = self.settings(args)
        # read from the state directly: the Trainer restores callbacks only with restore_callback_states_from_checkpoint
        attributes = stored_attributes(state)
        if wanted_hinges(self.settings(args)) is not None and not state.global_step:
            check_once(kwargs["model"], self.hinges)
        if self._set:
            check_not_begun_anew(hardness_profile(kwargs["model"]), self._set, args, state)
        wanted = (self.targets(run, kwargs["model"]) if self.at_switch else {}) or l1_targets(kwargs["model"], run)
        self._set = {}
        self._go_back(attributes)
        self.losses, self.processes = LossWatch(), args.world_size
        self.check(run)
        check_engine(args, kwargs["model"], kwargs["optimizer"])
        check_calibratable(run, kwargs["model"], kwargs["train_dataloader"].dataset)
        if wanted_hinges(run) is not None and self.at_switch is None:
            check_run(args, engine=False)
            check_optimizer(kwargs["optimizer"], at_start=not state.global_step)
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
        if self.ramped and run.hardness_compensate != "none":
            check_on_ramp(self._floor, self.targets(run, kwargs["model"]), run.hardness_compensate)
        if self.at_switch is None:
            warn_if_hard(kwargs["model"], wanted, state)
        self._clipping = attach_to_the_run(kwargs["optimizer"], kwargs["model"])
        self._apply(run, state, **kwargs)

    def _go_back(self, attributes: Mapping[str, Any]) -> None:
        """Has the state be that of a checkpoint, or of a start; `attributes` of older checkpoints lack some."""
        self.at_switch = attributes.get("at_switch")
        self.calibrated = attributes.get("calibrated")
        self.ramped = attributes.get("ramped")
        self.hinges = HingeReport.of(attributes["hinges"]) if attributes.get("hinges") else None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._clipping is not None and not self._gradient_seen:
            check_gradient(kwargs["optimizer"], kwargs["model"])
            self._gradient_seen = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log or control.should_save or control.should_evaluate:  # save_strategy="best" decides after that
            check_finite(kwargs["model"], state, args, self.losses)
        self._apply(self.settings(args), state, **kwargs)
        if control.should_save or control.should_training_stop:
            to_average(kwargs["optimizer"])  # what is saved is what was evaluated

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save or control.should_evaluate:
            check_finite(kwargs["model"], state, args, self.losses)
        if control.should_save or control.should_training_stop:
            to_average(kwargs["optimizer"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._clipping is not None:
            self._clipping.remove()
        self._set = {}
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None:  # the model is that of then
            self._go_back(stored_hardening(best))
            self.refit = self.refit if self.at_switch else None
        check_finite(kwargs["model"], state, args, weights=True)
        cast("dict[str, Any]", state.stateful_callbacks)[type(self).__name__] = self.state()  # for trainer.save_state()
        targets = self.targets(self.settings(args), kwargs["model"])
        warn_if_soft(kwargs["model"], targets, state, args, self.at_switch is not None)

    def _apply(
        self,
        args: LambdaGELUTrainingArguments,
        state: TrainerState,
        model: nn.Module,
        train_dataloader: DataLoader[Any],
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        ramp = args.hardness_compensate == "none"
        hold = args.hardness_hold if ramp else 0.0
        schedule = HardeningSchedule(state.max_steps, args.hardness_switch_point, hold, args.hardness_ramp)
        if schedule.learning(state.global_step) and self.at_switch is None:
            return  # a run that goes on for more steps than were meant does not learn again
        data = self._data(args, state, train_dataloader)
        switching = self.at_switch is None
        if self.at_switch is None:
            check_finite(model, state, args, self.losses, weights=True)
            to_average(optimizer)
            self.at_switch = hardness_profile(model)
            self.ramped = ramp
        if args.hardness_target == "calibrated" and self.calibrated is None:
            with not_begun_anew(args):
                self.calibrated = calibrated_targets(model, args, data)
        if switching and not ramp:
            with not_begun_anew(args):
                refit = refit_at_switch(model, args, data)
            self.refit, self.hinges = refit.report, refit.hinges
            forget(optimizer, refit.reshaped)
            logger.info(str(self.refit) if self.hinges is None else f"{self.hinges}\n{self.refit}")
        targets = self.targets(args, model)
        if switching and state.is_world_process_zero:
            until = f"by hardness_ramp={args.hardness_ramp!r}, until step {schedule.hold_step}"
            then = until if self.refit is None or ramp else refit_line(self.refit, self.hinges)
            say(switch_lines(state.global_step, state.max_steps, [*self.at_switch.values()], [*targets.values()], then))
        for name, site in hardness_sites(model).items():
            start = self.at_switch[name]
            ramped = schedule.hardness(state.global_step, start, targets[name]) if ramp else targets[name]
            self._set[name] = max(start, ramped, self._floor.get(name, 1.0))
            site.set_hardness(self._set[name])
        sites = hardness_sites(model).values()
        go_on_from(optimizer, None if switching else [site.unclipped_hardness for site in sites])

    def try_a_batch(
        self, args: LambdaGELUTrainingArguments, state: TrainerState, model: nn.Module, loader: DataLoader[Any]
    ) -> None:
        """CalibrationError if the switch is still to come and could not use a batch; see `switch.try_a_batch`."""
        if self.at_switch is None:
            try_a_batch(model, args, self._data(args, state, loader))

    def _data(self, args: TrainingArguments, state: TrainerState, loader: DataLoader[Any]) -> SwitchData:
        return SwitchData(loader.dataset, loader.collate_fn, self.inputs, batch_size_now(args, state))

    def targets(self, args: LambdaGELUTrainingArguments, model: nn.Module) -> dict[str, float]:
        """{module name: the λ to ramp to}; empty while it is still to be calibrated."""
        return l1_targets(model, args) if args.hardness_target == "l1" else self.calibrated or {}
