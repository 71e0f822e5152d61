"""The pass in which every site puts out twice as much: which linear maps take its output up.

Doubling the output must double the input of such a map, or not change it, behind a normalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..activation.module import LambdaGELU
from ..structure.hooks import Hooks
from ..structure.linear_calls import LinearCall
from ..structure.linear_maps import watch_linears
from .fold_scales import Fold, Obstacle, Scale, Weights
from .fold_upstream import UpstreamWalk


class DoublingPass:
    """One forward pass in which sites, and what was added to their output, are doubled; `walk` saw the pass before.

    Each linear map puts out what it did then, so that a site's doubling ends where its output is taken up.

    Attributes:
        taken_up: the sites whose output a linear map took up.
    """

    def __init__(self, weights: Weights, folds: Mapping[str, Fold], walk: UpstreamWalk) -> None:
        self.weights, self.folds, self.walk = weights, folds, walk
        self.taken_up: set[str] = set()

    @torch.no_grad()
    def run(self, sites: Mapping[str, LambdaGELU], forward: Callable[[], Any]) -> None:
        """Run the model, and let each fold have what takes its site's output up."""
        order = iter(self.walk.calls)

        def on_linear(call: LinearCall) -> Tensor | None:
            if not call.output.is_floating_point():
                return None
            first, found = next(order, (None, set()))
            if first is None or first.input.shape != call.input.shape:
                for fold in self.folds.values():
                    fold.refuse("the model calls other maps each time")
                return None
            if found:
                self._compare(first, call.input, found)
            return first.output.detach()

        added = {parameter for several in self.walk.added.values() for parameter in several}
        with Hooks() as hooks, ExitStack() as stack, watch_linears(on_linear):
            for site in sites.values():
                hooks.after(site, lambda module, args, output: output * 2.0)
            for parameter in added:
                before = parameter.data
                stack.callback(setattr, parameter, "data", before)
                parameter.data = before * 2.0
            forward()

    def _compare(self, call: LinearCall, now: Tensor, found: set[str]) -> None:
        """Judge by a map's input, then and now, what the map is to the sites that it comes from."""
        before = call.input.detach()
        scale = float(before.abs().max()) if before.numel() else 0.0
        self.taken_up |= found
        if torch.allclose(now, before * 2.0, rtol=0.0, atol=1e-4 * scale):
            for name in found:
                fold = self.folds[name]
                try:
                    fold.divide(*(Scale(m.label, m.parameter, m.index) for m in self.weights.maps(call)))
                    fold.scale(*(self.weights.whole(parameter) for parameter in self.walk.added[name]))
                except Obstacle as obstacle:
                    fold.refuse(str(obstacle))
        elif not torch.allclose(now, before, rtol=0.0, atol=1e-2 * scale):  # a normalisation leaves its ε
            for name in found:
                self.folds[name].refuse("its output is mixed with something else")
