"""The study behind the defaults: recipes × tasks × seeds, one row a result in results/study.csv.

    python -m scripts.studies.run                  # everything that is not in the CSV yet
    python -m scripts.studies.run --tasks movies --recipes gelu relu_first --seeds 0 1
    python -m scripts.studies.run --tune           # choose each recipe's learning rate on the validation split
    python -m scripts.studies.run --size full --tune && python -m scripts.studies.run --size full

A run that is interrupted goes on where it stopped. Every recipe has the same number of trials of the learning rate; what
they chose is in the CSV too, as rows of the validation split. Tables and plots: report.py.

The size `full` trains the pretrained models on all there is, three epochs long, with the recipes that matter most, each at
the best of three rates: a day on two cores. Its rows are in results/study_full.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets

from hf_lambda_gelu.checkpoints.card import package_versions
from scripts.studies.recipes import baselines, hardening, rivals, stages  # noqa: F401 (registers their recipes)
from scripts.studies.recipes.recipe import RECIPES, Recipe, Run
from scripts.studies.scratch import SCRATCH
from scripts.studies.tasks import FULL, PRETRAINED, Task
from scripts.tools.tables import append, read

RESULTS = Path(__file__).parent / "results" / "study.csv"
FULL_RESULTS = RESULTS.with_name("study_full.csv")
FIELDS = ("task", "recipe", "seed", "split", "rate", "accuracy", "loss", "before", "profile", "steps", "seconds", "versions")
TASKS: dict[str, Task] = {task.name: task for task in (*PRETRAINED, *SCRATCH)}
FULL_TASKS: dict[str, Task] = {task.name: task for task in FULL}
FULL_RECIPES = ("gelu", "relu_first", "paper", "refit_late")
TUNING_SEED = 100  # no seed of the comparison


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--tasks", nargs="+", choices={**TASKS, **FULL_TASKS}, metavar="TASK", help="all by default")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, metavar="RECIPE", help="all of the size by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--tune", action="store_true", help="run the trials on the validation split instead")
    parser.add_argument("--results", type=Path, help="the size's own by default")
    options = parser.parse_args()
    full = options.size == "full"
    tasks, results = (FULL_TASKS, FULL_RESULTS) if full else (TASKS, RESULTS)
    if unknown := [name for name in options.tasks or () if name not in tasks]:
        parser.error(f"{', '.join(unknown)}: of the size {options.size} there are {', '.join(tasks)}")
    recipes, results = options.recipes or (FULL_RECIPES if full else RECIPES), options.results or results
    datasets.disable_progress_bars()
    for seed in [TUNING_SEED] if options.tune else options.seeds:
        for name in options.tasks or tasks:
            for recipe in recipes:
                task = tasks[name]
                for rate in task.rates if options.tune else [best_rate(results, task, recipe)]:
                    run(results, task, recipe, seed, rate, "validation" if options.tune else "test")


def run(
    results: Path, task: Task, recipe: str, seed: int, rate: float, split: str, recipes: dict[str, Recipe] = RECIPES
) -> None:
    """Run and append, unless the results are there."""
    key = {"task": task.name, "seed": str(seed), "split": split, "rate": f"{rate:g}"}
    if any(row["recipe"] == recipe and key.items() <= row.items() for row in read(results)):
        return
    start = time.time()
    train, judged = task.splits(seed, split)
    given = Run(task, seed, rate, task.encode(train), task.encode(judged), trial=split == "validation")
    found = recipes[recipe](given)
    seconds = time.time() - start
    rows = [
        {
            **key,
            "recipe": name,
            "accuracy": f"{result.final['accuracy']:.4f}",
            "loss": f"{result.final['loss']:.4f}",
            "before": f"{result.before['accuracy']:.4f}" if result.before else "",
            "profile": " ".join(f"{value:.3f}" for value in result.profile),
            "steps": -(-len(train) // 32) * task.epochs,
            "seconds": f"{seconds:.0f}",
            "versions": " ".join(package_versions().values()),
        }
        for name, result in found.items()
    ]
    append(results, FIELDS, rows)
    print(
        json.dumps({k: rows[0][k] for k in ("task", "recipe", "seed", "split", "rate", "accuracy", "seconds")}), flush=True
    )


def best_rate(results: Path, task: Task, recipe: str) -> float:
    """The learning rate that did best on the validation split; the first one if none was tried."""
    trials = [r for r in read(results) if (r["task"], r["recipe"], r["split"]) == (task.name, recipe, "validation")]
    return float(max(trials, key=lambda row: float(row["accuracy"]))["rate"]) if trials else task.rates[0]


if __name__ == "__main__":
    main()
