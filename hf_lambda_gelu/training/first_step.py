"""The first training step shows whether the sites are what runs, before any weight has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..activation.module import hardness_sites
from ..measurement.forward import random_state_kept
from ..measurement.in_effect import bypassed, counting_calls
from ..reports import span
from ..structure.forwards import refusal
from ..structure.hooks import Hooks

logger = logging.get_logger(__name__)


def first_step(
    model: nn.Module, step: Callable[[], torch.Tensor], rerun: Callable[[], Any], hooked: bool = False
) -> torch.Tensor:
    """What `step` returns, if the sites of `model` ran in it. [derived]

    Args:
        step: forward and backward on a batch.
        rerun: forward on that batch once more. It is run, without gradients, only if a site was not called.
        hooked: whether `step` has hooks on the model, with which fused kernels stand back: a run without comes first.

    Raises:
        ValueError: a site that something else runs in the place of, with what to switch off. No gradient is left.
    """
    called: set[str] = set()
    if hooked:
        with counting_calls(model, called), torch.no_grad(), random_state_kept(model):
            rerun()
    else:
        with counting_calls(model, called):
            loss = step()
    with torch.no_grad(), random_state_kept(model):
        missed = bypassed(model, called, rerun)
    tell_missed(model, missed)
    return step() if hooked else loss


def tell_missed(model: nn.Module, missed: Mapping[str, str | None]) -> None:
    """Raises ValueError for sites that are bypassed, and warns of those that a batch did not reach, see `bypassed`."""
    reasons = {site: why for site, why in missed.items() if why is not None}
    if reasons:
        model.zero_grad()
        raise ValueError(f"{refusal(reasons)}. λ would not be learned there")
    if missed:
        logger.warning(
            f"{len(missed)} of {len(hardness_sites(model))} λ-GELU did not run on the first batch, {span(list(missed))}: "
            "their λ is learned from batches that reach them, if there are any"
        )


class FirstUpdate:
    """The same for who has no hand in the step itself: from `begin`, before the first batch, to `end`, before the update."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._called: set[str] = set()
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._open = ExitStack()

    def begin(self) -> None:
        self._open.enter_context(counting_calls(self.model, self._called))
        self._open.enter_context(Hooks()).before(self.model, self._take)

    def leave(self) -> None:
        """The model is as before, where training was stopped in between."""
        self._open.close()

    def end(self) -> None:
        """Raises ValueError if something else runs in the place of a site; no gradient is left then."""
        self.leave()
        if self._inputs is None:  # only parts of the model ran
            return
        (args, kwargs), self._inputs = self._inputs, None
        with torch.no_grad(), random_state_kept(self.model):
            missed = bypassed(self.model, self._called, lambda: self.model(*args, **kwargs))
        tell_missed(self.model, missed)

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs = args, dict(kwargs)
