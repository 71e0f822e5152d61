"""The tasks of run.py. Each is one pretrained model, a way to calibrate it, and a way to judge it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AlbertForMaskedLM,
    AutoImageProcessor,
    AutoTokenizer,
    Dinov2Model,
    PreTrainedModel,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from scripts.studies.training_free.reactions import CALIBRATION_REACTIONS, TEST_REACTIONS
from scripts.tools.assets import asset

Batch = dict[str, Tensor]
Found = dict[str, Any]  # what judging gives: "score" and whatever else


class Task(ABC):
    """A model that is judged smooth first; what that gives is kept in a file, and is there for what follows.

    Attributes:
        asset: of the model.
        metric: what "score" is.
        shown: numbers beside it to put into the results.
    """

    asset: str
    metric: str
    shown: tuple[str, ...]

    @abstractmethod
    def load(self) -> PreTrainedModel:
        """The smooth model."""

    @abstractmethod
    def batches(self, smooth: Found, size: int, seed: int) -> Iterator[Batch]:
        """`size` calibration examples without labels, drawn by `seed`; none of them is among those to judge by."""

    @abstractmethod
    def judge(self, model: PreTrainedModel, smooth: Found | None) -> Found:
        """Scores of a model; `smooth` is None for the smooth model itself."""


# ------------------------------------------------------------------------------------------------- a language of molecules


class Albert(Task):
    """Guess the tokens of a reaction, masked one at a time."""

    asset, metric, shown = "albert_rxn", "accuracy of masked tokens", ("loss",)

    def load(self) -> PreTrainedModel:
        return AlbertForMaskedLM.from_pretrained(asset(self.asset))

    def masked(self, reactions: list[str]) -> list[tuple[Tensor, int]]:
        """The tokens of a reaction and a position in it, for every position."""
        tokenizer = AutoTokenizer.from_pretrained(asset(self.asset))
        rows = [torch.tensor(tokenizer(reaction)["input_ids"]) for reaction in reactions]
        return [(row, position) for row in rows for position in range(1, len(row) - 1)]

    def batch(self, examples: list[tuple[Tensor, int]]) -> tuple[Batch, Tensor, Tensor]:
        """What the model takes; the positions, and what was there."""
        tokenizer = AutoTokenizer.from_pretrained(asset(self.asset))
        ids = torch.nn.utils.rnn.pad_sequence([row for row, _ in examples], True, tokenizer.pad_token_id)
        mask = (ids != tokenizer.pad_token_id).long()
        rows, positions = torch.arange(len(ids)), torch.tensor([position for _, position in examples])
        truth = ids[rows, positions]
        ids[rows, positions] = tokenizer.mask_token_id
        return {"input_ids": ids, "attention_mask": mask}, positions, truth

    def batches(self, smooth: Found, size: int, seed: int) -> Iterator[Batch]:
        examples = self.masked(CALIBRATION_REACTIONS)
        chosen = np.random.default_rng(seed).choice(len(examples), size, replace=False)
        for i in range(0, size, 40):
            yield self.batch([examples[j] for j in chosen[i : i + 40]])[0]

    @torch.no_grad()
    def judge(self, model: PreTrainedModel, smooth: Found | None) -> Found:
        examples = self.masked(TEST_REACTIONS)
        right = loss = 0.0
        for i in range(0, len(examples), 40):
            batch, positions, truth = self.batch(examples[i : i + 40])
            logits = model(**batch).logits[torch.arange(len(truth)), positions]
            right += float((logits.argmax(-1) == truth).sum())
            loss += float(F.cross_entropy(logits, truth, reduction="sum"))
        return {"score": right / len(examples), "loss": loss / len(examples)}


# ------------------------------------------------------------------------------------------------------------------ speech

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGITS = {name: str(digit) for digit, name in enumerate(_NAMES)}


def words(text: str) -> list[str]:
    """Lower case, without punctuation, digits as digits: "you're" is one word, "re-enter" two."""
    return [_DIGITS.get(word, word) for word in re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))]


def word_errors(reference: str, guess: str) -> int:
    """Words to insert, delete or replace so that one becomes the other."""
    row = list(range(len(words(guess)) + 1))
    for i, wanted in enumerate(words(reference), 1):
        diagonal, row[0] = row[0], i
        for j, given in enumerate(words(guess), 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != given))
    return row[-1]


def error_rate(references: list[str], guesses: list[str]) -> float:
    """Word errors per word of the references."""
    pairs = zip(references, guesses, strict=True)
    return sum(word_errors(*pair) for pair in pairs) / sum(len(words(reference)) for reference in references)


class Whisper(Task):
    """Transcribe voice prompts. The decoder is calibrated on what the smooth model itself transcribes."""

    asset, metric, shown = "whisper_tiny_en", "word error rate", ("error_to_smooth",)

    def load(self) -> PreTrainedModel:
        return WhisperForConditionalGeneration.from_pretrained(asset(self.asset))

    def heard(self, split: str, rows: list[int] | None = None, noise: float = 0.0) -> tuple[Iterator[Tensor], list[str]]:
        """Features in batches of 5, and the transcripts as they should be.

        Args:
            noise: its deviation, as a fraction of the sound's own.
        """
        data = datasets.load_dataset(str(asset("voice_prompts")), split=split).with_format("numpy")
        data = data if rows is None else data.select(rows)
        extractor = WhisperProcessor.from_pretrained(asset(self.asset)).feature_extractor
        generator = np.random.default_rng(0)

        def sound(array: np.ndarray) -> np.ndarray:
            return array + noise * array.std() * generator.standard_normal(array.shape) if noise else array

        audio = ([sound(np.asarray(a)) for a in data[i : i + 5]["audio"]] for i in range(0, len(data), 5))
        features = (extractor(a, sampling_rate=16000, return_tensors="pt").input_features for a in audio)
        return features, [str(text) for text in data["text"]]

    def ids(self, model: PreTrainedModel, split: str) -> tuple[list[list[int]], list[str]]:
        """Token ids that the model transcribes to, without the special ones."""
        features, references = self.heard(split)
        end = model.generation_config.eos_token_id
        rows = [row for batch in features for row in model.generate(batch, max_new_tokens=80).tolist()]
        return [row[: row.index(end)] if end in row else row for row in rows], references

    def batches(self, smooth: Found, size: int, seed: int, noise: float = 0.0) -> Iterator[Batch]:
        chosen = np.random.default_rng(seed).choice(len(smooth["calibration"]), size, replace=False).tolist()
        for i, features in enumerate(self.heard("calibration", chosen, noise)[0]):
            rows = [torch.tensor([*smooth["start"], *smooth["calibration"][j]]) for j in chosen[5 * i : 5 * i + 5]]
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True)
            ids = torch.nn.utils.rnn.pad_sequence(rows, True, smooth["start"][0])
            yield {"input_features": features, "decoder_input_ids": ids, "decoder_attention_mask": mask}

    def judge(self, model: PreTrainedModel, smooth: Found | None) -> Found:
        tokenizer = WhisperProcessor.from_pretrained(asset(self.asset)).tokenizer
        ids, references = self.ids(model, "test")
        texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
        found: Found = {"score": error_rate(references, texts), "texts": texts}
        if smooth is None:
            special = model.generation_config
            found["start"] = [special.decoder_start_token_id, special.no_timestamps_token_id]
            return found | {"calibration": self.ids(model, "calibration")[0]}
        rows = zip(references, smooth["texts"], texts, strict=True)
        kept = [dict(zip(("reference", "smooth", "substituted"), row, strict=True)) for row in list(rows)[:5]]
        return found | {"error_to_smooth": error_rate(smooth["texts"], texts), "transcripts": kept}


# ------------------------------------------------------------------------------------------------------------------ images


class Dinov2(Task):
    """A linear probe on the smooth model's class token, frozen: the substituted model has to give the features it knows."""

    asset, metric, shown = "dinov2_small", "accuracy of a frozen linear probe", ("feature_error",)
    probe_images = judged_images = 2000

    def load(self) -> PreTrainedModel:
        return Dinov2Model.from_pretrained(asset(self.asset))

    def images(self, split: str, rows: np.ndarray, size: int = 20) -> Iterator[Tensor]:
        """Images of 70 pixels in batches."""
        processor = AutoImageProcessor.from_pretrained(asset(self.asset))
        processor.size, processor.do_center_crop = {"height": 70, "width": 70}, False
        data = self.data(split).select(rows)
        for i in range(0, len(data), size):
            images = [image.convert("RGB") for image in data[i : i + size]["image"]]
            yield processor(images, return_tensors="pt")["pixel_values"]

    def data(self, split: str) -> datasets.Dataset:
        return datasets.load_dataset(str(asset("fashion_mnist")), split=split)

    def order(self) -> np.ndarray:
        """The training images, shuffled: the probe learns from the first ones, calibration draws from the others."""
        return np.random.default_rng(0).permutation(60000)

    def batches(self, smooth: Found, size: int, seed: int) -> Iterator[Batch]:
        chosen = np.random.default_rng(seed).choice(self.order()[self.probe_images :], size, replace=False)
        return ({"pixel_values": pixels} for pixels in self.images("train", chosen))

    @torch.no_grad()
    def features(self, model: PreTrainedModel, split: str, rows: np.ndarray) -> Tensor:
        return torch.cat([model(pixel_values=p).last_hidden_state[:, 0] for p in self.images(split, rows)])

    def judge(self, model: PreTrainedModel, smooth: Found | None) -> Found:
        rows = np.arange(self.judged_images)
        truth = torch.tensor(self.data("test").select(rows)["label"])
        features = self.features(model, "test", rows)
        if smooth is None:
            smooth = self.probe(model) | {"features": features}
        guesses = (((features - smooth["mean"]) / smooth["std"]) @ smooth["weight"].T + smooth["bias"]).argmax(-1)
        centred = smooth["features"] - smooth["features"].mean(0)
        error = float((features - smooth["features"]).norm() / centred.norm())
        return smooth | {"score": float((guesses == truth).float().mean()), "feature_error": error}

    def probe(self, model: PreTrainedModel) -> Found:
        """Logistic regression on standardised features, its penalty chosen by cross-validation."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV

        chosen = self.order()[: self.probe_images]
        features, labels = self.features(model, "train", chosen), self.data("train").select(chosen)["label"]
        mean, std = features.mean(0), features.std(0)
        search = GridSearchCV(LogisticRegression(max_iter=2000), {"C": [1.0, 0.3, 0.1, 0.03, 0.01, 0.003]}, cv=5)
        fitted = search.fit(((features - mean) / std).numpy(), list(labels)).best_estimator_
        weight, bias = (torch.tensor(value).float() for value in (fitted.coef_, fitted.intercept_))
        return {"mean": mean, "std": std, "weight": weight, "bias": bias}


TASKS: dict[str, Task] = {"albert": Albert(), "whisper": Whisper(), "dinov2": Dinov2()}
