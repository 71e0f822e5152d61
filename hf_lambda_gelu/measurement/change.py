"""What substitution changes, measured on batches: outputs, loss, metrics; and the zeros that ReLUs put out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat

from ..activation.module import hardness_sites
from .batches import CalibrationError, rows, token_mask
from .forward import decoder_modules, main_output, run_batch


@dataclass
class Change:
    """What was measured: see `SubstitutionReport`, which has the same attributes."""

    relative_change: float = 0.0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    zeros: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def measure_change(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    before_: Callable[[], AbstractContextManager[None]],
    after_: Callable[[], AbstractContextManager[None]],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None,
) -> Change:
    """Run the model on each batch within both contexts, and measure what differs."""
    change = norm = 0.0
    losses: list[tuple[float, float]] = []
    logits: tuple[Tensor, Tensor] | None = None
    labels: Tensor | None = None
    zeros = _Zeros(model)
    for index, batch in enumerate(batches):
        with before_():
            smooth = run_batch(model, batch, index)
        with after_(), zeros.counting(batch):
            hard = run_batch(model, batch, index)
        before, after = main_output(smooth), main_output(hard)
        if before.shape != after.shape:  # durations that the model predicts, for one
            raise CalibrationError(
                f"calibration batch {index}: as ReLU the output has the shape {tuple(after.shape)}, before "
                f"{tuple(before.shape)}: "
                "the change cannot be measured. Substitute without calibration, or pass inputs that fix the length"
            )
        for first, second in zip(before, after, strict=True):  # one by one: a language model's logits are large
            change += float((second.float() - first.float()).square().sum(dtype=torch.float64))
            norm += float(first.float().square().sum(dtype=torch.float64))
        if batch.get("labels") is not None:
            if smooth.get("loss") is not None:
                size = len(batch["labels"])  # the mean over examples, as the Trainer reports it
                losses += [(float(smooth["loss"]), float(hard["loss"]))] * size
            if compute_metrics is None:
                continue
            # of unequal length under dynamic padding: padded with −100, as the Trainer does
            both, truth = (before.float().cpu(), after.float().cpu()), batch["labels"].cpu()
            logits = both if logits is None else nested_concat(logits, both)
            labels = truth if labels is None else nested_concat(labels, truth)
    report = Change((change / norm) ** 0.5 if norm else 0.0, zeros=zeros.fractions())
    if losses:
        report.metrics["loss"] = tuple(sum(column) / len(losses) for column in zip(*losses, strict=True))  # type: ignore[assignment]
    if logits is not None:
        first, second = (compute_metrics(EvalPrediction(side.numpy(), labels.numpy())) for side in logits)
        report.metrics.update({name: (first[name], second[name]) for name in first})
    return report


class _Zeros:
    """Counts, by site, what a ReLU makes 0."""

    def __init__(self, model: nn.Module) -> None:
        self.sites = hardness_sites(model)
        self.decoder = decoder_modules(model)
        self.counts = {name: [0, 0] for name in self.sites}  # zeros, elements

    @contextlib.contextmanager
    def counting(self, batch: Mapping[str, Any]) -> Iterator[None]:
        masks = {in_decoder: token_mask(batch, in_decoder) for in_decoder in (False, True)}

        def watch(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = rows(args[0], masks[module in self.decoder])
            self.counts[name][0] += int((x <= 0).sum())
            self.counts[name][1] += x.numel()

        with contextlib.ExitStack() as hooks:
            for name, site in self.sites.items():
                hooks.enter_context(site.register_forward_pre_hook(partial(watch, name)))
            yield

    def fractions(self) -> dict[str, float]:
        """Without the sites that no batch reached."""
        return {name: zeros / total for name, (zeros, total) in self.counts.items() if total}
