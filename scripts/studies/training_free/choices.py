"""Two choices behind several ReLUs per gate: weights of rows, and the penalty on activity in the choice of places. SmolLM2.

    python -m scripts.studies.training_free.choices                     # what results/choices.csv lacks
    python -m scripts.studies.training_free.choices --settings default "activity 0"
    python -m scripts.studies.training_free.choices --table

Each row is one refit with two ReLUs per gate, on the first 6,144 of the 20,480 tokens that the study of hinges draws, judged
as there. One thing at a time is unlike the default: all rows count the same, or the penalty is another.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
from torch import Tensor

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import package_versions
from hf_lambda_gelu.surgery.hinges import work
from hf_lambda_gelu.surgery.refit.row_weights import RowWeights
from scripts.studies.training_free.hinges import spread
from scripts.studies.training_free.judged import SmolLM2
from scripts.tools.tables import append, read

RESULTS = Path(__file__).parents[1] / "results" / "choices.csv"
FIELDS = ("setting", "seed", "tokens", "smooth", "substituted", "zeros", "seconds", "versions")
SETTINGS: dict[str, float | None] = {  # the penalty; None: all rows count the same
    "default": work._ACTIVITY,
    "all rows the same": None,
    "activity 0": 0.0,
    "activity 0.1": 0.1,
}
BATCHES, WINDOW = 3, 256 * 8


@contextmanager
def setting(name: str) -> Iterator[None]:
    penalty = SETTINGS[name]
    if penalty is None:
        with patch.object(RowWeights, "of", _alike):
            yield
    else:
        with patch.object(work, "_ACTIVITY", penalty):
            yield


def _alike(weights: RowWeights, stream: Tensor) -> Tensor:
    return torch.ones(len(stream))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.training_free.choices",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown, and measure nothing")
    options = parser.parse_args(argv)
    if options.table:
        print(table(options.results))
        return
    datasets.disable_progress_bars()
    there = {(row["setting"], row["seed"]) for row in read(options.results)}
    wanted = [(name, seed) for seed in options.seeds for name in options.settings if (name, str(seed)) not in there]
    if not wanted:
        return
    task = SmolLM2()
    smooth, _ = task.judge(task.load().eval(), "cpu")
    for name, seed in wanted:
        append(options.results, FIELDS, [measure(task, name, seed, smooth)])


def measure(task: SmolLM2, name: str, seed: int, smooth: float) -> dict[str, object]:
    model = task.load().eval()
    hlg.convert(model)
    batches = list(task.batches(seed))[:BATCHES]
    start = time.perf_counter()
    with setting(name):
        report = hlg.relu_ize(model, calibration=batches, compensate="least_squares", hinges=2)
    seconds = time.perf_counter() - start
    after, _ = task.judge(model, "cpu")
    zeros = statistics.fmean(report.zeros.values())
    print(f"{name}, seed {seed}: {smooth:.4f} → {after:.4f}, zeros {zeros:.4f}, {seconds:.0f} s", flush=True)
    return {
        "setting": name,
        "seed": seed,
        "tokens": BATCHES * WINDOW,
        "smooth": f"{smooth:.4f}",
        "substituted": f"{after:.4f}",
        "zeros": f"{zeros:.4f}",
        "seconds": f"{seconds:.1f}",
        "versions": " ".join(package_versions().values()),
    }


def table(results: Path = RESULTS) -> str:
    """Means over the draws, as Markdown."""
    lines = ["| unlike the default | draws | perplexity | zeros |", "|---|---|---|---|"]
    for name in SETTINGS:
        rows = [row for row in read(results) if row["setting"] == name]
        if rows:
            ratios = [float(row["substituted"]) / float(row["smooth"]) for row in rows]
            zeros = statistics.fmean(float(row["zeros"]) for row in rows)
            shown = "nothing" if name == "default" else name
            lines.append(f"| {shown} | {len(rows)} | × {spread(ratios, '.3f')} | {100 * zeros:.0f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
