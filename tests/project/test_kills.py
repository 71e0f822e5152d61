"""The study of kills: its table says that every interrupted run ended as its twin, and its kills are kills."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.studies import kills
from scripts.tools.tables import read


def test_every_run_ended_as_its_twin() -> None:
    """At least 50 SIGKILLs, of each kind some, some of them within a save; and disks that were full."""
    rows = read(kills.RESULTS)
    assert {(row["kind"], row["engine"], row["moment"]) for row in rows} == {case.key for case in kills.cases()}
    assert {(row["hardness_equal"], row["weights_equal"]) for row in rows} == {("True", "True")}
    stopped = Counter((row["kind"], row["stopped_by"]) for row in rows)
    assert sum(count for (_, by), count in stopped.items() if by == "SIGKILL") >= 50
    for kind in ("random", "checkpoint", "refit", "one of two", "torchrun"):
        assert stopped[kind, "SIGKILL"] >= 2
    for kind in ("file limit", "full disk"):
        assert stopped[kind, "the run's own error"] >= 5
    assert sum("missing" in row["left"] or "cut off" in row["left"] for row in rows) >= 20


def test_the_table_counts() -> None:
    row = {"kind": "random", "stopped_by": "SIGKILL", "hardness_equal": "True", "weights_equal": "True"}
    rows = [
        {**row, "left": "checkpoint-3: whole", "resumed_from": "checkpoint-3"},
        {**row, "left": "checkpoint-3: optimizer.pt is missing", "resumed_from": "the start", "weights_equal": "False"},
        {**row, "left": "no checkpoint", "resumed_from": "the start", "stopped_by": "nothing"},
    ]
    assert kills.table(rows).splitlines()[-1] == "| random | 2 | 1 | 1 | 1 |"


@pytest.mark.parametrize("ends", [False, True])
def test_a_kill(tmp_path: Path, ends: bool) -> None:
    """Of a process that has made the file that is waited for; of one that has ended there is nothing to kill."""
    (tmp_path / "run").mkdir()

    def process(then: Callable[[], None]) -> int:
        pid = os.fork()
        if not pid:
            then()
            os._exit(0)
        return pid

    def mark_and_stay() -> None:
        (tmp_path / "run" / "mark").touch()
        time.sleep(60)

    pid = process((lambda: None) if ends else mark_and_stay)
    if ends:
        time.sleep(0.3)
    assert kills.killed(kills.Case("file", "refit", "mark", "mark"), tmp_path, [pid], 0.0) is not ends
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
