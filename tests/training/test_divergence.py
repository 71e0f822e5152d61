"""Losses and weights that are no numbers: the run stops with step, layer and value, and the last good checkpoint stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import SITES, Rows, arguments, converted
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training.divergence import LossWatch, broken_weights

Loss = Callable[[torch.Tensor], torch.Tensor]


def run(folder: Path, spoil: Loss, at: int, model: PreTrainedModel | None = None, **changes: Any) -> None:
    """Trains; the loss of the step that comes after step `at` is spoilt."""

    class Spoilt(hlg.LambdaGELUTrainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, *args, **kwargs)
            return spoil(loss) if model.training and self.state.global_step == at else loss

    args = arguments(folder, **{"max_steps": 12, "logging_steps": 2, **changes})
    Spoilt(model or converted(hardness=1.7), args, train_dataset=Rows(), eval_dataset=Rows(8, 1)).train()


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        # found at the next log, though transformers' logs hide the loss
        (
            lambda loss: loss * math.nan,
            {
                "hardness_compensate": "least_squares",
                "hardness_switch_point": 0.2,
                "save_strategy": "steps",
                "save_steps": 4,
            },
            rf"the loss of step 6 is nan; λ of {SITES[0]} is nan after step 6, 2 sites .*; \d+ weights .*good .*point-4\.",
        ),
        # the network is in order as yet
        (
            lambda loss: loss + math.inf,
            {"save_strategy": "steps", "save_steps": 4},
            "the loss of step 6 is inf; every λ and weight is still finite: look at the data of that step.*checkpoint-4",
        ),
        # found by what is saved at the end of an epoch of 4 steps
        (
            lambda loss: loss * math.inf,
            {"save_strategy": "epoch", "logging_strategy": "no", "hardness_switch_point": 1.0, "hardness_hold": 0.0},
            rf"the loss of step 6 is inf; λ of {SITES[0]} is nan after step 8, 2 sites.*checkpoint-4",
        ),
        # chosen for saving by the evaluation, after `on_step_end`
        (
            lambda loss: loss * math.nan,
            {
                "save_strategy": "best",
                "metric_for_best_model": "eval_samples_per_second",
                "eval_strategy": "steps",
                "eval_steps": 6,
                "logging_strategy": "no",
                "hardness_switch_point": 1.0,
                "hardness_hold": 0.0,
            },
            rf"the loss of step 6 is nan; λ of {SITES[0]} is nan after step 6.*no checkpoint was saved",
        ),
        # nothing is logged or saved until λ is to leave for its target
        (
            lambda loss: loss * math.nan,
            {"logging_strategy": "no", "hardness_switch_point": 0.75},
            rf"the loss of step 6 is nan; λ of {SITES[0]} is nan after step 9.*no checkpoint was saved",
        ),
        # nor until the end
        (
            lambda loss: loss * math.nan,
            {"logging_strategy": "no", "hardness_switch_point": 0.25},
            r"\d+ weights hold values that are no numbers after step 12, bert\.",
        ),
    ],
    ids=["after the switch", "a loss alone", "epoch", "best", "switch", "end"],
)
def test_a_loss_that_is_no_number(tmp_path: Path, spoil: Loss, changes: dict[str, Any], message: str) -> None:
    """Stopped before anything is saved, with the last good checkpoint, which save_total_limit has left."""
    with pytest.raises(FloatingPointError, match=message) as error:
        run(tmp_path, spoil, 5, save_total_limit=1, **changes)
    good = "checkpoint-4" in str(error.value)
    assert saved(tmp_path) == ["checkpoint-4"] * good
    assert "relu_ize" not in str(error.value)


def test_a_batch_without_a_label(tmp_path: Path) -> None:
    """Its mean is over nothing, NaN, its gradient 0: training goes on, as a stock Trainer's does."""

    class Unlabelled(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = super().__getitem__(index)
            return {**row, "labels": torch.full_like(row["labels"], -100)}

    model = converted(hardness=1.7)
    args = arguments(tmp_path, max_steps=2, hardness_switch_point=1.0, hardness_hold=0.0)
    trainer = hlg.LambdaGELUTrainer(model, args, train_dataset=Unlabelled())
    trainer.train()
    batch = {name: value[None] for name, value in Unlabelled()[0].items()}
    assert model(**batch).loss.isnan()
    assert not broken_weights(model)


def test_the_first_loss_is_kept() -> None:
    watch = LossWatch()
    assert watch.read() is None
    for step, value in enumerate((1.0, 2.0, math.inf, 3.0, math.nan), 1):
        watch.see(torch.tensor(value), step, {})
    assert watch.read() == (math.inf, 3)


def test_the_first_broken_weight_is_named() -> None:
    model = converted()
    assert broken_weights(model) == []
    for name in ("classifier.weight", "bert.encoder.layer.1.output.dense.bias"):
        model.get_parameter(name).data.view(-1)[3] = -math.inf
    assert broken_weights(model) == ["bert.encoder.layer.1.output.dense.bias", "classifier.weight"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_relu_for_a_network_that_has_diverged(value: float) -> None:
    """Refused, though NaN is not below any target; `relu_ize` is not what helps."""
    model = converted()
    hlg.hardness_sites(model)[SITES[1]].unclipped_hardness.data.fill_(value)
    for force in (False, True):
        with pytest.raises(ValueError, match=rf"λ of 1 of 2 sites is no number \({SITES[1]}: {value}\): training has div"):
            hlg.relu_ize(model, force)
    with pytest.raises(ValueError, match="got nan: it comes from a run that has diverged"):
        hlg.LambdaGELU(math.nan)
