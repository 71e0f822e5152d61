"""What substitution changes, measured on batches: outputs, loss, metrics; and the zeros that ReLUs put out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..activation.module import hardness_sites
from ..reports import progress
from .batches import CalibrationError
from .forward import main_output, run_batch, same_random_numbers
from .in_effect import check_in_effect, counting_calls
from .output_rows import output_rows
from .places import Places
from .site_rows import SiteRows
from .team import ALONE, Team

if TYPE_CHECKING:
    from transformers import EvalPrediction

# elements of the outputs that are compared at a time
_PIECE = 2**20

State = Callable[[], AbstractContextManager[None]]  # within the block, the model is in that state


@dataclass
class MeasuredChange:
    """What was measured: see `SubstitutionReport`, which has the same attributes."""

    relative_change: float = 0.0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    zeros: dict[str, float] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    first: tuple[Mapping[str, Any], Tensor] | None = None  # a batch, and the main output of its first example afterwards


@torch.no_grad()
def measure_change(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    before: State,
    after: State,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None,
    total: int | None = None,
    team: Team = ALONE,
) -> MeasuredChange:
    """Runs the model on each batch in both states, with the same random numbers, and measures what differs.

    Args:
        compute_metrics: as for `Trainer`, called for either state on the logits of all batches that hold labels.
        total: how many batches there are, for the progress bar, if `batches` has no length.
        team: whose processes each have their own share of the batches; all get what was measured on all.

    Raises:
        CalibrationError: the model's forward raises, or the output changes its shape, or a site is not what runs.
    """
    called: set[str] = set()
    first: tuple[Mapping[str, Any], Tensor] | None = None
    comparison, zeros = _Comparison(model, keep_logits=compute_metrics is not None), _Zeros(model)
    for index, batch in enumerate(progress(batches, "measuring the change", total)):
        with before(), counting_calls(model, called), same_random_numbers(model):
            smooth = run_batch(model, batch, index)
        with after(), zeros.counting(batch), same_random_numbers(model):
            hard = run_batch(model, batch, index)
        first = first or (batch, first_example(hard))
        comparison.add(index, batch, smooth, hard)
        del smooth, hard  # before there are the next ones
    called.update(*team.gathered(called, "the sites that ran"))
    comparison.join(team)
    zeros.join(team)
    unreached: list[str] = []
    if first is not None:
        with before():
            unreached = check_in_effect(model, called, partial(run_batch, model, first[0], 0))
    unreached = max(team.gathered(unreached, "the sites that did not run"), key=len)  # none where a share is empty
    change = comparison.relative_change(), comparison.metrics(compute_metrics), zeros.fractions()
    return MeasuredChange(*change, unreached, first)


def first_example(output: Mapping[str, Any]) -> Tensor:
    """A copy of the main output, of the first example alone: a language model's logits are large."""
    main = main_output(output)
    return (main[:1] if main.dim() else main).clone()


