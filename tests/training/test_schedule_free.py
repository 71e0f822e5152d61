"""Schedule-free optimizers train at one point and evaluate at another: switch, ramp and checkpoints see the right one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.training import SITES, TARGET, Rows, StopAfterSaving, arguments, converted
from torch import Tensor, nn
from transformers import TrainerCallback

import hf_lambda_gelu as hlg

BETA = 0.9  # of all of them, by default: y = βx + (1 − β)z


def average(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """x, by the formula, of parameters that are y."""
    inner = optimizer.optimizer
    assert all(group["train_mode"] for group in inner.param_groups)
    return {name: (p - (1 - BETA) * inner.state[p]["z"]) / BETA for name, p in model.named_parameters() if p in inner.state}


class Watch(TrainerCallback):
    """Keeps x from before the callbacks of one step, all parameters from after them, and then stops all movement."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.before = average(kwargs["model"], kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.after = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}


def trainer_of(folder: Path, optim: str = "schedule_free_adamw", **changes: Any) -> hlg.LambdaGELUTrainer:
    options = {"optim": optim, "learning_rate": 1e-2, "hardness_learning_rate": 0.1, **changes}
    return hlg.LambdaGELUTrainer(
        converted(hardness=1.5), arguments(folder, **options), train_dataset=Rows(), eval_dataset=Rows(16, 1)
    )


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "schedule_free_sgd"])
def test_the_refit_stays(tmp_path: Path, optim: str) -> None:
    """It is of the averaged network, and with a rate of 0 from there on the network that is saved is that which it made."""
    trainer = trainer_of(
        tmp_path, optim, hardness_compensate="least_squares", hardness_switch_point=0.5, lr_scheduler_type="constant"
    )
    watch = Watch(10)
    trainer.add_callback(watch)
    trainer.train()
    trainer.save_model(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    refit = {f"{name}.{kind}" for name in ("bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense")
             for kind in ("weight", "bias")}  # fmt: skip
    for name, value in watch.after.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)
        if name not in refit and "hardness" not in name:
            torch.testing.assert_close(value, watch.before[name], rtol=1e-5, atol=1e-6)
    assert any((watch.after[name] - watch.before[name]).abs().max() > 1e-3 for name in refit)
    assert trainer.learned_hardness[SITES[0]] == pytest.approx(
        watch.before[f"{SITES[0]}.unclipped_hardness"].clamp(min=1.0).item(), rel=1e-5
    )
    for site in SITES:
        assert saved[f"{site}.unclipped_hardness"].item() == pytest.approx(TARGET, rel=1e-6)


def test_the_ramp_is_what_evaluation_sees(tmp_path: Path) -> None:
    """λ on the ramp, read in evaluation, is the schedule's, and the target at the end."""
    trainer = trainer_of(tmp_path, eval_strategy="no")
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["optimizer"].eval()
            seen.append(hlg.hardness_profile(kwargs["model"])[SITES[0]])
            kwargs["optimizer"].train()

    trainer.add_callback(Look())
    trainer.train()
    schedule = hlg.HardeningSchedule(20, 0.25, 0.1)
    start = trainer.learned_hardness[SITES[0]]
    assert seen[5:] == pytest.approx([schedule.hardness(step, start, TARGET) for step in range(6, 21)], rel=1e-5)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_saved_and_resumed(tmp_path: Path, strategy: str) -> None:
    """A checkpoint between evaluations holds x; a run that goes on from it ends as one that was not stopped, to the bit."""
    options = {"save_strategy": strategy, "save_steps": 4, "max_steps": 12, "hardness_switch_point": 0.75}
    found: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == 4:
                found.update(average(kwargs["model"], kwargs["optimizer"]))

    through = trainer_of(tmp_path / "a", **options)
    through.add_callback(Keep())
    through.train()
    for name, value in load_file(tmp_path / "a" / "checkpoint-4" / "model.safetensors").items():
        if name in found:
            torch.testing.assert_close(value, found[name], rtol=1e-5, atol=1e-6)
    stopped = trainer_of(tmp_path / "b", **options)
    stopped.add_callback(StopAfterSaving(4))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    again = trainer_of(tmp_path / "b", **options)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(through.model.parameters(), again.model.parameters(), strict=True))


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    """Loaded at the end, and evaluated once more: the optimizer's points of the last step do not get into it."""
    trainer = trainer_of(
        tmp_path, max_steps=8, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_relu_loss",
    )  # fmt: skip
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    trainer.evaluate()
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items() if name in best)
