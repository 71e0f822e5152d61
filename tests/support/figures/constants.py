"""Figures of the pages that nothing makes: each with the reason why it stands there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Constant:
    """One of them.

    Attributes:
        page: that it is on.
        says: what the page says, word for word.
        reason: why no table makes it.
        path, text: a file of the project and what it must hold for the figure to be right; empty where no file tells.
    """

    page: str
    says: str
    reason: str
    path: str = ""
    text: str = ""

    def is_stale(self) -> bool:
        """Whether the file says something else by now."""
        return bool(self.path) and self.text not in (ROOT / self.path).read_text(encoding="utf-8")


LEVEL = ("the level of the interval", "scripts/studies/report.py", "stats.t.ppf(0.975,")
SITES = ("what sites are set to", "scripts/architectures/checks.py", "1.5 + 0.25 * (index % 4)")
RATES = ("the defaults of --learning-rate", "hf_lambda_gelu/cli/distill.py", "1e-3 if lora else 2e-4")
STUDY = "docs/study.md"
WARM_UP = ("the recipes' warm-up", "scripts/studies/recipes/recipe.py", "warmup_steps=0.1")
LATE = ("the default's switch point", "scripts/studies/recipes/hardening.py", "_refit(run, 0.75)")
MOMENTUM = ("of SGD", "scripts/studies/robustness.py", "momentum=0.9")
PAPERS = ("a figure of the paper",)

CONSTANTS = [
    Constant("README.md", "its 95 % interval", *LEVEL),
    Constant("docs/how-to/sparsity.md", "its 95 % interval", *LEVEL),
    Constant(STUDY, "intervals are 95 % t intervals", *LEVEL),
    Constant(STUDY, "mean ± 95 % interval in points", *LEVEL),
    Constant(STUDY, "10 % warm-up", *WARM_UP),
    Constant(STUDY, "the refit after 75 %", *LATE),
    Constant(STUDY, "t = 0.1 as", *PAPERS),
    Constant(STUDY, "a momentum of 0.9", *MOMENTUM),
    Constant(STUDY, "At τ = 0.1", "names a row of the table"),
    Constant("docs/cost.md", "One H100 (80 GB)", "the card's memory, by its name"),
    Constant("docs/coverage.md", "at λ between 1.5 and 2.25", *SITES),
    Constant("docs/how-to/adapters.md", "the paper's heuristic of 0.25", *PAPERS),
    Constant("docs/reference/training.md", "the paper's heuristic for its ramp is 0.25", *PAPERS),
    Constant("docs/how-to/command-line.md", "by default 2e-4", *RATES),
    Constant("docs/how-to/command-line.md", "at 1e-3", *RATES),
]
