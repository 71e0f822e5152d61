"""The tasks of the study: real pretrained models on real labelled data, cut to a minute or two a run on two cores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from assets import asset
from finetuning import classification_metrics
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: the key in the results.
        title: what tables call it.
        model: asset of the pretrained model.
        data: asset of the data.
        kind: "text" or "image".
        train, evaluate: examples to train on, and to judge by.
        epochs, length: passes over the training examples; tokens, or pixels, that an example is cut to.
        rates: learning rates that each recipe may choose from, on the validation split.
    """

    name: str
    title: str
    model: str
    data: str
    kind: str
    train: int
    evaluate: int
    epochs: int
    length: int
    rates: tuple[float, ...] = (1e-4, 5e-5)
    calibration: int = 300

    def splits(self, seed: int, split: str) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Training examples drawn by `seed`, and the first ones of "validation" or "test"."""
        raw = _load(self.data)
        train = raw["train"].shuffle(seed=seed)
        if split in raw:
            judged = raw[split]
        else:  # no validation split: the end of the training split, which the draw then leaves out
            whole = raw["train"]
            judged = whole.select(range(len(whole) - self.evaluate, len(whole)))
            train = whole.select(range(len(whole) - self.evaluate)).shuffle(seed=seed)
        return (
            train.select(range(min(self.train, len(train)))),
            judged.select(range(min(self.evaluate, len(judged)))),
        )

    def encode(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The examples as the model takes them."""
        if self.kind == "text":
            tokenizer = _processor(self)
            return rows.map(
                lambda r: {**tokenizer(r["text"], truncation=True, max_length=self.length), "labels": r["label"]},
                batched=True,
                remove_columns=rows.column_names,
            )
        pixels = [p for i in range(0, len(rows), 100) for p in self._pixels(rows[i : i + 100]["image"])]
        return datasets.Dataset.from_dict({"pixel_values": pixels, "labels": rows["label"]}).with_format("torch")

    def _pixels(self, images: list[Any]) -> np.ndarray:
        return _processor(self)([image.convert("RGB") for image in images], return_tensors="np")["pixel_values"]

    def collator(self) -> Callable[[list[dict[str, Any]]], Batch]:
        return DataCollatorWithPadding(_processor(self)) if self.kind == "text" else torch.utils.data.default_collate

    def model_for(self, classes: int) -> PreTrainedModel:
        """The pretrained model with a new head, which the caller's seed initialises."""
        auto = AutoModelForSequenceClassification if self.kind == "text" else AutoModelForImageClassification
        return auto.from_pretrained(asset(self.model), num_labels=classes)

    def batches(self, rows: datasets.Dataset, count: int, size: int = 20) -> list[Batch]:
        """The first `count` examples as unlabelled batches, to calibrate on."""
        rows = rows.select(range(min(count, len(rows))))
        collate = self.collator()
        made = [collate([rows[j] for j in range(i, min(i + size, len(rows)))]) for i in range(0, len(rows), size)]
        return [{k: v for k, v in batch.items() if k != "labels"} for batch in made]

    metrics = staticmethod(classification_metrics(None))


@functools.cache
def _load(name: str) -> datasets.DatasetDict:
    return datasets.load_dataset(str(asset(name)))


@functools.cache
def _processor(task: Task) -> Any:
    if task.kind == "text":
        return AutoTokenizer.from_pretrained(asset(task.model))
    processor = AutoImageProcessor.from_pretrained(asset(task.model))
    processor.size, processor.do_center_crop = {"height": task.length, "width": task.length}, False
    return processor


_MINILM = "MiniLM-L6"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("movies", f"{_MINILM}, movie reviews", "minilm", "movie_reviews", "text", 1000, 1000, 2, 48),
        Task("amazon", f"{_MINILM}, product reviews", "minilm", "amazon_reviews", "text", 1000, 1000, 2, 48),
        Task("r8", f"{_MINILM}, Reuters R8", "minilm", "reuters_r8", "text", 600, 1000, 2, 64),
        Task(
            "fashion",
            "DINOv2-small, Fashion-MNIST",
            "dinov2_small",
            "fashion_mnist",
            "image",
            600,
            1000,
            2,
            70,
            (5e-5, 1e-4),
        ),
    )
}
