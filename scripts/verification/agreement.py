"""Asks both exact solvers the same questions, and writes whether they agree, into results/agreement.csv.

python -m scripts.verification.agreement

A question is whether an objective, one logit minus another, can be zero or less in a box. The random networks have so few
units that can be on and off that the lowest objective is known: by a linear program for each way in which they can be. For
the network trained on digits the questions are those that bounds leave open.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hf_lambda_gelu.downstream.verification.bounds import Box, interval_bounds, linear_bounds, lower_bounds
from hf_lambda_gelu.downstream.verification.network import Layer, read_network, values
from hf_lambda_gelu.downstream.verification.robustness import query
from hf_lambda_gelu.downstream.verification.solvers import SOLVERS, Query, SolverProcess, chosen_solver

from ..tools.tables import append
from .queries import digits, digits_network, lowest_by_regions, random_query, unstable

RESULTS = Path(__file__).parent / "results" / "agreement.csv"
FIELDS = [
    "network",
    "number",
    "features",
    "unstable",
    "lowest",
    *(f"{s}{x}" for s in SOLVERS for x in ("", "_at", "_seconds")),
]
LIMIT = 60.0  # seconds for a question


def digits_queries(count: int, epsilon: float = 0.05) -> Iterator[Query]:
    """Questions about test images of digits that bounds leave open, one for each image."""
    images, labels = digits()
    layers = read_network(digits_network(16, 16))
    for image, label in zip(images[1500:].double().numpy(), labels[1500:].tolist(), strict=True):
        box = Box(np.maximum(image - epsilon, 0.0), np.minimum(image + epsilon, 1.0))
        margins = np.delete(np.eye(10)[label] - np.eye(10), label, axis=0)
        pre = linear_bounds(layers, box, interval_bounds(layers, box))
        lowest = lower_bounds(layers, pre, box, margins, np.zeros(9))
        if lowest.min() <= 0.0 and count > 0:
            count -= 1
            yield query(layers, pre, box, margins[int(lowest.argmin())])


def row(network: str, number: int, asked: Query, solvers: list[SolverProcess]) -> dict[str, Any]:
    """What each solver answers, and the objective at the point that it found."""
    layers = [Layer(*layer) for layer in asked["layers"]]
    free = sum(int(unstable(la, Box(*pre)).sum()) for la, pre in zip(layers, asked["pre"], strict=True))
    found: dict[str, Any] = {"network": network, "number": number, "features": len(asked["box"][0]), "unstable": free}
    if network == "random":
        found["lowest"] = f"{lowest_by_regions(asked):.9f}"
    for solver in solvers:
        start = time.perf_counter()
        kind, x = solver.ask(asked, LIMIT)
        found[f"{solver.name}_seconds"] = f"{time.perf_counter() - start:.2f}"
        found[solver.name] = kind
        if kind == "found":
            point = np.clip(x, *asked["box"])[None]
            found[f"{solver.name}_at"] = f"{(values(layers, point) @ asked['objective'][0]).item():.3e}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=120, help="questions about random networks (default: 120)")
    parser.add_argument("--digits", type=int, default=60, help="questions about digits (default: 60)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table, which is made anew")
    options = parser.parse_args()
    questions = [("random", i, random_query(i)) for i in range(options.random)]
    questions += [("digits", i, asked) for i, asked in enumerate(digits_queries(options.digits))]
    rows = []
    with SolverProcess(chosen_solver("marabou")) as marabou, SolverProcess(chosen_solver("highs")) as highs:
        for network, number, asked in questions:
            rows.append(row(network, number, asked, [marabou, highs]))
    options.results.unlink(missing_ok=True)
    append(options.results, FIELDS, rows)
    wrong = [r for r in rows if r["marabou"] != r["highs"] or r["marabou"] not in ("none", "found")]
    wrong += [r for r in rows if "lowest" in r and (float(r["lowest"]) <= 0.0) != (r["highs"] == "found")]
    points = [float(r[f"{name}_at"]) for r in rows for name in SOLVERS if f"{name}_at" in r]
    counts = {kind: sum(r["highs"] == kind for r in rows) for kind in ("found", "none")}
    print(
        f"{len(rows)} questions: {counts['found']} points found, {counts['none']} none; the solvers differ in {len(wrong)}"
    )
    print(f"{sum(point >= 0.0 for point in points)} of {len(points)} points are not confirmed in float64")
    return int(bool(wrong) or any(point >= 0.0 for point in points))


if __name__ == "__main__":
    sys.exit(main())
