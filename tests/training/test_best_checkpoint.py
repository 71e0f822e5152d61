"""The best checkpoint at the end of a run, from before the switch and after it: the trainer says what the network is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.training import SITES, TARGET, Rows, StopAfterSaving, arguments, converted, trainer_of
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import hf_lambda_gelu as hlg

STEPS, SWITCH, BEFORE, AFTER = 8, 4, 2, 6
RUN: dict[str, Any] = {
    "max_steps": STEPS,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "greater_is_better": False,
}
REFIT: dict[str, Any] = {"hardness_compensate": "least_squares", "hardness_switch_point": SWITCH / STEPS}


class Prefers(TrainerCallback):
    """Has one step's metrics be the best, each later one worse: evaluated are the steps 2, 4, 6 and 8."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics[args.metric_for_best_model] = float(abs(state.global_step - self.step))


def run(folder: Path, best: int, seed: int = 0, **changes: Any) -> hlg.LambdaGELUTrainer:
    changes = RUN | REFIT | {"metric_for_best_model": "eval_relu_loss"} | changes
    trainer = trainer_of(converted(seed, hardness=1.5), folder, **changes)
    trainer.add_callback(Prefers(best))
    return trainer


def holds(trainer: Trainer, folder: Path) -> bool:
    """Whether its model is the checkpoint's, to the bit."""
    saved = load_file(folder / "model.safetensors")
    return all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())


def soft(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "gates soft" in record.getMessage()]


CHOICES: list[dict[str, Any]] = [
    {},
    {"save_total_limit": 1},
    {"save_strategy": "best"},
    {"callbacks": 1},  # EarlyStoppingCallback, which stops before the switch or at it
    {"callbacks": 2},
    {"metric_for_best_model": "eval_loss"},
]


@pytest.mark.parametrize("changes", CHOICES)
def test_from_before_the_switch(tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]) -> None:
    """The run was at its switch, but the network that is held was not: λ are those it has, and no refit is in it."""
    changes = dict(changes)
    patience = changes.pop("callbacks", None)
    trainer = run(tmp_path, BEFORE, **changes)
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
    trainer.train()
    folder = tmp_path / f"checkpoint-{BEFORE}"
    assert trainer.state.best_model_checkpoint == str(folder)
    assert holds(trainer, folder)
    profile = hlg.hardness_profile(trainer.model)
    assert max(profile.values()) < 2.0
    assert trainer.learned_hardness == profile
    assert not trainer.has_switched
    assert trainer.compensation is None
    (said,) = soft(caplog)
    assert f"load_best_model_at_end brought back checkpoint-{BEFORE}, with 2 of 2 gates soft, before the switch" in said
    assert "resume_from_checkpoint" not in said, "there is nothing to resume"
    measured = "take what eval_relu_loss has measured by relu_ize(model, force=True)"
    assert (measured in said) == ("metric_for_best_model" not in changes)
    with pytest.raises(hlg.SoftGateError):
        hlg.relu_ize(trainer.model)
    trainer.save_state()
    stored = json.loads((tmp_path / "trainer_state.json").read_text())["stateful_callbacks"]["HardeningCallback"]
    assert stored["attributes"]["at_switch"] is None


def test_from_after_the_switch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is hard and refit, the one checkpoint that is left, and what a killed run that is resumed ends with too."""
    changes = {"save_total_limit": 1}
    twin = run(tmp_path / "twin", AFTER, **changes)
    twin.add_callback(EarlyStoppingCallback(1))
    twin.train()
    assert twin.state.global_step == STEPS
    cut = run(tmp_path / "cut", AFTER, **changes)
    cut.add_callback(StopAfterSaving(STEPS))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {f"checkpoint-{AFTER}", f"checkpoint-{STEPS}"}
    resumed = run(tmp_path / "cut", AFTER, seed=5, **changes)
    resumed.train(resume_from_checkpoint=True)
    for trainer, folder in ((twin, tmp_path / "twin"), (resumed, tmp_path / "cut")):
        assert [path.name for path in folder.iterdir()] == [f"checkpoint-{AFTER}"]
        assert holds(trainer, folder / f"checkpoint-{AFTER}")
        assert trainer.has_switched
        assert list(hlg.hardness_profile(trainer.model).values()) == pytest.approx([TARGET, TARGET])
        assert max(trainer.learned_hardness.values()) < 2.0
    assert twin.learned_hardness == resumed.learned_hardness
    assert twin.compensation is not None
    assert not soft(caplog)
    hlg.relu_ize(resumed.model)


def test_a_callback_in_another_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """λ of the switch is not that of a network from before it; layers that become wider cannot go back there."""
    model = converted(hardness=1.5)
    changes = RUN | {"metric_for_best_model": "eval_loss"}

    def stock(folder: str, **options: Any) -> tuple[Trainer, hlg.HardnessCallback]:
        callback = hlg.HardnessCallback(**REFIT, **options)
        optimizers = (torch.optim.AdamW(hlg.parameter_groups(model), lr=1e-3), None)
        args = arguments(tmp_path / folder, TrainingArguments, **changes)
        found = Trainer(model, args, train_dataset=Rows(), eval_dataset=Rows(16, 1), optimizers=optimizers)
        found.add_callback(callback)
        found.add_callback(Prefers(BEFORE))
        return found, callback

    wider, _ = stock("wider", hardness_hinges=2)
    with pytest.raises(ValueError, match="load_best_model_at_end=True may bring back a checkpoint from before the switch"):
        wider.train()
    assert wider.state.global_step == 0
    trainer, callback = stock("run")
    trainer.train()
    assert holds(trainer, tmp_path / "run" / f"checkpoint-{BEFORE}")
    assert (callback.learned_hardness, callback.compensation) == ({}, None)
    assert f"brought back checkpoint-{BEFORE}" in soft(caplog)[0]
    assert set(hlg.hardness_profile(model)) == set(SITES)
