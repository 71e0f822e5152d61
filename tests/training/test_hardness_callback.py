"""`HardnessCallback` in a stock Trainer: to the bit what `LambdaGELUTrainer` does, also after a kill; else refused."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.training import SITES, At, Rows, StopAfterSaving, arguments, converted, logged
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_lambda_gelu as hlg

STEPS = 12
RUN: dict[str, Any] = {"max_steps": STEPS, "seed": 7, "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2}
RATE = 0.05
RAMP: dict[str, Any] = {"hardness_compensate": "none", "hardness_switch_point": 0.25}
SWITCHES = [
    RAMP,
    {"hardness_compensate": "least_squares", "hardness_switch_point": 0.5},
    RAMP | {"hardness_target": "calibrated"},
]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Without clipping it hides no factor in a gradient."""
    return torch.optim.SGD(hlg.parameter_groups(model, RATE), lr=0.01, momentum=0.9)


def stock(model: nn.Module, folder: Path, callback: TrainerCallback, optimizer: Any = None, **changes: Any) -> Trainer:
    """transformers' own Trainer, with the callback."""
    args = arguments(folder, TrainingArguments, **(RUN | {"max_grad_norm": 0.0} | changes))
    optimizers = (sgd(model) if optimizer is None else optimizer, None)
    return Trainer(model, args, train_dataset=Rows(28), optimizers=optimizers, callbacks=[callback])


@pytest.mark.parametrize("switch", SWITCHES, ids=["ramp", "refit", "calibrated"])
def test_it_does_what_the_trainer_does(tmp_path: Path, switch: dict[str, Any]) -> None:
    """λ, losses and weights, bit for bit; killed before, at and after the switch, and resumed by a new model."""
    model = converted(hardness=1.3)
    twin = hlg.LambdaGELUTrainer(
        model,
        arguments(tmp_path / "twin", **(RUN | {"max_grad_norm": 0.0} | switch)),
        train_dataset=Rows(28),
        optimizers=(sgd(model), None),
    )
    twin.train()
    expected = model.state_dict()

    def same(run: Trainer, callback: hlg.HardnessCallback) -> None:
        for key in ("loss", "grad_norm", *(f"hardness/{site}" for site in SITES)):
            assert logged(run, key) == logged(twin, key), key
        assert not [name for name, value in run.model.state_dict().items() if not torch.equal(value, expected[name])]
        assert callback.learned_hardness == twin.learned_hardness

    callback = hlg.HardnessCallback(**switch)
    whole = stock(converted(hardness=1.3), tmp_path / "whole", callback)
    whole.train()
    same(whole, callback)
    assert len({*logged(whole, f"hardness/{SITES[0]}").values()}) >= 5
    assert (callback.compensation is None) == (switch["hardness_compensate"] == "none")
    assert callback.hardness_targets == twin.hardness_targets
    assert not hlg.relu_ize(whole.model, targets=callback.hardness_targets).forced

    at = int(STEPS * switch["hardness_switch_point"])
    for step in (at - 1, at, at + 3) if switch is RAMP else (at - 1, at):
        saving = {"save_strategy": "steps", "save_steps": step}
        cut = stock(converted(hardness=1.3), tmp_path / f"{step}", hlg.HardnessCallback(**switch), **saving)
        cut.add_callback(StopAfterSaving(step))
        with pytest.raises(KeyboardInterrupt):
            cut.train()
        callback = hlg.HardnessCallback(**switch)
        resumed = stock(converted(seed=99), tmp_path / f"{step}", callback, **saving)
        resumed.train(resume_from_checkpoint=True)
        same(resumed, callback)


