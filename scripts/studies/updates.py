"""λ against the step: the optimizer-aware update beside the naive one, which steps s itself.

    python -m scripts.studies.updates                  # adds what is not in results/updates.csv yet, prints a table

The MLP on image segments, trained from random weights by SGD with momentum and by AdamW. λ starts at 1 + ln 2, as is
reported of the paper, or just above 1. Both updates have the same learning rate, the same batches and the same start; the
naive one's step on s moves λ by (σ/t)² (SGD) or σ/t (AdamW) times the step that was meant.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader
from transformers import set_seed

import hf_lambda_gelu as hlg
from scripts.studies.recipes.hardening import PAPER_START
from scripts.studies.report import shown
from scripts.studies.run import TASKS
from scripts.studies.tasks import Task
from scripts.tools import tables

RESULTS = Path(__file__).parent / "results" / "updates.csv"
FIELDS = ("optimizer", "update", "start", "seed", "step", "largest", "hardness")
STEPS, EVERY = 300, 10
RATES = {"sgd": 0.1, "adamw": 0.01}  # of λ; the weights have 0.1 and 0.003
STARTS = (PAPER_START, 1.05)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.updates", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    done = set(read(options.results))
    for seed, optimizer, update, start in itertools.product(options.seeds, RATES, ("naive", "aware"), STARTS):
        if (optimizer, update, f"{start:.3f}", seed) not in done:
            append(options.results, optimizer, update, start, seed)
    print(table(read(options.results)))


class Softplus(nn.Module):
    """λ = 1 + softplus(s / t): the paper's parameter s, with its temperature t = 0.1 as reported."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, raw: Tensor) -> Tensor:
        return 1.0 + nn.functional.softplus(raw / self.temperature)

    def right_inverse(self, hardness: Tensor) -> Tensor:
        excess = hardness - 1.0
        return self.temperature * (excess + torch.log(-torch.expm1(-excess)))


def trace(task: Task, optimizer: str, update: str, start: float, seed: int) -> Iterator[list[float]]:
    """λ of each activation, before the first step and after each."""
    set_seed(seed)
    model = task.model()
    hlg.convert(model, start)
    sites = list(hlg.hardness_sites(model).values())
    if update == "naive":
        for site in sites:
            register_parametrization(site, "unclipped_hardness", Softplus())
    named = list(model.named_parameters())
    weights = [parameter for name, parameter in named if "unclipped_hardness" not in name]
    hardness = [parameter for name, parameter in named if "unclipped_hardness" in name]
    groups = [{"params": weights}, {"params": hardness, "lr": RATES[optimizer], "weight_decay": 0.0}]
    sgd = optimizer == "sgd"
    stepper = torch.optim.SGD(groups, lr=0.1, momentum=0.9) if sgd else torch.optim.AdamW(groups, lr=0.003)
    if update == "aware":
        hlg.attach_hardness_update(stepper, model)
    rows, _ = task.splits(seed, "test")
    loader = DataLoader(task.encode(rows), 32, shuffle=True, generator=torch.Generator().manual_seed(seed))
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    yield [site.hardness.item() for site in sites]
    for batch in itertools.islice(batches, STEPS):
        model(**batch).loss.backward()
        stepper.step()
        stepper.zero_grad()
        yield [site.hardness.item() for site in sites]


def append(results: Path, optimizer: str, update: str, start: float, seed: int) -> None:
    values = np.array(list(trace(TASKS["segment"], optimizer, update, start, seed)))
    largest = np.abs(np.diff(values, axis=0)).max()
    rows = [
        {
            "optimizer": optimizer,
            "update": update,
            "start": f"{start:.3f}",
            "seed": seed,
            "step": step,
            "largest": f"{largest:.4f}",
            "hardness": " ".join(f"{x:.3f}" for x in values[step]),
        }
        for step in range(0, STEPS + 1, EVERY)
    ]
    tables.append(results, FIELDS, rows)


# (optimizer, update, start, seed) → a row for every tenth step: the run's largest step of λ, then λ of each layer
Traces = dict[tuple[str, str, str, int], np.ndarray]


def read(results: Path) -> Traces:
    found: dict[tuple[str, str, str, int], list[list[float]]] = {}
    for row in tables.read(results):
        key = (row["optimizer"], row["update"], row["start"], int(row["seed"]))
        found.setdefault(key, []).append([float(x) for x in (row["largest"], *row["hardness"].split())])
    return {key: np.array(values) for key, values in found.items()}


def table(traces: Traces) -> str:
    """By optimizer, start and update: the largest single step of λ, and how far it came."""
    lines = ["| optimizer | λ at the start | update | largest step of λ | λ at the end − start, mean over layers |"]
    lines.append("|" + "---|" * 5)
    for optimizer, start, update in sorted({(o, s, u) for o, u, s, _ in traces}, key=lambda k: (k[0], k[1], k[2])):
        runs = [t for (o, u, s, _), t in traces.items() if (o, s, u) == (optimizer, start, update)]
        jumps = np.array([t[0, 0] for t in runs])
        moved = np.array([(t[-1] - t[0])[1:].mean() for t in runs])
        lines.append(f"| {optimizer} | {start} | {update} | {shown(jumps, 3)} | {shown(moved, 3)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
