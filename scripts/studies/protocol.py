"""What the study trains on: tasks, examples, rates, and what a run takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from scripts.studies.tasks import Task


def tasks(group: Iterable[Task], tuned: bool) -> str:
    """Examples and epochs of each task, and its rate, or the rates that each recipe chose from where they were `tuned`."""
    lines = ["| task | model and data | training examples × epochs | of | test examples | learning rate |", "|" + "---|" * 6]
    for task in group:
        rates = ", ".join(f"{rate:g}" for rate in (task.rates if tuned else task.rates[:1]))
        lines.append(
            f"| `{task.name}` | {task.title} | {task.train:,} × {task.epochs} | {task.size or '–'} | {task.evaluate:,} | "
            f"{rates} |"
        )
    return "\n".join(lines)


def chosen(rows: list[dict[str, Any]], group: Iterable[Task], labels: dict[str, str]) -> str:
    """The rate that each recipe chose on the validation split, and the minutes of a run at it, on one core."""
    found = {(row["task"], row["recipe"]): row["rate"] for row in rows if row["split"] == "test"}
    measured = [task for task in group if task.name in {name for name, _ in found}]
    lines = ["| recipe | " + " | ".join(task.name for task in measured) + " |", "|" + "---|" * (len(measured) + 1)]
    for recipe, label in labels.items():
        cells = []
        for task in measured:
            key = (task.name, recipe, "test")
            times = [float(row["seconds"]) for row in rows if (row["task"], row["recipe"], row["split"]) == key]
            cells.append(f"{float(found[key[:2]]):g}, {np.mean(times) / 60:.1f}" if times else "–")
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)
