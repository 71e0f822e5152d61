"""How many examples a refit without training wants: GELU networks of the full size, refit on 300, as in the study, and more.

    python -m scripts.studies.training_free.examples                              # what results/examples.csv lacks
    python -m scripts.studies.training_free.examples --tasks newsgroups --seeds 0 1
    python -m scripts.studies.training_free.examples --table

Each network is GELU's of `scripts.studies.run --size full`, of the same seed, at the learning rate that it chose there; the
examples are its first training examples, without their labels. A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import package_versions
from scripts.studies.recipes.recipe import Run
from scripts.studies.run import FULL_RESULTS, FULL_TASKS, best_rate
from scripts.tools.tables import append, read

RESULTS = Path(__file__).parents[1] / "results" / "examples.csv"
FIELDS = ("task", "seed", "examples", "smooth", "substituted", "seconds", "versions")
TASKS = ("newsgroups", "fashion")  # where the refit on 300 was furthest behind
COUNTS = (300, 1000, 3000)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.training_free.examples",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    options = parser.parse_args()
    if options.table:
        print(table(options.results))
        return
    datasets.disable_progress_bars()
    for seed in options.seeds:
        for task in options.tasks:
            run(options.results, task, seed)


def run(results: Path, name: str, seed: int) -> None:
    """Fine-tunes once, and appends what the refits on each number of examples give."""
    there = {int(row["examples"]) for row in read(results) if (row["task"], row["seed"]) == (name, str(seed))}
    wanted = [count for count in COUNTS if count not in there]
    if not wanted:
        return
    task = FULL_TASKS[name]
    train, judged = task.splits(seed, "test")
    given = Run(task, seed, best_rate(FULL_RESULTS, task, "gelu"), task.encode(train), task.encode(judged))
    model = given.model()
    given.trainer(model).train()
    smooth = given.judge(model)["accuracy"]
    hlg.convert(model)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for count in wanted:
        again = given.model()
        hlg.convert(again)
        again.load_state_dict(weights)
        start = time.time()
        hlg.relu_ize(again, calibration=task.batches(given.train, count), compensate="least_squares")
        seconds = time.time() - start
        found = {"smooth": f"{smooth:.4f}", "substituted": f"{given.judge(again)['accuracy']:.4f}"}
        key = {"task": name, "seed": seed, "examples": count}
        append(
            results,
            FIELDS,
            [{**key, **found, "seconds": f"{seconds:.0f}", "versions": " ".join(package_versions().values())}],
        )


def table(results: Path = RESULTS) -> str:
    """Points against the smooth network by number of examples: the mean, and least and most of the seeds."""
    lines = ["| task | seeds | GELU | " + " | ".join(f"{count:,} examples" for count in COUNTS) + " |"]
    lines += ["|---|---|---|" + "---|" * len(COUNTS)]
    for task in TASKS:
        rows = [row for row in read(results) if row["task"] == task]
        seeds = sorted({row["seed"] for row in rows})
        if not seeds:
            continue
        smooth = statistics.mean(float(row["smooth"]) for row in rows)
        cells = []
        for count in COUNTS:
            points = [
                100 * (float(row["substituted"]) - float(row["smooth"])) for row in rows if row["examples"] == str(count)
            ]
            mean = f"{statistics.mean(points):+.1f} [{min(points):+.1f}, {max(points):+.1f}]" if points else "–"
            cells.append(mean.replace("-", "−"))
        lines.append(f"| `{task}` | {len(seeds)} | {100 * smooth:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
