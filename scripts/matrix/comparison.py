"""A run and its twin's: what is written down of both, and what a cell comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import hf_lambda_gelu as hlg
from scripts.matrix.cells import Cell, Outcome
from scripts.matrix.twin import difference, set_weights, weights

RATE = 0.05  # of λ, in units of λ per step
BOUND = 1e-5
GRADIENT_BOUND = 0.02  # in bf16, of the norm: half a percent is what one rounding does to a number
Profile = list[float]
Make = Callable[[nn.Module, list[dict[str, Any]]], Any]  # of a model and groups: an optimizer, or several in a list


@dataclass
class Run:
    """λ after each step and at the end, all other weights after each step, and how often λ was clipped by the twin."""

    profiles: list[Profile] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[int, Tensor]] = field(default_factory=lambda: [{}])  # {site: of λ}, a dict for each step
    clipped: int = 0

    def watch_gradients(self, hardness: list[nn.Parameter], led_by: Run | None) -> None:
        """Writes down the gradients of λ; the twin goes on with those of the run that leads it."""

        def hook(gradient: Tensor, site: int) -> Tensor:
            self.gradients[-1][site] = gradient.clone()
            return gradient if led_by is None else led_by.gradients[len(self.gradients) - 1][site]

        for site, parameter in enumerate(hardness):
            parameter.register_hook(partial(hook, site=site))

    def after_step(self, model: nn.Module, profile: Profile, led_by: Run | None) -> None:
        """Writes down where the run is; the twin's other weights become those of the run that leads it."""
        if led_by is None:
            self.weights.append(weights(model))
        else:
            set_weights(model, led_by.weights[len(self.profiles)])
        self.profiles.append(profile)
        self.gradients.append({})


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    return [site.unclipped_hardness for site in hlg.hardness_sites(model).values()]


def dtype_of(cell: Cell) -> torch.dtype:
    return torch.bfloat16 if cell.precision == "pure bf16" else torch.float32


class Refusal(Exception):
    def __init__(self, error: Exception, unchanged: bool) -> None:
        self.error, self.unchanged = error, unchanged


def refused(refusal: Refusal, train_twin: Callable[[], Any]) -> Outcome:
    """Refused by name if the package says it and no weight has changed, or if the twin ends with the same words."""
    error, text = refusal.error, str(refusal.error)
    if refusal.unchanged and isinstance(error, ValueError) and ("λ" in text or "hardness" in text):
        return Outcome("refused", None, text)
    if not isinstance(error, (ImportError, ValueError, AssertionError, RuntimeError)):
        return Outcome("off", None, f"not by name: {type(error).__name__}: {text}")
    try:
        train_twin()
    except Exception as stock:
        if (type(stock), str(stock)) == (type(error), text):
            return Outcome("refused", None, f"without λ too: {type(stock).__name__}: {text}")
    return Outcome("off", None, f"not by name: {type(error).__name__}: {text}")


def compared(cell: Cell, mine: Run, theirs: Run, trained_by: str) -> Outcome:
    figure = difference(mine.profiles, theirs.profiles)
    moved = max(abs(a - b) for a, b in zip(theirs.profiles[0], theirs.profiles[-1], strict=True))
    said = f"{trained_by}, own group; λ moved by {moved:.2g}, clipped {theirs.clipped} times"
    equal = figure <= BOUND
    if cell.precision != "fp32":
        a, b = (torch.cat([step[site] for step in run.gradients for site in sorted(step)]) for run in (mine, theirs))
        distance = float((a - b).norm() / b.norm())
        equal &= distance <= GRADIENT_BOUND
        said += f"; gradients of λ given, {distance:.1e} from its own"
    if moved < 1e-3 or not theirs.clipped:
        return Outcome("off", figure, f"shows nothing: {said}")
    return Outcome("equal" if equal else "off", figure, said)
