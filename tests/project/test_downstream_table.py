"""`make downstream`: what its table may say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hf_lambda_gelu as hlg
from scripts.downstream import blocks
from scripts.downstream.__main__ import PARTS, RESULTS
from scripts.downstream.rows import REFUSED, answer
from scripts.tools.tables import read


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


def test_solvers_that_do_not_agree_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rows of blocks stand on: a verdict of one solver that the other contradicts is no row."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    rows = torch.rand(3, 4)
    assert blocks.verdicts(network, rows, 1e-6) == "3 robust, all by bounds and search"
    ask = hlg.verify_robustness

    def lying(*args: object, solver: str, **options: object) -> hlg.RobustnessReport:
        report = ask(*args, solver=solver, **options)  # type: ignore[arg-type]
        if solver == "highs":
            report.verdicts[1] = replace(report.verdicts[1], verdict="refuted")
        return report

    monkeypatch.setattr(hlg, "verify_robustness", lying)
    with pytest.raises(RuntimeError, match="do not agree on row 1: robust, refuted"):
        blocks.verdicts(network, rows, 1e-6)


def test_only_the_refusal_that_is_meant_counts() -> None:
    def fail() -> str:
        raise ValueError("out of memory")

    assert answer(fail, (ValueError,), "memory") == REFUSED
    for refusals, says in (((ValueError,), "smooth"), ((TypeError,), "memory")):
        with pytest.raises(ValueError, match="out of memory"):
            answer(fail, refusals, says)
