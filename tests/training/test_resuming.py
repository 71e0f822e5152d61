"""A run that was killed and resumed is the uninterrupted run; checkpoints that do not fit are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.training import (
    HOLD,
    SITES,
    STEPS,
    SWITCH,
    Rows,
    StopAfterSaving,
    arguments,
    converted,
    logged,
    trained,
    trainer_of,
)
from transformers import PreTrainedModel, Trainer, TrainingArguments

import hf_lambda_gelu as hlg

RESUME = {"hardness_learning_rate": 0.05, "lr_scheduler_type": "cosine", "weight_decay": 0.01, "seed": 7}


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        # before the switch, also at an epoch's end; at it; in the ramp, also at an epoch's end; last of it; in the hold
        ({}, (2, 4, SWITCH, 9, 16, HOLD - 1, HOLD + 1)),
        (
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
            (2, 4, SWITCH, 9, 16, HOLD - 1, HOLD + 1),
        ),
        ({"hardness_target": "calibrated"}, (4, 9)),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, changes: dict[str, Any], stops: tuple[int, ...]) -> None:
    """Bit for bit, with shuffling and dropout: killed after a checkpoint, continued by a new trainer and a new model."""
    rows = Rows(28)  # 4 optimizer steps per epoch, the last one of a smaller batch

    def build(model: PreTrainedModel, folder: Path, **more: Any) -> hlg.LambdaGELUTrainer:
        return hlg.LambdaGELUTrainer(model, arguments(folder, **RESUME, **changes, **more), train_dataset=rows)

    twin = build(converted(hardness=1.3), tmp_path / "twin")
    twin.train()
    expected = twin.model.state_dict()
    assert len({*logged(twin, f"hardness/{SITES[0]}").values()}) == HOLD  # another λ after every step, until it is held

    for step in stops:
        folder = tmp_path / f"{step}"
        saving = {"save_strategy": "steps", "save_steps": step, "restore_callback_states_from_checkpoint": bool(step % 2)}
        interrupted = build(converted(hardness=1.3), folder, **saving)
        interrupted.add_callback(StopAfterSaving(step))
        with pytest.raises(KeyboardInterrupt):
            interrupted.train()

        resumed = build(converted(seed=99), folder, **saving)  # other weights: everything must come from the checkpoint
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == STEPS
        assert not [name for name, value in resumed.model.state_dict().items() if not torch.equal(value, expected[name])], (
            step
        )
        for key in ("loss", "grad_norm", *(f"hardness/{site}" for site in SITES)):
            assert logged(resumed, key) == logged(twin, key), (step, key)
        assert resumed.learned_hardness == twin.learned_hardness, step
        assert resumed.hardness_targets == twin.hardness_targets, step
        assert set(resumed.hardness_targets) == set(SITES)


def test_a_finished_run_resumes_to_its_end(tmp_path: Path) -> None:
    """Nothing is left to do, and nothing changes: λ is at the target, the learned λ is the one from the switch."""
    first = trained(converted(hardness=1.3), tmp_path, save_strategy="steps", save_steps=STEPS, **RESUME)
    again = trainer_of(converted(seed=99), tmp_path, **RESUME)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(v, first.model.state_dict()[k]) for k, v in again.model.state_dict().items())
    assert again.learned_hardness == first.learned_hardness


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    """Refused before a single weight is read, with the names; the model stays as it was, bit for bit."""

    def shorter(convert: bool) -> PreTrainedModel:
        model = tiny.build("bert-classifier")
        model.config.num_hidden_layers = 1
        model.bert.encoder.layer = model.bert.encoder.layer[:1]
        if convert:
            hlg.convert(model)
        return model

    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trained(shorter(True), tmp_path / "other", **saving)
    stock = arguments(tmp_path / "stock", TrainingArguments, **saving)
    Trainer(tiny.build("bert-classifier"), stock, train_dataset=Rows()).train()
    trained(converted(), tmp_path / "more", **saving)

    cases = [
        (converted(seed=1), "other", rf"holds λ for 1 sites, the model has 2.*only in the model: .*{SITES[1]}"),
        (converted(seed=1), "stock", rf"holds λ for 0 sites, the model has 2.*only in the model: .*{SITES[0]}"),
        (shorter(True), "more", rf"holds λ for 2 sites, the model has 1.*only in the checkpoint: .*{SITES[1]}"),
    ]
    for model, name, expected in cases:
        before = copy.deepcopy(model.state_dict())
        trainer = trainer_of(model, tmp_path / "new", **saving)
        with pytest.raises(ValueError, match=expected):
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    # λ of other sites in the state of the run, though the weights fit
    state = tmp_path / "more" / "checkpoint-2" / "trainer_state.json"
    record = json.loads(state.read_text())
    record["stateful_callbacks"]["HardeningCallback"]["attributes"]["at_switch"] = {"elsewhere": 2.0}
    state.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"was hardening \['elsewhere'\], the model has λ-GELU at"):
        trainer_of(converted(), tmp_path / "new").train(resume_from_checkpoint=str(state.parent))


def test_a_ramp_that_goes_on_as_a_refit(tmp_path: Path) -> None:
    """Past the switch nothing is refit any more: half-hard gates would be hard at once, and the network another."""
    saving = {"save_strategy": "steps", "save_steps": 9}
    first = trainer_of(converted(), tmp_path, **saving)
    first.add_callback(StopAfterSaving(9))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    reached = min(hlg.hardness_profile(first.model).values())
    again = trainer_of(converted(), tmp_path, hardness_compensate="bias", **saving)
    with pytest.raises(
        ValueError, match=rf"along hardness_ramp, with λ = {reached:.4g} at bert.*hardness_compensate='none'"
    ):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 9
