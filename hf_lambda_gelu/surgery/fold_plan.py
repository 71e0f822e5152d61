"""Which weights the scale of an activation can be moved into: found by running the model twice.

Upstream: the weights that make what enters a site. Downstream: the linear maps that take its output up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..activation.module import LambdaGELU
from .fold_downstream import DoublingPass
from .fold_scales import Fold, Weights
from .fold_upstream import UpstreamWalk


def plan_fold(model: nn.Module, sites: Mapping[str, LambdaGELU], forward: Callable[[], Any]) -> dict[str, Fold]:
    """Run the model twice, and find for every site the weights that λ can go into."""
    folds = {name: Fold(name) for name in sites}
    weights = Weights(model)
    walk = UpstreamWalk(weights, folds)
    walk.run(model, sites, forward)
    doubling = DoublingPass(weights, folds, walk)
    doubling.run(sites, forward)
    for name, fold in folds.items():
        if name not in walk.called:
            fold.refuse("the inputs never reach it")
        elif name not in doubling.taken_up:
            fold.refuse("no linear map takes up its output")
    _check_shared(folds, sites)
    return folds


def _check_shared(folds: Mapping[str, Fold], sites: Mapping[str, LambdaGELU]) -> None:
    """Sites that scale the same weight must have the same λ."""
    for kind in ("scaled", "divided"):
        owners: dict[tuple[Any, ...], str] = {}
        for name, made in folds.items():
            for scale in getattr(made, kind):
                other = owners.setdefault(scale.key, name)
                if sites[other].hardness.item() != sites[name].hardness.item():
                    made.refuse(f"{scale.label} serves {other} too, whose λ differs")
