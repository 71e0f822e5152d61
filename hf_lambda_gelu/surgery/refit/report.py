"""What a refit did, site by site."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Compensate = Literal["least_squares", "bias"]


@dataclass(frozen=True)
class CompensatedSite:
    """One site: what was refit, and the relative output error ‖wanted − given‖ / ‖smooth output‖ on held-out rows.

    Attributes:
        weight: the parameter that was refit.
        method: "least_squares", "bias" or "none", whichever did best on the held-out rows.
        target: "stream", the smooth network's stream, or "local", the smooth gate on the same input.
        rows: rows (tokens, patches) that the refit saw.
        before, after: the relative error with ReLU as it is, and refit.
        effective_rank: of the features, at the ridge that was chosen.
        note: what a reader should know.
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


@dataclass
class CompensationReport:
    """What was refit. Printing it gives the table; `to_dict` what a JSON file can hold."""

    sites: list[CompensatedSite] = field(default_factory=list)
    uncompensated: dict[str, str] = field(default_factory=dict)  # site → why
    bias_attribute: str | None = None  # the config attribute that was switched on to give the maps a bias
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        width = max([len(site.name) for site in self.sites] + [4])
        lines = [
            f"{len(self.sites)} sites compensated in {self.seconds:.0f} s: error relative to the smooth output, held out"
        ]
        if self.sites:
            lines.append(f"  {'site':<{width}}  {'method':<13}  {'target':<6}  {'rows':>7}  {'before':>7}  {'after':>7}")
        for s in self.sites:
            note = f"  ({s.note})" if s.note else ""
            lines.append(
                f"  {s.name:<{width}}  {s.method:<13}  {s.target:<6}  {s.rows:>7}  {s.before:>7.3f}  {s.after:>7.3f}{note}"
            )
        if self.bias_attribute:
            lines.append(f"  config.{self.bias_attribute} is True now: the maps had no bias, and it gives them one")
        lines += [f"  {name} not compensated: {reason}" for name, reason in self.uncompensated.items()]
        return "\n".join(lines)


def _summary(methods: list[str]) -> str:
    counts = Counter(methods)
    return methods[0] if len(counts) == 1 else ", ".join(f"{name} × {count}" for name, count in counts.items())
