"""`make downstream`: what its table may say, and that README shows it as it was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.downstream.__main__ import PARTS, RESULTS
from scripts.downstream.rows import FIELDS, REFUSED, Row, answer, markdown
from scripts.tools.tables import read

ROOT = Path(__file__).resolve().parents[2]


def rows() -> dict[str, dict[str, str]]:
    return {row["tool"]: row for row in read(RESULTS)}


def test_every_part_was_measured() -> None:
    assert {row["part"] for row in read(RESULTS)} == set(PARTS)


@pytest.mark.parametrize("tool", ["Marabou", "HiGHS", "hls4ml", "activation_sparsity", "prune_dead_units"])
def test_smooth_networks_are_refused(tool: str) -> None:
    row = rows()[tool]
    assert (row["gelu"], row["lambda_gelu"]) == (REFUSED, REFUSED)
    assert row["relu"] != REFUSED


def test_solvers_agree() -> None:
    assert rows()["Marabou"]["relu"] == rows()["HiGHS"]["relu"]
    assert "timeout" not in rows()["HiGHS"]["relu"]


def test_readme_shows_the_table() -> None:
    ordered = sorted(read(RESULTS), key=lambda row: list(PARTS).index(row["part"]))
    table = markdown(Row(**{name: row[name] for name in FIELDS}) for row in ordered)
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_only_the_refusal_that_is_meant_counts() -> None:
    def fail() -> str:
        raise ValueError("out of memory")

    assert answer(fail, (ValueError,), "memory") == REFUSED
    for refusals, says in (((ValueError,), "smooth"), ((TypeError,), "memory")):
        with pytest.raises(ValueError, match="out of memory"):
            answer(fail, refusals, says)
