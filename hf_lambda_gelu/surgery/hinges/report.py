"""What hinges did to a model, site by site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...reports import span


def rounded_up(bound: float) -> float:
    """Rounded up to three digits: a bound that is shown must be one."""
    unit = 10.0 ** (math.floor(math.log10(bound)) - 2)
    return math.ceil(bound / unit - 1e-9) * unit


@dataclass(frozen=True)
class HingedSite:
    """One site whose layer is wider now.

    Attributes:
        units: its units before and now.
        neurons: number of hinges → how many neurons have so many.
        bound: sup over all x of |f − Σ|, in units of the pre-activation, where hinges lie by minimax; None where data say.
    """

    name: str
    units: tuple[int, int]
    neurons: Mapping[int, int]
    bound: float | None = None


@dataclass
class HingeReport:
    """The sites with several ReLUs in the place of each gate, `SubstitutionReport.hinges`. Printing it gives the table.

    Attributes:
        sites: in network order.
        widths: config path → (number before, number now).
        single: site → why it has one ReLU per neuron, as it has no layer of its own that could be wider.
    """

    sites: list[HingedSite] = field(default_factory=list)
    widths: dict[str, tuple[float, float]] = field(default_factory=dict)
    single: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> HingeReport:
        """That of which JSON holds `dataclasses.asdict`."""
        sites = [
            HingedSite(
                site["name"],
                (site["units"][0], site["units"][1]),
                {int(number): count for number, count in site["neurons"].items()},
                site["bound"],
            )
            for site in stored["sites"]
        ]
        widths = {path: (before, now) for path, (before, now) in stored["widths"].items()}
        return cls(sites, widths, dict(stored["single"]))

    def __str__(self) -> str:
        width = max([len(site.name) for site in self.sites] + [4])
        bounded = any(site.bound is not None for site in self.sites)
        lines = [f"{len(self.sites)} layers are wider now, several ReLUs in the place of a gate"]
        lines.append(f"  {'site':<{width}}  {'units':>14}  neurons by hinges{'  sup |f − Σ|' if bounded else ''}")
        for site in self.sites:
            neurons = ", ".join(f"{count} × {number}" for number, count in sorted(site.neurons.items()))
            bound = "" if site.bound is None else f"  {rounded_up(site.bound):.3g}"
            units = f"{site.units[0]} → {site.units[1]}"
            lines.append(f"  {site.name:<{width}}  {units:>14}  {neurons:<17}{bound}")
        lines += [f"  config.{path}: {before:g} → {now:g}" for path, (before, now) in self.widths.items()]
        if self.single:
            reason = next(iter(self.single.values()))
            lines.append(f"  {len(self.single)} with one ReLU per neuron ({reason})   {span(list(self.single))}")
        return "\n".join(lines)