def own_group(model: nn.Module, **values: Any) -> list[dict[str, Any]]:
    groups = hlg.parameter_groups(model, RATE)
    return [groups[0], groups[1] | values]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: None,
            r"λ of .* is in a parameter group with \d+ other parameters, learning rate 0.001 and weight decay 0:",
        ),
        (lambda m: torch.optim.AdamW(own_group(m, weight_decay=0.1)), "with 0 other parameters.*weight decay 0.1"),
        (lambda m: torch.optim.SGD(hlg.parameter_groups(m)[:1], lr=0.1), "is in no parameter group of the optimizer"),
    ],
    ids=["the Trainer's own", "decayed", "left out"],
)
def test_groups_that_would_learn_something_else(tmp_path: Path, make: Any, message: str) -> None:
    """Before the first step, with the line that helps."""
    model = converted(hardness=1.3)
    before = tiny.snapshot(model)["tensors"]
    args = arguments(tmp_path, TrainingArguments)
    run = Trainer(
        model, args, train_dataset=Rows(), optimizers=(make(model), None), callbacks=[hlg.HardnessCallback(**RAMP)]
    )
    with pytest.raises(ValueError, match=f"(?s){message}.*optimizers=.torch.optim.AdamW.hlg.parameter_groups"):
        run.train()
    assert run.state.global_step == 0
    assert tiny.snapshot(model)["tensors"] == before


