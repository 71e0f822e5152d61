"""The first training step shows whether the sites are what runs, before any weight has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..activation.module import hardness_sites
from ..measurement.forward import random_state_kept
from ..measurement.in_effect import bypassed, counting_calls
from ..reports import span
from ..structure.forwards import refusal

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
    reasons = {site: why for site, why in missed.items() if why is not None}
    if reasons:
        model.zero_grad()
        raise ValueError(f"{refusal(reasons)}. λ would not be learned there")
    if missed:
        logger.warning(
            f"{len(missed)} of {len(hardness_sites(model))} λ-GELU did not run on the first batch, {span(list(missed))}: "
            "their λ is learned from batches that reach them, if there are any"
        )
    return step() if hooked else loss
