"""The study's figures, from the committed tables alone, as a paper could print them.

    python -m scripts.studies.figures                            # all, into runs/figures, as PDF
    python -m scripts.studies.figures --only profiles --suffix png

profiles: λ by layer as learned to the end of training without a ramp, a panel a task, mean and 95 % interval over seeds.
steps: λ of each layer against the step, naive and optimizer-aware, seed 0. tolerance: accuracy before and after the
substitution against ε. recipes: accuracy − GELU's from pretrained weights, paired by task and seed. Bands and bars are 95 %
t intervals over seeds, thin grey lines are seeds. Colours are those of Okabe and Ito, which
colour-blind readers tell apart, and every series has a line or marker of its own too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scripts.studies import report, updates
from scripts.studies.claims import DROPS
from scripts.studies.run import RESULTS
from scripts.studies.scratch import SCRATCH
from scripts.studies.tasks import PRETRAINED
from scripts.tools.tables import read

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#666666"
WIDTH = 6.8  # inches, a text of two columns
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE", help="all by default")
    parser.add_argument("--folder", type=Path, default=Path("runs/figures"))
    parser.add_argument("--suffix", choices=("pdf", "svg", "png"), default="pdf")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        path = options.folder / f"{name}.{options.suffix}"
        with rc_context(STYLE):
            FIGURES[name]().savefig(path, dpi=200)
        print(path)


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _legend(figure: Figure) -> None:
    """The first panel's, above all panels."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


def bands(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over rows (seeds) of each column, and the half-width of its 95 % t interval; 0 of one row."""
    found = np.array([report.interval(column) for column in values.T])
    return found[:, 0], np.nan_to_num(found[:, 1])


def _banded(axes: Axes, x: np.ndarray, values: np.ndarray, colour: str, style: str, label: str = "") -> None:
    mean, half = bands(values)
    axes.plot(x, mean, style, color=colour, label=label)
    axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    for edge in (mean - half, mean + half):
        axes.plot(x, edge, style[1:], color=colour, linewidth=0.5, alpha=0.6)


def profiles(results: Path = RESULTS) -> Figure:
    rows = [row for row in read(results) if (row["split"], row["recipe"]) == ("test", "unhardened")]
    found = {
        task.title: np.array([[float(x) for x in row["profile"].split()] for row in rows if row["task"] == task.name])
        for task in SCRATCH
    }
    found = {title: values for title, values in found.items() if len(values)}
    figure = _figure(1.9)
    for axes, (title, values) in zip(figure.subplots(1, len(found), squeeze=False).flat, found.items(), strict=True):
        depth = np.arange(1, values.shape[1] + 1)
        axes.plot(depth, values.T, color=GREY, linewidth=0.5, alpha=0.6)
        _banded(axes, depth, values, BLUE, "o-")
        axes.set(title=f"{title.replace(', ', chr(10))}\n{len(values)} seeds", xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_ylabel("learned λ")
    return figure


def steps(results: Path = updates.RESULTS) -> Figure:
    traces = updates.read(results)
    panels = sorted({(optimizer, start) for optimizer, _, start, _ in traces})
    figure = _figure(3.6)
    names = {"sgd": "SGD", "adamw": "AdamW"}
    for axes, (optimizer, start) in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
        for update, colour, style in (("naive", VERMILION, "--"), ("aware", BLUE, "-")):
            values = traces[optimizer, update, start, 0][:, 1:]
            lines = axes.plot(np.arange(len(values)) * updates.EVERY, values, style, color=colour)
            lines[0].set_label("naive: s is stepped" if update == "naive" else "optimizer-aware: λ is stepped")
        axes.set(title=f"{names[optimizer]}, λ₀ = {start}", ylabel="λ, a line a layer")
        axes.axhline(1.0, color=GREY, linewidth=0.6, linestyle=":")
    for axes in figure.axes[2:]:
        axes.set_xlabel("optimizer step")
    _legend(figure)
    return figure


def tolerance(results: Path = RESULTS) -> Figure:
    before, after = report.accuracies(results, "before"), report.accuracies(results)
    tasks = [task for task in SCRATCH if task.name in before.get("tolerance_0.1", {})]
    figure = _figure(2.4)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False).flat, tasks, strict=True):
        recipes = [recipe for recipe in DROPS if task.name in before.get(recipe, {})]
        place = np.arange(len(recipes))
        for scores, colour, style, label in (
            (before, BLUE, "o-", "λ-GELU, before the substitution"),
            (after, VERMILION, "s--", "ReLU, after it"),
        ):
            seeds = sorted(set.intersection(*({*scores[recipe][task.name]} for recipe in recipes)))
            values = np.array([[scores[recipe][task.name][seed] for recipe in recipes] for seed in seeds])
            _banded(axes, place, values, colour, style, label)
        axes.set(title=f"{task.title}, {len(seeds)} seeds", xlabel="ε (λ at the end of the ramp)")
        axes.set_xticks(place, [DROPS[recipe].replace(" (", "\n(") for recipe in recipes])
    figure.axes[0].set_ylabel("test accuracy, %")
    _legend(figure)
    return figure


def recipes(results: Path = RESULTS) -> Figure:
    scores, tasks = report.accuracies(results), [task.name for task in PRETRAINED]
    found = {
        recipe: report.paired(scores, recipe, "gelu", tasks)
        for recipe in report.found_recipes(scores, tasks)
        if recipe not in ("gelu", "swap")
    }
    figure = _figure(0.17 * len(found) + 0.6)
    axes = figure.subplots()
    for place, differences in enumerate(reversed(found.values())):
        mean, half = report.interval(differences)
        axes.errorbar(mean, place, xerr=np.nan_to_num(half), fmt="o", color=BLUE, capsize=2)
    axes.axvline(0.0, color=GREY, linewidth=0.6)
    axes.set_yticks(range(len(found)), [report.LABELS[recipe] for recipe in reversed(found)])
    axes.set_xlabel("accuracy − GELU's, points")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "profiles": profiles,
    "steps": steps,
    "tolerance": tolerance,
    "recipes": recipes,
}


if __name__ == "__main__":
    main()
