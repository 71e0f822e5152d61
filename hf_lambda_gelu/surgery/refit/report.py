"""What a refit did, site by site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .evidence import Evidence
from .held_out import Verdict, summary

Compensate = Literal["least_squares", "bias"]

# above this ratio of parameters in effect to rows, a fit is expected to err by as much more on new data
_RANK_WARNING = 0.25
FEW_ROWS = "few rows"


@dataclass(frozen=True)
class CompensatedSite:
    """One site: what was refit, and the relative output error ‖wanted − given‖ / ‖smooth output‖ on held-out rows.

    Attributes:
        weight: the parameter that was refit.
        method: "least_squares", "bias" or "none", whichever did best on the held-out rows.
        target: "stream", the smooth network's residual stream, or "local", the smooth gate on the same input.
        rows: rows (tokens, patches) that the refit saw.
        before, after: the relative error with ReLU as it is, and refit.
        effective_rank: of the features, at the ridge that was chosen.
        note: what a reader should know.
        padding: rows of padding, which the refit did not see.
    """

    name: str
    weight: str
    method: str
    target: str
    rows: int
    before: float
    after: float
    effective_rank: float | None = None
    note: str = ""
    padding: int = 0


@dataclass
class CompensationReport:
    """What was refit. Printing it gives the table; `to_dict` what a JSON file can hold."""

    sites: list[CompensatedSite] = field(default_factory=list)
    uncompensated: dict[str, str] = field(default_factory=dict)  # site → why
    bias_attribute: str | None = None  # the config attributes that were switched on to give the maps a bias
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        width = max([len(site.name) for site in self.sites] + [4])
        lines = [
            f"{len(self.sites)} sites compensated in {self.seconds:.0f} s: error relative to the smooth output, held out"
        ]
        if self.sites:
            numbers = "".join(f"  {title:>7}" for title in ("rows", "padding", "before", "after"))
            lines.append(f"  {'site':<{width}}  {'method':<13}  {'target':<6}{numbers}")
        for s in self.sites:
            note = f"  ({s.note})" if s.note else ""
            numbers = f"  {s.rows:>7}  {s.padding:>7}  {s.before:>7.3f}  {s.after:>7.3f}"
            lines.append(f"  {s.name:<{width}}  {s.method:<13}  {s.target:<6}{numbers}{note}")
        if self.bias_attribute:
            switched = ", ".join(f"config.{path}" for path in self.bias_attribute.split(", "))
            lines.append(f"  {switched} is True now: the maps had no bias, and it gives them one")
        lines += [f"  {name} not compensated: {reason}" for name, reason in self.uncompensated.items()]
        return "\n".join(lines)


def describe(
    site: str, weight: str, target: str, verdicts: Sequence[Verdict], evidence: Evidence, biased: bool
) -> CompensatedSite:
    """What a reader is told of one site, from the evidence and the verdicts on the maps after it.

    Args:
        biased: whether all maps have a bias.
    """
    rank: float | None = None
    notes: list[str] = []
    before = after = 0.0
    for verdict in verdicts:
        before, after = before + verdict.before, after + verdict.after
        if verdict.rank is not None:
            rank = max(rank or 0.0, verdict.rank)
            if rank > _RANK_WARNING * verdict.rows:
                notes.append(f"{FEW_ROWS}: {verdict.rows} for an effective rank of {rank:.0f}")
    rows = sum(v.rows for v in verdicts) // evidence.maps[0].groups  # all groups of a convolution get the same positions
    starved = sum(v.starved for v in verdicts)
    if not rows or starved == len(verdicts):
        notes.append("no rows to fit and to judge by: at least two examples that are not padding are needed")
    elif starved:
        notes.append(f"{starved} of {len(verdicts)} experts got too few tokens")
    if not evidence.seen.told:
        notes.append("the mask fits none of its rows: padding counted too")
    if pruned := max((v.pruned for v in verdicts), default=0.0):
        notes.append(f"pruned: {100 * pruned:.0f} % of the weight kept at 0")
    if any(v.indefinite for v in verdicts):
        notes.append("a larger ridge: rounding made the Gram matrix indefinite")
    if not biased:
        notes.append("weights only: the map has no bias")
    norm = max(evidence.norm, 1e-30)
    before, after = (before / norm) ** 0.5, (after / norm) ** 0.5
    note = "; ".join(dict.fromkeys(notes))
    method, padding = summary(v.method for v in verdicts), evidence.seen.padding
    return CompensatedSite(site, weight, method, target, rows, before, after, rank, note, padding)
