"""The three networks that every tool gets: as it comes, with λ-GELU in the place of GELU, and with ReLU after a refit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from datasets import load_dataset
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import hf_lambda_gelu as hlg

from ..tools.assets import asset
from ..verification.queries import digits, digits_network

HARDNESS = 4.0  # λ of the λ-GELU networks
TRAIN = 1500  # digits; the others are for tests


class Networks(NamedTuple):
    """One network three times, and the batches of the refit."""

    smooth: nn.Module
    hardened: nn.Module
    relu: nn.Module
    batches: Sequence[Any]


def three(smooth: nn.Module, batches: Sequence[Any]) -> Networks:
    hardened = copy.deepcopy(smooth)
    hlg.convert(hardened, init_hardness=HARDNESS)
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
