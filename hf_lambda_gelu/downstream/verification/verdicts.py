"""What `verify_robustness` found, by input: the report, and the CSV file from which a run is resumed."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...reports import finite_or_none, table, to_dict
from .solvers import SOLVERS

VERDICTS = ("robust", "refuted", "timeout", "unknown")
_BEFORE_SOLVERS = ("the input itself", "intervals", "linear bounds", "search")
_COLUMNS = (
    "index",
    "label",
    "verdict",
    "decided_by",
    "reason",
    "margin",
    "other",
    "agrees_in_own_dtype",
    "seconds",
    "counterexample",
    "query",
)


@dataclass(frozen=True)
class RobustnessVerdict:
    """One input; see `RobustnessReport`."""

    index: int
    label: int
    verdict: str
    decided_by: str
    reason: str
    margin: float
    other: int | None
    agrees_in_own_dtype: bool | None
    seconds: float
    counterexample: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class RobustnessReport:
    """What `verify_robustness` found. Printing it gives the table; `to_dict` what a JSON file can hold.

    Attributes:
        epsilon: the radius of the ball, in units of the inputs.
        clip: the range that inputs stay in; None if any number will do.
        solver: "marabou" or "highs", what was asked where bounds and search did not decide.
        verdicts: by input, in order. Each has `index` and `label`; `verdict`, "robust", "refuted", "timeout" or "unknown";
            `decided_by`, "intervals" or "linear bounds", which prove in real arithmetic, "search", the solver's name, which
            computes in floating point, or "the input itself" where the model is wrong without any change; `reason`, of what
            is neither robust nor refuted; `margin`, a proven lower bound on the label's logit minus the largest other one in
            the ball, −inf where none was computed; `other`, the class that the counterexample gets; `agrees_in_own_dtype`,
            whether the model in the dtype that it has also puts that class above the label's; `seconds`; and
            `counterexample`, float64, of the shape of an input.

    Examples:
        >>> report = hlg.verify_robustness(model, images, labels, 0.02, clip=(0.0, 1.0))  # import hf_lambda_gelu as hlg
        >>> report.counts["robust"], [verdict.reason for verdict in report.verdicts if verdict.reason]
    """

    epsilon: float
    clip: tuple[float, float] | None
    solver: str
    verdicts: list[RobustnessVerdict]

    @property
    def counts(self) -> dict[str, int]:
        """How many inputs got each of the four verdicts."""
        found = Counter(verdict.verdict for verdict in self.verdicts)
        return {name: found[name] for name in VERDICTS}

    def to_dict(self) -> dict[str, Any]:
        """The attributes, without counterexamples, and `counts`."""
        plain = to_dict(self)
        verdicts = [{name: finite_or_none(value) for name, value in row.items()} for row in plain["verdicts"]]
        return {**plain, "verdicts": verdicts, "counts": self.counts}

    def __str__(self) -> str:
        within = "" if self.clip is None else f", values in [{self.clip[0]:g}, {self.clip[1]:g}]"
        ways = [way for way in (*_BEFORE_SOLVERS, *SOLVERS) if any(way == v.decided_by for v in self.verdicts)]
        rows = []
        for name in VERDICTS:
            own = [verdict for verdict in self.verdicts if verdict.verdict == name]
            if own:
                counts = Counter(verdict.decided_by for verdict in own)
                cells = [str(counts[way]) if counts[way] else "" for way in ways]
                rows.append([name, str(len(own)), *cells, f"{sum(v.seconds for v in own):.1f}"])
        header = ["verdict", "inputs", *(f"by {way}" for way in ways), "seconds"]
        lines = [f"{len(self.verdicts)} inputs, each value within ± {self.epsilon:g}{within}; exact solver: {self.solver}"]
        lines += table(header, [f">{len(title)}" for title in header[1:]], rows)
        reasons = [f"  input {v.index}: {v.verdict}: {v.reason}" for v in self.verdicts if v.reason]
        more = [f"  … and {len(reasons) - 5} more"] if len(reasons) > 5 else []
        return "\n".join(lines + reasons[:5] + more)


@contextmanager
def _any_length() -> Iterator[None]:
    """Within the block, csv takes fields of any length: a counterexample has as many numbers as an input."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


class OtherQuery(ValueError):
    """A row answers another question than the one asked."""


class ResultsFile:
    """Verdicts as rows of a CSV file, each on disk as soon as it is known.

    Args:
        path: the file; None keeps nothing.
        queries: a fingerprint of each input's question, so that rows of another one are not taken for its answer.
        shape: of one input.

    Raises:
        ValueError: the file is none of these, or of another model, other inputs, labels, ε or range.
    """

    def __init__(self, path: str | Path | None, queries: list[str], shape: torch.Size) -> None:
        self.path = None if path is None else Path(path)
        self.queries, self.shape = queries, shape
        self.known: dict[int, RobustnessVerdict] = {}
        if self.path is not None:
            self._read(self.path)

    def add(self, verdict: RobustnessVerdict) -> None:
        self.known[verdict.index] = verdict
        if self.path is None:
            return
        row = {name: getattr(verdict, name) for name in _COLUMNS if name not in ("counterexample", "query")}
        row = {name: "" if value is None else value for name, value in row.items()}
        found = verdict.counterexample
        row["counterexample"] = "" if found is None else json.dumps(found.flatten().tolist())
        row["query"] = self.queries[verdict.index]
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, _COLUMNS).writerow(row)

    def _read(self, path: Path) -> None:
        """Takes in the rows that are there; a last one that was cut off in writing is taken out of the file."""
        text = path.read_bytes().decode() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        with _any_length():
            rows = list(csv.reader(whole.splitlines(keepends=True)))
        if text and (not rows or tuple(rows[0]) != _COLUMNS):
            raise ValueError(
                f"{path} is no results file of verify_robustness: its first line is {text.partition(chr(10))[0]!r}"
            )
        for number, row in enumerate(rows[1:], 2):
            try:
                self._take(path, dict(zip(_COLUMNS, row, strict=True)))
            except OtherQuery:
                raise
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{path}: row {number} is no verdict of verify_robustness ({error}): remove it") from error
        if not text:
            whole = ",".join(_COLUMNS) + "\r\n"
        if whole != text:
            path.write_bytes(whole.encode())

    def _take(self, path: Path, row: dict[str, str]) -> None:
        index = int(row["index"])
        if not 0 <= index < len(self.queries) or row["query"] != self.queries[index]:
            raise OtherQuery(
                f"{path} has a row of input {index} that is not of this model, input, label, ε and range: give another "
                "path, or remove the file to begin anew"
            )
        numbers = json.loads(row["counterexample"]) if row["counterexample"] else None
        example = None if numbers is None else torch.tensor(numbers, dtype=torch.float64, device="cpu")
        if row["verdict"] not in VERDICTS:
            raise ValueError(f"{row['verdict']!r} is none of {', '.join(VERDICTS)}")
        self.known[index] = RobustnessVerdict(
            index=index,
            label=int(row["label"]),
            verdict=row["verdict"],
            decided_by=row["decided_by"],
            reason=row["reason"],
            margin=float(row["margin"] or -math.inf),
            other=int(row["other"]) if row["other"] else None,
            agrees_in_own_dtype={"True": True, "False": False}.get(row["agrees_in_own_dtype"]),
            seconds=float(row["seconds"]),
            counterexample=None if example is None else example.reshape(self.shape),
        )
