"""Teachers, losses and outputs that do not fit, refused before a weight changes; a run that diverges."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import distilled as d
from support import tiny
from transformers import PreTrainedModel, TrainingArguments

import hf_lambda_gelu as hlg


def renamed(teacher: PreTrainedModel, labels: list[str]) -> PreTrainedModel:
    teacher.config.id2label = dict(enumerate(labels))
    return teacher


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t: (s, s), "the teacher is the student itself"),
        (lambda s, t: (d.adapted(s), s), "the teacher is the student itself, or shares weights"),
        (lambda s, t: (s, None), "expected a model of transformers as teacher"),
        (lambda s, t: (s, torch.nn.Linear(2, 2)), "its folder or Hub name, got Linear"),
        (lambda s, t: (s, "no/such-teacher"), "neither a folder nor a model on the Hub"),
        (lambda s, t: (s, tiny.build("bert")), "its task is 'fill-mask', the student's is 'text-classification'"),
        (lambda s, t: (s, tiny.build("bert-classifier", vocab_size=98)), "its vocabulary size is 98, the student's is 99"),
        (lambda s, t: (s, tiny.build("bert-classifier", num_labels=3)), "its number of labels is 3, the student's is 2"),
        (lambda s, t: (renamed(s, ["no", "yes"]), renamed(t, ["yes", "no"])), "its list of labels is {0: 'yes', 1: 'no'}"),
        (lambda s, t: (hlg.convert(t) and t, s), "still has 2 λ-GELU modules"),
        (lambda s, t: ("name", t), "expected the student, a model, got str"),
    ],
)  # fmt: skip
def test_teachers_that_do_not_fit(make: Callable[..., Any], message: str, tmp_path: Path) -> None:
    """Refused when the trainer is made, before a batch is looked at."""
    student, teacher = make(*d.pair("bert-classifier"))
    with pytest.raises(ValueError, match=re.escape(message)):
        d.trainer(student, teacher, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_loss_func": len}, "compute_loss_func is not taken"),
        ({"model_init": len}, "model_init is not taken"),
        ({"args": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor=0.1"),
    ],
)
def test_another_loss(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    student, teacher = d.pair("bert-classifier")
    args = TrainingArguments(str(tmp_path), use_cpu=True, **changes.pop("args", {}))
    with pytest.raises(ValueError, match=message):
        hlg.DistillationTrainer(student, args, teacher=teacher, **changes)


def test_outputs_that_do_not_fit(tmp_path: Path) -> None:
    """What no config says is said at the first batch, before a weight changes."""
    student, teacher = d.pair("llama")
    teacher.lm_head = torch.nn.Linear(32, 98)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(ValueError, match=r"logits of the student has the shape \(4, 11, 99\), of the teacher \(4, 11, 98\)"):
        d.trainer(student, teacher, tmp_path, d.texts(4)).train()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    speech = tiny.build("wav2vec2")
    student = copy.deepcopy(speech)
    hlg.convert(student)
    hlg.relu_ize(student, force=True)
    batch = {"input_values": torch.randn(2, 400), "attention_mask": torch.tensor([[1] * 400, [1] * 200 + [0] * 200])}
    with pytest.raises(ValueError, match="the batch has padding"):
        d.trainer(student, speech, tmp_path).compute_loss(student, batch)


def test_divergence_is_said(tmp_path: Path) -> None:
    """A rate far too high: an error with the step, and no checkpoint of weights that are no numbers."""
    student, teacher = d.pair("llama")
    made = d.trainer(student, teacher, tmp_path, d.texts(12), learning_rate=1e18, save_strategy="steps", save_steps=3)
    with pytest.raises(FloatingPointError, match="training has diverged"):
        made.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not math.isfinite(sum(float(p.detach().sum()) for p in student.parameters()))
