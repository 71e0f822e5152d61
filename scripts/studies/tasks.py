"""The tasks of the study that start from pretrained models, on real data: cut to a minute or two a run, and whole."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scripts.finetuning import classification_metrics
from scripts.tools.assets import asset

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task(ABC):
    """A task of the study.

    Attributes:
        name: the key in the results.
        title: what tables call it.
        train, evaluate: examples to train on, and to judge by.
        epochs: passes over the training examples, in batches of 32.
        rates: learning rates that each recipe may choose from, on the validation split.
        bf16: whether training computes in bf16 where autocast does; everything else, judging too, is fp32.
    """

    name: str
    title: str
    train: int
    evaluate: int
    epochs: int
    rates: tuple[float, ...]
    bf16: bool = field(default=False, kw_only=True)

    pretrained: ClassVar[bool]
    by_length: ClassVar[bool] = False  # whether batches hold examples of like length

    @property
    def size(self) -> str:
        """How large an example is; empty for that of the data."""
        return ""

    @abstractmethod
    def raw(self) -> datasets.DatasetDict:
        """All rows, by split."""

    def encode(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The examples as the model takes them."""
        return rows

    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The model to train, its new weights drawn from torch's random numbers."""

    def collator(self) -> Callable[[list[dict[str, Any]]], Batch]:
        return torch.utils.data.default_collate

    @property
    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        return classification_metrics(None)

    def splits(self, seed: int, split: str) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Training examples drawn by `seed`, and the first ones of "validation" (2,000 at most) or "test"."""
        raw = self.raw()
        count = min(self.evaluate, 2000) if split == "validation" else self.evaluate
        train = raw["train"].shuffle(seed=seed)
        if split in raw:
            judged = raw[split]
        else:  # no validation split: the end of the training split, which the draw then leaves out
            whole = raw["train"]
            judged = whole.select(range(len(whole) - count, len(whole)))
            train = whole.select(range(len(whole) - count)).shuffle(seed=seed)
        return (
            train.select(range(min(self.train, len(train)))),
            judged.select(range(min(count, len(judged)))),
        )

    def batches(self, rows: datasets.Dataset, count: int = 300, size: int = 20) -> list[Batch]:
        """The first `count` examples as unlabelled batches, to calibrate on."""
        rows = rows.select(range(min(count, len(rows))))
        collate = self.collator()
        made = [collate([rows[j] for j in range(i, min(i + size, len(rows)))]) for i in range(0, len(rows), size)]
        return [{k: v for k, v in batch.items() if k != "labels"} for batch in made]


@dataclass(frozen=True)
class TextTask(Task):
    """A pretrained encoder with a new head, on sentences cut to `length` tokens.

    Attributes:
        assets: of the pretrained model, and of the data.
    """

    assets: tuple[str, str]
    length: int

    pretrained, by_length = True, True

    @property
    def size(self) -> str:
        return f"{self.length} tokens"

    def raw(self) -> datasets.DatasetDict:
        return _load(self.assets[1])

    def encode(self, rows: datasets.Dataset) -> datasets.Dataset:
        tokenizer = _tokenizer(self.assets[0])
        return rows.map(
            lambda r: {**tokenizer(r["text"], truncation=True, max_length=self.length), "labels": r["label"]},
            batched=True,
            remove_columns=rows.column_names,
        )

    def model(self) -> PreTrainedModel:
        classes = self.raw()["train"].features["label"].num_classes
        return AutoModelForSequenceClassification.from_pretrained(asset(self.assets[0]), num_labels=classes)

    def collator(self) -> Callable[[list[dict[str, Any]]], Batch]:
        return DataCollatorWithPadding(_tokenizer(self.assets[0]))


@dataclass(frozen=True)
class ImageTask(Task):
    """A pretrained vision transformer with a new head, on images of `length` × `length` pixels."""

    assets: tuple[str, str]
    length: int

    pretrained = True

    @property
    def size(self) -> str:
        return f"{self.length} pixels"

    def raw(self) -> datasets.DatasetDict:
        return _load(self.assets[1])

    def encode(self, rows: datasets.Dataset) -> datasets.Dataset:
        processor = AutoImageProcessor.from_pretrained(asset(self.assets[0]))
        processor.size, processor.do_center_crop = {"height": self.length, "width": self.length}, False
        pixels: list[Any] = []
        for i in range(0, len(rows), 100):
            images = [image.convert("RGB") for image in rows[i : i + 100]["image"]]
            pixels += list(processor(images, return_tensors="np")["pixel_values"])
        return datasets.Dataset.from_dict({"pixel_values": pixels, "labels": rows["label"]}).with_format("torch")

    def model(self) -> PreTrainedModel:
        classes = self.raw()["train"].features["label"].num_classes
        return AutoModelForImageClassification.from_pretrained(asset(self.assets[0]), num_labels=classes)


@functools.cache
def _load(name: str) -> datasets.DatasetDict:
    return datasets.load_dataset(str(asset(name)))


@functools.cache
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(asset(name))


_TEXT = (1e-4, 2e-4)
PRETRAINED = (
    TextTask("movies", "MiniLM-L6, movie reviews", 1000, 1000, 2, _TEXT, ("minilm", "movie_reviews"), 48),
    TextTask("amazon", "MiniLM-L6, product reviews", 1000, 1000, 2, _TEXT, ("minilm", "amazon_reviews"), 48),
    TextTask("r8", "MiniLM-L6, Reuters R8", 600, 1000, 2, _TEXT, ("minilm", "reuters_r8"), 64),
    ImageTask("fashion", "DINOv2-small, Fashion-MNIST", 600, 1000, 2, (5e-5, 1e-4), ("dinov2_small", "fashion_mnist"), 70),
)

_FULL = {  # training and test examples, all there are but of the pictures, and the rates to choose from
    "movies": (6041, 2000, (5e-5, 1e-4, 2e-4)),
    "amazon": (1421, 1006, (5e-5, 1e-4, 2e-4)),
    "r8": (4980, 2189, (1e-4, 2e-4, 4e-4)),
    "fashion": (6000, 5000, (1e-5, 2e-5, 5e-5)),
}
_NEWSGROUPS = ("minilm", "newsgroups")
FULL = (
    *(
        replace(task, train=train, evaluate=evaluate, epochs=3, rates=rates, bf16=True)
        for task in PRETRAINED
        for train, evaluate, rates in [_FULL[task.name]]
    ),
    TextTask("newsgroups", "MiniLM-L6, 20 Newsgroups", 3000, 2000, 3, (2e-4, 4e-4, 8e-4), _NEWSGROUPS, 48, bf16=True),
)
