"""What a student and its teacher say on a batch: how far apart that is, and how many predictions are compared. [derived]"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..checkpoints.save import pipeline_tag
from ..measurement.batches import batch_size

_NO_LABEL = -100  # what transformers' losses leave out
_SHIFTED_LOSS = "ForCausalLMLoss"

Kind = Literal["classes", "labels", "numbers", "states"]


@dataclass(frozen=True)
class Comparison:
    """Compares the outputs of two models that take the same batches, prediction by prediction.

    With s of the student and t of the teacher, a prediction's distance is, by `kind`,

    - "classes": KL(softmax t ‖ softmax s), in nats;
    - "labels": the same of a sigmoid each, summed over the labels (`problem_type="multi_label_classification"`);
    - "numbers": ‖s − t‖², of a regression;
    - "states": ‖s − t‖² / ‖t‖², of a model without logits, on its last hidden state.

    Attributes:
        kind: what is predicted.
        by_token: whether each token has a prediction, or each example one, over all of its positions.
        shifted: whether a position predicts the label of the next one, as in causal language models.
        decoder: whether the predictions are those of an encoder-decoder's decoder.
    """

    kind: Kind
    by_token: bool
    shifted: bool
    decoder: bool

    @classmethod
    def of(cls, teacher: PreTrainedModel, output: Mapping[str, Any], batch: Mapping[str, Any]) -> Comparison:
        """For all batches like this one, of which `output` is what the teacher puts out.

        Raises:
            ValueError: it has neither logits nor a last hidden state, or logits of another form.
        """
        logits = output.get("logits")
        found = output.get("last_hidden_state") if logits is None else logits
        if not isinstance(found, Tensor) or (logits is not None and found.dim() not in (2, 3)):
            shape = f", logits of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
            raise ValueError(
                f"{type(teacher).__name__} puts out {', '.join(output)}{shape}: expected logits of shape (examples, "
                "classes) or (examples, positions, classes), or a last_hidden_state. Train this model on its own loss"
            )
        config, decoder = teacher.config, bool(teacher.config.is_encoder_decoder)
        problem, labels = getattr(config, "problem_type", None), batch.get("labels")
        if isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == found.shape:
            problem = problem or "multi_label_classification"  # as transformers' own losses conclude
        if logits is None:
            kind: Kind = "states"
        elif found.dim() == 2 and (problem == "regression" or found.shape[-1] == 1):
            kind = "numbers"
        else:
            kind = "labels" if found.dim() == 2 and problem == "multi_label_classification" else "classes"
        made = cls(kind, False, _shifts(teacher) and not decoder, decoder)
        tokens = made._tokens(batch)
        by_token = found.dim() == 3 and tokens is not None and tokens == found.shape[:2]
        if logits is not None and found.dim() == 3 and tokens is not None and not by_token:
            raise ValueError(
                f"{type(teacher).__name__} puts out logits of shape {tuple(found.shape)} for {tokens[0]} texts of "
                f"{tokens[1]} tokens: expected logits for each token"
            )
        return cls(kind, by_token, made.shifted, decoder)

    def count(self, batch: Mapping[str, Any], model: nn.Module) -> int:
        """How many predictions of the batch are compared: neither padding nor those whose label is −100.

        Args:
            model: whose batch it is, for the number of examples.
        """
        counted = self._counted(batch)
        if counted is not None:
            return int(counted.sum())
        tokens = self._tokens(batch) if self.by_token else None
        return tokens[0] * tokens[1] if tokens is not None else batch_size(model, batch)

    def total(self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Mapping[str, Any]) -> Tensor:
        """The sum of the distances of all predictions that are compared, in fp32, or fp64 where the outputs are.

        Raises:
            ValueError: the outputs have other shapes, or the batch's mask or labels do not fit them.
        """
        name = "last_hidden_state" if self.kind == "states" else "logits"
        ours, wanted = student.get(name), teacher.get(name)
        if not isinstance(ours, Tensor) or not isinstance(wanted, Tensor) or ours.shape != wanted.shape:
            shapes = [tuple(each.shape) if isinstance(each, Tensor) else None for each in (ours, wanted)]
            raise ValueError(
                f"{name} of the student has the shape {shapes[0]}, of the teacher {shapes[1]}: expected the same. Let the "
                "teacher be the smooth model that the student was made from"
            )
        counted = self._counted(batch)
        leading = ours.shape[: 2 if self.by_token else 1]
        if counted is None:
            self._check_no_padding(batch, ours)
        elif counted.shape != leading:
            raise ValueError(
                f"{name} has the shape {tuple(ours.shape)}, mask and labels of the batch are about "
                f"{tuple(counted.shape)} predictions: expected as many. Leave out labels that are not one for each of them"
            )
        wanted = wanted.to(ours.device)
        if self.kind == "states" and not self.by_token:
            ours, wanted = ours.flatten(1), wanted.flatten(1)
        if counted is not None and not bool(counted.all()):
            chosen = counted.to(ours.device)
            ours, wanted = ours[chosen], wanted[chosen]
        apart = distances(self.kind, ours, wanted)
        return apart.sum() if self.by_token or apart.dim() < 2 else apart.flatten(1).mean(1).sum()

    def _tokens(self, batch: Mapping[str, Any]) -> tuple[int, int] | None:
        """(examples, tokens) of the text that the predictions belong to, None where the batch has none."""
        names = ("decoder_input_ids", "decoder_inputs_embeds", "labels") if self.decoder else ("input_ids", "inputs_embeds")
        for name in names:
            value = batch.get(name)
            if isinstance(value, Tensor) and value.dim() >= 2:
                return value.shape[0], value.shape[1]
        return None

    def _counted(self, batch: Mapping[str, Any]) -> Tensor | None:
        """True at the predictions that are compared: (examples, tokens), or (examples,); None where all are."""
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            labels = None
        if not self.by_token:
            return labels != _NO_LABEL if labels is not None and labels.dim() == 1 else None
        mask = batch.get("decoder_attention_mask" if self.decoder else "attention_mask")
        counted = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if labels is not None and labels.dim() == 2:
            there = labels != _NO_LABEL
            if self.shifted:  # the last position has no label
                there = torch.cat([there[:, 1:], torch.zeros_like(there[:, :1])], dim=1)
            counted = there if counted is None or counted.shape != there.shape else counted & there.to(counted.device)
        return counted

    def _check_no_padding(self, batch: Mapping[str, Any], found: Tensor) -> None:
        """ValueError where there may be padding among positions that are no tokens: nothing says which are."""
        mask = batch.get("attention_mask")
        if self.by_token or (self.kind != "states" and found.dim() == 2):
            return  # of one prediction an example, which saw the mask
        if isinstance(mask, Tensor) and not bool(mask.all()):
            raise ValueError(
                f"the batch has padding, by an attention_mask of shape {tuple(mask.shape)}, and the model puts out "
                f"{tuple(found.shape)}, so that nothing says which of it is padding: let a batch hold examples of one length"
            )


def distances(kind: Kind, student: Tensor, teacher: Tensor) -> Tensor:
    """How far apart two outputs are, by `Comparison`: (…, features) each → (…)."""
    half = student.dtype in (torch.float16, torch.bfloat16)
    ours, wanted = (value.float() if half else value for value in (student, teacher.to(student.dtype)))
    if kind == "classes":
        return F.kl_div(ours.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    if kind == "labels":
        yes = wanted.sigmoid()
        cross, own = (F.binary_cross_entropy_with_logits(logits, yes, reduction="none") for logits in (ours, wanted))
        return (cross - own).sum(-1)
    apart = (ours - wanted).square().sum(-1)
    if kind == "numbers":
        return apart
    return apart / wanted.square().sum(-1).clamp_min(torch.finfo(wanted.dtype).tiny)


def _shifts(model: PreTrainedModel) -> bool:
    """Whether the model's own loss holds a position's prediction against the next position's label."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    loss: Any = LOSS_MAPPING.get(str(getattr(model, "loss_type", None)))  # GPT-2 has none, and uses the same
    return getattr(loss, "__name__", None) == _SHIFTED_LOSS or pipeline_tag(model) == "text-generation"
