"""Several ReLUs per gate without training: quality, width, zeros and time, on four pretrained models.

    python -m scripts.studies.training_free.hinges                       # what results/hinges.csv lacks
    python -m scripts.studies.training_free.hinges --tasks smollm2 --variants k2 k3 --seeds 0 --device cuda
    python -m scripts.studies.training_free.hinges --table

A row of results/hinges.csv is one substitution; the seed draws the calibration examples and nothing else. An interrupted run
goes on where it stopped: a row is written as soon as it is there. Seeds come last in order, so that a run which is cut short
has each variant once. Each network is saved and loaded by stock transformers in a process of its own: `stock` is the largest
difference of its outputs. With --keep FOLDER what was saved stays there, as TASK-VARIANT-seedN.

- smollm2: perplexity on 10,240 tokens of the test splits, after 20,480 tokens of the train splits (assets of three kinds of
  text, windows of 256 tokens).
- dinov2: accuracy of a linear probe on the smooth model's class token, frozen, on 2,000 pictures, after 800 pictures.
- minilm: the same of a probe on mean sentence vectors, on 2,000 reviews, after 500 reviews.
- whisper: word error rate of voice prompts, as in tasks.py, after 120 of the 124 others. Their 17 tokens each in the decoder
  are too few rows for two ReLUs per gate, so 70 of the 124 come again with noise, a tenth of the sound.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import package_versions
from scripts.relu_ize_lm import Arguments, windows
from scripts.studies.training_free import tasks
from scripts.tools.assets import asset
from scripts.tools.tables import append, read

RESULTS = Path(__file__).parents[1] / "results" / "hinges.csv"
FIELDS = (
    "task", "variant", "seed", "calibration", "metric", "smooth", "substituted", "feature_error", "width", "zeros",
    "parameters", "smooth_parameters", "stock", "seconds", "device", "versions",
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "k1": {},
    "k2": {"hinges": 2},
    "k3": {"hinges": 3},
    "budget1.25": {"budget": 1.25},
    "budget1.5": {"budget": 1.5},
    "budget2": {"budget": 2.0},
}
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.training_free.hinges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", help="where the models run, such as cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the saved networks there")
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown, and measure nothing")
    options = parser.parse_args(argv)
    if options.table:
        print(table(options.results))
        return
    datasets.disable_progress_bars()
    for name in options.tasks:
        wanted = [(variant, seed) for seed in options.seeds for variant in options.variants]
        missing = [key for key in wanted if not _is_there(options.results, name, *key)]
        if missing:
            measure(name, missing, options)


def _is_there(results: Path, task: str, variant: str, seed: int) -> bool:
    return any((r["task"], r["variant"], r["seed"]) == (task, variant, str(seed)) for r in read(results))


def measure(name: str, missing: list[tuple[str, int]], options: argparse.Namespace) -> None:
    """Measure and append these rows of one task; the smooth model is judged once."""
    task: Task = TASKS[name]()
    smooth = task.load().eval().to(options.device)
    before, _ = task.judge(smooth, options.device)
    count = sum(p.numel() for p in smooth.parameters())
    for variant, seed in missing:
        model = copy.deepcopy(smooth)
        hlg.convert(model)
        start = time.perf_counter()
        batches = list(task.batches(seed))
        report = hlg.relu_ize(model, calibration=batches, compensate="least_squares", **VARIANTS[variant])
        seconds = time.perf_counter() - start
        after, error = task.judge(model, options.device)
        with nullcontext(options.keep) if options.keep else TemporaryDirectory() as folder:
            saved = hlg.save_relu_pretrained(model, Path(folder, f"{name}-{variant}-seed{seed}"), overwrite=True)
            stock = hlg.verify_relu_pretrained(model, saved)
        hinged = {} if report.hinges is None else {site.name: site.units[1] for site in report.hinges.sites}
        row = {
            "task": name,
            "variant": variant,
            "seed": seed,
            "calibration": task.calibration,
            "metric": task.metric,
            "smooth": f"{before:.4f}",
            "substituted": f"{after:.4f}",
            "feature_error": "" if math.isnan(error) else f"{error:.4f}",
            "width": next(iter(hinged.values()), ""),
            "zeros": f"{statistics.fmean(report.zeros.values()):.4f}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "smooth_parameters": count,
            "stock": stock,
            "seconds": f"{seconds:.1f}",
            "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device,
            "versions": " ".join(package_versions().values()),
        }
        append(options.results, FIELDS, [row])
        print(f"{name} {variant} seed {seed}: {before:.4f} → {after:.4f}, zeros {row['zeros']}, {seconds:.0f} s", flush=True)


def table(results: Path = RESULTS) -> str:
    """Means over the draws, with the least and the most, as Markdown."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read(results):
        groups.setdefault((row["task"], row["variant"]), []).append(row)
    heads = ("task", "variant", "draws", "smooth", "ReLU", "apart", "zeros", "parameters", "seconds")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for task in TASKS:
        for variant in VARIANTS:
            rows = groups.get((task, variant), [])
            if rows:
                lines.append(f"| {task} | {variant} | {len(rows)} | {' | '.join(_cells(rows))} |")
    return "\n".join(lines)


def _cells(rows: list[dict[str, str]]) -> list[str]:
    """Of one network: perplexity is a ratio apart, a share of right or wrong words and pictures so many points."""

    def mean(name: str) -> float:
        return statistics.fmean(float(row[name]) for row in rows)

    if rows[0]["metric"] == "perplexity":
        apart = [float(row["substituted"]) / float(row["smooth"]) for row in rows]
        cells = [f"{mean('smooth'):.1f}", f"{mean('substituted'):.1f}", f"× {spread(apart, '.3f')}"]
    else:
        apart = [100 * (float(row["substituted"]) - float(row["smooth"])) for row in rows]
        cells = [f"{100 * mean('smooth'):.1f}", f"{100 * mean('substituted'):.1f}", spread(apart, "+.2f")]
    parameters = mean("parameters") / mean("smooth_parameters")
    return [*cells, f"{100 * mean('zeros'):.0f} %", f"× {parameters:.2f}", f"{mean('seconds'):.0f}"]


def spread(numbers: list[float], form: str) -> str:
    """The mean, and in brackets the least and the most of several."""
    text = f"{statistics.fmean(numbers):{form}}"
    text += "" if len(numbers) == 1 else f" [{min(numbers):{form}}, {max(numbers):{form}}]"
    return text.replace("-", "−")


if __name__ == "__main__":
    main()
