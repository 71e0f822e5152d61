"""Targets of λ that are calibrated at the switch, against root finding on their definition."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import ndtr
from support.training import (
    HOLD,
    SITES,
    STEPS,
    SWITCH,
    TARGET,
    At,
    Masking,
    NoisyRows,
    Rows,
    StopAfterSaving,
    arguments,
    converted,
    logged,
    trained,
    trainer_of,
)
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.trainer_utils import RemoveColumnsCollator

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training.switch import SwitchData, calibrated_targets


def error_as_relu(x: np.ndarray, hardness: float) -> float:
    """Of x Φ(λx), relative to ReLU, root mean square."""
    relu = np.maximum(x, 0)
    return math.sqrt(((x * ndtr(hardness * x) - relu) ** 2).mean() / (relu**2).mean())


def test_calibrated_targets(tmp_path: Path) -> None:
    """From 64 of 100 rows, on the network at the switch: root finding on the definition, with what hooks see in a copy."""
    rows = Rows(100)
    copies: list[PreTrainedModel] = []
    args = arguments(tmp_path, hardness_target="calibrated", hardness_relative_tolerance=0.02, hardness_learning_rate=0.05)
    trainer = hlg.LambdaGELUTrainer(converted(hardness=1.5), args, train_dataset=rows)
    trainer.add_callback(At(lambda model: copies.append(copy.deepcopy(model)), SWITCH))
    assert trainer.hardness_targets == {}
    trainer.train()
    chosen = torch.tensor([k * 100 // 64 for k in range(64)])
    seen: dict[str, np.ndarray] = {}
    for site in SITES:
        copies[0].get_submodule(site).register_forward_pre_hook(
            lambda _, args, site=site: seen.update({site: args[0].double().numpy().ravel()})
        )
    with torch.no_grad():
        copies[0].eval()(rows.tokens[chosen])
    targets = trainer.hardness_targets
    for site in SITES:
        expected = brentq(lambda h, x=seen[site]: error_as_relu(x, h) - 0.02, 1.0, 1e4)
        assert targets[site] == pytest.approx(expected, rel=2e-3)
        log, start = logged(trainer, f"hardness/{site}"), trainer.learned_hardness[site]
        assert start == log[SWITCH] < 2.0
        for step in range(SWITCH, STEPS + 1):
            progress = min(1.0, (step - SWITCH) / (HOLD - SWITCH))
            assert log[step] == pytest.approx(start ** (1 - progress) * targets[site] ** progress, rel=2e-6), step
    assert abs(targets[SITES[0]] / targets[SITES[1]] - 1) > 0.01


def test_calibrating_disturbs_neither_data_nor_random_numbers(tmp_path: Path) -> None:
    """Shuffling, dropout, a data set and a collator that draw: what the model is fed and the states after every step."""
    records = []
    for target in ("l1", "calibrated"):
        fed: list[Tensor] = []
        states: list[Any] = []
        model = converted(hardness=1.5)
        model.register_forward_pre_hook(
            lambda m, args, kwargs, fed=fed: fed.append(kwargs["input_ids"]) if m.training else None, with_kwargs=True
        )
        args = arguments(tmp_path, hardness_target=target)
        trainer = hlg.LambdaGELUTrainer(model, args, train_dataset=NoisyRows(), data_collator=Masking())
        trainer.add_callback(
            At(lambda _, s=states: s.append((random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())))
        )
        trainer.train()
        records.append((torch.stack(fed), states, trainer))
    assert torch.equal(records[0][0], records[1][0])
    assert records[0][1] == records[1][1]
    first, second = (record[2] for record in records)
    assert first.hardness_targets == dict.fromkeys(SITES, pytest.approx(TARGET))
    assert logged(first)[SWITCH + 1] == logged(second)[SWITCH + 1]
    assert logged(first)[SWITCH + 2] != logged(second)[SWITCH + 2]


def test_calibrated_targets_do_not_depend_on_the_random_state() -> None:
    """So all processes measure the same, wherever their random numbers stand."""
    model, collator = converted(), Masking()
    found = []
    for seed in (1, 2):
        for generator in (torch, np.random, random):
            (getattr(generator, "manual_seed", None) or generator.seed)(seed)
        model.train(seed == 2)
        args = hlg.LambdaGELUTrainingArguments(use_cpu=True)
        wrapped = RemoveColumnsCollator(collator, ["input_ids", "labels"])
        found.append(calibrated_targets(model, args, SwitchData(NoisyRows(), wrapped, lambda batch: [batch], 8)))
    assert found[0] == found[1]
    assert torch.equal(collator.generator.get_state(), Masking().generator.get_state())


def test_a_calibrated_target_below_the_learned_hardness(tmp_path: Path) -> None:
    """λ stays what was learned: a ramp never goes down."""
    trainer = trained(
        converted(hardness=1.5), tmp_path, hardness_target="calibrated", hardness_relative_tolerance=10.0, max_steps=8
    )
    assert trainer.hardness_targets == dict.fromkeys(SITES, 1.0)
    assert hlg.hardness_profile(trainer.model) == pytest.approx(trainer.learned_hardness, rel=1e-6)
    assert min(trainer.learned_hardness.values()) > 1.3


def test_calibrated_targets_of_a_ramp_from_the_start(tmp_path: Path) -> None:
    """Columns that the model does not take are left out of a `datasets` set too; a second `train()` measures again."""
    rows = Rows()
    words = [[0] * index for index in range(32)]
    data = datasets.Dataset.from_dict({"input_ids": rows.tokens.tolist(), "labels": rows.labels.tolist(), "words": words})
    args = arguments(tmp_path, hardness_target="calibrated", hardness_switch_point=0.0, max_steps=2, learning_rate=0.5)
    trainer = hlg.LambdaGELUTrainer(converted(), args, train_dataset=data)
    expected = hlg.calibrate(trainer.model, [{"input_ids": rows.tokens}]).targets()
    trainer.train()
    first = trainer.hardness_targets
    assert first == pytest.approx(expected, rel=2e-3)
    trainer.train()
    assert max(abs(trainer.hardness_targets[site] / first[site] - 1) for site in SITES) > 0.05


def test_calibrated_targets_and_checkpoints(tmp_path: Path) -> None:
    """A checkpoint in the ramp holds the targets; that of an ℓ1 run does not, and they are measured on resuming."""
    saving = {"save_strategy": "steps", "save_steps": 9}
    for name in ("calibrated", "l1"):
        trainer = trainer_of(converted(hardness=1.5), tmp_path / name, hardness_target=name, **saving)
        trainer.add_callback(StopAfterSaving(9))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        text = (tmp_path / name / "checkpoint-9" / "trainer_state.json").read_text()
        kept = json.loads(text)["stateful_callbacks"]["HardeningCallback"]["attributes"]
        assert kept == {
            "at_switch": trainer.learned_hardness,
            "calibrated": None if name == "l1" else trainer.hardness_targets,
            "hinges": None,
            "ramped": True,
            "processes": 1,
        }

    resumed = trainer_of(converted(seed=9), tmp_path / "l1", hardness_target="calibrated", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.learned_hardness == trainer.learned_hardness
    assert all(2.0 < resumed.hardness_targets[site] < 100.0 for site in SITES)
    reached = {site: logged(trainer, f"hardness/{site}")[9] for site in SITES}  # a resumed run makes no gate softer
    expected = {site: max(target, reached[site]) for site, target in resumed.hardness_targets.items()}
    assert hlg.hardness_profile(resumed.model) == pytest.approx(expected, rel=1e-5)


def test_training_sets_that_cannot_be_indexed(tmp_path: Path) -> None:
    """Refused before the first step, and only if they are needed."""

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            rows = Rows(64)
            return (rows[index] for index in range(64))

    for target in ("l1", "calibrated"):
        args = arguments(tmp_path, hardness_target=target, max_steps=2)
        trainer = hlg.LambdaGELUTrainer(converted(), args, train_dataset=Stream())
        if target == "l1":
            trainer.train()
        else:
            with pytest.raises(ValueError, match=r"take examples by their index, .* is a Stream without length or index"):
                trainer.train()
            assert trainer.state.global_step == 0
