"""What is read while a run goes on: short lines, every layer in the logs, the switch, and what a run that ends soft says."""

from __future__ import annotations

import io
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from support.training import SITES, At, converted, logged, trained, trainer_of
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training.console import profile_line

REFIT = {"hardness_compensate": "least_squares", "hardness_switch_point": 0.5, "max_steps": 6}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0], "1"),
        ([159.58, 159.6], "159.6 in every layer"),
        ([1.0, 1.5, 2.0, 1.25], "1–2 ▁▅█▃"),
        ([1.0, 10.0, 100.0], "1–100 ▁▅█"),  # by log λ
        ([1.0] * 40 + [2.0] * 40, "1–2 " + "▁" * 12 + "█" * 12),
        ([1.0, math.nan], "1 of 2 are no numbers"),
    ],
)
def test_a_profile_in_one_line(values: list[float], expected: str) -> None:
    assert profile_line(values) == expected


@pytest.mark.parametrize("bar", [False, True])
def test_lines_are_short_and_logs_are_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str], bar: bool) -> None:
    """With and without a progress bar; the history and a callback of one's own get λ of every layer."""
    seen: list[dict[str, Any]] = []

    class Own(PrinterCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = trainer_of(converted(hardness=1.5), tmp_path, disable_tqdm=not bar, max_steps=4, hardness_switch_point=0.5)
    trainer.model.get_submodule(SITES[1]).set_hardness(1.25)
    trainer.add_callback(Own())
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert len(lines) == 4
    assert not any(site in line for line in lines for site in SITES)
    assert max(map(len, lines)) < 160
    low, high = sorted(logged(trainer, f"hardness/{site}")[1] for site in SITES)
    assert f"'λ': '{low:.4g}–{high:.4g} " in lines[0].split("{")[1]
    assert all(set(logged(trainer, f"hardness/{site}")) == {1, 2, 3, 4} for site in SITES)
    assert all(any(f"hardness/{site}" in logs for logs in seen) for site in SITES)
    for cls in (PrinterCallback, ProgressCallback):
        assert cls.on_log.__module__.startswith("transformers"), "only instances are changed"


def test_the_table_of_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own, with a stand-in for IPython, which is not installed: each row has λ."""
    display = types.SimpleNamespace(
        HTML=str, display=lambda *args, **kwargs: types.SimpleNamespace(update=lambda html: None)
    )
    package = types.ModuleType("IPython")
    package.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    from transformers.utils import notebook

    tables = []

    class Kept(notebook.NotebookProgressCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            tables.append(self.training_tracker.inner_table)
            super().on_train_end(*args, **kwargs)

    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 2}):
        trainer = trainer_of(converted(hardness=1.5), tmp_path, max_steps=4, hardness_switch_point=0.5, **changes)
        trainer.pop_callback(PrinterCallback)
        trainer.add_callback(Kept())
        trainer.train()
        columns, *rows = tables[-1]
        assert [dict(zip(columns, row, strict=True))["λ"] for row in rows][-1] == "159.6 in every layer"
        assert len(rows) == (2 if changes else 4)


@pytest.mark.parametrize(
    ("changes", "then"),
    [
        (REFIT, r"  the maps after 2 activations were refit in \d+ s: relative error on held-out rows 0\."),
        ({"max_steps": 6, "hardness_switch_point": 0.5}, "  by hardness_ramp='geometric', until step 5"),
    ],
)
def test_the_switch_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, then: str) -> None:
    """At transformers' default level; not if errors alone are asked for, nor by other processes than the first."""
    trainer = trained(converted(hardness=1.5), tmp_path, **changes)
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("hardness: switch after step 3 of 6: λ "))
    assert lines[at].endswith(f"{profile_line(trainer.learned_hardness.values())} → 159.6 in every layer")
    assert re.match(then, lines[at + 1])
    if trainer.compensation is not None:
        mean = [sum(getattr(site, name) for site in trainer.compensation.sites) / 2 for name in ("before", "after")]
        assert f"{mean[0]:.3f} before, {mean[1]:.3f} after" in lines[at + 1]

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        trained(converted(hardness=1.5), tmp_path, **changes)
    finally:
        logging.set_verbosity(before)
    assert "switch after" not in capsys.readouterr().out


def test_a_terminal_that_cannot_print_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows' cp1252 has neither λ nor blocks: nothing fails, digits stand for the blocks."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    trained(converted(hardness=1.5), tmp_path, **REFIT)
    sys.stdout.flush()
    text = raw.getvalue().decode("cp1252")
    assert "hardness: switch after step 3 of 6: lambda 1." in text
    assert "'lambda': '1." in text
    assert profile_line([1.0, 1.5]) == "1-1.5 07"


class Enough(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize(
    ("point", "expected"),
    [(0.75, "gates soft, before the switch (hardness_switch_point)"), (0.25, "gates soft: they are not ReLU yet")],
)
def test_a_run_that_ends_soft_says_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, point: float, expected: str
) -> None:
    """The softest gate with its λ and target, and what to do, which then works."""
    model = converted(hardness=1.5)
    trainer = trainer_of(model, tmp_path, max_steps=8, hardness_switch_point=point)
    softest = At(lambda m: m.get_submodule(SITES[1]).set_hardness(1.25), 3)
    trainer.add_callback(softest)
    trainer.add_callback(Enough())
    trainer.train()
    assert f"training ended at step 3 of 8 with 2 of 2 {expected}" in caplog.text
    assert f"Softest is {SITES[1]} with λ = 1.25; 159.6 is wanted" in caplog.text
    with pytest.raises(hlg.SoftGateError):
        hlg.relu_ize(model)
    batches = [{"input_ids": trainer.train_dataset.tokens}]
    hlg.relu_ize(model, calibration=batches, compensate="least_squares")


def test_arguments_are_not_changed_by_printing(tmp_path: Path) -> None:
    """A log without λ, of an evaluation, is printed as it is."""
    trainer = trainer_of(converted(), tmp_path)
    logs = {"eval_loss": 1.0, "total_flos": 5.0}
    trainer.log(logs)
    assert logs == {"eval_loss": 1.0, "epoch": 0}, "as transformers' printing callback leaves it"
