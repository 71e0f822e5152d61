"""A run of a block, or of the whole model, that can be made at any time; proven to give what the model's forward gave."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...measurement.batches import FORWARD_ERRORS
from ...measurement.forward import main_output
from ...measurement.towers import Towers
from .blocks import hidden_of
from .capture import Sample


class ReplayError(Exception):
    """A block gives something else when it is run apart from the model's forward. Never leaves the package."""


@dataclass(frozen=True)
class Run:
    """One run. Calling it runs the block without gradients, and returns what it put out.

    Attributes:
        block: what is run.
        forward: runs it, on what the model's forward called it with.
        towers: knows the masks while it runs.
        following: a block within which it knows them; `forward` has one of its own, if it is the whole model's.
        sample: of what the block put out in the forward pass; None if that is not known.
    """

    block: nn.Module
    forward: Callable[[], Any]
    towers: Towers
    following: Callable[[], AbstractContextManager[None]] = nullcontext
    sample: Sample | None = None

    @torch.no_grad()
    def __call__(self) -> Tensor | None:
        """
        Raises:
            ReplayError: the forward pass put out something else.
        """
        try:
            with self.following():
                output = main_tensor(self.forward())
        except FORWARD_ERRORS as error:
            if self.sample is None:
                raise
            raise ReplayError(f"{type(error).__name__}: {error}") from error
        if self.sample is not None and not self.sample.matches(Sample.of(output)):
            raise ReplayError("it puts out something else")
        return output


def main_tensor(output: Any) -> Tensor | None:
    """A block's output, the first of several, or a whole model's main output."""
    return main_output(output) if isinstance(output, dict) else hidden_of(output)
