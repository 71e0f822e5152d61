"""A ReLU network as a mixed-integer linear model with big-M constraints, solved by HiGHS.

An unstable ReLU, h = max(0, z) with l < 0 < u for z, gets a binary d: h ≥ z, h ≥ 0, h ≤ z − l (1 − d), h ≤ u d (Tjeng et al.
2019, arXiv 1711.07356). The bounds l, u are the M. A stable one needs none.

This file is also run by its path, without the package: see `solver_worker`. It imports no other of the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .network import Array
    from .solvers import Answer, Query

    Columns = NDArray[np.int64]  # their numbers

_TOLERANCE = 1e-9  # of constraints and of integrality; HiGHS allows no less than 1e-10


def solve(query: Query, seconds: float) -> Answer:
    """Looks for the least value of the objective that is at most the query's slack.

    Returns:
        ("none", None) where no point is as low as the slack; ("found", x) with the first point that is clearly below zero,
        or else with the lowest; ("timeout", None); ("failed", what HiGHS says).
    """
    import highspy

    model = _Model()
    x = model.columns(*query["box"])
    for (weight, bias, relu), pre in zip(query["layers"], query["pre"], strict=True):
        x = _relu(model, x, weight, bias, pre) if relu else _equal(model, x, weight, bias, pre)
    row, constant = query["objective"]
    model.rows(row[None], [x], np.array([-np.inf]), np.array([query["slack"] - constant]))
    model.costs = np.zeros(len(model.lower))
    model.costs[x] = row

    solver = highspy.Highs()
    options = {
        "output_flag": False,
        "threads": 1,
        "time_limit": seconds,
        "mip_feasibility_tolerance": _TOLERANCE,
        "primal_feasibility_tolerance": _TOLERANCE,
        "objective_target": -query["slack"] - constant,  # stops at the first point below it
        "mip_rel_gap": 0.0,
        "small_matrix_value": 1e-12,  # what is smaller is taken for zero; HiGHS allows no less
    }
    for name, value in options.items():
        solver.setOptionValue(name, value)
    solver.passModel(model.for_highs(highspy))
    solver.run()
    return _answer(solver, highspy.HighsModelStatus, len(query["box"][0]))


def _answer(solver: Any, statuses: Any, features: int) -> Answer:
    status = solver.getModelStatus()
    if status == statuses.kInfeasible:
        return "none", None
    if status in (statuses.kOptimal, statuses.kObjectiveTarget):
        return "found", np.array(solver.getSolution().col_value[:features])
    if status in (statuses.kTimeLimit, statuses.kInterrupt):
        return "timeout", None
    return "failed", f"HiGHS ended with the status {solver.modelStatusToString(status)!r}"


def _equal(model: _Model, x: Columns, weight: Array, bias: Array, pre: tuple[Array, Array]) -> Columns:
    z = model.columns(*pre)
    model.rows(np.hstack([weight, -np.eye(len(z))]), [x, z], -bias, -bias)
    return z


def _relu(model: _Model, x: Columns, weight: Array, bias: Array, pre: tuple[Array, Array]) -> Columns:
    """Columns for h = max(0, W x + b)."""
    low, high = pre
    h = model.columns(np.maximum(low, 0.0), np.maximum(high, 0.0))
    active, unstable = low >= 0.0, (low < 0.0) & (high > 0.0)
    unit = np.eye(len(h))
    if active.any():
        model.rows(np.hstack([weight, -unit])[active], [x, h], -bias[active], -bias[active])
    if unstable.any():
        d = model.columns(np.zeros(unstable.sum()), np.ones(unstable.sum()), integer=True)
        infinite = np.full(len(d), np.inf)
        weight, unit, bias, low, high = weight[unstable], unit[unstable], bias[unstable], low[unstable], high[unstable]
        model.rows(np.hstack([-weight, unit]), [x, h], bias, infinite)
        model.rows(np.hstack([-weight, unit, np.diag(-low)]), [x, h, d], -infinite, bias - low)
        model.rows(np.hstack([unit, np.diag(-high)]), [h, d], -infinite, np.zeros(len(d)))
    return h


class _Model:
    """Columns and rows, as they are added."""

    def __init__(self) -> None:
        self.lower, self.upper, self.costs = np.empty(0), np.empty(0), np.empty(0)
        self.integer = np.empty(0, dtype=bool)
        self._rows: list[tuple[Any, Any, float, float]] = []

    def columns(self, lower: Array, upper: Array, integer: bool = False) -> Columns:
        """The numbers of new columns with these bounds."""
        first = len(self.lower)
        self.lower, self.upper = np.concatenate([self.lower, lower]), np.concatenate([self.upper, upper])
        self.integer = np.concatenate([self.integer, np.full(len(lower), integer)])
        return np.arange(first, len(self.lower))

    def rows(self, matrix: Array, columns: list[Columns], lower: Array, upper: Array) -> None:
        """lower ≤ matrix · columns ≤ upper."""
        numbers = np.concatenate(columns)
        for values, low, high in zip(matrix, lower, upper, strict=True):
            used = values != 0.0
            self._rows.append((numbers[used], values[used], float(low), float(high)))

    def for_highs(self, highspy: Any) -> Any:
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.lower), len(self._rows)
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = self.costs, self.lower, self.upper
        lp.row_lower_ = np.array([row[2] for row in self._rows])
        lp.row_upper_ = np.array([row[3] for row in self._rows])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.cumsum([0, *(len(row[0]) for row in self._rows)])
        lp.a_matrix_.index_ = np.concatenate([row[0] for row in self._rows])
        lp.a_matrix_.value_ = np.concatenate([row[1] for row in self._rows])
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        lp.integrality_ = [kinds[int(integer)] for integer in self.integer]
        return lp
