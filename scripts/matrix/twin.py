"""A tiny classifier with λ-GELU, and its twin: the same model with a plain torch module whose parameter is λ.

The twin has nothing of the package: no module, no parameter group, no clipping, no kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification

import hf_lambda_gelu as hlg

STARTS = (1.005, 1.02, 1.3, 3.0)  # λ of the four layers: two that a few steps can push below 1
STEPS = 30
BATCH = 8


class Rows(Dataset[dict[str, Tensor]]):
    """Random token rows with a label that can be learned."""

    def __init__(self, count: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(3, 99, (count, 11), generator=generator)
        self.labels = (self.tokens[:, 0] > 50).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


class PlainGELU(nn.Module):
    """x · ½ (1 + erf(λx/√2)) in fp64, by torch's autograd; a λ that a step takes below 1 counts as 1, with its gradient."""

    def __init__(self, hardness: float) -> None:
        super().__init__()
        self.hardness = nn.Parameter(torch.tensor([hardness]))

    def forward(self, x: Tensor) -> Tensor:
        hardness = self.hardness.detach().clamp(min=1.0) + (self.hardness - self.hardness.detach())
        with torch.autocast("cpu", enabled=False):
            wide = x.double()  # 1 + erf cancels left of zero, which bf16, with its relative steps, would show
            return (wide * 0.5 * (1.0 + torch.erf(hardness * wide / math.sqrt(2.0)))).to(x.dtype)


def build(dtype: torch.dtype) -> BertForSequenceClassification:
    """Four layers, without dropout, with weights large enough for λ to matter; the same at each call."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=len(STARTS),
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config).to(dtype)


def ours(dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    """Converted, with λ at `STARTS`."""
    model = build(dtype)
    hlg.convert(model)
    for site, start in zip(hlg.hardness_sites(model).values(), STARTS, strict=True):
        site.set_hardness(start)
    return model


def twin(dtype: torch.dtype = torch.float32) -> tuple[BertForSequenceClassification, list[nn.Parameter]]:
    """The model with `PlainGELU`, and its λ, which are fp32 whatever the weights are."""
    model = build(dtype)
    plain = [PlainGELU(start) for start in STARTS]
    for layer, module in zip(model.bert.encoder.layer, plain, strict=True):
        layer.intermediate.intermediate_act_fn = module
    return model, [module.hardness for module in plain]


def twin_groups(
    model: nn.Module, hardness: Iterable[nn.Parameter], rate: float, groups: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Groups of an optimizer, or one of all parameters, from which λ is taken into one of its own, without weight decay."""
    own = list(hardness)
    taken = {id(p) for p in own}
    groups = groups or [{"params": list(model.parameters())}]
    left = [{**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
    return [*left, {"params": own, "lr": rate, "weight_decay": 0.0}]


@torch.no_grad()
def clip(hardness: Iterable[nn.Parameter], optimizer: Any) -> int:
    """λ ≥ 1 after a step; how many were below. A schedule-free optimizer has two points of each λ, both are clipped."""
    below = 0
    for p in hardness:
        group = next((g for g in optimizer.param_groups if any(q is p for q in g["params"])), {})
        z = optimizer.state.get(p, {}).get("z")
        if z is None or "train_mode" not in group:
            below += int(p.item() < 1.0)
            p.clamp_(min=1.0)
        elif min(p.item(), z.item()) < 1.0:  # p = βx + (1 − β)z, x being what evaluation takes
            beta = group["momentum"] if "momentum" in group else group["betas"][0]
            x = ((p.double() - (1.0 - beta) * z.double()) / beta).clamp(min=1.0)
            z.clamp_(min=1.0)
            p.copy_(beta * x + (1.0 - beta) * z.double())
            below += 1
    return below


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters but λ."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "hardness" not in name}


@torch.no_grad()
def set_weights(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Sets all parameters but λ: else differences of rounding would grow from step to step, in bf16 beyond those of λ."""
    for name, p in model.named_parameters():
        if "hardness" not in name:
            p.copy_(values[name])


def difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """The largest |λ − λ of the twin| / λ of the twin over steps and sites; infinite if the lengths differ."""
    if len(ours) != len(theirs):
        return math.inf
    pairs = [(a, b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True)]
    return max(abs(a - b) / b if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs)


def unchanged(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    """Whether every parameter and buffer is what it was, to the bit."""
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
