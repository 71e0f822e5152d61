"""`make matrix`: its page has the committed rows, none of which is off, and its tables say what rows say."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from transformers.training_args import OptimizerNames

from scripts.matrix import engines, optimizers, run, trainers
from scripts.matrix.cells import Outcome
from scripts.matrix.comparison import BOUND
from scripts.matrix.table import CELL, table
from scripts.tools.tables import read

NAMES = {name.value for name in OptimizerNames}  # a newer transformers has more than were run


def row(optimizer: str, verdict: str, figure: str = "", text: str = "", **changes: str) -> dict[str, str]:
    found = {"part": "engines", "optimizer": optimizer, "precision": "fp32", "engine": "DDP × 2", "trainer": "Trainer"}
    return found | {"verdict": verdict, "figure": figure, "text": text} | changes


def test_page_shows_the_tables() -> None:
    """As `python -m scripts.matrix.run --page` puts them there."""
    text = run.PAGE.read_text(encoding="utf-8")
    assert run.page(text, run.rows_in(run.RESULTS)) == text


def test_no_cell_is_off() -> None:
    rows = run.rows_in(run.RESULTS)
    keys = [(entry["part"], *(entry[field] for field in CELL)) for entry in rows]
    assert len(keys) == len(set(keys)) > 80
    assert {entry["verdict"] for entry in rows} == {"equal", "refused"}
    # in bf16 two runs that sum in another order part, as two of one process would
    bf16 = {"optimizers": BOUND, "engines": engines.BOUNDS["bf16"][0], "trainers": trainers.BOUND["bf16"]}
    for entry in rows:
        bound = bf16[entry["part"]] if entry["precision"] == "bf16" else BOUND
        assert entry["verdict"] == "refused" or float(entry["figure"]) <= bound
    assert all(len(entry["text"]) > 20 for entry in rows if entry["verdict"] == "refused")


def test_every_optimizer_was_run() -> None:
    done = {tuple(entry[field] for field in CELL) for entry in run.rows_in(run.RESULTS) if entry["part"] == "optimizers"}
    assert {tuple(asdict(cell).values()) for cell in optimizers.CELLS if cell.optimizer not in NAMES} <= done
    assert {"adamw_torch", "galore_adamw", "lomo", "schedule_free_adamw", "paged_lion_8bit"} <= {name for name, *_ in done}


def test_tables() -> None:
    """Rows that differ in one column are one, with the largest figure; a refusal's text stands once; what is off is seen."""
    rows = [
        row("SGD", "equal", "2.0e-07"),
        row("AdamW", "equal", "3.0e-06"),
        row("AdamW", "equal", "1.0e-06", precision="bf16"),
        row("'x'", "refused", text="optim=\"'x'\" is not | possible"),
        row("lomo", "refused", text="optim='lomo' steps within backward"),
        row("adalomo", "refused", text="optim='adalomo' steps within backward"),
        row("XLA", "refused", text="without λ too: no XLA"),
        row("LBFGS", "off", "1.0e-01", "Trainer"),
    ]
    assert table(rows).splitlines() == [
        "### By engines",
        "",
        "8 cells: 3 equal, 4 refused, 1 off; DDP × 2, Trainer.",
        "",
        "| precision | optimizer | λ against the twin, at most |",
        "| --- | --- | --- |",
        "| fp32 | SGD · AdamW | 3.0e-06 |",
        "| bf16 | AdamW | 1.0e-06 |",
        "",
        "| precision | optimizer | refused by this package |",
        "| --- | --- | --- |",
        "| fp32 | 'x' | optim=… is not \\| possible |",
        "| fp32 | lomo · adalomo | optim=… steps within backward |",
        "",
        "| precision | optimizer | refused by the library itself |",
        "| --- | --- | --- |",
        "| fp32 | XLA | no XLA |",
        "",
        "| precision | optimizer | **off** |",
        "| --- | --- | --- |",
        "| fp32 | LBFGS | 1.0e-01: Trainer |",
    ]


def test_a_run_goes_on_and_says_what_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each part into a file of its own; a cell that is there is not run again; the exit says how many are off."""
    asked = []

    def outcome(name: str, index: int) -> Outcome:
        asked.append(index)
        return Outcome("off", None, "exit code 1: ValueError") if index == 2 else Outcome("equal", 1e-7, "plain loop")

    monkeypatch.setattr(run, "outcome", outcome)
    monkeypatch.setattr(optimizers, "CELLS", optimizers.CELLS[:2])
    command = ["--parts", "optimizers", "--results", str(tmp_path)]
    run.main(command)
    monkeypatch.undo()
    monkeypatch.setattr(run, "outcome", outcome)
    monkeypatch.setattr(optimizers, "CELLS", optimizers.CELLS[:3])
    with pytest.raises(SystemExit, match="1 of 3 cells are off"):
        run.main(command)
    assert asked == [0, 1, 2]
    assert len(read(tmp_path / "optimizers.csv")) == 3
    assert "3 cells: 2 equal, 0 refused, 1 off" in capsys.readouterr().out
