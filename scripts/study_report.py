"""Tables and a plot from scripts/results/study.csv alone.

python scripts/study_report.py            # Markdown to standard output
python scripts/study_report.py --plot docs/study.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy import stats
from study import RESULTS, read
from study_tasks import TASKS

LABELS = {
    "gelu": "GELU, fine-tuned",
    "swap": "… ReLU swapped in, unprepared",
    "bias_after": "… biases refit, no training",
    "least_squares_after": "… compensated, no training",
    "relu_first": "ReLU swapped in first, fine-tuned",
    "bias_first": "ReLU first, biases refit, fine-tuned",
    "least_squares_first": "ReLU first, compensated, fine-tuned",
    "refit_quarter": "λ-GELU, refit after 25 % of the steps",
    "refit_half": "λ-GELU, refit after 50 % of the steps",
    "refit_late": "λ-GELU, refit after 75 % of the steps",
    "lambda_one": "λ-GELU from λ = 1, geometric ramp",
    "ramp_reciprocal": "λ-GELU from λ = 1, reciprocal ramp",
    "ramp_only": "ramp from the start, nothing learned",
    "paper": "λ-GELU from λ = 1.69, geometric ramp (as reported of the paper)",
    "half_hardened": "λ-GELU ramped to 8, then compensated",
    "midway": "GELU for 50 % of the steps, compensated, ReLU for the rest",
    "quarter": "GELU for 25 % of the steps, compensated, ReLU for the rest",
    "lerp": "GELU mixed into ReLU (as nn_pruning)",
    "sugar": "ReLU forward, smooth backward (SUGAR)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    scores = accuracies(options.results)
    print(table(scores))
    if options.plot:
        plot(scores, options.plot)


Scores = dict[str, dict[str, dict[int, float]]]  # recipe → task → seed → accuracy in points


def accuracies(results: Path) -> Scores:
    """Accuracy on the test split, in points."""
    scores: Scores = {}
    for row in read(results):
        if row["split"] == "test":
            task = scores.setdefault(row["recipe"], {}).setdefault(row["task"], {})
            task[int(row["seed"])] = 100.0 * float(row["accuracy"])
    return scores


def paired(scores: Scores, recipe: str, reference: str, tasks: list[str]) -> np.ndarray:
    """Differences recipe − reference over all (task, seed) that both have, in points."""
    first, second = scores.get(recipe, {}), scores.get(reference, {})
    return np.array(
        [
            first[task][seed] - second[task][seed]
            for task in tasks
            for seed in sorted(first.get(task, {}).keys() & second.get(task, {}).keys())
        ]
    )


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Mean and half-width of its 95 % t interval."""
    n = len(differences)
    if n < 2:
        return (float(differences.mean()) if n else float("nan")), float("nan")
    return float(differences.mean()), float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))


def shown(differences: np.ndarray) -> str:
    mean, half = interval(differences)
    return "–" if not len(differences) else f"{mean:+.1f}" + ("" if np.isnan(half) else f" ± {half:.1f}")


def table(scores: Scores) -> str:
    """Per recipe: mean accuracy by task, and the paired differences to GELU by task and to the swap pooled."""
    tasks = [name for name in TASKS if any(name in found for found in scores.values())]
    head = ["recipe", *tasks, "− GELU, pooled", "− swapped first, pooled", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for recipe in [r for r in LABELS if r in scores]:
        cells = [LABELS[recipe]]
        for task in tasks:
            values = list(scores[recipe].get(task, {}).values())
            cells.append(f"{np.mean(values):.1f}" if values else "–")
        cells += [
            "" if recipe == reference else shown(paired(scores, recipe, reference, tasks))
            for reference in ("gelu", "relu_first")
        ]
        counts = [len(scores[recipe][task]) for task in tasks if task in scores[recipe]]
        cells.append("/".join(map(str, counts)))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "ReLU − GELU by task, paired by seed, mean ± 95 % interval in points:", ""]
    lines += ["| recipe | " + " | ".join(tasks) + " |", "|" + "---|" * (len(tasks) + 1)]
    for recipe in [r for r in LABELS if r in scores and r != "gelu"]:
        cells = [shown(paired(scores, recipe, "gelu", [task])) for task in tasks]
        lines.append("| " + " | ".join([LABELS[recipe], *cells]) + " |")
    return "\n".join(lines)


def plot(scores: Scores, path: Path) -> None:
    """Differences to GELU, pooled over tasks and seeds, one line a recipe."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {r: paired(scores, r, "gelu", list(TASKS)) for r in LABELS if r in scores and r not in ("gelu", "swap")}
    figure = Figure(figsize=(8, 0.4 * len(found) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (recipe, differences) in enumerate(reversed(found.items())):
        mean, half = interval(differences)
        axes.errorbar(mean, place, xerr=0.0 if np.isnan(half) else half, fmt="o", color="tab:blue", capsize=3)
        axes.text(-0.01, place, LABELS[recipe], ha="right", va="center", transform=axes.get_yaxis_transform(), fontsize=8)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set(yticks=[], xlabel="accuracy − GELU's, points, paired by seed, 95 % interval")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
