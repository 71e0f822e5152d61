"""`sensitivity`: what it costs to make one λ-GELU site ReLU and leave all others as they are.

Derived; the paper (arXiv 2603.21991) reports learned hardness by layer, not what each layer costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activation.module import LambdaGELU, hardness_profile
from ..reports import length, progress, table, to_dict
from ..structure.transaction import transaction
from .batches import CalibrationError, batch_size, model_batches
from .calibration import calibration_sites, pieces
from .forward import main_output, measuring, run_batch, same_random_numbers
from .output_rows import output_rows


@dataclass(frozen=True)
class SiteSensitivity:
    """What changes when this site alone is ReLU.

    Attributes:
        name, base, hardness: the module, its gate, and λ when it was measured.
        rank: 1 for the site whose substitution costs least.
        relative_change: ‖Δoutput‖ / ‖output‖ over all batches, root mean square, of the logits or the first output.
        loss_change: loss with the site as ReLU minus loss without, negative if ReLU is better; None without a loss.

    Examples:
        >>> cheapest = min(report.sites, key=lambda site: site.rank)  # report = hlg.sensitivity(model, batches)
        >>> cheapest.name, cheapest.relative_change
    """

    name: str
    base: str
    hardness: float
    rank: int
    relative_change: float
    loss_change: float | None


@dataclass(frozen=True)
class SensitivityReport:
    """What `sensitivity` measured. Printing it gives the table; `to_dict` what a JSON file can hold.

    Attributes:
        sites: in network order.
        loss: of the model as it is; None if a batch gave none, and then sites are ranked by their relative change.
        examples: how many were measured.

    Examples:
        >>> report = hlg.sensitivity(model, batches)  # import hf_lambda_gelu as hlg; a model after hlg.convert
        >>> report.order[0]  # the site to begin with
    """

    sites: list[SiteSensitivity]
    loss: float | None
    examples: int

    @property
    def order(self) -> list[str]:
        """Module names, from the site whose substitution costs least to the one where it costs most."""
        return [site.name for site in sorted(self.sites, key=lambda site: site.rank)]

    def to_dict(self) -> dict[str, Any]:
        """The attributes, and `order`."""
        return {**to_dict(self), "order": self.order}

    def __str__(self) -> str:
        without = "" if self.loss is None else f"; loss {self.loss:.4f} without"
        header, formats = ["site", "λ", "outputs"], [">9", ">9"]
        if self.loss is not None:
            header, formats = [*header, "Δ loss"], [*formats, ">9"]
        cells = []
        for s in self.sites:
            row = [s.name, f"{s.hardness:.4g}", f"{s.relative_change:.2e}"]
            cells.append([*row, *([] if s.loss_change is None else [f"{s.loss_change:+.4f}"]), str(s.rank)])
        lines = [f"one of {len(self.sites)} activations as ReLU at a time, {self.examples} examples{without}"]
        return "\n".join(lines + table([*header, "rank (1: costs least)"], [*formats, ">4"], cells))


@transaction
@torch.no_grad()
def sensitivity(model: nn.Module, dataloader: Iterable[Any]) -> SensitivityReport:
    """Measures, site by site, how the loss and the outputs change when only that site is ReLU. [derived]

    With y the outputs of the model as it is and yᵢ those with site i as ReLU, the relative change of i is
    √(Σ‖yᵢ − y‖² / Σ‖y‖²), summed over all examples in fp64. The model is run in eval mode without gradients, in its own
    dtype, n_sites + 1 times a batch, and left as it was; the others keep their λ.

    Args:
        model: a converted model.
        dataloader: batches, mappings of what the model's forward takes, iterated once. With labels, sites are ranked by the
            change of the loss, a mean over examples (each batch counts by its size, as the Trainer reports it); without, by
            the relative change of the outputs, where padding does not count.

    Raises:
        ValueError: the model has no λ-GELU, is on the meta device, or puts out no tensor to compare.
        CalibrationError: a loader that yields nothing usable (see `batches.model_batches`), a forward that raises, or a loss
            or outputs that are not finite; the message names the batch and the site.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import AutoModelForSequenceClassification, AutoTokenizer
        >>> name = "textattack/bert-base-uncased-SST-2"
        >>> model = AutoModelForSequenceClassification.from_pretrained(name)
        >>> batch = AutoTokenizer.from_pretrained(name)(["a good film", "a dull film"], padding=True, return_tensors="pt")
        >>> _ = hlg.convert(model)
        >>> print(hlg.sensitivity(model, [batch]))
    """
    sites, profile = calibration_sites(model), hardness_profile(model)
    costs = _Costs(sites)
    batches = length(dataloader)
    total = None if batches is None else batches * (len(sites) + 1)
    with measuring(model):
        passes = _passes(model_batches(model, dataloader), sites)
        for index, batch, name in progress(passes, "sensitivity", total):
            if name is None:
                costs.start(batch_size(model, batch), *_measured(model, batch, index))
            else:
                with _as_relu(sites[name]):
                    costs.add(name, *_measured(model, batch, index, f" with {name} as ReLU"))
    return costs.report(profile)


def _passes(batches: Iterable[dict[str, Any]], sites: Iterable[str]) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """What is run: each batch with the model as it is (None), then with each site as ReLU."""
    for index, batch in enumerate(batches):
        for name in (None, *sites):
            yield index, batch, name


class _Costs:
    """Sums over the batches: of the model as it is, and by site."""

    def __init__(self, sites: Mapping[str, LambdaGELU]) -> None:
        self.sites = sites
        self.norm = self.loss = 0.0  # Σ‖y‖², and the sum of the loss over examples
        self.squares = dict.fromkeys(sites, 0.0)  # Σ‖yᵢ − y‖²
        self.losses = dict.fromkeys(sites, 0.0)
        self.examples, self.has_loss = 0, True
        self._size, self._before = 0, torch.empty(0, device="cpu")  # the batch at hand

    def start(self, size: int, output: Tensor, loss: float | None) -> None:
        """Takes in a batch of that many examples, run through the model as it is."""
        self._size, self._before = size, output
        self.examples += size
        self.norm += sum(float(piece.square().sum()) for piece in pieces(output))
        self.has_loss = self.has_loss and loss is not None
        self.loss += size * (loss or 0.0)

    def add(self, name: str, output: Tensor, loss: float | None) -> None:
        """Takes in the same batch with that site as ReLU."""
        for old, new in zip(pieces(self._before), pieces(output), strict=True):
            self.squares[name] += float((new - old).square().sum())
        self.losses[name] += self._size * (loss or 0.0)

    def report(self, profile: Mapping[str, float]) -> SensitivityReport:
        changes = {
            name: math.sqrt(square / self.norm) if self.norm else math.inf if square else 0.0
            for name, square in self.squares.items()
        }
        loss_changes = {name: (value - self.loss) / self.examples for name, value in self.losses.items()}
        cost = loss_changes if self.has_loss else changes
        ranks = {name: rank for rank, name in enumerate(sorted(self.sites, key=cost.__getitem__), 1)}
        found = [
            SiteSensitivity(n, s.base, profile[n], ranks[n], changes[n], loss_changes[n] if self.has_loss else None)
            for n, s in self.sites.items()
        ]
        return SensitivityReport(found, self.loss / self.examples if self.has_loss else None, self.examples)


@contextmanager
def _as_relu(site: LambdaGELU) -> Iterator[None]:
    before, site.as_relu = site.as_relu, True
    try:
        yield
    finally:
        site.as_relu = before


def _measured(model: nn.Module, batch: Mapping[str, Any], index: int, how: str = "") -> tuple[Tensor, float | None]:
    """The main output without padding, (rows, features), and the loss; with the same random numbers at every call."""
    with same_random_numbers(model):
        result = run_batch(model, batch, index)
    output = output_rows(main_output(result), batch, model)
    loss = None if result.get("loss") is None else float(result["loss"])
    if not (math.isfinite(loss or 0.0) and bool(torch.isfinite(output).all())):
        raise CalibrationError(
            f"calibration batch {index}{how}: the outputs or the loss ({loss}) are not finite. A loss is NaN where all "
            "labels are −100; else look for an overflow of half precision"
        )
    return output, loss
