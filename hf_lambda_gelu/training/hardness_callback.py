"""`HardnessCallback`: learns and hardens λ in a Trainer that is not `LambdaGELUTrainer`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Literal, cast

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..activation.hardness import DEFAULT_RELATIVE_TOLERANCE, DEFAULT_TOLERANCE
from ..activation.module import hardness_profile, hardness_sites
from ..structure.adapters import has_adapters
from ..structure.hard_coded import hard_coded_sites
from ..surgery.refit.report import CompensationReport
from .arguments import Hardening, LambdaGELUTrainingArguments, check_hardening, wanted_hinges
from .callback import HardeningCallback, as_it_is, stored_attributes
from .first_step import FirstUpdate
from .start_checks import check_generation, warn_if_frozen
from .wider import layers_of

_REMEDY = "optimizers=(torch.optim.AdamW(hlg.parameter_groups(model), lr=…), None)"


class HardnessCallback(HardeningCallback):
    """Learns and hardens λ in any Trainer of transformers, or subclass of it, whose class and arguments stay as they are.

    It does what `LambdaGELUTrainer` does, to the bit: λ is learned, clipped to ≥ 1, logged as `hardness/<module>`, taken to
    its target at the switch and kept there. What it has learned is stored in `trainer_state.json`, and a resumed run goes on
    with it. Not in it: the evaluation with the gates as ReLU, the sparsity penalty, publishing, models with adapters.

    A callback cannot make parameter groups: give the Trainer an optimizer with those of `parameter_groups`, where λ has a
    learning rate of its own and no weight decay. What `report_to` names logs before any callback of yours; to let it see
    λ, move the callback to the front of `trainer.callback_handler.callbacks`. [derived]

    Args:
        hardness_switch_point, hardness_compensate, hardness_ramp, hardness_target, hardness_tolerance,
            hardness_relative_tolerance, hardness_hold, hardness_hinges, hardness_budget: as in
            `LambdaGELUTrainingArguments`. Wider layers need gates with biases from the start, and a run that
            is resumed after the switch a model that was loaded from the checkpoint.
        calibration_inputs: batch → the batches of what the model's forward takes, as
            `LambdaGELUTrainer.calibration_inputs`; by default the batch itself.

    Raises:
        ValueError: a value out of its range. When training begins: the model has no λ-GELU or has adapters; λ is in no
            parameter group, or in one with weight decay or other parameters; the switch needs examples of a training
            set without length or index; a checkpoint whose λ the model has not got; the arguments or the trainer are
            `LambdaGELUTrainer`'s. Before the first step changes a weight: a fused kernel runs in the place of sites.
        CalibrationError: when training begins, if the model's forward does not take training batches; at the switch, if
            the model cannot be measured or refit.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
        >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=1))
        >>> report = hlg.convert(model)
        >>> rows = [{"input_ids": torch.arange(8) + i, "labels": i % 2} for i in range(16)]
        >>> trainer = Trainer(
        ...     model,
        ...     TrainingArguments("runs/bert", max_steps=4, report_to="none"),
        ...     train_dataset=rows,
        ...     optimizers=(torch.optim.AdamW(hlg.parameter_groups(model), lr=5e-5), None),
        ...     callbacks=[hlg.HardnessCallback(hardness_switch_point=0.5)],
        ... )
        >>> trainer.train()  # doctest: +SKIP
        >>> print(hlg.relu_ize(model))  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        hardness_switch_point: float = 0.75,
        hardness_compensate: Literal["least_squares", "bias", "none"] = "least_squares",
        hardness_ramp: Literal["geometric", "linear", "cosine", "reciprocal"] = "geometric",
        hardness_target: Literal["l1", "calibrated"] = "l1",
        hardness_tolerance: float = DEFAULT_TOLERANCE,
        hardness_relative_tolerance: float = DEFAULT_RELATIVE_TOLERANCE,
        hardness_hold: float = 0.1,
        hardness_hinges: int = 1,
        hardness_budget: float | None = None,
        calibration_inputs: Callable[[Any], Iterable[Any]] | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "hardness_switch_point": hardness_switch_point,
            "hardness_compensate": hardness_compensate,
            "hardness_ramp": hardness_ramp,
            "hardness_target": hardness_target,
            "hardness_tolerance": hardness_tolerance,
            "hardness_relative_tolerance": hardness_relative_tolerance,
            "hardness_hold": hardness_hold,
            "hardness_hinges": hardness_hinges,
            "hardness_budget": hardness_budget,
        }
        check_hardening(cast(Hardening, SimpleNamespace(**self.options)))
        self.own_inputs = calibration_inputs is not None
        if calibration_inputs is not None:
            self.inputs = calibration_inputs
        self.saved: dict[str, Any] | None = None  # the step of the last checkpoint, and λ in it
        self._model: nn.Module | None = None
        self._watch: FirstUpdate | None = None

    @property
    def learned_hardness(self) -> dict[str, float]:
        """{module name: λ} as learned, at the switch; empty before."""
        return self.at_switch or {}

    @property
    def hardness_targets(self) -> dict[str, float]:
        """{module name: λ} that the sites end at; empty before training, and before they are calibrated at the switch."""
        return (
            {}
            if self._model is None
            else self.targets(cast(LambdaGELUTrainingArguments, SimpleNamespace(**self.options)), self._model)
        )

    @property
    def compensation(self) -> CompensationReport | None:
        """What was refit at the switch, if it was in this process."""
        return self.refit

    def settings(self, args: TrainingArguments) -> LambdaGELUTrainingArguments:
        run = copy.copy(args)
        vars(run).update(self.options)
        return cast(LambdaGELUTrainingArguments, run)

    def check(self, run: LambdaGELUTrainingArguments) -> None:
        check_hardening(run)

    def state(self) -> dict[str, Any]:
        attributes = super().state()["attributes"] | {"own_inputs": self.own_inputs, "saved": self.saved}
        return {"args": self.options, "attributes": attributes}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._model = model = kwargs["model"]
        if self._watch is not None:
            self._watch.leave()
        self._check(args, model, kwargs["optimizer"])
        if state.global_step:
            _check_resumed(stored_attributes(state), model, state)
        super().on_train_begin(args, state, control, **kwargs)
        if self.at_switch is None:
            layers_of(model, self.settings(args), give_biases=False)
        self.try_a_batch(self.settings(args), state, model, kwargs["train_dataloader"])
        self._watch = FirstUpdate(model)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._watch is not None:
            self._watch.begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._watch is not None:
            watch, self._watch = self._watch, None
            watch.end()
        super().on_pre_optimizer_step(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self._keep_what_may_be_saved(state, control, kwargs["model"])

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_epoch_end(args, state, control, **kwargs)
        self._keep_what_may_be_saved(state, control, kwargs["model"])

    def _keep_what_may_be_saved(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        # where every process comes by: sharded λ are read by all together. save_strategy="best" decides after an evaluation
        if control.should_save or control.should_evaluate:
            self.saved = {"step": state.global_step, "hardness": hardness_profile(model)}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            hardness = {f"hardness/{name}": value for name, value in hardness_profile(kwargs["model"]).items()}
            logs.update(hardness)  # for the callbacks that come after this one
            state.log_history[-1].update(hardness)  # the Trainer has put a copy of the logs there

    def _check(self, args: TrainingArguments, model: nn.Module, optimizer: Any) -> None:
        if isinstance(args, LambdaGELUTrainingArguments):
            raise ValueError(
                "HardnessCallback is for Trainers with arguments of their own, got LambdaGELUTrainingArguments: "
                "LambdaGELUTrainer hardens by itself, leave the callback out there"
            )
        if not hardness_sites(model):
            raise ValueError(f"{type(model).__name__} has no λ-GELU: call hf_lambda_gelu.convert(model) before the Trainer")
        if has_adapters(model):
            raise ValueError(
                "HardnessCallback does not bring λ back with adapters when a run is resumed: use LambdaGELUTrainer, or a "
                "class X(hlg.LambdaGELUTrainer, YourTrainer)"
            )
        if self.own_inputs and self.inputs is as_it_is:
            raise ValueError(
                "restore_callback_states_from_checkpoint has put a HardnessCallback without your calibration_inputs in the "
                "place of yours: leave it False, HardnessCallback reads its state by itself"
            )
        if args.load_best_model_at_end and wanted_hinges(self.settings(args)) is not None:
            raise ValueError(
                "load_best_model_at_end=True may bring back a checkpoint from before the switch, whose layers are narrower "
                "than the model's then: set it False, or use LambdaGELUTrainer, which fits the layers to the checkpoint"
            )
        hard_coded_sites(model)  # raises for λ that no checkpoint would hold
        check_generation(args)
        warn_if_frozen(model)
        _check_groups(optimizer, model)


def _check_groups(optimizer: Any, model: nn.Module) -> None:
    """Raises ValueError unless each λ that is trained is in a parameter group of λ alone, without weight decay."""
    sites = hardness_sites(model)
    trained = {id(site.unclipped_hardness): name for name, site in sites.items() if site.unclipped_hardness.requires_grad}
    if type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":  # its groups hold flat copies
        return
    found = set()
    for group in optimizer.param_groups:
        inside = {id(parameter) for parameter in group["params"]}
        found |= inside
        names = [trained[key] for key in inside if key in trained]
        others = len(inside) - len(names)
        if names and (others or group.get("weight_decay")):
            raise ValueError(
                f"λ of {names[0]} is in a parameter group with {others} other parameters, learning rate {group['lr']:g} and "
                f"weight decay {group.get('weight_decay', 0.0):g}: it wants a rate of its own, 0.01 for one, and no decay. "
                f"Give the Trainer {_REMEDY}"
            )
    missing = [name for key, name in trained.items() if key not in found]
    if missing:
        raise ValueError(f"λ of {missing[0]} is in no parameter group of the optimizer: give the Trainer {_REMEDY}")


def _check_resumed(stored: dict[str, Any], model: nn.Module, state: TrainerState) -> None:
    """Raises ValueError if the model has not got the λ of the checkpoint: Trainer loads what fits, and leaves the rest."""
    if not stored:
        raise ValueError(
            f"the run that is resumed at step {state.global_step} was trained without HardnessCallback: its checkpoint may "
            "hold no λ. Start a new run from its weights: from_pretrained, convert, train"
        )
    saved = stored.get("saved")
    if saved is None or saved["step"] != state.global_step:  # LambdaGELUTrainer's, which checks what it loads
        return
    now = hardness_profile(model)
    wrong = [name for name, value in saved["hardness"].items() if not math.isclose(value, now.get(name, 0.0), rel_tol=1e-5)]
    wrong += [name for name in now if name not in saved["hardness"]]
    if wrong:
        raise ValueError(
            f"λ of {wrong[0]} is {now.get(wrong[0], 'not in the model')}, in the checkpoint it was "
            f"{saved['hardness'].get(wrong[0], 'not there')}: convert the model as for the run that is resumed"
        )
