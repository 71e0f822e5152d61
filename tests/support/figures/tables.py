"""The tables of the pages: each is what a command prints from committed results, line by line."""

from __future__ import annotations

from collections.abc import Callable

from scripts.architectures import hinges as wider
from scripts.architectures import run as coverage
from scripts.benchmarks import refit, sparse_ffn
from scripts.benchmarks import report as benchmarks
from scripts.downstream.__main__ import PARTS
from scripts.downstream.__main__ import RESULTS as DOWNSTREAM
from scripts.downstream.rows import FIELDS, Row, markdown
from scripts.matrix import run as matrix
from scripts.matrix import table as matrix_table
from scripts.studies import claims, kills, protocol, report, robustness, run, sparsity, updates
from scripts.studies.scratch import SCRATCH
from scripts.studies.tasks import FULL, PRETRAINED
from scripts.studies.training_free import choices, distilled, goals, hinges, kept
from scripts.studies.training_free import run as training_free
from scripts.tools.tables import read


def recipes() -> str:
    """All tables of `scripts.studies.report` but those of README."""
    scores, before = report.accuracies(run.RESULTS), report.accuracies(run.RESULTS, "before")
    measured = {task for found in scores.values() for task in found}
    tasks = [[task.name for task in group if task.name in measured] for group in (PRETRAINED, SCRATCH)]
    return "\n\n".join(
        "\n\n".join([report.table(scores, names), report.differences(scores, names), report.gaps(scores, before, names)])
        for names in tasks
    )


def all_examples() -> str:
    """All tables of `scripts.studies.report --size full`."""
    scores = report.accuracies(run.FULL_RESULTS)
    measured = [task for task in FULL if task.name in scores["gelu"]]
    return "\n\n".join(
        [
            protocol.tasks(measured, tuned=True),
            report.headline(scores, FULL),
            report.differences(scores, [task.name for task in measured]),
            protocol.chosen(read(run.FULL_RESULTS), FULL, report.TRAINED),
        ]
    )


def judged_rows() -> list[dict[str, str]]:
    return [row for row in read(run.RESULTS) if row["split"] == "test"]


def downstream(*parts: str) -> str:
    """Rows of `make downstream`, in the order of its parts; of all without arguments."""
    rows = sorted(read(DOWNSTREAM), key=lambda row: list(PARTS).index(row["part"]))
    return markdown(Row(**{name: row[name] for name in FIELDS}) for row in rows if not parts or row["part"] in parts)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "recipes": ("docs/study.md", recipes),
    "all examples": ("docs/study.md", all_examples),
    "README": ("README.md", lambda: report.headline(report.accuracies(run.FULL_RESULTS), FULL)),
    "tasks": ("docs/study.md", lambda: protocol.tasks([*PRETRAINED, *SCRATCH], tuned=False)),
    "profiles": ("docs/study.md", lambda: claims.profiles(judged_rows())),
    "drops": ("docs/study.md", lambda: claims.drops(judged_rows())),
    "updates": ("docs/study.md", lambda: updates.table(updates.read(updates.RESULTS))),
    "robust profiles": ("docs/study.md", lambda: robustness.profiles(robustness.judged_rows(robustness.RESULTS))),
    "hold and τ": ("docs/study.md", lambda: robustness.accuracies(robustness.judged_rows(robustness.RESULTS))),
    "without training": ("docs/study.md", training_free.table),
    "hinges": ("docs/study.md", hinges.table),
    "goals": ("docs/study.md", goals.table),
    "goals in README": ("README.md", goals.table),
    "choices": ("docs/study.md", choices.table),
    "a few steps": ("docs/study.md", distilled.table),
    "latency": ("docs/study.md", kept.table),
    "sparsity": ("docs/how-to/sparsity.md", lambda: sparsity.table(read(sparsity.RESULTS))),
    "downstream": ("README.md", downstream),
    "compression": ("docs/how-to/compression.md", lambda: downstream("compression")),
    "activations": ("docs/cost.md", lambda: benchmarks.activations(read(benchmarks.CPU))),
    "kernels": ("docs/cost.md", lambda: benchmarks.kernels(read(benchmarks.KERNELS))),
    "streaming": ("docs/how-to/larger-than-memory.md", lambda: benchmarks.streaming(read(benchmarks.STREAMING))),
    "refit": ("docs/how-it-works.md", lambda: refit.table(read(refit.RESULTS))),
    "sparse FFN": ("docs/how-to/sparsity.md", lambda: sparse_ffn.table(read(sparse_ffn.RESULTS))),
    "kills": ("docs/reference/training.md", lambda: kills.table(read(kills.RESULTS))),
    "matrix": ("docs/matrix.md", lambda: matrix_table.table(matrix.rows_in(matrix.RESULTS))),
    "coverage": ("docs/coverage.md", lambda: coverage.table(read(coverage.RESULTS))),
    "wider layers": ("docs/coverage.md", lambda: wider.table(read(wider.RESULTS))),
}
