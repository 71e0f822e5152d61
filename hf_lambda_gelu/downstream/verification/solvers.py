"""The exact solvers, each in a process of its own: a time limit ends it at once, and a crash takes nothing with it."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

from .network import Array

Answer = tuple[str, Any]  # ("none", None), ("found", x), ("timeout", None) or ("failed", why)

_HERE = Path(__file__).parent
# name → the package that it needs, the file that asks it
SOLVERS = {"marabou": ("maraboupy", _HERE / "marabou.py"), "highs": ("highspy", _HERE / "milp.py")}
_GRACE = 1.0  # seconds that a solver may take to end by itself
_START = 120.0  # seconds that a process may take to start


class Query(TypedDict):
    """Is there an x in the box with objective ≤ slack? All arrays are float64.

    Keys:
        layers: (W, b, whether ReLU follows), as in `network.Layer`.
        box: lower and upper bounds of x.
        pre: lower and upper bounds of each layer's W h + b.
        objective: r and c; the objective is r · (what the last layer puts out) + c.
        slack: > 0; what is within ± slack of zero is left to the tolerance of the solvers.
    """

    layers: list[tuple[Array, Array, bool]]
    box: tuple[Array, Array]
    pre: list[tuple[Array, Array]]
    objective: tuple[Array, float]
    slack: float


def chosen_solver(name: str) -> str:
    """The solver called `name`; of "auto", Marabou where it is installed, else HiGHS.

    Raises:
        ValueError: no such solver.
        ImportError: its package is missing.
    """
    if name == "auto":
        name = next((known for known, (package, _) in SOLVERS.items() if find_spec(package) is not None), "highs")
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}: expected 'auto', {', '.join(map(repr, SOLVERS))}")
    package = SOLVERS[name][0]
    if find_spec(package) is None:
        wheels = " (wheels for Python 3.11 and older; solver='highs' runs on every one)" if name == "marabou" else ""
        raise ImportError(f"solver={name!r} needs {package}{wheels}: pip install 'hf_lambda_gelu[verify]'")
    return name


class SolverProcess:
    """One process of a solver, started at the first query, and again after one that had to be ended.

    Examples:
        >>> with SolverProcess("highs") as solver:
        ...     kind, x = solver.ask(query, seconds=10.0)
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[Any] = queue.Queue()

    def __enter__(self) -> SolverProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def ask(self, query: Query, seconds: float) -> Answer:
        """The solver's answer; ("timeout", None) if there is none in time, ("failed", why) if it crashes."""
        if seconds <= 0.0:
            return "timeout", None
        try:
            process = self._process or self._start()
            if process is None:
                return "failed", f"{self.name} did not start within {_START:g} s"
            assert process.stdin is not None
            pickle.dump((query, seconds), process.stdin)
            process.stdin.flush()
            answer: Answer = self._answers.get(timeout=seconds + _GRACE)
        except queue.Empty:
            self._end()
            return "timeout", None
        except (EOFError, BrokenPipeError):
            return "failed", self._crash()
        except BaseException:  # a solver that is still at the last query would answer it at the next
            self._end()
            raise
        if isinstance(answer, EOFError):
            return "failed", self._crash()
        return answer

    def _start(self) -> subprocess.Popen[bytes] | None:
        """The process once it is ready; None if it is not in time."""
        self._answers = queue.Queue()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = process = subprocess.Popen(
            [sys.executable, str(_HERE / "solver_worker.py"), str(SOLVERS[self.name][1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        threading.Thread(target=_read, args=(process, self._answers), daemon=True).start()
        try:
            ready = self._answers.get(timeout=_START)
        except queue.Empty:
            self._end()
            return None
        if isinstance(ready, EOFError):
            raise EOFError
        return process

    def _crash(self) -> str:
        process = self._process
        assert process is not None
        try:
            code = process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return f"{self.name} gave an answer that cannot be read"
        finally:
            self._end()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"{self.name} crashed: its process ended {how}"

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what was written to a process that is gone is lost
                        pipe.close()


def _read(process: subprocess.Popen[bytes], answers: queue.Queue[Any]) -> None:
    """Puts what the process answers into the queue, and an EOFError at its end."""
    assert process.stdout is not None
    try:
        while True:
            answers.put(pickle.load(process.stdout))
    except (EOFError, OSError, ValueError, pickle.UnpicklingError):
        answers.put(EOFError())
