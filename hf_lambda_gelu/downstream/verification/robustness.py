"""`verify_robustness`: proves or refutes that a ReLU network gives all inputs in a ball the same class.

Bounds first, which decide most; then a search along gradients; what is left goes to an exact solver.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...reports import progress
from ...structure.transaction import transaction
from .balls import balls, checked_inputs
from .bounds import Box, interval_bounds, linear_bounds, lower_bounds
from .counterexamples import Replay
from .network import Array, Layer, check_as_read, in_float64, read_network
from .solvers import Query, SolverProcess, chosen_solver
from .verdicts import ResultsFile, RobustnessReport, RobustnessVerdict

# Of the logits' size: far above the 1e-9 by which solvers take a constraint for met. No proof that it suffices.
_SLACK = 1e-6


@transaction
def verify_robustness(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | Sequence[int],
    epsilon: float,
    *,
    clip: tuple[float, float] | None = None,
    solver: str = "auto",
    time_limit: float = 60.0,
    results: str | Path | None = None,
) -> RobustnessReport:
    """Proves or refutes for each input x₀ that every x with |xᵢ − x₀ᵢ| ≤ ε gets the label's logit as the strictly largest.

    In order: bounds by intervals, bounds by linear relaxation (CROWN, arXiv 1811.00866), a search along gradients, and an
    exact solver: Marabou (arXiv 2401.14461), or a big-M mixed-integer model (arXiv 1711.07356) in HiGHS. What bounds prove
    holds in real arithmetic for the weights as stored. Solvers compute in floating point: "robust" by one is no such proof,
    but its word that no margin is below 1e-6 of the logits' size. A counterexample counts if the model, run by torch in
    float64, refutes, and bounds at that point say that rounding does not decide it. The model is left as it was.

    Args:
        model: nn.Sequential of nn.Linear, nn.ReLU, nn.Flatten, nn.Identity and nn.Dropout in eval mode, nested or not.
        inputs: (n, …), a first nn.Flatten makes rows of more dimensions; the ball's ε is in their units.
        labels: (n,), the class of each.
        epsilon: ε > 0.
        clip: (low, high), the range that x stays in, such as (0, 1) of pixels.
        solver: "marabou" (wheels up to Python 3.11), "highs", or "auto": Marabou where it is installed, else HiGHS.
        time_limit: seconds > 0 for each input.
        results: a CSV file to which each verdict is written as it is found; one that is there is kept, so a run that was
            stopped goes on. Remove the rows that a longer time limit shall try again.

    Returns:
        The verdicts: "robust", "refuted" with its counterexample, "timeout", or "unknown" with the reason.

    Raises:
        ValueError: a layer that is none of these (smooth ones are told apart), or an argument that cannot be used.
        ImportError: the solver is missing (`pip install 'hf_lambda_gelu[verify]'`).

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> inputs = torch.rand(5, 4)
        >>> report = hlg.verify_robustness(model, inputs, model(inputs).argmax(1), 1e-6, clip=(0.0, 1.0))
        >>> report.counts["robust"]
        5
    """
    layers = read_network(model)
    rows, targets = _checked(layers, inputs, labels, epsilon, clip, time_limit)
    exact = in_float64(model)
    check_as_read(exact, layers, inputs.detach().to("cpu", torch.float64))
    name = chosen_solver(solver)
    queries = _fingerprints(layers, rows, targets, epsilon, clip)
    kept = ResultsFile(results, queries, inputs.shape[1:])
    with torch.inference_mode(False), SolverProcess(name) as process:
        judge = _Judge(layers, Replay(model, exact, layers, inputs.shape[1:]), process, time_limit)
        for index in progress(range(len(rows)), "verification"):
            if index not in kept.known:
                kept.add(judge.verdict(index, rows[index], targets[index], epsilon, clip))
    return RobustnessReport(float(epsilon), clip, name, [kept.known[index] for index in range(len(rows))])


class _Judge:
    """Decides one input after another."""

    def __init__(self, layers: list[Layer], replay: Replay, process: SolverProcess, time_limit: float) -> None:
        self.layers, self.replay, self.process, self.time_limit = layers, replay, process, time_limit

    def verdict(
        self, index: int, x: Array, label: int, epsilon: float, clip: tuple[float, float] | None
    ) -> RobustnessVerdict:
        start = time.monotonic()
        outer, inner = balls(x, epsilon, clip)
        verdict = self._decided(
            RobustnessVerdict(index, label, "unknown", "", "", -math.inf, None, None, 0.0), x, outer, inner
        )
        return replace(verdict, seconds=round(time.monotonic() - start, 4))

    def _decided(self, open_: RobustnessVerdict, x: Array, outer: Box, inner: Box) -> RobustnessVerdict:
        deadline = time.monotonic() + self.time_limit
        if self.replay.other_class(x, open_.label) is not None:
            return self._refuted(open_, x, "the input itself")
        others = [other for other in range(len(self.layers[-1].bias)) if other != open_.label]
        margins = np.zeros((len(others), len(self.layers[-1].bias)))
        margins[:, open_.label], margins[np.arange(len(others)), others] = 1.0, -1.0
        last = Layer(margins, np.zeros(len(others)), relu=False)
        by_interval = interval_bounds([*self.layers, last], outer)
        lowest = by_interval.pop().lower
        if lowest.min() > 0.0:
            return replace(open_, verdict="robust", decided_by="intervals", margin=float(lowest.min()))
        pre = linear_bounds(self.layers, outer, by_interval)
        lowest = np.maximum(lowest, lower_bounds(self.layers, pre, outer, margins, last.bias))
        open_ = replace(open_, margin=float(lowest.min()))
        if lowest.min() > 0.0:
            return replace(open_, verdict="robust", decided_by="linear bounds")
        found = self.replay.searched(inner, open_.label)
        if found is not None:
            return self._refuted(open_, found, "search")
        if not all(np.isfinite(bounds.magnitude).all() for bounds in pre):
            return replace(open_, reason="float64 overflows in the bounds: an exact solver needs them finite")
        left = [row for row in np.argsort(lowest).tolist() if not lowest[row] > 0.0]
        return self._solved(open_, [query(self.layers, pre, outer, margins[row]) for row in left], inner, deadline)

    def _solved(self, open_: RobustnessVerdict, queries: list[Query], inner: Box, deadline: float) -> RobustnessVerdict:
        """Asks the solver about one other class after another, until one refutes."""
        reasons: list[str] = []
        name = self.process.name
        for asked in queries:
            kind, answer = self.process.ask(asked, deadline - time.monotonic())
            if kind == "timeout":
                reason = f"{name} had no answer within {self.time_limit:g} s"
                return replace(open_, verdict="timeout", reason="; ".join(dict.fromkeys([reason, *reasons])))
            if kind == "failed":
                reasons.append(" ".join(str(answer).split()))
            elif kind == "found":
                x = np.clip(answer, inner.lower, inner.upper)
                if self.replay.other_class(x, open_.label) is not None:
                    return self._refuted(open_, x, name)
                reasons.append(f"{name} found a point that torch does not confirm: the margin is zero within tolerances")
        if reasons:
            return replace(open_, reason="; ".join(dict.fromkeys(reasons)))
        return replace(open_, verdict="robust", decided_by=name)

    def _refuted(self, open_: RobustnessVerdict, x: Array, how: str) -> RobustnessVerdict:
        other = self.replay.other_class(x, open_.label)
        assert other is not None
        agrees = self.replay.agrees(x, open_.label, other)
        example = torch.from_numpy(x.copy()).reshape(self.replay.shape)
        return replace(
            open_, verdict="refuted", decided_by=how, other=other, agrees_in_own_dtype=agrees, counterexample=example
        )


def query(layers: list[Layer], pre: list[Box], box: Box, margin: Array) -> Query:
    """Can margin · logits be zero or less in the box?"""
    return {
        "layers": [(layer.weight, layer.bias, layer.relu) for layer in layers],
        "box": (box.lower, box.upper),
        "pre": [(bounds.lower, bounds.upper) for bounds in pre],
        "objective": (margin, 0.0),
        "slack": _SLACK * max(1.0, float(pre[-1].magnitude.max())),
    }


def _checked(
    layers: list[Layer],
    inputs: Tensor,
    labels: Tensor | Sequence[int],
    epsilon: float,
    clip: tuple[float, float] | None,
    time_limit: float,
) -> tuple[Array, list[int]]:
    """The inputs as rows in float64, and their labels."""
    classes = len(layers[-1].bias)
    if classes < 2:
        raise ValueError("the network has one output: expected the logits of two classes or more")
    if not time_limit > 0.0:
        raise ValueError(f"time_limit must be a number of seconds > 0 for each input, got {time_limit}")
    rows = checked_inputs(inputs, epsilon, clip)
    targets = torch.as_tensor(labels, device="cpu")
    if targets.shape != (len(rows),) or targets.is_floating_point() or targets.dtype == torch.bool:
        got = f"shape {tuple(targets.shape)} of {targets.dtype}"
        raise ValueError(f"labels must be {len(rows)} whole numbers, one for each input, got {got}")
    least, most = int(targets.min()), int(targets.max())
    if least < 0 or most >= classes:
        raise ValueError(f"labels must be from 0 to {classes - 1}, the network's outputs, got {least} to {most}")
    return rows, [int(target) for target in targets]


def _fingerprints(
    layers: list[Layer], rows: Array, targets: list[int], epsilon: float, clip: tuple[float, float] | None
) -> list[str]:
    """By input, 16 characters that change with the network, the input, its label, ε and the range."""
    network = hashlib.sha256(repr((float(epsilon), clip)).encode())
    for layer in layers:
        network.update(layer.weight.tobytes() + layer.bias.tobytes() + bytes([layer.relu]))
    found = []
    for row, target in zip(rows, targets, strict=True):
        own = network.copy()
        own.update(row.tobytes() + bytes(str(target), "ascii"))
        found.append(own.hexdigest()[:16])
    return found
