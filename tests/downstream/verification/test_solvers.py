"""Both solvers say what linear programs over all regions say; time limits, crashes and absent packages are named."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support.verified import lowest_by_regions, random_query

import hf_lambda_gelu as hlg
from hf_lambda_gelu.downstream.verification import solvers
from hf_lambda_gelu.downstream.verification.marabou import _objective
from hf_lambda_gelu.downstream.verification.solvers import Query, SolverProcess, chosen_solver
from scripts.tools.tables import read
from scripts.verification import agreement

NAMES = [
    "highs",
    pytest.param(
        "marabou",
        marks=pytest.mark.skipif(importlib.util.find_spec("maraboupy") is None, reason="maraboupy has no wheel here"),
    ),
]
QUERIES = range(20)


@cache
def asked(seed: int) -> tuple[Query, float]:
    """A question, and the lowest objective."""
    query = random_query(seed)
    return query, lowest_by_regions(query)


@pytest.mark.parametrize("name", NAMES)
def test_against_all_regions(name: str) -> None:
    """The answer is "none" exactly where the lowest of all linear pieces is above the slack; what is found is as low."""
    answers = []
    with SolverProcess(name) as solver:
        for seed in QUERIES:
            query, lowest = asked(seed)
            assert abs(lowest - query["slack"]) > 1e-5, "too close for solvers to tell"
            kind, x = solver.ask(query, seconds=30.0)
            assert kind == ("found" if lowest < query["slack"] else "none"), seed
            if kind == "found":
                assert lowest - 1e-6 <= _objective(query, x) <= query["slack"] + 1e-6
            answers.append(kind)
    assert min(answers.count("none"), answers.count("found")) >= len(QUERIES) // 4


@pytest.mark.parametrize("name", NAMES)
def test_a_point_clearly_below_is_preferred(name: str) -> None:
    """Where the objective can be below minus the slack, the point is one that torch will confirm."""
    with SolverProcess(name) as solver:
        for seed in QUERIES:
            query, lowest = asked(seed)
            if lowest < -10 * query["slack"]:
                assert _objective(query, solver.ask(query, seconds=30.0)[1]) < 0.0


# ------------------------------------------------------------------------------------- solvers that do not do as they should

Fake = Callable[[str], str]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """`fake(body)` is the name of a solver whose `solve(query, seconds)` has that body."""

    def make(body: str) -> str:
        path = tmp_path / "fake_solver.py"
        path.write_text("import os, signal, sys, time\n\ndef solve(query, seconds):\n    " + body.replace("\n", "\n    "))
        monkeypatch.setitem(solvers.SOLVERS, "highs", ("highspy", path))
        return "highs"

    return make


def test_one_that_hangs_is_ended(fake: Fake) -> None:
    with SolverProcess(fake("time.sleep(60)")) as solver:
        solver.ask(random_query(0), seconds=0.0)  # over at once: no process is started
        assert solver._process is None
        start = time.monotonic()
        assert solver.ask(random_query(0), seconds=0.2) == ("timeout", None)
        assert time.monotonic() - start < 10.0
        assert solver._process is None, "the process that hung is gone"


@pytest.mark.parametrize(
    ("death", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "by SIGKILL"),
        ("os._exit(3)", "with exit code 3"),
    ],
)
def test_a_crash_is_named_and_the_next_query_answered(fake: Fake, death: str, how: str) -> None:
    name = fake(f"if seconds > 5.0:\n    {death}\nreturn 'none', None")
    with SolverProcess(name) as solver:
        assert solver.ask(random_query(0), seconds=1.0) == ("none", None)
        assert solver.ask(random_query(0), seconds=6.0) == ("failed", f"highs crashed: its process ended {how}")
        assert solver.ask(random_query(0), seconds=1.0) == ("none", None)


def test_an_exception_is_named_and_the_process_goes_on(fake: Fake) -> None:
    name = fake("if seconds > 5.0:\n    raise MemoryError('too large')\nreturn 'found', os.getpid()")
    with SolverProcess(name) as solver:
        before = solver.ask(random_query(0), seconds=1.0)
        assert solver.ask(random_query(0), seconds=6.0) == ("failed", "MemoryError: too large")
        assert solver.ask(random_query(0), seconds=1.0) == before


def test_what_a_solver_prints_goes_nowhere(fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    with SolverProcess(fake("print('x' * 100000)\nos.write(1, b'y' * 100000)\nreturn 'none', None")) as solver:
        assert solver.ask(random_query(0), seconds=20.0) == ("none", None)
    assert capfd.readouterr() == ("", "")


def test_an_answer_that_cannot_be_read(fake: Fake) -> None:
    body = "import gc, io\nfor f in gc.get_objects():\n    if isinstance(f, io.BufferedWriter) and f.fileno() > 2:\n"
    body += "        f.write(b'no pickle'); f.flush()\ntime.sleep(60)"
    with SolverProcess(fake(body)) as solver:
        assert solver.ask(random_query(0), seconds=30.0) == ("failed", "highs gave an answer that cannot be read")


def test_one_that_does_not_start(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "_START", 0.0)
    with SolverProcess(fake("return 'none', None")) as solver:
        assert solver.ask(random_query(0), seconds=30.0) == ("failed", "highs did not start within 0 s")


def test_the_process_ends_with_the_block() -> None:
    with SolverProcess("highs") as solver:
        solver.ask(random_query(0), seconds=30.0)
        process = solver._process
        assert process is not None
        assert process.poll() is None
    assert process.poll() is not None


# ----------------------------------------------------------------------------------------------------- absent packages


def absent(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    def find(name: str) -> importlib.machinery.ModuleSpec | None:
        return None if name in packages else importlib.machinery.ModuleSpec(name, None)

    monkeypatch.setattr(solvers, "find_spec", find)


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch)
    assert chosen_solver("auto") == "marabou"
    absent(monkeypatch, "maraboupy")
    assert chosen_solver("auto") == "highs"
    absent(monkeypatch, "maraboupy", "highspy")
    with pytest.raises(ImportError, match=r"needs highspy: pip install 'hf_lambda_gelu\[verify\]'"):
        chosen_solver("auto")


def test_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "maraboupy")
    with pytest.raises(ImportError, match=r"needs maraboupy \(wheels for Python 3.11 and older; solver='highs' runs on"):
        chosen_solver("marabou")
    assert chosen_solver("highs") == "highs"
    with pytest.raises(ValueError, match="unknown solver 'gurobi': expected 'auto', 'marabou', 'highs'"):
        chosen_solver("gurobi")


def test_bounds_alone_do_not_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """That nothing is installed is said before any work, and not at the first input that needs a solver."""
    import torch

    absent(monkeypatch, "maraboupy", "highspy")
    with pytest.raises(ImportError, match="pip install"):
        hlg.verify_robustness(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.zeros(1, 2), [0], 0.1)


# ------------------------------------------------------------------------------------------------ the table of agreement


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The committed one has more than 100 questions, and both solvers say the same; a few of them are asked again."""
    pytest.importorskip("maraboupy", reason="maraboupy has no wheel here")
    committed = {(row["network"], row["number"]): row for row in read(agreement.RESULTS)}
    assert len(committed) > 100
    assert {row["marabou"] for row in committed.values()} == {"none", "found"}
    assert all(row["marabou"] == row["highs"] for row in committed.values())
    path = tmp_path / "agreement.csv"
    monkeypatch.setattr("sys.argv", ["agreement", "--random", "4", "--digits", "3", "--results", str(path)])
    assert agreement.main() == 0
    assert "0 of " in capsys.readouterr().out
    for row in read(path):
        before = committed[row["network"], row["number"]]
        assert [row[name] for name in ("features", "marabou", "highs")] == [
            before[name] for name in ("features", "marabou", "highs")
        ]
    assert len(read(path)) == 7
