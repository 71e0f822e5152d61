"""`LambdaGELUTrainer`: transformers' Trainer, with λ learned, hardened and watched."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from .._compat import finish_current_push
from ..activation.module import hardness_profile, hardness_sites
from ..activation.older_checkpoints import NAME, OLDER
from ..checkpoints.card import PAPER, CardDetails
from ..checkpoints.folders import check_writable
from ..checkpoints.shards import tensor_names
from ..structure.modules import has_adapters
from ..structure.offloading import check_not_offloaded
from ..surgery.adapter_hardness import load_hardness, save_hardness_with_adapters
from ..surgery.gates import gates_as_relu
from ..surgery.refit.report import CompensationReport
from .arguments import LambdaGELUTrainingArguments
from .callback import HardeningCallback
from .first_step import first_step
from .publish import push_trained
from .second_evaluation import without_a_trace
from .sparsity_penalty import SparsityPenalty, check_penalisable

logger = logging.get_logger(__name__)


class LambdaGELUTrainer(Trainer):
    """Trains a model that `convert` has prepared, and hardens its λ, so that ReLU can take the place of each λ-GELU.

    - λ is stepped in λ itself by the run's own optimizer (`attach_hardness_update`), in a parameter group of its own with
      `hardness_learning_rate` and no weight decay;
    - at `hardness_switch_point` it goes to its target at once, and the linear maps after the sites are refit on training
      examples so that the function stays (`hardness_compensate`); with "none" it follows `hardness_ramp` instead;
    - the target is that of `hardness_tolerance`, or with `hardness_target="calibrated"` each site's own, from its
      pre-activations on 64 training examples at the switch;
    - λ of every layer is in the logs, as `hardness/<module>`;
    - with `sparsity_penalty`, the gradient is that of the loss and of a penalty on what the gates let through; the logs have
      it as `sparsity/penalty`, and the share of zeros that ReLU would put out as `sparsity/zeros`;
    - evaluation also reports the metrics with the gates as ReLU, as `eval_relu_*`.

    Everything else is transformers' Trainer. `args` must be `LambdaGELUTrainingArguments`.

    Raises:
        ValueError: the model has no λ-GELU or is offloaded, the arguments are of another class, the output folder cannot be
            written, or a checkpoint to resume from belongs to a model converted otherwise, or the switch needs examples of a
            training set without length or index: each before training starts. At the first step, before λ or a weight
            changes: a fused kernel that runs in the place of sites.
        CalibrationError: before the first step, if the model's forward does not take what `calibration_inputs` gives; at the
            switch, if the model cannot be measured or refit.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=1))
        >>> report = hlg.convert(model)
        >>> rows = [{"input_ids": torch.arange(8) + i, "labels": i % 2} for i in range(16)]
        >>> arguments = hlg.LambdaGELUTrainingArguments("runs/bert", max_steps=4, report_to="none")
        >>> trainer = hlg.LambdaGELUTrainer(model, arguments, train_dataset=rows)
        >>> trainer.train()  # doctest: +SKIP
        >>> print(hlg.relu_ize(model))  # doctest: +SKIP
    """

    _sites_run = False  # whether a training step has shown that the sites are what runs
    _penalty: SparsityPenalty | None = None
    args: LambdaGELUTrainingArguments
    model: nn.Module  # Trainer's __init__ raises where there is none

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: LambdaGELUTrainingArguments | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = LambdaGELUTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, LambdaGELUTrainingArguments):
            raise ValueError(
                f"LambdaGELUTrainer expects LambdaGELUTrainingArguments, got {type(args).__name__}: they hold the hardness "
                "schedule beside all fields of TrainingArguments"
            )
        if model is not None:
            check_not_offloaded(model)
        if args.output_dir is not None:
            check_writable(args.output_dir)
        super().__init__(model=model, args=args, **kwargs)  # by name: subclasses' bases order theirs otherwise
        if not hardness_sites(self.model):
            raise ValueError(
                f"{type(self.model).__name__} has no λ-GELU: call hf_lambda_gelu.convert(model) before building the trainer"
            )
        self.add_callback(HardeningCallback())
        if has_adapters(self.model):
            self._check_adapters()
            save_hardness_with_adapters(self.model)
        if args.sparsity_penalty:
            check_penalisable(args, self.model, self.is_fsdp_enabled or self.is_deepspeed_enabled)
        best = args.metric_for_best_model or ""
        if "relu_" in best and not args.eval_relu:
            raise ValueError(f"metric_for_best_model={best!r} is not measured with eval_relu=False: set eval_relu=True")
        if args.load_best_model_at_end and "relu_" not in best:
            logger.warning(
                f"load_best_model_at_end with metric_for_best_model={best!r} may bring back a checkpoint from before the "
                f"gates were hard: choose by the ReLU metrics, e.g. 'eval_relu_{best.removeprefix('eval_')}'"
            )

    def _check_adapters(self) -> None:
        if self.args.hardness_compensate != "none":
            raise ValueError(
                f"hardness_compensate={self.args.hardness_compensate!r} refits base weights, which checkpoints of adapters "
                "do not hold: set hardness_compensate='none', for a ramp, or merge after training and substitute by "
                "relu_ize(model, calibration=…, compensate='least_squares')"
            )
        frozen = [name for name, site in hardness_sites(self.model).items() if not site.unclipped_hardness.requires_grad]
        if frozen:
            logger.warning(
                f"λ of {len(frozen)} sites is frozen, {frozen[0]} the first: PEFT freezes what is there when it wraps a "
                "model. To learn λ, call convert after it"
            )

    @property
    def learned_hardness(self) -> dict[str, float]:
        """{module name: λ} as learned, at the switch to the ramp; the present profile before that."""
        return self._hardening.at_switch or hardness_profile(self.model)

    @property
    def hardness_targets(self) -> dict[str, float]:
        """{module name: λ} that the ramp ends at; empty before the switch if they are calibrated there."""
        return self._hardening.targets(self.args, self.model)

    @property
    def compensation(self) -> CompensationReport | None:
        """What was refit at the switch, if it was in this process."""
        return self._hardening.refit

    @property
    def _hardening(self) -> HardeningCallback:
        # looked up, as the Trainer replaces callbacks when it restores their states
        return next(c for c in self.callback_handler.callbacks if isinstance(c, HardeningCallback))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        sites = hardness_sites(self.model if model is None else model)
        trained = [site.unclipped_hardness for site in sites.values() if site.unclipped_hardness.requires_grad]
        optimizer = self.optimizer
        if optimizer is None:
            for hardness in trained:  # hidden from the Trainer's groups, which have the model's rate and weight decay
                hardness.requires_grad_(False)
            try:
                optimizer = super().create_optimizer(model)
            finally:
                for hardness in trained:
                    hardness.requires_grad_(True)
            if trained:
                optimizer.add_param_group({"params": trained, "lr": self.args.hardness_learning_rate, "weight_decay": 0.0})
        return optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        step = partial(super().training_step, model, inputs, num_items_in_batch)
        if self._penalty is not None:
            step = partial(self._penalty.step, step)
        if self._sites_run:
            return step()
        self._hardening.inputs = self.calibration_inputs
        loader = cast("DataLoader[Any]", self.callback_handler.train_dataloader)  # while a Trainer runs
        self._hardening.try_a_batch(self.args, self.model, loader)

        def rerun() -> Any:
            return self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)

        loss = first_step(self.model, step, rerun, hooked=self._penalty is not None)
        self._sites_run = True
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | int | None]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.args.sparsity_penalty:
            if self._penalty is None or self._penalty.model is not self.model:  # a search for hyperparameters makes new ones
                self._penalty = SparsityPenalty(self.model, self.args)
            self._penalty.begin_update(batches)
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        compute = partial(super().compute_loss, model, inputs, return_outputs, num_items_in_batch)
        if self._penalty is None or not self._penalty.wanted:
            return compute()
        with self._penalty.watching(inputs):
            found = compute()
        loss, outputs = found if isinstance(found, tuple) else (found, None)
        loss = self._penalty.add(loss, self.current_gradient_accumulation_steps, self._scaled(num_items_in_batch))
        return (loss, outputs) if return_outputs else loss

    def _scaled(self, items: torch.Tensor | int | None) -> bool:
        """Whether Trainer takes a loss for one that is divided by what an update accumulates, as in its `training_step`."""
        told = getattr(self, "loss_is_scaled_for_ga", None)  # of newer transformers
        if told is not None:
            return bool(told)
        return (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None

    def calibration_inputs(self, batch: Any) -> Iterable[Any]:
        """The batches of what the model's forward takes, made of a training batch, on which the switch measures and refits.

        To be overridden where the model's forward does not take training batches as they are: a loss of one's own on pairs,
        two towers. [derived]

        Args:
            batch: what the collator makes.

        Examples:
            >>> class Pairs(hlg.LambdaGELUTrainer):  # import hf_lambda_gelu as hlg
            ...     def calibration_inputs(self, batch):
            ...         yield {"input_ids": batch["query_ids"]}
            ...         yield {"input_ids": batch["document_ids"]}
        """
        return [batch]

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        def loop(prefix: str) -> EvalLoopOutput:
            return super(LambdaGELUTrainer, self).evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, prefix
            )

        output = loop(metric_key_prefix)
        if self.args.eval_relu:
            # in the same loop, so that one log line, one callback event and the choice of the best checkpoint see both
            with gates_as_relu(self.model), without_a_trace(self):
                relu = loop(f"{metric_key_prefix}_relu").metrics or {}
            if output.metrics is not None:
                output.metrics.update({name: value for name, value in relu.items() if "preparation_time" not in name})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update({f"hardness/{name}": value for name, value in hardness_profile(self.model).items()})
            logs.update({} if self._penalty is None else self._penalty.logs())
        super().log(logs, start_time)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        relu: bool = True,
        details: CardDetails | None = None,
        **kwargs: Any,
    ) -> Any:
        """Publishes the model as the ReLU network that it has become; `relu=False` publishes it with its λ, as Trainer does.

        The ReLU network is proven before, and uploaded in one commit, see `push_relu_to_hub`; the model in memory stays as
        it is. What is pushed *while* training (`hub_strategy`) is the λ-GELU model.

        Args:
            blocking: only without `relu`, which always waits.
            details: what the card of the ReLU network shall say; training arguments are added, and the last evaluation
                where it has no results.
            kwargs: without `relu`, as for `Trainer.push_to_hub`.

        Raises:
            SoftGateError: the gates are too soft for ReLU to take their place.
        """
        if not relu:
            tags = kwargs.pop("tags", None) or []
            tags = [*([tags] if isinstance(tags, str) else tags), "lambda-gelu", f"arxiv:{PAPER}"]
            return super().push_to_hub(commit_message, blocking, token, revision, private, tags=tags, **kwargs)
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)}: the card of a ReLU network takes details=CardDetails(…)")
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        finish_current_push(self)
        return push_trained(
            self,
            commit_message,
            details or CardDetails(),
            private=bool(private if private is not None else self.args.hub_private_repo),
            revision=revision or self.args.hub_revision,
            token=token,
        )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if has_adapters(self.model) and self.state.best_model_checkpoint:
            load_hardness(self.model, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer loads non-strictly: without this, λ would silently start over
        saved = tensor_names(Path(resume_from_checkpoint))  # of adapters and of FSDP, PEFT and accelerate check them
        if saved is not None:
            wanted = {f"{name}.{NAME}" for name in hardness_sites(self.model if model is None else model)}
            found = {key.replace(OLDER, NAME) for key in saved if key.endswith((NAME, OLDER))}
            if found != wanted:
                raise ValueError(
                    f"cannot resume from {resume_from_checkpoint}: it holds λ for {len(found)} sites, the model has "
                    f"{len(wanted)}; only in the checkpoint: {sorted(found - wanted)}, only in the model: "
                    f"{sorted(wanted - found)}. Convert the model as the interrupted run did, or start a new run"
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if has_adapters(self.model):
            load_hardness(self.model, resume_from_checkpoint)
