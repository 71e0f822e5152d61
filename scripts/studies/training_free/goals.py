"""What was aimed at with several ReLUs per gate, and what came out: the table of README and of the study.

python -m scripts.studies.training_free.goals     # from results/hinges.csv and results/distilled.csv, measures nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scripts.studies.training_free.hinges import spread
from scripts.tools.tables import read

RESULTS = Path(__file__).parents[1] / "results"
_HINGES = "python -m scripts.studies.training_free.hinges --tasks {task} --variants {variant}"
_DISTILLED = "python -m scripts.studies.training_free.distilled --variants {variant}"


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        what: the network.
        goal: the number aimed at, as × of the smooth perplexity, or as points of a score.
        table: of which results, with the column of the score.
        wanted: (task, variant) of the rows.
    """

    what: str
    goal: float
    table: tuple[str, str]
    wanted: tuple[str, str]

    @property
    def is_ratio(self) -> bool:
        return self.wanted[0] == "smollm2"

    @property
    def command(self) -> str:
        task, variant = self.wanted
        return (_HINGES if self.table[0] == "hinges" else _DISTILLED).format(task=task, variant=variant)

    def measured(self, folder: Path = RESULTS) -> list[float]:
        """One number a draw."""
        name, column = self.table
        rows = [row for row in read(folder / f"{name}.csv") if (row["task"], row["variant"]) == self.wanted]
        if self.is_ratio:
            return [float(row[column]) / float(row["smooth"]) for row in rows]
        return [100.0 * (float(row[column]) - float(row["smooth"])) for row in rows]

    def holds(self, mean: float) -> bool:
        """More perplexity or wrong words are worse, as is less accuracy."""
        return mean <= self.goal if self.is_ratio or self.goal > 0 else mean >= self.goal


GOALS = (
    Goal("SmolLM2, perplexity, two ReLUs per gate", 1.10, ("hinges", "substituted"), ("smollm2", "k2")),
    Goal("… three", 1.03, ("hinges", "substituted"), ("smollm2", "k3")),
    Goal("… layers a quarter wider", 1.20, ("hinges", "substituted"), ("smollm2", "budget1.25")),
    Goal("… two, and 60 steps after it", 1.03, ("distilled", "distilled"), ("smollm2", "k2")),
    Goal("… one, and 60 steps after it", 1.15, ("distilled", "distilled"), ("smollm2", "k1")),
    Goal("DINOv2, accuracy of a frozen probe, two", -0.3, ("hinges", "substituted"), ("dinov2", "k2")),
    Goal("Whisper, word error rate, two", 0.2, ("hinges", "substituted"), ("whisper", "k2")),
)


def table(folder: Path = RESULTS) -> str:
    """As Markdown."""
    heads = ("network, without training unless said", "goal", "measured", "draws", "", "command")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for goal in GOALS:
        found = goal.measured(folder)
        aim = f"× {goal.goal:.2f}" if goal.is_ratio else f"{goal.goal:+.1f} points".replace("-", "−")
        if not found:
            lines.append(f"| {goal.what} | {aim} | not measured | 0 | | `{goal.command}` |")
            continue
        shown = f"× {spread(found, '.3f')}" if goal.is_ratio else spread(found, "+.2f")
        held = "held" if goal.holds(sum(found) / len(found)) else "missed"
        lines.append(f"| {goal.what} | {aim} | {shown} | {len(found)} | {held} | `{goal.command}` |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
