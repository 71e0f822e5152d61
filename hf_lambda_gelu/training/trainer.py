"""`LambdaGELUTrainer`: transformers' Trainer, with λ learned, hardened and watched."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..activation.module import hardness_profile, hardness_sites
from ..checkpoints.card import PAPER, CardDetails
from ..structure.adapters import has_adapters
from ..surgery.adapter_hardness import load_hardness, save_hardness_with_adapters
from ..surgery.hinges.layers import Layers
from ..surgery.hinges.report import HingeReport
from ..surgery.refit.report import CompensationReport
from .arguments import LambdaGELUTrainingArguments, wanted_hinges
from .callback import HardeningCallback
from .console import shorten
from .divergence import check_finite
from .first_step import first_step
from .optimizer import own_group
from .pictures import ProfilePictures
from .publish import push_relu
from .pushes import before_other_weights, push_checkpoint, visibility
from .resuming import before_a_save, checkpoint_to_resume
from .run_checks import check_name
from .second_evaluation import evaluate_twice, without_a_trace
from .sparsity_penalty import SparsityPenalty, loss_is_scaled
from .start_checks import check_arguments, check_reference, check_same_sites, check_trainable
from .wider import check_as_wide, check_run, layers_of, stored_hinges


class LambdaGELUTrainer(Trainer):
    """Trains a model that `convert` has prepared, and hardens its λ, so that ReLU can take the place of each λ-GELU.

    - λ is stepped in λ itself by the run's own optimizer (`attach_hardness_update`), in a parameter group of its own with
      `hardness_learning_rate` and no weight decay;
    - at `hardness_switch_point` it goes to its target at once, and the linear maps after the sites are refit on training
      examples so that the function stays (`hardness_compensate`); with "none" it follows `hardness_ramp` instead;
    - the target is that of `hardness_tolerance`, or with `hardness_target="calibrated"` each site's own, from its
      pre-activations on 64 training examples at the switch;
    - λ of every layer is in the logs, as `hardness/<module>`; what is printed has one line for all of them;
    - with `sparsity_penalty`, the gradient is that of the loss and of a penalty on what the gates let through; the logs have
      it as `sparsity/penalty`, and the share of zeros that ReLU would put out as `sparsity/zeros`;
    - with `hardness_hinges` or `hardness_budget`, layers are wider from the switch on, with several ReLUs in the place of
      each gate; maps that need biases for that get them when the trainer is made, as zeros;
    - evaluation also reports the metrics with the gates as ReLU, as `eval_relu_*`.

    Everything else is transformers' Trainer. `args` must be `LambdaGELUTrainingArguments`.

    Raises:
        ValueError: the model has no λ-GELU or is offloaded, the arguments are of another class, the output folder cannot be
            written, or a checkpoint to resume from is broken or belongs to a model converted otherwise, or the switch needs
            examples of a training set without length or index: each before training starts. At the first step, before λ or
            a weight changes: a fused kernel that runs in the place of sites.
        FloatingPointError: a loss, λ or weights are no numbers: with step, layer, value and the last good checkpoint.
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
    _layers: Layers | None = None  # that the switch makes wider
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
        check_arguments(args, model)
        super().__init__(model=model, args=args, **kwargs)  # by name: subclasses' bases order theirs otherwise
        engine = self.is_fsdp_enabled or self.is_deepspeed_enabled
        check_trainable(args, self.model, getattr(self, "ref_model", None), engine)
        if has_adapters(self.model) and getattr(self, "ref_model", self) is None:  # TRL's take the model without them
            check_reference(args)
        if wanted_hinges(args) is not None:
            check_run(args, engine)
        if self.model_init is None:
            self._layers = layers_of(self.model, args, give_biases=self.optimizer is None)  # which then gets them
        self.add_callback(_HandsInputsOn(self))
        self.add_callback(HardeningCallback())
        self.add_callback(ProfilePictures(self))
        save_hardness_with_adapters(self.model)

    @property
    def learned_hardness(self) -> dict[str, float]:
        """{module name: λ} as learned, at the switch; the present profile before that."""
        return self._hardening.at_switch or hardness_profile(self.model)

    @property
    def has_switched(self) -> bool:
        """Whether λ is no longer learned, but at its target or on its way; of the best checkpoint, where that is loaded."""
        return self._hardening.at_switch is not None

    @property
    def hardness_targets(self) -> dict[str, float]:
        """{module name: λ} that the sites end at; empty before the switch if they are calibrated there."""
        return self._hardening.targets(self.args, self.model)

    @property
    def compensation(self) -> CompensationReport | None:
        """What was refit at the switch, if it was in this process."""
        return self._hardening.refit

    @property
    def hinges(self) -> HingeReport | None:
        """The layers that the switch made wider, with `hardness_hinges` or `hardness_budget`."""
        return self._hardening.hinges

    @property
    def _hardening(self) -> HardeningCallback:
        # looked up, as the Trainer replaces callbacks when it restores their states
        return next(c for c in self.callback_handler.callbacks if isinstance(c, HardeningCallback))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._layers = layers_of(model, self.args)
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        sites = hardness_sites(self.model if model is None else model)
        trained = [site.unclipped_hardness for site in sites.values() if site.unclipped_hardness.requires_grad]
        if not trained:
            return super().create_optimizer(model)
        if self.optimizer_cls_and_kwargs is None:
            check_name(self.args.optim)
        optimizer = super().create_optimizer(model)
        own_group(optimizer, trained, self.args.hardness_learning_rate)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        return super().train(checkpoint_to_resume(resume_from_checkpoint, self.args), *args, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        loss = self._checked_step(model, inputs, num_items_in_batch)
        if not self.args.fp16:  # which leaves out the steps that overflow
            self._hardening.losses.see(loss, self.state.global_step + 1, inputs)
        return loss

    def _checked_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        step = partial(super().training_step, model, inputs, num_items_in_batch)
        if self._penalty is not None:
            step = partial(self._penalty.step, step)
        if self._sites_run:
            return step()
        loader = cast("DataLoader[Any]", self.callback_handler.train_dataloader)  # while a Trainer runs
        self._hardening.try_a_batch(self.args, self.state, self.model, loader)

        def rerun() -> Any:
            with without_a_trace(self):
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
        loss = self._penalty.add(loss, self.current_gradient_accumulation_steps, loss_is_scaled(self, num_items_in_batch))
        return (loss, outputs) if return_outputs else loss

    def calibration_inputs(self, batch: Any) -> Iterable[Any]:
        """The batches of what the model's forward takes, made of a training batch, on which the switch measures and refits.

        To be overridden where the model's forward does not take training batches as they are: a loss of one's own on pairs,
        two towers. For trainers of sentence-transformers, it is each column's texts. [derived]

        Args:
            batch: what the collator makes.

        Examples:
            >>> class Pairs(hlg.LambdaGELUTrainer):  # import hf_lambda_gelu as hlg
            ...     def calibration_inputs(self, batch):
            ...         yield {"input_ids": batch["query_ids"]}
            ...         yield {"input_ids": batch["document_ids"]}
        """
        collect = getattr(self, "collect_features", None)  # of sentence-transformers: a batch holds several columns of texts
        return [batch] if collect is None else collect(batch)[0]

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        def loop(loader: Any, prefix: str) -> EvalLoopOutput:
            return super(LambdaGELUTrainer, self).evaluation_loop(
                loader, description, prediction_loss_only, ignore_keys, prefix
            )

        both = partial(evaluate_twice, self, loop) if self.args.eval_relu else loop
        return both(dataloader, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update({f"hardness/{name}": value for name, value in hardness_profile(self.model).items()})
            logs.update({} if self._penalty is None else self._penalty.logs())
        shorten(self.callback_handler.callbacks, logs)
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
        inputs: dict[str, torch.Tensor] | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Publishes the model as the ReLU network that it has become; `relu=False` publishes it with its λ, as Trainer does.

        The ReLU network is proven before, and uploaded in one commit, see `push_relu_to_hub`; the model in memory stays as
        it is. What is pushed *while* training (`hub_strategy`), or by `save_model`, is the λ-GELU model; the card of a ReLU
        network that the repository holds is removed before, and so it is with `relu=False`.

        Args:
            blocking: only without `relu`, which always waits.
            details: what the card of the ReLU network shall say; training arguments are added, and where it has no results
                the evaluation of these very weights: after training, or at the last step, or the best checkpoint's.
            inputs: a batch of what the model's forward takes, for the proof; by default a few examples of the evaluation
                set, or of the training set, by the trainer's collator and `calibration_inputs`; where forward does not take
                these, as for `verify_relu_pretrained`.
            trust_remote_code: of a model with code of its own, run that code to prove the ReLU network, and upload it.
            kwargs: without `relu`, as for `Trainer.push_to_hub`.

        Raises:
            SoftGateError: the gates are too soft for ReLU to take their place.
        """
        if not relu:
            tags = kwargs.pop("tags", None) or []
            tags = [*([tags] if isinstance(tags, str) else tags), "lambda-gelu", f"arxiv:{PAPER}"]
            with visibility(self.args, private):
                before_other_weights(self, token, revision)
                return super().push_to_hub(commit_message, blocking, token, revision, tags=tags, **kwargs)
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)}: the card of a ReLU network takes details=CardDetails(…)")
        return push_relu(
            self,
            commit_message,
            details or CardDetails(),
            token=token,
            revision=revision,
            private=private,
            inputs=inputs,
            trust_remote_code=trust_remote_code,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, True)
        if self.args.push_to_hub and not _internal_call:  # what was saved: λ-GELU, however soft
            self.push_to_hub("Model save", revision=self.args.hub_revision, relu=False)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_finite(self.model, self.state, self.args, self._hardening.losses, weights=True)
        if self.args.should_save:
            before_a_save(self._get_output_dir(trial=trial), self.state.global_step, self.args)
        super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        push_checkpoint(self, checkpoint_folder, super()._push_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint:
            self._fit_widths(self.state.best_model_checkpoint)
        super()._load_best_model()
        if has_adapters(self.model) and self.state.best_model_checkpoint:
            load_hardness(self.model, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_same_sites(self.model if model is None else model, resume_from_checkpoint)
        self._fit_widths(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, *(() if model is None else (model,)))  # not all bases take one
        if has_adapters(self.model):
            load_hardness(self.model, resume_from_checkpoint)

    def _fit_widths(self, checkpoint: str) -> None:
        """Lets the model have layers as wide as those of the checkpoint, whose weights are to be loaded."""
        stored = stored_hinges(checkpoint)
        if self._layers is not None:
            self._layers.fit(stored)
        elif stored is not None:
            check_as_wide(self.model, stored, checkpoint)


class _HandsInputsOn(TrainerCallback):
    """Lets the callback that hardens have `calibration_inputs` before it may switch; one that is restored is made anew."""

    def __init__(self, trainer: LambdaGELUTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._hardening.inputs = self.trainer.calibration_inputs
