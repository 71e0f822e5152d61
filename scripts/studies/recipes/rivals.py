"""Recipes of the study that are other people's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.edits import replace_module
from scripts.studies.recipes.recipe import Result, Run, recipe


class _Lerp(nn.Module):
    """mix · smooth(x) + (1 − mix) · ReLU(x), as nn_pruning mixes; here the mix is a function of the step."""

    def __init__(self, smooth: nn.Module) -> None:
        super().__init__()
        self.smooth, self.mix = smooth, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.mix == 0.0 else torch.lerp(F.relu(x), self.smooth(x), self.mix)


class _MixDown(TrainerCallback):
    """mix 1 → 0, linearly, over the first nine tenths of training: as long as the default ramp takes to be hard."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, _Lerp):
                module.mix = max(0.0, 1.0 - state.global_step / (0.9 * state.max_steps))


@recipe
def lerp(run: Run) -> dict[str, Result]:
    """A linear mix from GELU to ReLU, as nn_pruning has it."""
    model = run.model()
    names = [site.name for site in hlg.convert(model).sites]
    for name in names:
        replace_module(model, name, _Lerp(nn.GELU()))
    run.trainer(model, (_MixDown(),)).train()
    return {"lerp": Result(run.judge(model))}


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # B-SiLU, (x + 1.67) σ(x) − 0.835, whose derivative SUGAR takes in place of the step
        gate = torch.sigmoid(x)
        return grad * (gate + (x + 1.67) * gate * (1.0 - gate))


class _Sugar(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Surrogate.apply(x)


@recipe
def sugar(run: Run) -> dict[str, Result]:
    """ReLU forward from the first step on, a smooth surrogate backward (SUGAR, arXiv 2505.22074)."""
    model = run.model()
    for site in hlg.convert(model).sites:
        replace_module(model, site.name, _Sugar())
    run.trainer(model).train()
    return {"sugar": Result(run.judge(model))}
