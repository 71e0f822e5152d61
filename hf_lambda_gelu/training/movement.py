"""Whether an optimizer moves λ at all: some step only what they know, say matrices, and pass over the rest in silence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils import logging

logger = logging.get_logger(__name__)

CALLS = 10  # as often must a gradient have called for a step of λ; RAdam takes its first five without one
STEPS = 50  # then nothing is looked at any more
# of λ: what a step of this size adds does not round to nothing in fp32
SMALLEST = 1e-6


class Movement:
    """Warns once if a λ stays where it is, to the bit, though its gradients call for steps. [derived]

    A λ at 1 whose gradient pushes it down stays for good; so there all gradients must have called for a rise.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        whole = [parameter for parameter in parameters if not hasattr(parameter, "full_tensor")]
        self._calls = dict.fromkeys(whole, 0)  # of those that have not moved yet
        self._before: dict[nn.Parameter, Tensor] = {}
        self._steps = 0

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *_: object) -> None:
        """To be called by the optimizer before its step."""
        self._before = {parameter: parameter.clone() for parameter in self._calls}

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, *_: object) -> None:
        """To be called by the optimizer after its step, while gradients are there and before λ is clipped."""
        if not self._calls:
            return
        self._steps += 1
        rates = {parameter: group.get("lr", 0.0) for group in optimizer.param_groups for parameter in group["params"]}
        for parameter, before in self._before.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if bool(((parameter != before) | (before <= 1.0) & (gradient > 0.0)).any()):
                self._calls.pop(parameter, None)
            elif bool((float(rates.get(parameter, 0.0)) * gradient.abs() > SMALLEST * before).all()):
                self._calls[parameter] += 1
        stay = [calls for calls in self._calls.values() if calls >= CALLS]
        if stay:
            logger.warning(
                f"{type(optimizer).__name__} has not moved {len(stay)} λ in {self._steps} steps, though their gradients "
                "call for it: it may step none but matrices. Give λ to an optimizer that steps it, such as AdamW"
            )
        if stay or self._steps >= STEPS:
            self._calls = {}
