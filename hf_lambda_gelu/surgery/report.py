"""What `relu_ize` did, site by site."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..reports import span
from ..structure.smooth_activations import Unconverted
from .hinges.report import HingeReport
from .refit.report import CompensationReport

# of sites that stay GELU: a power of two, so that weights are scaled without rounding; 1e-5 from ReLU
FOLDED_HARDNESS = 2.0**14

# relative error of a site after a refit: SmolLM2, whose perplexity is 1.57 × SiLU's then, has 0.9 in the median; with two
# hinges, and 1.05 ×, 0.37
_MUCH = 0.5


@dataclass(frozen=True)
class SubstitutedSite:
    """One site: its λ before substitution and sup |f − ReLU| = c / λ in units of the pre-activation."""

    name: str
    base: str
    hardness: float
    sup_error: float


@dataclass
class SubstitutionReport:
    """What `relu_ize` did. Printing it gives the table; `to_dict` what a JSON file can hold.

    Attributes:
        sites: in network order, each with `name`, `base`, `hardness` before, and `sup_error`, sup |f − ReLU|.
        tolerance, forced: ε, below whose λ a gate counts as soft; whether soft gates were substituted all the same.
        attributes: config path → the λ-GELU key that it named before.
        left: smooth activations that remain, with the reason.
        folded: site that no config can make ReLU → sup |f − ReLU| that is left.
        hinges: layers that are wider now; None if there are none.
        compensation: what was refit, None without `compensate`: `sites`, with the relative error on held-out rows `before`
            and `after`, and `uncompensated`, {site: why not}.
        relative_change: ‖after − before‖ / ‖before‖ of the outputs, padding left out; None without calibration batches.
        metrics: name → (before, after): the loss of batches with labels, and what `compute_metrics` gave.
        zeros: site → fraction of zeros that its ReLU puts out, padding left out.
        unreached: sites that ran on none of the calibration batches.
    """

    sites: list[SubstitutedSite]
    tolerance: float
    forced: bool = False
    attributes: dict[str, str] = field(default_factory=dict)
    left: list[Unconverted] = field(default_factory=list)
    folded: dict[str, float] = field(default_factory=dict)
    hinges: HingeReport | None = None
    compensation: CompensationReport | None = None
    relative_change: float | None = None
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    zeros: dict[str, float] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)

    @property
    def profile(self) -> dict[str, float]:
        """{module name: λ before substitution}, in network order."""
        return {site.name: site.hardness for site in self.sites}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        width = max(len(site.name) for site in self.sites)
        lines = [
            f"{len(self.sites) - len(self.folded)} activations are ReLU now"
            + (" (forced: gates were soft)" if self.forced else "")
        ]
        lines.append(f"  {'site':<{width}}  {'λ before':>10}  sup |f − ReLU|")
        lines += [f"  {s.name:<{width}}  {s.hardness:>10.4g}  {s.sup_error:.2g}" for s in self.sites]
        if self.hinges is not None:
            lines.append(str(self.hinges))
        if self.compensation is not None:
            lines.append(str(self.compensation))
            many = [site for site in self.compensation.sites if site.after > _MUCH]
            if self.hinges is None and len(many) > len(self.compensation.sites) / 2:
                lines.append(
                    f"  at {len(many)} sites an error above {_MUCH:g} is left: one ReLU cannot follow such gates. hinges=2 "
                    "puts two in the place of each, in layers twice as wide"
                )
        if self.relative_change is not None:
            lines.append(f"  outputs changed by {self.relative_change:.2e} (relative, root mean square)")
        lines += [f"  {name}: {before:.4f} → {after:.4f}" for name, (before, after) in self.metrics.items()]
        if self.zeros:
            values = list(self.zeros.values())
            mean = sum(values) / len(values)
            lines.append(f"  zeros in what the ReLUs put out: {mean:.0%}, by site {min(values):.0%} to {max(values):.0%}")
        if self.unreached:
            lines.append(
                f"  {len(self.unreached)} ran on none of the batches, so nothing was measured there   {span(self.unreached)}"
            )
        if self.folded:
            names = list(self.folded)
            lines.append(
                f"{len(names)} that the model's class hard-codes stay smooth, at λ = {FOLDED_HARDNESS:g} in the weights: "
                f"within {max(self.folded.values()):.1g} of ReLU, in units of the pre-activation   {span(names)}. Load "
                "it in float32 or bfloat16: what enters them then overflows in float16"
            )
        if self.left:
            lines += [f"{len(self.left)} smooth activations remain"] + [f"  {item}" for item in self.left]
        return "\n".join(lines)
