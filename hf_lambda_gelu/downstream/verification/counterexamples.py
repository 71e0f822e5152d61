"""Counterexamples: looked for by gradients, and replayed in torch, without which none counts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ...measurement.forward import evaluating
from .bounds import Box, interval_bounds
from .network import Array, Layer

_STEPS = 20


class Replay:
    """Runs the model itself on what is said to be a counterexample.

    Args:
        model: as the user has it.
        exact: its copy in float64.
        layers: as they were read, for the last doubt: rounding.
        shape: of one input.
    """

    def __init__(self, model: nn.Module, exact: nn.Module, layers: list[Layer], shape: torch.Size) -> None:
        self.model, self.exact, self.layers, self.shape = model, exact, layers, shape
        self.parameter = next(model.parameters())

    def other_class(self, x: Array, label: int) -> int | None:
        """The class that gets more than the label's logit; None if torch in float64 finds none, or rounding decides.

        The second is asked of the bounds at this very point: the margin is to be below zero in real arithmetic too.
        """
        logits = self.logits(x)
        other = int(logits.argmax())
        if not float(logits[other]) > float(logits[label]):
            return None
        margin = Layer(np.zeros((1, len(logits))), np.zeros(1), relu=False)
        margin.weight[0, label], margin.weight[0, other] = 1.0, -1.0
        return other if interval_bounds([*self.layers, margin], Box(x, x))[-1].upper[0] < 0.0 else None

    @torch.no_grad()
    def logits(self, x: Array) -> Tensor:
        """In float64, shape (classes,)."""
        logits: Tensor = self.exact(torch.from_numpy(x).reshape(1, *self.shape))[0]
        return logits

    @torch.no_grad()
    def agrees(self, x: Array, label: int, other: int) -> bool:
        """Whether the model as it is, on the input in its dtype, puts the other class above the label's too."""
        inputs = torch.from_numpy(x).reshape(1, *self.shape).to(self.parameter.device, self.parameter.dtype)
        with evaluating(self.model):
            logits = self.model(inputs)[0]
        return bool(logits[other] > logits[label])

    def searched(self, box: Box, label: int) -> Array | None:
        """A counterexample in the box, by steps along the sign of the gradient; None if none was met. [PGD, 1706.06083]"""
        low, high = torch.from_numpy(box.lower), torch.from_numpy(box.upper)
        x = (low + high) / 2
        for step in range(_STEPS):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                logits = self.exact(x.reshape(1, *self.shape))[0]
                rest = logits.clone()
                rest[label] = -torch.inf
                (rest.max() - logits[label]).backward()
            assert x.grad is not None
            # the first step leads to a corner, the later ones less and less far
            x = (x.detach() + x.grad.sign() * (high - low) / (step + 1)).clamp(low, high)
            found: Array = x.numpy()
            if self.other_class(found, label) is not None:
                return found
        return None
