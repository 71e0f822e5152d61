"""Runs that begin anew: `auto_find_batch_size` for want of memory, a second `train()`, a backbone that is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import SITES, Rows, arguments, converted
from transformers import Trainer, TrainingArguments

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training import switch

REFIT = {"max_steps": 8, "hardness_compensate": "least_squares", "hardness_switch_point": 0.5}
OUT = "CUDA out of memory. Tried to allocate 2.00 GiB."  # as torch says it


def run(folder: Path, cls: type[hlg.LambdaGELUTrainer] = hlg.LambdaGELUTrainer, **changes: Any) -> hlg.LambdaGELUTrainer:
    return cls(converted(), arguments(folder, **(REFIT | changes)), train_dataset=Rows())


class Small(hlg.LambdaGELUTrainer):
    """Memory is enough for four examples, as in training so in measuring."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        model.register_forward_pre_hook(self.allocate, with_kwargs=True)
        self.refused = 0

    def allocate(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > 4:
            self.refused += 1
            raise RuntimeError(OUT)


class OutOfMemoryAt(hlg.LambdaGELUTrainer):
    """Memory is out in training, once, after so many steps."""

    after = 6

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == self.after:
            self.after = -1
            raise RuntimeError(OUT)
        return super().compute_loss(*args, **kwargs)


def test_the_switch_takes_batches_that_fit(tmp_path: Path) -> None:
    """What memory was too small for at the first step is not tried again there."""
    found = run(tmp_path, Small, auto_find_batch_size=True)
    found.train()
    assert found.refused  # before a step was taken
    assert found.state.global_step == 8
    assert found.compensation is not None
    assert {site.rows for site in found.compensation.sites} == {32 * 11}  # all tokens, none of them twice


@pytest.mark.parametrize("changes", [{}, {"hardness_compensate": "none"}], ids=["refit", "ramp"])
def test_not_begun_anew_past_the_switch(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = run(tmp_path, OutOfMemoryAt, auto_find_batch_size=True, **changes)
    with pytest.raises(ValueError, match=r"begins the run anew with batches of \d, past its switch.*size=\d$"):
        found.train()
    learned = found.learned_hardness
    assert 1.0 <= min(learned.values()) <= max(learned.values()) < 2.0


def test_begun_anew_before_the_switch(tmp_path: Path) -> None:
    """λ goes on from where it was, as weights do, and is learned."""
    found = run(tmp_path, OutOfMemoryAt, auto_find_batch_size=True)
    found.after = 2
    found.train()
    assert found.has_switched
    assert found.state.global_step == 8
    assert max(found.learned_hardness.values()) < 2.0


@pytest.mark.parametrize("target", ["l1", "calibrated"])
def test_memory_that_is_out_at_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """The run ends, and says so, with the model as it was before the switch."""
    found = run(tmp_path, auto_find_batch_size=True, hardness_target=target)
    tried = []

    def out(model: Any, *args: Any, **kwargs: Any) -> None:
        tried.append(hlg.hardness_profile(model))
        raise RuntimeError(OUT)

    monkeypatch.setattr(switch, "refit_for_hard_gates" if target == "l1" else "calibrate_by", out)
    with pytest.raises(RuntimeError, match=r"the switch needs more memory than there is.*per_device_train_batch_size"):
        found.train()
    assert len(tried) == 1
    assert hlg.hardness_profile(found.model) == tried[0]


def test_a_second_run_of_a_hard_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is learned of λ: said at its start, and only there."""
    found = run(tmp_path)
    found.train()
    assert not [record for record in caplog.records if "already" in record.message]
    found.train()
    (told,) = [record.message for record in caplog.records if "already" in record.message]
    assert told.startswith("every λ is at its target already (an earlier run, or harden), the softest 159.")


@pytest.mark.parametrize("own", [True, False], ids=["LambdaGELUTrainer", "HardnessCallback"])
def test_a_backbone_frozen_after_convert(tmp_path: Path, caplog: pytest.LogCaptureFixture, own: bool) -> None:
    model = converted()
    model.bert.encoder.layer[0].requires_grad_(False)
    if own:
        hlg.LambdaGELUTrainer(model, arguments(tmp_path), train_dataset=Rows())
    else:
        stock = arguments(tmp_path, TrainingArguments, max_steps=1)
        optimizer = torch.optim.AdamW(hlg.parameter_groups(model), lr=1e-3)
        Trainer(
            model,
            stock,
            train_dataset=Rows(),
            optimizers=(optimizer, None),
            callbacks=[hlg.HardnessCallback(hardness_compensate="none")],
        ).train()
    (told,) = [record.message for record in caplog.records if "frozen" in record.message]
    assert told.startswith(f"λ of 1 sites is frozen, {SITES[0]} the first: it is not learned there")
