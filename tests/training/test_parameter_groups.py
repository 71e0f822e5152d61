"""The optimizer's parameter groups, against those of the stock Trainer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.training import SITES, arguments, converted, trainer_of
from torch import nn
from transformers import Trainer, TrainingArguments


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_parameter_groups(tmp_path: Path, optim: str) -> None:
    """Against the groups that the stock Trainer makes of the unconverted model, plus one group for λ."""
    changes = {"optim": optim, "weight_decay": 0.1, "learning_rate": 2e-4}
    stock = tiny.build("bert-classifier")
    stock.classifier.bias.requires_grad_(False)
    stock_optimizer = Trainer(stock, arguments(tmp_path, TrainingArguments, **changes)).create_optimizer()

    model = converted()
    model.classifier.bias.requires_grad_(False)
    trainer = trainer_of(model, tmp_path, hardness_learning_rate=0.03, **changes)
    groups = trainer.create_optimizer().param_groups

    counts = Counter(id(p) for group in groups for p in group["params"])
    assert counts == Counter(id(p) for p in model.parameters() if p.requires_grad)
    assert all(model.get_submodule(site).unclipped_hardness.requires_grad for site in SITES)

    def named(of: nn.Module, group: dict[str, Any]) -> set[str]:
        names = {id(p): name for name, p in of.named_parameters()}
        return {names[id(p)] for p in group["params"]}

    assert [named(model, g) for g in groups[:-1]] == [named(stock, g) for g in stock_optimizer.param_groups]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(2e-4, 0.1), (2e-4, 0.0), (0.03, 0.0)]
    assert named(model, groups[-1]) == {f"{site}.unclipped_hardness" for site in SITES}
    assert type(trainer.optimizer) is type(stock_optimizer)
