"""Four pretrained models, what each is calibrated on without training, and how it is judged.

- smollm2: perplexity on 10,240 tokens of the test splits, after 20,480 tokens of the train splits (assets of three kinds of
  text, windows of 256 tokens).
- dinov2: accuracy of a linear probe on the smooth model's class token, frozen, on 2,000 pictures, after 800 pictures.
- minilm: the same of a probe on mean sentence vectors, on 2,000 reviews, after 500 reviews.
- whisper: word error rate of voice prompts, as in tasks.py, after 120 of the 124 others. Their 17 tokens each in the decoder
  are too few rows for two ReLUs per gate, so 70 of the 124 come again with noise, a tenth of the sound.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from scripts.relu_ize_lm import Arguments, windows
from scripts.studies.training_free import tasks
from scripts.tools.assets import asset

Batch = dict[str, Tensor]


class Task(Protocol):
    """A model, batches to calibrate it on, and a way to judge it.

    Attributes:
        metric: what `judge` gives first; its second number is the error of the features, where there are some.
        calibration: how much, with its unit.
    """

    metric: str
    calibration: str

    def load(self) -> nn.Module: ...

    def batches(self, seed: int) -> Iterator[Batch]: ...

    def judge(self, model: nn.Module, device: str) -> tuple[float, float]: ...


class SmolLM2:
    """A language model with a gated FFN."""

    metric, calibration = "perplexity", "20480 tokens"

    def __init__(self) -> None:
        self.folder = str(asset("smollm2"))
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        options = Arguments()
        self.test = windows(options, tokenizer, "test", 10240)
        self.pool = windows(options, tokenizer, "train", 4 * 20480)

    def load(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder)

    def batches(self, seed: int) -> Iterator[Batch]:
        chosen = np.random.default_rng(seed).choice(len(self.pool), 80, replace=False)
        return ({"input_ids": part} for part in self.pool[chosen].split(8))

    @torch.no_grad()
    def judge(self, model: nn.Module, device: str) -> tuple[float, float]:
        parts = [part.to(device) for part in self.test.split(4)]
        total = sum(float(model(input_ids=p, labels=p).loss) * len(p) for p in parts)
        return math.exp(total / len(self.test)), math.nan


class Probed(ABC):
    """A linear probe on the smooth model's features; the substituted model has to give the features that it knows."""

    metric = "accuracy of a frozen linear probe"

    def __init__(self) -> None:
        self.probe: dict[str, Tensor] | None = None
        self.smooth: Tensor | None = None

    @abstractmethod
    def features(self, model: nn.Module, split: str, device: str) -> Tensor:
        """(rows, features) on the CPU."""

    @abstractmethod
    def labels(self, split: str) -> list[int]:
        """The classes of these rows."""

    def judge(self, model: nn.Module, device: str) -> tuple[float, float]:
        """The smooth model comes first: the probe learns from it."""
        if self.probe is None or self.smooth is None:
            self.probe = self._learned(self.features(model, "train", device))
            features = self.smooth = self.features(model, "test", device)
        else:
            features = self.features(model, "test", device)
        probe = self.probe
        guesses = (((features - probe["mean"]) / probe["std"]) @ probe["weight"].T + probe["bias"]).argmax(-1)
        right = float((guesses == torch.tensor(self.labels("test"))).float().mean())
        return right, float((features - self.smooth).norm() / (self.smooth - self.smooth.mean(0)).norm())

    def _learned(self, features: Tensor) -> dict[str, Tensor]:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV

        mean, std = features.mean(0), features.std(0)
        search = GridSearchCV(LogisticRegression(max_iter=2000), {"C": [1.0, 0.3, 0.1, 0.03, 0.01, 0.003]}, cv=5)
        fitted = search.fit(((features - mean) / std).numpy(), self.labels("train")).best_estimator_
        coefficients, bias = torch.tensor(fitted.coef_).float(), torch.tensor(fitted.intercept_).float()
        if len(coefficients) == 1:  # of two classes it is a difference
            coefficients, bias = torch.cat([-coefficients, coefficients]), torch.cat([-bias, bias])
        return {"mean": mean, "std": std, "weight": coefficients, "bias": bias}


