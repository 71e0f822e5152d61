"""`activation_sparsity`: how much of what a ReLU network computes is exactly 0, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..measurement.batches import CalibrationError, model_batches
from ..measurement.forward import measuring, random_state_kept, run_batch
from ..measurement.places import Places
from ..measurement.site_rows import Count, SiteRows
from ..reports import finite_or_none, progress, table, to_dict
from ..structure.linear_calls import LinearCall
from ..structure.linear_maps import watch_linears
from ..structure.smooth_activations import Unconverted, smooth_activations
from ..structure.transaction import transaction
from .relu_sites import relu_sites


@dataclass(frozen=True)
class SiteSparsity:
    """What one ReLU put out over the batches, padding left out.

    Attributes:
        name: of the ReLU module.
        zeros: the share of exact zeros in its output; NaN if no batch reached it.
        units: the width of its output; None if calls of it had different ones.
        dead: the units that never fire: they are 0 at every token of every batch.
        tokens, padding: rows (tokens, patches, pixels) that counted, and rows of padding that did not. `padding` is None
            where padding could not be told from tokens.
    """

    name: str
    zeros: float
    units: int | None
    dead: tuple[int, ...]
    tokens: int
    padding: int | None


@dataclass(frozen=True)
class ActivationSparsityReport:
    """What `activation_sparsity` measured. Printing it gives the table; `to_dict` what a JSON file can hold.

    Attributes:
        sites: in network order.
        left: activations that are smooth, and put out no zeros.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> batches = [torch.tensor([[-1.0, 0.0, 2.0]]), torch.tensor([[-1.0, 1.0, -2.0]])]
        >>> report = hlg.activation_sparsity(torch.nn.Sequential(torch.nn.ReLU()), batches)
        >>> [site.dead for site in report.sites]
        [(0,)]
    """

    sites: tuple[SiteSparsity, ...]
    left: tuple[Unconverted, ...] = ()

    @property
    def zeros(self) -> float:
        """The mean over the sites that ran; NaN if none did."""
        shares = [site.zeros for site in self.sites if site.tokens]
        return sum(shares) / len(shares) if shares else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The attributes and the mean; None for what is not a finite number."""
        record = to_dict(self)
        for site in record["sites"]:
            site["zeros"] = finite_or_none(site["zeros"])
        return record | {"zeros": finite_or_none(self.zeros)}

    def __str__(self) -> str:
        rows = []
        for s in self.sites:
            if not s.tokens:
                rows.append([s.name, "no batch reached it"])
                continue
            units, dead = ("?", "?") if s.units is None else (str(s.units), str(len(s.dead)))
            rows.append([s.name, str(s.tokens), "?" if s.padding is None else str(s.padding), f"{s.zeros:.1%}", units, dead])
        lines = [f"{len(self.sites)} ReLUs: {self.zeros:.1%} of what they put out is exactly 0 (mean over the sites)"]
        lines += table(["site", "tokens", "padding", "zeros", "units", "never fire"], [">8", ">8", ">7", ">7", ">10"], rows)
        if self.left:
            lines += [f"{len(self.left)} smooth activations put out none", *(f"  {item}" for item in self.left)]
        return "\n".join(lines)


@transaction
@torch.no_grad()
def activation_sparsity(model: nn.Module, batches: Iterable[Any]) -> ActivationSparsityReport:
    """Counts the exact zeros that each ReLU of `model` puts out, in one pass over `batches`. [derived]

    The share of zeros of a site is #{(t, j): ReLU(x_tj) = 0} / (T · d), over T tokens and d units. The model is run in eval
    mode without gradients and left as it was. Padding does not count where the attention mask fits what the site works on.

    Args:
        model: a ReLU network: after `relu_ize`, or loaded from what was saved then. In any dtype, on any device.
        batches: mappings of what the model's forward takes, like those that it will meet; or tensors where it is
            no transformers model.

    Returns:
        Per site the share of zeros, the units that never fire, tokens and padding; the activations that are smooth.

    Raises:
        ValueError: the model is smooth (convert and `relu_ize` it first), has no ReLU that is a module, or is offloaded.
        CalibrationError: a loader that yields nothing usable, a forward that raises, or numbers that are not finite.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> hlg.activation_sparsity(model, [torch.tensor([[-1.0, 0.0, 2.0, -3.0]])]).zeros
        0.75
    """
    sites = relu_sites(model)
    counters = {name: _Zeros() for name in sites}
    channels: dict[torch.Size, int] = {}  # shape of a linear map's output → which dimension its channels are
    index = 0

    def on_linear(linear: LinearCall) -> None:
        channels[linear.restored(linear.output).shape] = -1 if linear.order is None else linear.order[-1]

    def take(name: str, x: Tensor, _: Places) -> None:
        if bool(torch.isnan(x).any()):
            raise CalibrationError(
                f"calibration batch {index}: what enters {name} is NaN. Look for an overflow of half precision, or for "
                "weights or inputs that are NaN"
            )
        counters[name].add(x)

    rows = SiteRows(model, sites, take, lambda x: channels.get(x.shape, -1))
    with measuring(model), random_state_kept(model), watch_linears(on_linear):
        for index, batch in enumerate(model_batches(model, progress(batches, "counting zeros"))):
            channels.clear()
            with rows.counting(batch):
                run_batch(model, batch, index)
    found = tuple(counter.of(name, rows.counts[name]) for name, counter in counters.items())
    return ActivationSparsityReport(found, tuple(smooth_activations(model)))


class _Zeros:
    """Counts over rows (tokens, units) that arrive call by call."""

    def __init__(self) -> None:
        self.zeros = self.elements = 0
        self.fires: Tensor | None = None  # (units,)
        self.one_width = True

    def add(self, x: Tensor) -> None:
        """Takes in what enters the ReLU."""
        positive = x > 0
        self.elements += x.numel()
        self.zeros += x.numel() - int(positive.sum())
        fires = positive.any(0)
        self.one_width = self.one_width and (self.fires is None or len(self.fires) == len(fires))
        self.fires = fires if self.fires is None or not self.one_width else self.fires | fires

    def of(self, name: str, seen: Count) -> SiteSparsity:
        share = self.zeros / self.elements if self.elements else math.nan
        fires = self.fires if self.one_width else None
        dead = () if fires is None else tuple(torch.nonzero(~fires).flatten().tolist())
        units = None if fires is None else len(fires)
        return SiteSparsity(name, share, units, dead, seen.tokens, seen.padding if seen.told else None)
