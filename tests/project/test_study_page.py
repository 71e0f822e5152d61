"""The study's tables, in its page and in README, are what its commands make of the committed results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.benchmarks import refit_parts
from scripts.studies import claims, report, run, sparsity, updates
from scripts.studies.scratch import SCRATCH
from scripts.studies.tasks import PRETRAINED
from scripts.studies.training_free import choices, distilled, first_steps, goals, hinges, kept
from scripts.studies.training_free import run as training_free
from scripts.tools.tables import read

ROOT = Path(__file__).resolve().parents[2]


def recipes() -> str:
    """All tables of `scripts.studies.report` but those of README."""
    scores, before = report.accuracies(run.RESULTS), report.accuracies(run.RESULTS, "before")
    measured = {task for found in scores.values() for task in found}
    tasks = [[task.name for task in group if task.name in measured] for group in (PRETRAINED, SCRATCH)]
    return "\n".join(
        "\n".join([report.table(scores, names), report.differences(scores, names), report.gaps(scores, before, names)])
        for names in tasks
    )


def judged_rows() -> list[dict[str, str]]:
    return [row for row in read(run.RESULTS) if row["split"] == "test"]


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "recipes": ("docs/study.md", recipes),
    "README": ("README.md", lambda: report.headline(report.accuracies(run.RESULTS), PRETRAINED)),
    "profiles": ("docs/study.md", lambda: claims.profiles(judged_rows())),
    "drops": ("docs/study.md", lambda: claims.drops(judged_rows())),
    "updates": ("docs/study.md", lambda: updates.table(updates.read(updates.RESULTS))),
    "without training": ("docs/study.md", training_free.table),
    "hinges": ("docs/study.md", hinges.table),
    "goals": ("docs/study.md", goals.table),
    "goals in README": ("README.md", goals.table),
    "choices": ("docs/study.md", choices.table),
    "a few steps": ("docs/study.md", distilled.table),
    "latency": ("docs/study.md", kept.table),
    "sparsity": ("docs/how-to/sparsity.md", lambda: sparsity.table(read(sparsity.RESULTS))),
}


@pytest.mark.parametrize("name", TABLES)
def test_page_shows_the_table(name: str) -> None:
    page, made = TABLES[name]
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [line for line in made().splitlines() if line.startswith("|")]
    assert len(lines) > 2
    assert [line for line in lines if line not in text] == []


@pytest.mark.parametrize("page", ["docs/study.md", "docs/how-to/language-model.md"])
def test_page_says_where_the_first_steps_lead(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for row in read(first_steps.RESULTS):
        assert f"{float(row['before']):.2f} nats" in text
        assert f"{float(row['after']):.3f}" in text


def test_page_says_what_the_steps_bring() -> None:
    text = (ROOT / "docs/how-to/language-model.md").read_text(encoding="utf-8")
    for row in read(distilled.RESULTS):
        assert f"from {float(row['refit']):.1f} to {float(row['distilled']):.1f}" in text


def test_page_says_what_a_refit_costs() -> None:
    """Of the whole model: seconds of the refit, of its floor and of SparseGPT, in the page's order."""
    text = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    rows = {row["what"]: float(row["seconds"]) for row in read(refit_parts.RESULTS) if row["layers"] == "30"}
    assert f"takes {rows['refit']:.0f} CPU seconds" in text
    assert f"take {rows['floor']:.0f}; llm-compressor's\nSparseGPT on all linear maps takes {rows['sparsegpt']:.0f}," in text
