"""What hangs on λ₀, the rates, the temperature t, the optimizer, the hold and τ: one is varied at a time, the rest stays.

    python -m scripts.studies.robustness           # adds what is not in results/robustness.csv yet, prints the tables
    python -m scripts.studies.robustness --tasks segment --settings unhardened rate_0.03 --seeds 0 1

On networks from random weights, from the paper's scheme as reported (the recipes `unhardened` and `paper`, their λ with a
learning rate of 0.01), and from the default here (`refit_late`). Profiles: λ as learned to the end of training without a
ramp. Spearman's correlation of the layers' order is taken between the seeds of a setting, and with the reference of the same
seed, which had the same examples, order and weights at the start; intervals are bootstraps over seeds. Accuracy there is
that before the substitution. Hold, τ and the rate with a refit: accuracy after the substitution − before, and − that of the
reference. Accuracies are in points, paired by seed, with 95 % t intervals.

t is there only where the paper's s in λ = 1 + softplus(s / t) is stepped by the optimizer; here the parameter is λ.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
from scipy import stats
from torch.nn.utils.parametrize import register_parametrization

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training.optimizer import own_group
from scripts.studies import run as study
from scripts.studies.claims import agreement, correlation
from scripts.studies.recipes.hardening import PAPER_START, TO_THE_END, hardened
from scripts.studies.recipes.recipe import RECIPES, Recipe, Result, Run
from scripts.studies.report import shown
from scripts.studies.updates import RATES, Softplus
from scripts.tools import tables

RESULTS = Path(__file__).parent / "results" / "robustness.csv"
LEARNED, RAMPED, REFIT = "unhardened", "paper", "refit_late"  # what is varied
SGD: dict[str, Any] = {"optim": "sgd", "optim_args": "momentum=0.9"}
SGD_RATES = (0.1, 0.03, 0.3)  # of the weights: the best one on the validation split

# ------------------------------------------------------------------------------------------------------------- the settings


def _stepping_s(run: Run, temperature: float) -> Result:
    """As `unhardened`, with s as the parameter, at the learning rate that λ has there."""
    model = run.model()
    hlg.convert(model, PAPER_START)
    sites = list(hlg.hardness_sites(model).values())
    for site in sites:
        register_parametrization(site, "unclipped_hardness", Softplus(temperature))
    trainer = run.trainer(model)
    raw = [parameter for name, parameter in model.named_parameters() if "unclipped_hardness" in name]
    own_group(trainer.create_optimizer(), raw, RATES["adamw"])
    trainer.train()
    before, profile = run.judge(model), list(hlg.hardness_profile(model).values())
    hlg.relu_ize(model, force=True)
    return Result(run.judge(model), before, profile)


def _learned(start: float = PAPER_START, **hardness: Any) -> Callable[[Run], Result]:
    return lambda run: hardened(run, start, **TO_THE_END, **hardness)


def _ramped(**hardness: Any) -> Callable[[Run], Result]:
    return lambda run: hardened(run, PAPER_START, hardness_switch_point=0.25, **hardness)


def _refit(rate: float) -> Callable[[Run], Result]:
    late = {"hardness_switch_point": 0.75, "hardness_compensate": "least_squares"}
    return lambda run: hardened(run, 1.0, hardness_learning_rate=rate, **late)


# name → what tables call it, and how it is made; by what is varied
PROFILES: dict[str, tuple[str, Callable[[Run], Result]]] = {
    "start_1": ("λ₀ = 1", _learned(1.0)),
    "start_1.3": ("λ₀ = 1.3", _learned(1.3)),
    "start_2.5": ("λ₀ = 2.5", _learned(2.5)),
    "rate_0.0033": ("rate of λ 0.0033", _learned(hardness_learning_rate=0.01 / 3)),
    "rate_0.03": ("rate of λ 0.03", _learned(hardness_learning_rate=0.03)),
    "t_0.05": ("s stepped, t = 0.05", functools.partial(_stepping_s, temperature=0.05)),
    "t_0.1": ("s stepped, t = 0.1", functools.partial(_stepping_s, temperature=0.1)),
    "t_0.3": ("s stepped, t = 0.3", functools.partial(_stepping_s, temperature=0.3)),
    "t_1": ("s stepped, t = 1", functools.partial(_stepping_s, temperature=1.0)),
    "sgd": ("SGD, rate of λ 0.1", _learned(hardness_learning_rate=RATES["sgd"], **SGD)),
    "sgd_1": ("SGD, rate of λ 1", _learned(hardness_learning_rate=1.0, **SGD)),
}
RAMPS = {
    "hold_0": ("hold 0", _ramped(hardness_hold=0.0)),
    "hold_0.25": ("hold 0.25", _ramped(hardness_hold=0.25)),
    "hold_0.5": ("hold 0.5", _ramped(hardness_hold=0.5)),
    **{
        f"tau_{tau:g}": (f"τ = {tau:g}", _ramped(hardness_target="calibrated", hardness_relative_tolerance=tau))
        for tau in (0.001, 0.01, 0.1)
    },
}
REFITS = {
    "refit_rate_0": ("rate of λ 0", _refit(0.0)),
    "refit_rate_0.0033": ("rate of λ 0.0033", _refit(0.01 / 3)),
    "refit_rate_0.03": ("rate of λ 0.03", _refit(0.03)),
}


def _recipe(name: str, make: Callable[[Run], Result]) -> Recipe:
    return lambda run: {name: make(run)}


SETTINGS: dict[str, Recipe] = {name: RECIPES[name] for name in (LEARNED, RAMPED, REFIT)} | {
    name: _recipe(name, make) for name, (_, make) in (PROFILES | RAMPS | REFITS).items()
}
# what is run of each task, and over how many seeds
VARIED = (LEARNED, "start_1", "t_0.1", "sgd")
PLAN = {
    "segment": (tuple(SETTINGS), 10),
    "resnet": ((*VARIED, "rate_0.03"), 3),
    "digits": ((*VARIED, RAMPED, "hold_0", "tau_0.01", "tau_0.1"), 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=PLAN, default=list(PLAN), metavar="TASK", help=", ".join(PLAN))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, metavar="SETTING", help="all of the task by default")
    parser.add_argument("--seeds", nargs="+", type=int, help="all of the task by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    for name in options.tasks:
        settings, seeds = PLAN[name]
        task, by_sgd = study.TASKS[name], replace(study.TASKS[name], rates=SGD_RATES)
        chosen = options.settings or settings
        for rate in SGD_RATES if any(setting.startswith("sgd") for setting in chosen) else ():
            study.run(options.results, by_sgd, "sgd", study.TUNING_SEED, rate, "validation", SETTINGS)
        for seed, setting in itertools.product(options.seeds or range(seeds), chosen):
            rate = study.best_rate(options.results, by_sgd, "sgd") if setting.startswith("sgd") else task.rates[0]
            study.run(options.results, task, setting, seed, rate, "test", SETTINGS)
    rows = judged_rows(options.results)
    print(profiles(rows), accuracies(rows), sep="\n\n")


# --------------------------------------------------------------------------------------------------------------- the tables


def judged_rows(results: Path) -> list[dict[str, str]]:
    return [row for row in tables.read(results) if row["split"] == "test"]


def profiles(rows: list[dict[str, str]]) -> str:
    """By task and setting: λ as learned, how like the layers' orders are, over seeds and to the reference's; accuracy."""
    head = ["task", "setting", "seeds", "λ by layer, mean over seeds", "Spearman between seeds", "with the reference"]
    lines = ["| " + " | ".join([*head, "accuracy − reference"]) + " |", "|" + "---|" * (len(head) + 1)]
    labels = {LEARNED: "reference", **{name: label for name, (label, _) in PROFILES.items()}}
    for task in PLAN:
        reference = _profiles(rows, task, LEARNED)
        for name, label in labels.items():
            learned = _profiles(rows, task, name)
            if len(learned) < 2:
                continue
            values = np.array(list(learned.values()))
            shared = sorted(learned.keys() & reference.keys())
            with_reference = likeness([learned[seed] for seed in shared], [reference[seed] for seed in shared])
            cells = [task, label, str(len(learned)), " ".join(f"{value:.2f}" for value in values.mean(0))]
            before, wanted = (_points(rows, task, setting, "before") for setting in (name, LEARNED))
            compared = ["", ""] if name == LEARNED else [correlation(*with_reference), _difference(before, wanted)]
            cells += [correlation(*agreement(values)), *compared]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def likeness(first: list[list[float]], second: list[list[float]], draws: int = 2000) -> tuple[float, float, float]:
    """Mean Spearman correlation of the profiles of like seeds, and its 95 % bootstrap interval over the seeds."""
    found = np.array([stats.spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)])
    chosen = np.random.default_rng(0).integers(0, len(found), (draws, len(found)))
    low, high = np.percentile(found[chosen].mean(1), [2.5, 97.5])
    return float(found.mean()), float(low), float(high)


def accuracies(rows: list[dict[str, str]]) -> str:
    """By setting and task: accuracy after the substitution − before, and − that of the reference, in points."""
    tasks = [task for task in PLAN if any(row["task"] == task and row["recipe"] == RAMPED for row in rows)]
    head = ["setting", *(f"{task}, {what}" for task in tasks for what in ("after − before", "− reference"))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for reference, title, varied in ((RAMPED, "ramped", RAMPS), (REFIT, "refit", REFITS)):
        for name, label in {reference: "reference", **{name: label for name, (label, _) in varied.items()}}.items():
            cells = [f"{title}: {label}"]
            for task in tasks:
                after, before = _points(rows, task, name, "accuracy"), _points(rows, task, name, "before")
                cells.append(_difference(after, before))
                cells.append("" if name == reference else _difference(after, _points(rows, task, reference, "accuracy")))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _profiles(rows: list[dict[str, str]], task: str, name: str) -> dict[int, list[float]]:
    found = [row for row in rows if (row["task"], row["recipe"]) == (task, name)]
    return {int(row["seed"]): [float(value) for value in row["profile"].split()] for row in found}


def _points(rows: list[dict[str, str]], task: str, name: str, column: str) -> dict[int, float]:
    found = [row for row in rows if (row["task"], row["recipe"]) == (task, name)]
    return {int(row["seed"]): 100.0 * float(row[column]) for row in found}


def _difference(first: dict[int, float], second: dict[int, float]) -> str:
    return shown(np.array([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]))


if __name__ == "__main__":
    main()
