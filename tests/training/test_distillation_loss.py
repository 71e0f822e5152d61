"""The loss of a ReLU network that learns from its smooth original, against loops in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import distilled as d
from transformers import BertModel


def by_tokens(distance: Callable[..., float], counts: Callable[[dict[str, Any], int, int], bool]) -> Callable[..., float]:
    """The mean over the tokens of a batch that count."""

    def mean(student: np.ndarray, teacher: np.ndarray, batch: dict[str, Any]) -> float:
        places = [(i, j) for i in range(student.shape[0]) for j in range(student.shape[1]) if counts(batch, i, j)]
        assert places
        return sum(distance(teacher[i, j], student[i, j]) for i, j in places) / len(places)

    return mean


def by_examples(distance: Callable[..., float]) -> Callable[..., float]:
    def mean(student: np.ndarray, teacher: np.ndarray, batch: dict[str, Any]) -> float:
        counted = [i for i in range(len(student)) if batch.get("labels") is None or batch["labels"].dim() > 1]
        counted = counted or [i for i, label in enumerate(batch["labels"].tolist()) if label != -100]
        return sum(distance(teacher[i].reshape(-1), student[i].reshape(-1)) for i in counted) / len(counted)

    return mean


def real(batch: dict[str, Any], i: int, j: int) -> bool:
    return bool(batch["attention_mask"][i, j])


def labelled(batch: dict[str, Any], i: int, j: int) -> bool:
    return real(batch, i, j) and bool(batch["labels"][i, j] != -100)


def next_labelled(batch: dict[str, Any], i: int, j: int) -> bool:
    return j < 10 and real(batch, i, j) and bool(batch["labels"][i, j + 1] != -100)


def images(_: bool) -> dict[str, Any]:
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def text(labels: bool) -> dict[str, Any]:
    return d.stacked(d.texts(6, labels))


def classes(kind: str) -> Callable[[bool], dict[str, Any]]:
    made = {"left out": torch.tensor([1, -100, 0, 1, -100, 0]), "several": torch.eye(3).repeat(2, 1)}
    return lambda _: {**text(False), "labels": made[kind]}


def decoded(_: bool) -> dict[str, Any]:
    ids = torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(1))
    return {**d.stacked(d.texts(3)), "labels": torch.where(ids < 30, -100, ids)}


CASES: dict[str, tuple[str, Any, dict[str, Any], Callable[[bool], dict[str, Any]], bool, Callable[..., float]]] = {
    "causal": ("llama", None, {}, text, False, by_tokens(d.kl, real)),
    "causal, labels": ("gpt2", None, {}, text, True, by_tokens(d.kl, next_labelled)),
    "masked, labels": ("bert", None, {}, text, True, by_tokens(d.kl, labelled)),
    "classes": ("bert-classifier", None, {}, text, False, by_examples(d.kl)),
    "classes, left out": ("bert-classifier", None, {}, classes("left out"), False, by_examples(d.kl)),
    "several labels": ("bert-classifier", None, {"num_labels": 3}, classes("several"), False, by_examples(d.bernoulli_kl)),
    "regression": (
        *("bert-classifier", None, {"num_labels": 1}, text, False),
        by_examples(lambda t, s: float(((t - s) ** 2).sum())),
    ),
    "image classes": ("vit", None, {}, images, False, by_examples(d.kl)),
    "states of text": ("bert", BertModel, {}, text, False, by_tokens(d.relative, real)),
    "decoder": ("t5", None, {"decoder_start_token_id": 0, "pad_token_id": 0}, decoded, True, by_tokens(
        d.kl, lambda batch, i, j: bool(batch["labels"][i, j] != -100))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss(case: str, tmp_path: Path) -> None:
    """Its value in fp32 is that of loops in float64, which padding and labels of −100 do not enter."""
    name, cls, overrides, batches, labels, reference = CASES[case]
    student, teacher = d.pair(name, cls, **overrides)
    batch = batches(labels)
    before = teacher.config.to_dict()
    made = d.trainer(student, teacher, tmp_path)
    with torch.no_grad():
        loss = float(made.compute_loss(student, dict(batch)))
        expected = reference(*(d.run_in_double(model, batch).numpy() for model in (student, teacher)), batch)
    assert loss == pytest.approx(expected, rel=2e-4)
    assert expected > 1e-5  # nothing is compared with itself
    assert teacher.config.to_dict() == before


def test_states_of_images_and_half_precision(tmp_path: Path) -> None:
    """Relative error by image; a teacher in bf16 takes the student's fp32 pixels."""
    student, teacher = (model.base_model for model in d.pair("dinov2"))
    batch = images(False)
    with torch.no_grad():
        loss = float(d.trainer(student, teacher, tmp_path).compute_loss(student, dict(batch)))
        ours, wanted = (d.run_in_double(model, batch).numpy() for model in (student, teacher))
        half = float(d.trainer(student, copy.deepcopy(teacher).bfloat16(), tmp_path).compute_loss(student, dict(batch)))
    assert loss == pytest.approx(np.mean([d.relative(t, s) for s, t in zip(ours, wanted, strict=True)]), rel=2e-4)
    assert half == pytest.approx(loss, rel=0.1)
    assert half != loss
