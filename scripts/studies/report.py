"""Tables from the study's results alone, as Markdown; what concerns the paper's claims is in claims.py.

python -m scripts.studies.report
python -m scripts.studies.report --size full
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy import stats

from scripts.studies import protocol
from scripts.studies.run import FULL_RESULTS, RESULTS
from scripts.studies.scratch import SCRATCH
from scripts.studies.tasks import FULL, PRETRAINED, Task
from scripts.tools.tables import read

LABELS = {
    "gelu": "GELU",
    "swap": "… ReLU swapped in, unprepared",
    "bias_after": "… biases refit, no training",
    "least_squares_after": "… compensated, no training",
    "hinges_after": "… compensated, two ReLUs per gate, no training",
    "relu_first": "ReLU swapped in first, trained as long",
    "bias_first": "ReLU first, biases refit, trained as long",
    "least_squares_first": "ReLU first, compensated, trained as long",
    "refit_half": "λ-GELU, refit after 50 % of the steps",
    "refit_late": "λ-GELU, refit after 75 % of the steps",
    "refit_distilled": "… after 50 %, learning from the smooth network then",
    "refit_averaged": "… after 75 %, weights averaged over the last eighth",
    "refit_ramp": "ramp from λ = 1 to 160 in four stages, each with a refit",
    "by_sensitivity": "site by site, least sensitive first, each with a refit",
    "per_neuron": "λ-GELU with λ by neuron, refit after 75 % of the steps",
    "lambda_one": "λ-GELU from λ = 1, geometric ramp",
    "ramp_reciprocal": "λ-GELU from λ = 1, reciprocal ramp",
    "ramp_only": "ramp from the start, nothing learned",
    "paper": "λ-GELU from λ = 1.69, geometric ramp (as reported of the paper)",
    "half_hardened": "λ-GELU ramped to 8, then compensated",
    "midway": "GELU for 50 % of the steps, compensated, ReLU for the rest",
    "lerp": "GELU mixed into ReLU (as nn_pruning)",
    "sugar": "ReLU forward, smooth backward (SUGAR)",
    "unhardened": "λ-GELU from λ = 1.69, learned to the end, ReLU swapped in",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--results", type=Path, help="the size's own by default")
    options = parser.parse_args()
    full = options.size == "full"
    results = options.results or (FULL_RESULTS if full else RESULTS)
    scores, before = accuracies(results), accuracies(results, "before")
    groups = (
        {"All examples, three epochs": FULL}
        if full
        else {"From pretrained weights": PRETRAINED, "From random weights": SCRATCH}
    )
    for title, group in groups.items():
        tasks = [task.name for task in group if any(task.name in found for found in scores.values())]
        if not tasks:
            continue
        print(f"## {title}\n\n{protocol.tasks(group, tuned=full)}\n")
        print(headline(scores, group), end="\n\n")
        print(table(scores, tasks), differences(scores, tasks), gaps(scores, before, tasks), sep="\n\n", end="\n\n")
        if full:
            print(protocol.chosen(read(results), group, TRAINED), end="\n\n")


Scores = dict[str, dict[str, dict[int, float]]]  # recipe → task → seed → accuracy in points


def accuracies(results: Path, column: str = "accuracy") -> Scores:
    """Accuracy on the test split, in points; "before" is that before the substitution, of recipes that end with one."""
    scores: Scores = {}
    for row in read(results):
        if row["split"] == "test" and row[column]:
            task = scores.setdefault(row["recipe"], {}).setdefault(row["task"], {})
            task[int(row["seed"])] = 100.0 * float(row[column])
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


def shown(differences: np.ndarray, digits: int = 1) -> str:
    mean, half = interval(differences)
    if not len(differences):
        return "–"
    text = f"{round(mean, digits) + 0.0:+.{digits}f}".replace("-", "−")  # + 0.0: no negative zero
    return text + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


HEADLINE = {
    "gelu": "GELU",
    "swap": "ReLU swapped in",
    "least_squares_after": "ReLU, compensated, **no training**",
    "hinges_after": "… with two ReLUs per gate",
    "relu_first": "ReLU swapped in first, trained as long",
    "paper": "the paper's scheme",
    "refit_late": "λ-GELU, refit after 75 %",
}


TRAINED = {recipe: LABELS[recipe] for recipe in HEADLINE if not recipe.endswith(("swap", "_after"))}


def headline(scores: Scores, group: tuple[Task, ...]) -> str:
    """Mean accuracy by task for the recipes that matter most; in brackets the difference to GELU, paired by seed.

    A recipe is shown where it has as many seeds as GELU.
    """
    tasks = [task for task in group if task.name in scores["gelu"]]
    cells = {recipe: [_cell(scores, recipe, task.name) for task in tasks] for recipe in HEADLINE}
    shown_recipes = [recipe for recipe in HEADLINE if any(cells[recipe])]
    lines = ["| model and task | " + " | ".join(HEADLINE[recipe] for recipe in shown_recipes) + " |"]
    lines.append("|" + "---|" * (len(shown_recipes) + 1))
    for index, task in enumerate(tasks):
        lines.append("| " + " | ".join([task.title, *(cells[recipe][index] or "–" for recipe in shown_recipes)]) + " |")
    return "\n".join(lines)


def _cell(scores: Scores, recipe: str, task: str) -> str:
    values = scores.get(recipe, {}).get(task, {})
    if values.keys() != scores["gelu"][task].keys():
        return ""
    gap = "" if recipe == "gelu" else f" ({shown(paired(scores, recipe, 'gelu', [task]))})"
    return f"{np.mean(list(values.values())):.1f}{gap}"


def table(scores: Scores, tasks: list[str]) -> str:
    """Per recipe: mean accuracy by task, and the paired differences to GELU and to the swap, pooled."""
    head = ["recipe", *tasks, "− GELU, pooled", "− swapped first, pooled", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for recipe in found_recipes(scores, tasks):
        cells = [LABELS[recipe]]
        for task in tasks:
            values = list(scores[recipe].get(task, {}).values())
            cells.append(f"{np.mean(values):.1f}" if values else "–")
        cells += [
            "" if recipe == reference else shown(paired(scores, recipe, reference, tasks))
            for reference in ("gelu", "relu_first")
        ]
        counts = [len(scores[recipe][task]) for task in tasks if task in scores[recipe]]
        cells.append(str(counts[0]) if len({*counts}) == 1 else "/".join(map(str, counts)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(scores: Scores, tasks: list[str]) -> str:
    lines = ["ReLU − GELU by task, paired by seed, mean ± 95 % interval in points:", ""]
    lines += ["| recipe | " + " | ".join(tasks) + " |", "|" + "---|" * (len(tasks) + 1)]
    for recipe in found_recipes(scores, tasks)[1:]:
        cells = [shown(paired(scores, recipe, "gelu", [task])) for task in tasks]
        lines.append("| " + " | ".join([LABELS[recipe], *cells]) + " |")
    return "\n".join(lines)


def gaps(scores: Scores, before: Scores, tasks: list[str]) -> str:
    """How far accuracy moved at the substitution, the largest of the seeds, for recipes that train towards it."""
    lines = ["Substitution gap of what is trained towards it, after − before, the largest in absolute value, in points:", ""]
    lines += ["| recipe | " + " | ".join(tasks) + " |", "|" + "---|" * (len(tasks) + 1)]
    for recipe in [r for r in found_recipes(before, tasks) if not r.endswith(("after", "swap", "unhardened"))]:
        cells = []
        for task in tasks:
            seeds = before[recipe].get(task, {})
            moved = [scores[recipe][task][seed] - value for seed, value in seeds.items()]
            cells.append(f"{max(moved, key=abs):+.1f}".replace("-", "−") if moved else "–")
        lines.append("| " + " | ".join([LABELS[recipe], *cells]) + " |")
    return "\n".join(lines)


def found_recipes(scores: Scores, tasks: list[str]) -> list[str]:
    return [recipe for recipe in LABELS if recipe in scores and set(tasks) & scores[recipe].keys()]


if __name__ == "__main__":
    main()
