"""What a run looks at itself: λ in what is stepped, valid arguments, numbers, a network that stays hard and ends hard."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import SITES, TARGET, Rows, StopAfterSaving, arguments, converted, logged
from torch import nn
from transformers import Trainer, TrainerCallback

import hf_lambda_gelu as hlg

Make = Callable[[nn.Module], torch.optim.Optimizer]


def own_optimizer(make: Make) -> type[hlg.LambdaGELUTrainer]:
    """A trainer whose `create_optimizer` does not call that of its base."""

    class Own(hlg.LambdaGELUTrainer):
        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            self.optimizer = make(self.model)
            return self.optimizer

    return Own


def without_hardness(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "hardness" not in name]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: torch.optim.SGD(without_hardness(m), lr=0.1), "in none of the optimizer's groups"),
        (lambda m: torch.optim.AdamW(m.parameters(), lr=0.1), "in a group with weight decay 0.01"),
    ],
    ids=["left out", "decayed"],
)
def test_an_optimizer_that_hardness_is_not_in(tmp_path: Path, make: Make, message: str) -> None:
    """Refused before the first step."""
    model = converted(hardness=1.7)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        own_optimizer(make)(model, arguments(tmp_path), train_dataset=Rows()).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_optimizer_of_ones_own_keeps_hardness_above_one(tmp_path: Path) -> None:
    """A rate that throws λ far below 1 in a step: it is clipped there, as by the trainer's own optimizer."""

    class Softer(own_optimizer(lambda m: torch.optim.SGD(hlg.parameter_groups(m, 50.0), lr=0.0))):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return sum(site.hardness.sum() for site in hlg.hardness_sites(model).values())

    trainer = Softer(
        converted(hardness=1.7),
        arguments(tmp_path, max_steps=4, hardness_switch_point=1.0, hardness_hold=0.0),
        train_dataset=Rows(),
    )
    trainer.train()
    assert [logged(trainer, f"hardness/{SITES[0]}")[step] for step in (1, 2, 3)] == [1.0] * 3
    assert trainer.learned_hardness == dict.fromkeys(SITES, 1.0)
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks, "they are gone with the run"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("hardness_compensate", "bogus", "unknown hardness_compensate 'bogus'"), ("hardness_learning_rate", -1.0, "got -1.0")],
)
def test_arguments_that_were_set_later(tmp_path: Path, name: str, value: Any, message: str) -> None:
    """As a search for hyperparameters sets them."""
    trainer = hlg.LambdaGELUTrainer(converted(), arguments(tmp_path), train_dataset=Rows())
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_run_that_diverges(tmp_path: Path) -> None:
    """Stopped with step, layer and value, before a checkpoint of NaN is written; the last good one is named."""

    class Diverging(hlg.LambdaGELUTrainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, *args, **kwargs)
            return loss * math.nan if self.state.global_step == 4 else loss

    args = arguments(tmp_path, save_strategy="steps", save_steps=1, hardness_switch_point=0.5)
    with pytest.raises(FloatingPointError, match=rf"λ of {SITES[0]} is nan after step 5, 2 sites.*checkpoint-4"):
        Diverging(converted(hardness=1.7), args, train_dataset=Rows()).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("compensate", ["none", "least_squares"])
@pytest.mark.parametrize("steps", [60, 400])
def test_more_steps_after_the_switch(tmp_path: Path, compensate: str, steps: int) -> None:
    """Resumed for more steps than were meant, the network stays as hard as it was, and ends at its target."""
    options = {"hardness_compensate": compensate, "save_strategy": "steps", "save_steps": 16}
    model = converted(hardness=1.7)
    first = hlg.LambdaGELUTrainer(model, arguments(tmp_path, **options), train_dataset=Rows())
    first.add_callback(StopAfterSaving(16))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    reached = hlg.hardness_profile(model)
    assert min(reached.values()) > 10.0
    stop = arguments(tmp_path, **{**options, "save_strategy": "no", "max_steps": steps})
    more = hlg.LambdaGELUTrainer(converted(seed=3), stop, train_dataset=Rows())

    class Enough(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 60

    more.add_callback(Enough())
    more.train(resume_from_checkpoint=True)
    for site in SITES:
        values = list(logged(more, f"hardness/{site}").values())
        assert all(value >= reached[site] for value in values[16:])
        assert values[16:] == sorted(values[16:]) or compensate != "none"
        if steps == 60:
            assert values[-1] == pytest.approx(TARGET, rel=1e-6)


def test_a_run_that_ends_soft(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stopped before the switch; a run that goes through says nothing."""

    class Enough(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    for callbacks, soft in (([Enough()], True), ([], False)):
        caplog.clear()
        args = arguments(tmp_path, max_steps=8)
        hlg.LambdaGELUTrainer(converted(hardness=1.7), args, train_dataset=Rows(), callbacks=callbacks).train()
        assert ("training ended at step 3 of 8 with 2 of 2 gates soft" in caplog.text) == soft
        assert ("gates soft" in caplog.text) == soft


def test_a_base_with_its_arguments_in_another_order(tmp_path: Path) -> None:
    """As that of TRL's DPOTrainer, whose second argument is another model."""

    class Reordered(Trainer):
        def __init__(self, model: Any = None, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
            assert ref_model is None
            super().__init__(model=model, args=args, **kwargs)

    class Mixed(hlg.LambdaGELUTrainer, Reordered):
        pass

    trainer = Mixed(converted(), arguments(tmp_path, max_steps=2), train_dataset=Rows())
    trainer.train()
    assert set(hlg.hardness_profile(trainer.model)) == set(SITES)
