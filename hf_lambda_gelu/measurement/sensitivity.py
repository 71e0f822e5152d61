"""`sensitivity`: what it costs to make one λ-GELU site ReLU and leave all others as they are.

Derived; the paper (arXiv 2603.21991) reports learned hardness by layer, not what each layer costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activation.module import LambdaGELU, hardness_profile
from ..structure.config import config_of
from .batches import CalibrationError, model_batches, rows, token_mask
from .calibration import calibration_sites, pieces
from .forward import main_output, measuring, run_batch


@dataclass(frozen=True)
class SiteSensitivity:
    """What changes when this site alone is ReLU.

    Attributes:
        name, base, hardness: the module, its gate, and λ when it was measured.
        rank: 1 for the site whose substitution costs least.
        relative_change: ‖Δoutput‖ / ‖output‖ over all batches, root mean square, of the logits or the first output.
        loss_change: loss with the site as ReLU minus loss without, negative if ReLU is better; None without a loss.
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
    """

    sites: list[SiteSensitivity]
    loss: float | None
    examples: int

    @property
    def order(self) -> list[str]:
        """Module names, from the site whose substitution costs least to the one where it costs most."""
        return [site.name for site in sorted(self.sites, key=lambda site: site.rank)]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "order": self.order}

    def __str__(self) -> str:
        width = max(len(site.name) for site in self.sites)
        without = "" if self.loss is None else f"; loss {self.loss:.4f} without"
        lines = [f"one of {len(self.sites)} activations as ReLU at a time, {self.examples} examples{without}"]
        header = f"  {'site':<{width}}  {'λ':>9}  {'outputs':>9}"
        lines.append(header + ("" if self.loss is None else f"  {'Δ loss':>9}") + "  rank (1: costs least)")
        for s in self.sites:
            line = f"  {s.name:<{width}}  {s.hardness:>9.4g}  {s.relative_change:>9.2e}"
            lines.append(line + ("" if s.loss_change is None else f"  {s.loss_change:>+9.4f}") + f"  {s.rank:>4}")
        return "\n".join(lines)


@torch.no_grad()
def sensitivity(model: nn.Module, dataloader: Iterable[Any]) -> SensitivityReport:
    """Measure, site by site, how the loss and the outputs change when only that site is ReLU. [derived]

    The model is run in eval mode without gradients, n_sites + 1 times a batch, and left as it was; the others keep their λ.

    Args:
        dataloader: batches, mappings of what the model's forward takes, iterated once. With labels, sites are ranked by the
            change of the loss, a mean over examples (each batch counts by its size, as the Trainer reports it); without, by
            the relative change of the outputs, where padding does not count.

    Raises:
        ValueError: the model has no λ-GELU, is on the meta device, or puts out no tensor to compare.
        CalibrationError: a loader that yields nothing usable (see `batches.model_batches`), a forward that raises, or a loss
            or outputs that are not finite; the message names the batch and the site.
    """
    sites, profile = calibration_sites(model), hardness_profile(model)
    decoder = bool(getattr(config_of(model), "is_encoder_decoder", False))
    squares = dict.fromkeys(sites, 0.0)
    losses = dict.fromkeys(sites, 0.0)
    norm = loss = 0.0
    examples, has_loss = 0, True
    with measuring(model):
        for index, batch in enumerate(model_batches(model, dataloader)):
            mask = token_mask(batch, decoder=decoder)
            before, loss_before = _measured(model, batch, mask, index)
            size = _examples(batch)
            examples += size
            norm += sum(float(piece.square().sum()) for piece in pieces(before))
            has_loss = has_loss and loss_before is not None
            loss += size * (loss_before or 0.0)
            for name, site in sites.items():
                with _as_relu(site):
                    after, loss_after = _measured(model, batch, mask, index, f" with {name} as ReLU")
                for old, new in zip(pieces(before), pieces(after), strict=True):
                    squares[name] += float((new - old).square().sum())
                losses[name] += size * (loss_after or 0.0)

    changes = {name: math.sqrt(square / norm) if norm else 0.0 for name, square in squares.items()}
    loss_changes = {name: (value - loss) / examples for name, value in losses.items()}
    cost = loss_changes if has_loss else changes
    ranks = {name: rank for rank, name in enumerate(sorted(sites, key=cost.__getitem__), 1)}
    found = [
        SiteSensitivity(n, s.base, profile[n], ranks[n], changes[n], loss_changes[n] if has_loss else None)
        for n, s in sites.items()
    ]
    return SensitivityReport(found, loss / examples if has_loss else None, examples)


@contextmanager
def _as_relu(site: LambdaGELU) -> Iterator[None]:
    before, site.as_relu = site.as_relu, True
    try:
        yield
    finally:
        site.as_relu = before


def _measured(
    model: nn.Module, batch: Mapping[str, Any], mask: Tensor | None, index: int, how: str = ""
) -> tuple[Tensor, float | None]:
    """The main output without padding, (rows, features), and the loss."""
    result = run_batch(model, batch, index)
    output = rows(main_output(result), mask)
    loss = None if result.get("loss") is None else float(result["loss"])
    if not (math.isfinite(loss or 0.0) and bool(torch.isfinite(output).all())):
        raise CalibrationError(
            f"calibration batch {index}{how}: the outputs or the loss ({loss}) are not finite. A loss is NaN where all "
            "labels are −100; else look for an overflow of half precision"
        )
    return output, loss


def _examples(batch: Mapping[str, Any]) -> int:
    labels = batch.get("labels")
    tensors = [labels] if isinstance(labels, Tensor) else [v for v in batch.values() if isinstance(v, Tensor) and v.dim()]
    return len(tensors[0])