def test_what_else_it_refuses(tmp_path: Path) -> None:
    """Settings out of range at once; at train begin a model without λ, the other way's arguments, batches of other names."""
    with pytest.raises(ValueError, match="unknown hardness_compensate 'bogus'"):
        hlg.HardnessCallback(hardness_compensate="bogus")
    with pytest.raises(ValueError, match="must not exceed 1"):
        hlg.HardnessCallback(hardness_compensate="none", hardness_switch_point=0.95)
    plain = tiny.build("bert-classifier")
    with pytest.raises(ValueError, match=r"has no λ-GELU: call hf_lambda_gelu\.convert"):
        stock(plain, tmp_path, hlg.HardnessCallback(), torch.optim.SGD(plain.parameters(), lr=0.1)).train()
    model = converted()
    run = Trainer(model, arguments(tmp_path), train_dataset=Rows(), callbacks=[hlg.HardnessCallback()])
    with pytest.raises(ValueError, match="LambdaGELUTrainer hardens by itself"):
        run.train()

    class Renamed(Rows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            row = super().__getitem__(index)
            return {"words": row["input_ids"], "labels": row["labels"]}

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = {"input_ids": inputs["words"], "labels": inputs["labels"]}
            return super().compute_loss(model, inputs, *args, **kwargs)

    def own(callback: TrainerCallback) -> Trainer:
        args = arguments(tmp_path, TrainingArguments, remove_unused_columns=False, max_steps=4)
        fresh = converted(hardness=1.3)
        return Own(fresh, args, train_dataset=Renamed(), optimizers=(sgd(fresh), None), callbacks=[callback])

    with pytest.raises(hlg.CalibrationError, match=r"switch at 0\.75 .*'words'.*or give HardnessCallback one"):
        own(hlg.HardnessCallback()).train()
    callback = hlg.HardnessCallback(calibration_inputs=lambda batch: [{"input_ids": batch["words"]}])
    own(callback).train()
    assert callback.compensation is not None
    assert [site.rows for site in callback.compensation.sites] == [32 * 11] * 2


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    """A model that was not given the checkpoint's λ, and a run that knew none."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    stock(converted(hardness=1.3), tmp_path / "run", hlg.HardnessCallback(**RAMP), **saving).train()
    folder = tmp_path / "run" / "checkpoint-2"
    record = json.loads((folder / "trainer_state.json").read_text())
    saved = record["stateful_callbacks"]["HardnessCallback"]["attributes"]["saved"]
    assert saved["step"] == 2
    assert set(saved["hardness"]) == set(SITES)
    saved["hardness"][SITES[1]] += 0.5  # as if the file of weights had not had this one
    (folder / "trainer_state.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"λ of {SITES[1]} is .*, in the checkpoint it was"):
        stock(converted(), tmp_path, hlg.HardnessCallback(**RAMP)).train(resume_from_checkpoint=str(folder))
    del record["stateful_callbacks"]["HardnessCallback"]
    (folder / "trainer_state.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="resumed at step 2 was trained without HardnessCallback"):
        stock(converted(), tmp_path, hlg.HardnessCallback(**RAMP)).train(resume_from_checkpoint=str(folder))


def test_callbacks_that_a_trainer_makes_anew(tmp_path: Path) -> None:
    """`restore_callback_states_from_checkpoint`: with its settings; a function cannot come back, and it says so."""
    values = RAMP | {"hardness_ramp": "linear"}
    saving = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": True, "max_steps": 8}
    for inputs in (None, lambda batch: [batch]):
        folder = tmp_path / f"{inputs is None}"
        first = stock(converted(hardness=1.3), folder, hlg.HardnessCallback(**values, calibration_inputs=inputs), **saving)
        first.train()
        again = stock(converted(), folder, hlg.HardnessCallback(**RAMP, calibration_inputs=inputs), **saving)
        if inputs is None:
            again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
            assert logged(again, f"hardness/{SITES[0]}") == logged(first, f"hardness/{SITES[0]}")
        else:
            with pytest.raises(ValueError, match="leave it False"):
                again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def opaque(self: Any, hidden_states: Tensor) -> Tensor:
    hidden_states = self.dense(hidden_states)
    return self.intermediate_act_fn(hidden_states) if hidden_states.dim() > 9 else F.gelu(hidden_states)


def test_a_kernel_in_the_place_of_a_site(tmp_path: Path) -> None:
    """Found after the first batches, before a weight has changed; its code does not tell."""
    model = converted()
    before = tiny.snapshot(model)["tensors"]
    block = model.bert.encoder.layer[1].intermediate
    block.forward = types.MethodType(opaque, block)
    with pytest.raises(ValueError, match=r"layer\.1\.intermediate\.intermediate_act_fn is not what runs.*λ would not"):
        stock(model, tmp_path, hlg.HardnessCallback(**RAMP)).train()
    assert tiny.snapshot(model)["tensors"] == before
    assert all(parameter.grad is None for parameter in model.parameters())


SAVING: list[dict[str, Any]] = [
    {"save_strategy": "steps", "save_steps": 2},
    {"save_strategy": "epoch"},
    {"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "loss"},
    {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"},
]


@pytest.mark.parametrize("saving", SAVING, ids=["steps", "epoch", "best of epochs", "best of steps"])
def test_whatever_says_when_to_save(tmp_path: Path, saving: dict[str, Any]) -> None:
    """Each checkpoint knows its λ, so that a model that lacks one is refused; λ that is no number is not saved."""

    def run(model: nn.Module, folder: Path, *callbacks: TrainerCallback) -> Trainer:
        # without an optimizer, whose groups would tell
        options = {"gradient_accumulation_steps": 1, "save_only_model": True, "logging_steps": 99}
        args = arguments(folder, TrainingArguments, **(RUN | options | saving))
        groups = (sgd(model), None)
        rows = {"train_dataset": Rows(16), "eval_dataset": Rows(8, 1)}  # two steps an epoch
        return Trainer(model, args, **rows, optimizers=groups, callbacks=[*callbacks, hlg.HardnessCallback(**RAMP)])

    cut = run(converted(hardness=1.3), tmp_path / "cut", StopAfterSaving(2))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    state = json.loads((tmp_path / "cut/checkpoint-2/trainer_state.json").read_text())
    saved = load_file(tmp_path / "cut/checkpoint-2/model.safetensors")
    stored = state["stateful_callbacks"]["HardnessCallback"]["attributes"]["saved"]
    assert stored["step"] == 2
    assert stored["hardness"] == {site: pytest.approx(float(saved[f"{site}.unclipped_hardness"])) for site in SITES}
    half = tiny.build("bert-classifier")
    hlg.convert(half)
    half.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.GELU()
    with pytest.raises(ValueError, match=f"λ of {SITES[1]} is not in the model, in the checkpoint it was 1."):
        run(half, tmp_path / "cut").train(resume_from_checkpoint=True)

    spoil = At(
        lambda model: [site.unclipped_hardness.data.fill_(float("nan")) for site in hlg.hardness_sites(model).values()], 2
    )
    diverged = run(converted(hardness=1.3), tmp_path / "diverged", spoil)
    with pytest.raises(FloatingPointError, match="is nan after step 2"):
        diverged.train()
    assert not list((tmp_path / "diverged").glob("checkpoint-*"))
