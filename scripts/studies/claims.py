"""What the paper claims, on the networks of the study that are trained from random weights; from results/study.csv.

    python -m scripts.studies.claims

Profiles: whether the order of the layers by their learned λ is the same over initialisations, by Spearman's correlation of
each pair of seeds; the interval is a bootstrap over seeds. Hardening: what the accuracy loses when ReLU takes the gates'
place, without a ramp and with ramps to λ = 0.798 / ε. How the update moves λ is in updates.py.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from scripts.studies.report import shown
from scripts.studies.run import RESULTS
from scripts.studies.scratch import SCRATCH
from scripts.tools.tables import read

# the paper's scheme with softer and softer ends of the ramp
DROPS = {
    "paper": "0.005 (λ = 160)",
    "tolerance_0.025": "0.025 (λ = 32)",
    "tolerance_0.1": "0.1 (λ = 8)",
    "tolerance_0.4": "0.4 (λ = 2)",
    "unhardened": "no ramp",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = [row for row in read(options.results) if row["split"] == "test"]
    print(profiles(rows), drops(rows), sep="\n\n")


def profiles(rows: list[dict[str, Any]]) -> str:
    """By task: λ as learned to the end of training, and how like the orders of its layers are over seeds."""
    lines = ["| task | seeds | λ by layer, mean over seeds | Spearman, mean over pairs of seeds |", "|---|---|---|---|"]
    for task in SCRATCH:
        found = [r["profile"] for r in rows if (r["task"], r["recipe"]) == (task.name, "unhardened")]
        if len(found) < 2:
            continue
        learned = np.array([[float(value) for value in profile.split()] for profile in found])
        mean, low, high = agreement(learned)
        values = " ".join(f"{value:.2f}" for value in learned.mean(0))
        lines.append(f"| {task.title} | {len(learned)} | {values} | {correlation(mean, low, high)} |")
    return "\n".join(lines)


def agreement(learned: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Mean Spearman correlation over pairs of rows (seeds, sites), and its 95 % bootstrap interval over the rows."""
    ranks = np.array([stats.rankdata(row) for row in learned])
    correlations = np.corrcoef(ranks)
    generator = np.random.default_rng(0)

    def mean(chosen: np.ndarray) -> float:
        pairs = [correlations[a, b] for a, b in itertools.combinations(chosen, 2) if a != b]
        return float(np.mean(pairs)) if pairs else np.nan

    means = [mean(generator.integers(0, len(learned), len(learned))) for _ in range(draws)]
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return mean(np.arange(len(learned))), float(low), float(high)


def correlation(mean: float, low: float, high: float) -> str:
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})".replace("-", "−")


def drops(rows: list[dict[str, Any]]) -> str:
    """By ε and task: the accuracy lost at substitution, in points, mean over seeds with its 95 % interval."""
    tasks = [task.name for task in SCRATCH if any(row["task"] == task.name for row in rows)]
    lines = ["| ε | " + " | ".join(tasks) + " |", "|" + "---|" * (len(tasks) + 1)]
    for recipe, label in DROPS.items():
        cells = []
        for task in tasks:
            found = [r for r in rows if (r["task"], r["recipe"]) == (task, recipe)]
            cells.append(shown(np.array([100.0 * (float(r["accuracy"]) - float(r["before"])) for r in found])))
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
