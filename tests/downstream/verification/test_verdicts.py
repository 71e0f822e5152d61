"""The report, and the CSV file: a run that was stopped goes on, and rows of another question are not taken."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import in_fork
from support.verified import digits, digits_network

import hf_lambda_gelu as hlg
from hf_lambda_gelu.downstream.verification import robustness

EPSILON = 0.05


def verified(path: Path | None, rows: slice = slice(1500, 1508), epsilon: float = EPSILON) -> hlg.RobustnessReport:
    images, labels = digits()
    return hlg.verify_robustness(
        digits_network(16, 16), images[rows], labels[rows], epsilon, clip=(0.0, 1.0), solver="highs", results=path
    )


def plain(report: hlg.RobustnessReport) -> list[tuple[object, ...]]:
    """All that does not change from run to run: times aside."""
    return [(v.index, v.label, v.verdict, v.decided_by, v.reason, v.margin, v.other) for v in report.verdicts]


class Judged:
    """Counts which inputs are judged, and is interrupted at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.indices: list[int] = []
        self.stop: int | None = None
        before = robustness._Judge.verdict

        def verdict(judge: robustness._Judge, index: int, *args: object) -> object:
            if index == self.stop:
                raise KeyboardInterrupt
            self.indices.append(index)
            return before(judge, index, *args)

        monkeypatch.setattr(robustness._Judge, "verdict", verdict)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Judged:
    return Judged(monkeypatch)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, judged: Judged) -> None:
    expected = verified(None)
    assert {verdict.verdict for verdict in expected.verdicts} == {"robust", "refuted"}
    path = tmp_path / "results.csv"
    judged.indices, judged.stop = [], 3
    with pytest.raises(KeyboardInterrupt):
        verified(path)
    assert len(path.read_text().splitlines()) == 4, "what was found before is on disk"
    judged.stop = None
    report = verified(path)
    assert judged.indices == [0, 1, 2, *range(3, 8)], "none was judged twice"
    assert plain(report) == plain(expected)
    for one, other in zip(report.verdicts, expected.verdicts, strict=True):
        assert (one.counterexample is None) == (other.counterexample is None)
        assert one.counterexample is None or torch.equal(one.counterexample, other.counterexample)
    assert plain(verified(path)) == plain(expected)
    assert len(judged.indices) == 8


def test_a_row_that_was_cut_off_is_asked_again(tmp_path: Path, judged: Judged) -> None:
    path = tmp_path / "results.csv"
    expected = verified(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    judged.indices = []
    assert plain(verified(path)) == plain(expected)
    assert judged.indices == [7]
    assert path.read_bytes().count(b"\n") == 9
    assert [row["index"] for row in csv.DictReader(path.open(newline=""))] == [str(i) for i in range(8)]


def test_a_process_that_was_killed(tmp_path: Path) -> None:
    """Not even a handler runs: all whole rows count."""
    path = tmp_path / "results.csv"
    script = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_verdicts, torch
torch.set_num_threads(1)  # as tests have it: the network is trained in both processes, to the same bits
from hf_lambda_gelu.downstream.verification import robustness
before = robustness._Judge.verdict
robustness._Judge.verdict = lambda judge, index, *args: os._exit(9) if index == 5 else before(judge, index, *args)
test_verdicts.verified(Path(sys.argv[2]))
"""
    run = in_fork(script, str(Path(__file__).parent), str(path))
    assert run.returncode == 9, run.stderr
    assert len(path.read_text().splitlines()) == 6
    assert plain(verified(path)) == plain(verified(None))


@pytest.mark.parametrize("change", [{"epsilon": 0.04}, {"rows": slice(1501, 1509)}, {"rows": slice(1500, 1504)}])
def test_rows_of_another_question(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "results.csv"
    verified(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"has a row of input . that is not of this model, input, label, ε and range: give"):
        verified(path, **change)  # type: ignore[arg-type]
    assert path.read_bytes() == before


def test_more_inputs_of_the_same_kind(tmp_path: Path, judged: Judged) -> None:
    path = tmp_path / "results.csv"
    verified(path, slice(1500, 1504))
    verified(path)
    assert judged.indices == list(range(8))


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "notes"])
def test_another_file_is_not_touched(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is no results file of verify_robustness: its first line is '(a,b|notes)'"):
        verified(path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("\r\n0,", "\r\nzero,", "invalid literal"),
        (",robust,", ",sturdy,", "'sturdy' is none of robust"),
        (",robust,", ",", ""),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, old: str, new: str, why: str) -> None:
    path = tmp_path / "results.csv"
    verified(path)
    text = path.read_bytes().decode()
    path.write_bytes(text.replace(old, new, 1).encode())
    with pytest.raises(ValueError, match=rf"row \d is no verdict of verify_robustness \(.*{why}.*\): remove it"):
        verified(path)


def test_report() -> None:
    report = verified(None)
    assert sum(report.counts.values()) == 8
    shown = str(report).splitlines()
    assert shown[0] == "8 inputs, each value within ± 0.05, values in [0, 1]; exact solver: highs"
    assert shown[1].split()[:2] == ["verdict", "inputs"]
    assert [line.split()[:2] for line in shown[2:]] == [[n, str(c)] for n, c in report.counts.items() if c]
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["counts"] == report.counts
    assert [verdict["verdict"] for verdict in plain["verdicts"]] == [verdict.verdict for verdict in report.verdicts]
    assert "counterexample" not in plain["verdicts"][0]


@pytest.mark.parametrize("verb", ["verify_robustness", "certified_distance", "feed_forward"])
def test_a_stop_leaves_gradients_as_they_were(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes where torch.no_grad ends, before it has put them back."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    rows = torch.zeros(2, 4)
    arguments = {"verify_robustness": (rows, [0, 1], 0.1), "certified_distance": (rows, 0.1), "feed_forward": ("1", rows)}

    ends, stopped = torch.no_grad.__exit__, True
    for number in itertools.count(1):
        calls = itertools.count(1)

        def end(block: torch.no_grad, *error: Any, calls: Iterator[int] = calls, number: int = number) -> None:
            if next(calls) == number:
                raise KeyboardInterrupt
            ends(block, *error)

        with monkeypatch.context() as patch:
            patch.setattr(torch.no_grad, "__exit__", end)
            try:
                getattr(hlg, verb)(network, *arguments[verb])
                stopped = False
            except KeyboardInterrupt:
                pass
            enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        assert enabled, number
        if not stopped:
            break
    assert number > 1
