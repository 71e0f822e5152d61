"""A ReLU network as a query for Marabou (Wu et al. 2024, arXiv 2401.14461).

This file is also run by its path, without the package: see `solver_worker`. It imports no other of the package.
"""

from __future__ import annotations

import math
import time
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .network import Array
    from .solvers import Answer, Query


def solve(query: Query, seconds: float) -> Answer:
    """Looks for a point where the objective is at most the query's slack.

    Marabou says whether there is one, and not where the lowest is: what it finds may lie between zero and the slack, and
    then it is asked a second time, for one that is clearly below zero.

    Returns:
        As `milp.solve`.
    """
    start = time.monotonic()
    answer = _asked(query, query["slack"], seconds)
    if answer[0] == "found" and _objective(query, answer[1]) >= 0.0:
        again = _asked(query, -query["slack"], seconds - (time.monotonic() - start))
        return answer if again[0] == "none" else again
    return answer


def _asked(query: Query, limit: float, seconds: float) -> Answer:
    from maraboupy import MarabouCore

    if seconds <= 0.0:
        return "timeout", None
    asked, features = _marabou_query(MarabouCore, query, limit)
    options = MarabouCore.Options()
    options._verbosity = 0
    options._timeoutInSeconds = math.ceil(seconds)  # whole seconds; `solvers` ends it to the moment
    options._numWorkers = options._numBlasThreads = 1
    exit_code, found, _ = MarabouCore.solve(asked, options, "")
    if exit_code == "unsat":
        return "none", None
    if exit_code == "sat":
        return "found", np.array([found[feature] for feature in features])
    if exit_code == "TIMEOUT":
        return "timeout", None
    return "failed", f"Marabou ended with {exit_code!r}"


def _marabou_query(core: Any, query: Query, limit: float) -> tuple[Any, list[int]]:
    """The query for objective ≤ limit, and its variables for the features."""
    asked, numbers = core.InputQuery(), count()
    bounded: list[tuple[int, float, float]] = []

    def variables(lower: Array, upper: Array) -> list[int]:
        new = [next(numbers) for _ in lower]
        bounded.extend(zip(new, lower.tolist(), upper.tolist(), strict=True))
        return new

    def equation(row: Array, inputs: list[int], scalar: float, output: int | None = None) -> None:
        made = core.Equation(core.Equation.EquationType.EQ if output is not None else core.Equation.EquationType.LE)
        for value, variable in zip(row.tolist(), inputs, strict=True):
            if value:
                made.addAddend(value, variable)
        if output is not None:
            made.addAddend(-1.0, output)
        made.setScalar(scalar)
        asked.addEquation(made)

    h = features = variables(*query["box"])
    for (weight, bias, relu), (lower, upper) in zip(query["layers"], query["pre"], strict=True):
        z = variables(lower, upper)
        for row, constant, output in zip(weight, bias.tolist(), z, strict=True):
            equation(row, h, -constant, output)
        h = variables(np.maximum(lower, 0.0), np.maximum(upper, 0.0)) if relu else z
        for before, after in zip(z, h, strict=True) if relu else ():
            core.addReluConstraint(asked, before, after)
    row, constant = query["objective"]
    equation(row, h, limit - constant)
    asked.setNumberOfVariables(next(numbers))
    for variable, low, high in bounded:
        asked.setLowerBound(variable, low)
        asked.setUpperBound(variable, high)
    for index, variable in enumerate(features):
        asked.markInputVariable(variable, index)
    return asked, features


def _objective(query: Query, x: Any) -> float:
    """What the objective is at x, in float64."""
    for weight, bias, relu in query["layers"]:
        x = weight @ x + bias
        x = np.maximum(x, 0.0) if relu else x
    row, constant = query["objective"]
    return float(row @ x) + constant