class _Comparison:
    """Sums over the batches of what two states of a model put out."""

    def __init__(self, model: nn.Module, keep_logits: bool) -> None:
        self.model, self.keep_logits = model, keep_logits
        self.change = self.norm = 0.0  # sums of squares
        self.losses: list[tuple[float, float]] = []  # an entry for each example
        self.logits: tuple[Tensor, Tensor] | None = None
        self.labels: Tensor | None = None

    def add(self, index: int, batch: Mapping[str, Any], smooth: Mapping[str, Any], hard: Mapping[str, Any]) -> None:
        """Takes in what both states put out on the batch of that number."""
        before, after = main_output(smooth), main_output(hard)
        if before.shape != after.shape:  # durations that the model predicts, for one
            raise CalibrationError(
                f"calibration batch {index}: as ReLU the output has the shape {tuple(after.shape)}, before "
                f"{tuple(before.shape)}: "
                "the change cannot be measured. Substitute without calibration, or pass inputs that fix the length"
            )
        both = [output_rows(side, batch, self.model) if side.dim() else side for side in (before, after)]
        flat = [side.reshape(-1) for side in both]  # but for padding, which no refit sees to
        for first, second in zip(*(side.split(_PIECE) for side in flat), strict=True):  # a language model's logits are large
            self.change += float((second.float() - first.float()).square().sum(dtype=torch.float64))
            self.norm += float(first.float().square().sum(dtype=torch.float64))
        if batch.get("labels") is None:
            return
        if smooth.get("loss") is not None:
            size = len(batch["labels"])  # the mean over examples, as the Trainer reports it
            self.losses += [(float(smooth["loss"]), float(hard["loss"]))] * size
        if self.keep_logits:
            self._keep((before.float().cpu(), after.float().cpu()), batch["labels"].cpu())

    def _keep(self, both: tuple[Tensor, Tensor], truth: Tensor) -> None:
        from transformers.trainer_pt_utils import nested_concat

        # of unequal length under dynamic padding: padded with −100, as the Trainer does
        self.logits = both if self.logits is None else nested_concat(self.logits, both)
        self.labels = truth if self.labels is None else nested_concat(self.labels, truth)

    def join(self, team: Team) -> None:
        """All batches were added, on each process of the team its own."""
        if team.size == 1:
            return
        sums = team.gathered((self.change, self.norm, self.losses), "the change of the outputs")
        self.change, self.norm = sum(change for change, *_ in sums), sum(norm for _, norm, _ in sums)
        self.losses = [pair for *_, losses in sums for pair in losses]
        if self.keep_logits:
            kept = team.gathered((self.logits, self.labels), "the logits")
            self.logits = self.labels = None
            for logits, labels in kept:
                if logits is not None and labels is not None:
                    self._keep(logits, labels)

    def relative_change(self) -> float:
        """‖after − before‖ / ‖before‖ but at padding; NaN if any of them is, infinite where they were 0 and are not now."""
        if self.norm:
            return math.sqrt(self.change / self.norm)  # in this order NaN stays NaN
        return 0.0 if self.change == 0.0 else math.inf if self.change > 0.0 else math.nan

    def metrics(
        self, compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    ) -> dict[str, tuple[float, float]]:
        """{name: (before, after)} of the loss, if there is one, and of what `compute_metrics` returns."""
        from transformers import EvalPrediction

        found: dict[str, tuple[float, float]] = {}
        if self.losses:
            before, after = (sum(column) / len(self.losses) for column in zip(*self.losses, strict=True))
            found["loss"] = (before, after)
        if compute_metrics is not None and self.logits is not None and self.labels is not None:
            truth = self.labels.numpy()
            first, second = (compute_metrics(EvalPrediction(side.numpy(), truth)) for side in self.logits)
            found.update({name: (first[name], second[name]) for name in first})
        return found


class _Zeros:
    """Counts, by site, what a ReLU makes 0."""

    def __init__(self, model: nn.Module) -> None:
        self.rows = SiteRows(model, hardness_sites(model), self._take)
        self.counts = {name: [0, 0] for name in self.rows.sites}  # zeros, elements

    @contextlib.contextmanager
    def counting(self, batch: Mapping[str, Any]) -> Iterator[None]:
        with self.rows.counting(batch):
            yield

    def _take(self, name: str, x: Tensor, _: Places) -> None:
        self.counts[name][0] += int((x <= 0).sum())
        self.counts[name][1] += x.numel()

    def join(self, team: Team) -> None:
        """All batches were added, on each process of the team its own."""
        every = team.gathered(self.counts, "the zeros of all sites")
        self.counts = {name: [sum(counts[name][i] for counts in every) for i in (0, 1)] for name in self.counts}

    def fractions(self) -> dict[str, float]:
        """Without the sites that no batch reached."""
        return {name: zeros / total for name, (zeros, total) in self.counts.items() if total}
