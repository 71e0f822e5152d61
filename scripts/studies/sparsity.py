"""What a penalty on the gates costs in accuracy, and the exact zeros that it buys, on real models.

    python -m scripts.studies.sparsity            # what is not in results/sparsity.csv yet; prints the table
    python -m scripts.studies.sparsity --table    # the table alone

Each run is the fine-tuning of `make demo` (on the study's examples), with `sparsity_penalty`; ReLU is substituted at the
end and saved. Accuracy and zeros are those of the checkpoint that stock transformers loads again, on test examples.
Runs of one seed have the same examples in the same order, and the same head: weight 0 is what the others are paired with.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import package_versions
from scripts.studies.recipes.recipe import Run
from scripts.studies.report import shown
from scripts.studies.tasks import PRETRAINED, Task
from scripts.tools.tables import append, read

RESULTS = Path(__file__).parent / "results" / "sparsity.csv"
FIELDS = (
    "task",
    "norm",
    "weight",
    "seed",
    "rate",
    "steps",
    "accuracy",
    "loss",
    "zeros",
    "by_site",
    "dead",
    "seconds",
    "versions",
)
TASKS: dict[str, Task] = {task.name: task for task in PRETRAINED}
# by task and norm; the same weight does more on text, which has more steps at a higher rate
WEIGHTS: dict[str, dict[str, tuple[float, ...]]] = {
    "movies": {"none": (0.0,), "l1": (0.1, 0.3), "hoyer": (0.1, 0.3, 1.0, 3.0)},
    "fashion": {"none": (0.0,), "l1": (1.0, 3.0), "hoyer": (1.0, 3.0)},
}
COUNTED = 300  # test examples on which zeros are counted


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.sparsity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), metavar="TASK")
    parser.add_argument("--norms", nargs="+", choices=("none", "l1", "hoyer"), default=["none", "l1", "hoyer"])
    parser.add_argument("--weights", nargs="+", type=float, help="of the norms; by default those of the table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="make no run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    for seed in [] if options.table else options.seeds:
        for name in options.tasks:
            for norm in options.norms:
                own = WEIGHTS[name][norm] if options.weights is None or norm == "none" else options.weights
                for weight in own:
                    run(options.results, TASKS[name], norm, weight, seed)
    print(table(read(options.results)))


def run(results: Path, task: Task, norm: str, weight: float, seed: int) -> None:
    """Run and append, unless the row is there."""
    key = {"task": task.name, "norm": norm, "weight": f"{weight:g}", "seed": str(seed)}
    if any(key.items() <= row.items() for row in read(results)):
        return
    start = time.time()
    train, judged = task.splits(seed, "test")
    given = Run(task, seed, task.rates[0], task.encode(train), task.encode(judged))
    penalty: dict[str, Any] = {} if norm == "none" else {"sparsity_penalty": weight, "sparsity_norm": norm}
    model = trained(given, penalty)
    found = given.judge(model)
    counted = hlg.activation_sparsity(model, task.batches(given.judged, COUNTED))
    row = {
        **key,
        "rate": f"{given.rate:g}",
        "steps": -(-len(train) // 32) * task.epochs,
        "accuracy": f"{found['accuracy']:.4f}",
        "loss": f"{found['loss']:.4f}",
        "zeros": f"{counted.zeros:.4f}",
        "by_site": " ".join(f"{site.zeros:.3f}" for site in counted.sites),
        "dead": sum(len(site.dead) for site in counted.sites),
        "seconds": f"{time.time() - start:.0f}",
        "versions": " ".join(package_versions().values()),
    }
    append(results, FIELDS, [row])
    print({name: row[name] for name in ("task", "norm", "weight", "seed", "accuracy", "zeros", "seconds")}, flush=True)


def trained(given: Run, penalty: dict[str, Any]) -> PreTrainedModel:
    """The ReLU network of a fine-tuning, saved and loaded by transformers."""
    model = given.model()
    hlg.convert(model)
    given.trainer(model, cls=hlg.LambdaGELUTrainer, hardness_switch_point=0.75, **penalty).train()
    hlg.relu_ize(model)
    with tempfile.TemporaryDirectory() as folder:
        hlg.save_relu_pretrained(model, folder)
        return type(model).from_pretrained(folder)


def table(rows: list[dict[str, str]]) -> str:
    """Mean zeros and accuracy by task, norm and weight; in brackets the difference to no penalty, paired by seed."""
    lines = ["| model and task | penalty | exact zeros, % | accuracy, % | seeds |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == name]
        kinds = {(row["norm"], float(row["weight"])): {} for row in mine}
        for row in mine:
            kinds[row["norm"], float(row["weight"])][row["seed"]] = row
        plain = kinds.get(("none", 0.0), {})
        for norm, weight in sorted(kinds, key=lambda kind: (kind[1] > 0, kind)):
            chosen = kinds[norm, weight]
            cells = []
            for column in ("zeros", "accuracy"):
                cells.append(f"{np.mean([100 * float(row[column]) for row in chosen.values()]):.1f}")
                if weight:
                    pairs = [(chosen[seed][column], plain[seed][column]) for seed in chosen if seed in plain]
                    cells[-1] += f" ({shown(np.array([100 * (float(a) - float(b)) for a, b in pairs]))})"
            title = TASKS[name].title if name in TASKS else name
            lines.append(
                f"| {title} | {f'{norm}, {weight:g}' if weight else 'none'} | {' | '.join(cells)} | {len(chosen)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
