"""`DistillationTrainer`: transformers' Trainer for a ReLU network that learns from its smooth original."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..checkpoints.folders import check_writable
from ..checkpoints.save import report_left_on
from ..measurement.forward import call, random_state_kept
from ..structure.edits import without_caches
from ..surgery.adapter_hardness import save_hardness_with_adapters
from .divergence import LossWatch, check_finite
from .dropout import without_dropout
from .predictions import Comparison
from .pushes import before_other_weights, push_checkpoint, visibility
from .resuming import before_a_save, checkpoint_to_resume
from .teacher import found_teacher, student_model

_PARALLEL = ("tp_size", "cp_size", "sp_size")


class DistillationTrainer(Trainer):
    """Trains a ReLU network to predict what its smooth original predicts, on examples without labels.

    The loss is the mean over all predictions of an update of

    - KL(softmax t ‖ softmax s), with logits s of the student and t of the teacher, (predictions, classes), in nats: at each
      token of a language model, for each example of a classifier;
    - for a model without logits (`AutoModel`) ‖s − t‖² / ‖t‖², with the last hidden states of each token, or of each image;
    - of sigmoids, where `problem_type` says that a classifier's labels do not exclude each other; ‖s − t‖² of a regression.

    It is computed in fp32, whatever the models compute in. Padding does not count, nor what labels of −100 leave out; labels
    are not used otherwise. The mean is that of the whole update, however it is cut into batches, accumulated, or dealt out
    to processes. In evaluation `eval_loss` is the mean of each batch, weighted by its examples, as Trainer's is.

    The teacher is in eval mode and without gradients, on the device of the student, in its own dtype, within the run's
    autocast; each process has all of it. It is in no checkpoint. The student is trained in full, or with PEFT's adapters,
    which `merge_and_unload` takes into the weights; and without dropout or augmentation, as the teacher has none (with
    gradient checkpointing set the dropout of Falcon, BLT and ProphetNet to 0 in the config, where their layers read it).
    All else is transformers' Trainer; a run resumes to the bit, from the newest checkpoint that is whole.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), at temperature
    1. Of hidden states and without dropout: derived.

    Args:
        model: the student, after `relu_ize`, or with adapters put into it afterwards.
        args: of any Trainer.
        teacher: the smooth model itself, its folder, or its Hub name.
        trust_remote_code: run code of its own that lies beside a teacher that is loaded by folder or name.
        kwargs: as for Trainer; neither `model_init` nor `compute_loss_func`.

    Raises:
        ValueError: before anything runs, a student with λ-GELU, or a teacher that is the student, shares weights with it, or
            has another task, vocabulary or list of labels; arguments that ask for another loss. At the first batch, before
            a weight changes: outputs of other shapes. In `train`, a checkpoint to resume from that is broken.
        CheckpointError: a teacher that does not load.
        FloatingPointError: the loss or weights are no numbers: with step, value and the last good checkpoint.

    Examples:
        >>> import copy, hf_lambda_gelu as hlg, torch
        >>> from transformers import BertConfig, BertForMaskedLM, TrainingArguments
        >>> smooth = BertForMaskedLM(BertConfig(num_hidden_layers=1))
        >>> model = copy.deepcopy(smooth)
        >>> _, report = hlg.convert(model), hlg.relu_ize(model, force=True)
        >>> rows = [{"input_ids": torch.arange(8) + i} for i in range(16)]
        >>> arguments = TrainingArguments("runs/distilled", max_steps=4, report_to="none")
        >>> trainer = hlg.DistillationTrainer(model, arguments, teacher=smooth, train_dataset=rows)
        >>> trainer.train()  # doctest: +SKIP
    """

    model: nn.Module  # Trainer's __init__ raises where there is none

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | str | os.PathLike[str] | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        args = TrainingArguments("tmp_trainer") if args is None else args
        _check_arguments(args, kwargs)
        student_model(model)  # type: ignore[arg-type]  # which it refuses
        self.teacher = found_teacher(teacher, model, trust_remote_code)  # type: ignore[arg-type]
        super().__init__(model=model, args=args, **kwargs)
        if report_left_on(self.model) is not None:  # the base is not what it was loaded as
            save_hardness_with_adapters(self.model)
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if any(getattr(parallel, name, 1) > 1 for name in _PARALLEL):
            raise ValueError(
                "tensor, context and sequence parallelism cut predictions apart: expected data parallelism alone"
            )
        # Trainer takes the loss for one that is divided by what an update accumulates
        self.model_accepts_loss_kwargs = True
        if getattr(self.teacher, "hf_device_map", None) is None and not getattr(self.teacher, "is_quantized", False):
            self.teacher.to(self.args.device)  # type: ignore[arg-type]
        self._comparison: Comparison | None = None
        self._losses = LossWatch()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._losses = LossWatch()
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args)
        with without_dropout(self.model):
            result = super().train(checkpoint, *args, **kwargs)
        check_finite(self.model, self.state, self.args, self._losses, weights=True)
        return result

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """The batches of an update, and how many predictions they hold, on all processes together."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, items
        comparison = self._compared(batches[0])
        count = torch.tensor(sum(comparison.count(batch, self.teacher) for batch in batches), device=self.args.device)
        return batches, self.accelerator.gather(count).sum()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.args.fp16:  # which leaves out the steps that overflow
            self._losses.see(loss, self.state.global_step + 1, inputs)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch: its part of the update's mean while training, else its own mean."""
        comparison = self._compared(inputs)
        wanted = self._taught(inputs)
        outputs = model(**_without_labels(inputs, comparison.decoder))
        total = comparison.total(outputs, wanted, inputs)
        if model.training and num_items_in_batch is not None:
            # the gradients of several processes are averaged
            loss = (
                total
                * self.accelerator.num_processes
                / torch.as_tensor(num_items_in_batch, device=total.device).clamp_min(1)
            )
        else:
            loss = total / max(1, comparison.count(inputs, self.teacher))
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        if all(inputs.get(name) is not None for name in self.label_names or ["labels"]):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        found = outputs.get("logits", outputs.get("last_hidden_state"))
        return loss.detach(), None if prediction_loss_only else found.detach(), None

    def _compared(self, batch: Mapping[str, Any]) -> Comparison:
        """How predictions are compared, which the teacher's output on the first batch tells."""
        if self._comparison is None:
            inputs = self._prepare_inputs(dict(batch))
            with random_state_kept(self.teacher):
                self._comparison = Comparison.of(self.teacher, self._taught(inputs), inputs)
        return self._comparison

    @torch.no_grad()
    def _taught(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the teacher puts out."""
        self.teacher.eval()
        fed = _without_labels(inputs, bool(self.teacher.config.is_encoder_decoder))
        fed = {name: _cast(value, self.teacher.dtype) for name, value in fed.items()}
        with without_caches(self.teacher), self.accelerator.autocast():
            return call(self.teacher, fed)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        with visibility(self.args, private):
            before_other_weights(self, token, revision)
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        push_checkpoint(self, checkpoint_folder, super()._push_from_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_finite(self.model, self.state, self.args, self._losses, weights=True)
        if self.args.should_save:
            before_a_save(self._get_output_dir(trial=trial), self.state.global_step, self.args)
        super()._save_checkpoint(model, trial)


def _check_arguments(args: TrainingArguments, kwargs: Mapping[str, Any]) -> None:
    """ValueError for what asks for another loss or student, or a folder that cannot be written."""
    for name in ("compute_loss_func", "model_init"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not taken: the student is what is passed as model, and its loss is the teacher's")
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} is about labels, and this loss has none: leave it out"
        )
    if args.output_dir is not None:
        check_writable(args.output_dir)


def _without_labels(inputs: Mapping[str, Any], decoder: bool) -> dict[str, Any]:
    """What is fed to both models: neither needs its own loss, but decoders may make their input of labels."""
    kept = decoder and "decoder_input_ids" not in inputs
    return {name: value for name, value in inputs.items() if name != "labels" or kept}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