class Pictures(Probed):
    """DINOv2-small on Fashion-MNIST, as in tasks.py."""

    calibration = "800 pictures"

    def __init__(self) -> None:
        super().__init__()
        self.task = tasks.Dinov2()

    def load(self) -> nn.Module:
        return self.task.load()

    def rows(self, split: str) -> np.ndarray:
        return np.arange(self.task.judged_images) if split == "test" else self.task.order()[: self.task.probe_images]

    def batches(self, seed: int) -> Iterator[Batch]:
        return self.task.batches({}, 800, seed)  # 20,800 tokens

    @torch.no_grad()
    def features(self, model: nn.Module, split: str, device: str) -> Tensor:
        images = self.task.images(split, self.rows(split))
        return torch.cat([model(pixel_values=p.to(device)).last_hidden_state[:, 0].cpu() for p in images])

    def labels(self, split: str) -> list[int]:
        return list(self.task.data(split).select(self.rows(split))["label"])


class Reviews(Probed):
    """MiniLM's mean sentence vectors of movie reviews."""

    calibration = "500 reviews"
    count = 2000

    def __init__(self) -> None:
        super().__init__()
        self.folder = str(asset("minilm"))
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.data = {split: datasets.load_dataset(str(asset("movie_reviews")), split=split) for split in ("train", "test")}
        self.order = np.random.default_rng(0).permutation(len(self.data["train"]))

    def load(self) -> nn.Module:
        return AutoModel.from_pretrained(self.folder)

    def tokens(self, texts: list[str]) -> Iterator[Batch]:
        for i in range(0, len(texts), 50):
            kept = self.tokenizer(texts[i : i + 50], padding=True, truncation=True, max_length=64, return_tensors="pt")
            yield {"input_ids": kept["input_ids"], "attention_mask": kept["attention_mask"]}

    def batches(self, seed: int) -> Iterator[Batch]:
        chosen = np.random.default_rng(seed).choice(self.order[self.count :], 500, replace=False)
        return self.tokens(self.data["train"].select(chosen)["text"][:])

    def rows(self, split: str) -> datasets.Dataset:
        data = self.data[split]
        chosen = self.order[: self.count] if split == "train" else np.arange(min(self.count, len(data)))
        return data.select(chosen)

    @torch.no_grad()
    def features(self, model: nn.Module, split: str, device: str) -> Tensor:
        found = []
        for batch in self.tokens(self.rows(split)["text"][:]):
            mask = batch["attention_mask"].unsqueeze(2)
            hidden = model(**{name: value.to(device) for name, value in batch.items()}).last_hidden_state.cpu()
            found.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(found)

    def labels(self, split: str) -> list[int]:
        return list(self.rows(split)["label"])


class Prompts:
    """Whisper, on the CPU. The smooth model comes first: the decoder is calibrated on what it transcribes."""

    metric, calibration = "word error rate", "120 prompts, 70 with noise"

    def __init__(self) -> None:
        self.task = tasks.Whisper()
        self.smooth: tasks.Found | None = None

    def load(self) -> nn.Module:
        return self.task.load()

    def batches(self, seed: int) -> Iterator[Batch]:
        assert self.smooth is not None
        noisy = self.task.batches(self.smooth, 70, seed, noise=0.1)
        return itertools.chain(self.task.batches(self.smooth, 120, seed), noisy)

    def judge(self, model: Any, device: str) -> tuple[float, float]:
        found = self.task.judge(model.to("cpu"), self.smooth)
        model.to(device)
        self.smooth = self.smooth or found
        return found["score"], math.nan


TASKS: dict[str, type[Any]] = {"smollm2": SmolLM2, "dinov2": Pictures, "minilm": Reviews, "whisper": Prompts}
