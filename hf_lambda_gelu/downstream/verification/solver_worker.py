"""Runs a solver in a process of its own: `python solver_worker.py path/of/solver.py`, a query in, an answer out, in pickles.

Run by its path, so that it starts without torch. What solvers print goes nowhere: stdout is the pipe of the answers.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from pathlib import Path


def main(solver: str) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    spec = importlib.util.spec_from_file_location(Path(solver).stem, solver)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    queries = sys.stdin.buffer
    pickle.dump("ready", answers)
    answers.flush()
    while True:
        try:
            query, seconds = pickle.load(queries)
        except EOFError:  # the package has closed the pipe
            return
        try:
            answer = module.solve(query, seconds)
        except Exception as error:  # solvers raise what they like; the next query may be one that they can do
            answer = ("failed", f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
