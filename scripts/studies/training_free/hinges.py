"""Several ReLUs per gate without training: quality, width, zeros and time, on four pretrained models.

    python -m scripts.studies.training_free.hinges                       # what results/hinges.csv lacks
    python -m scripts.studies.training_free.hinges --tasks smollm2 --variants k2 k3 --seeds 0 --device cuda
    python -m scripts.studies.training_free.hinges --table

A row of results/hinges.csv is one substitution; the seed draws the calibration examples and nothing else. An interrupted run
goes on where it stopped: a row is written as soon as it is there. Seeds come last in order, so that a run which is cut short
has each variant once. Each network is saved and loaded by stock transformers in a process of its own: `stock` is the largest
difference of its outputs. With --keep FOLDER what was saved stays there, as TASK-VARIANT-seedN.

The models, what they are calibrated on, and what judges them: judged.py.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import package_versions
from scripts.studies.training_free.judged import TASKS, Task
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
