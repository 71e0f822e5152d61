"""The refit at the switch (`hardness_compensate`), against `relu_ize` on a copy, uninterrupted runs and a second process."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.gloo_threads import WORKERS
from support.processes import in_fork
from support.training import (
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
    trainer_of,
)
from transformers import TrainerCallback

import hf_lambda_gelu as hlg

WEIGHTS = [f"bert.encoder.layer.{i}.output.dense.{kind}" for i in (0, 1) for kind in ("weight", "bias")]


class CopyBefore(TrainerCallback):
    """Keeps the model as it is after the step before the hardness callback sees it."""

    def __init__(self, step: int) -> None:
        self.step, self.model = step, None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.model = copy.deepcopy(model)


@pytest.mark.parametrize("method", ["bias", "least_squares"])
def test_the_model_after_the_switch_is_what_relu_ize_makes(tmp_path: Path, method: str) -> None:
    """All 32 examples in order, in batches of the run's size; nothing but the maps after the sites changes."""
    trainer = trainer_of(converted(hardness=1.5), tmp_path, hardness_compensate=method)
    before, after = CopyBefore(SWITCH), []
    trainer.add_callback(before)
    trainer.add_callback(At(lambda model: after.append(copy.deepcopy(model.state_dict()))))
    trainer.train()
    rows = Rows()
    batches = [{"input_ids": rows.tokens[i : i + 8], "labels": rows.labels[i : i + 8]} for i in range(0, 32, 8)]
    learned = hlg.hardness_profile(before.model)
    report = hlg.relu_ize(before.model, calibration=batches, compensate=method)
    expected, got = before.model.state_dict(), after[SWITCH - 1]
    for name, tensor in expected.items():
        assert torch.allclose(tensor, got[name], atol=1e-6), name
    refit = {s.name: s.method for s in trainer.compensation.sites}
    assert refit == {s.name: s.method for s in report.compensation.sites} == dict.fromkeys(SITES, method)
    assert trainer.learned_hardness == pytest.approx(learned)
    for site in SITES:
        log = logged(trainer, f"hardness/{site}")
        assert log[SWITCH] == pytest.approx(TARGET)  # at once
        assert log[SWITCH - 1] < 2.0
        assert log[STEPS] == pytest.approx(TARGET)
    assert not hlg.relu_ize(trainer.model).forced


def test_the_last_step_as_switch(tmp_path: Path) -> None:
    """Only a ramp needs room for its hold: a refit may come as late as one wants."""
    late = {"hardness_switch_point": (STEPS - 1) / STEPS, "hardness_hold": 0.5}
    with pytest.raises(ValueError, match="must not exceed 1"):
        arguments(tmp_path, **late)
    trainer = trainer_of(converted(), tmp_path, hardness_compensate="bias", **late)
    trainer.train()
    log = logged(trainer, f"hardness/{SITES[0]}")
    assert (log[STEPS - 1], log[STEPS]) == (pytest.approx(TARGET), pytest.approx(TARGET))
    assert log[STEPS - 2] < 2.0


def test_the_function_stays_where_a_jump_without_refit_changes_it(tmp_path: Path) -> None:
    """The outputs around the switch, on the training examples."""
    changes = {}
    for method in ("least_squares", "none"):
        trainer = trainer_of(converted(hardness=1.0), tmp_path, hardness_compensate=method, max_steps=SWITCH * 4)
        before, after = CopyBefore(SWITCH), []
        trainer.add_callback(before)
        trainer.add_callback(At(lambda model, after=after: after.append(copy.deepcopy(model))))
        trainer.train()
        jumped = after[SWITCH - 1].eval()
        tiny.set_hardness(jumped, TARGET)
        with torch.no_grad():
            first, second = (m.eval()(input_ids=Rows().tokens).logits for m in (before.model, jumped))
        changes[method] = float((first - second).norm() / first.norm())
    assert changes["least_squares"] < 0.5 * changes["none"]


def test_resuming_after_the_switch(tmp_path: Path) -> None:
    """An uninterrupted twin has the same λ and weights; the refit is not done again."""
    options = {"hardness_compensate": "least_squares", "save_strategy": "steps", "save_steps": 9}
    whole = trainer_of(converted(hardness=1.5), tmp_path / "whole", **options)
    whole.train()
    cut = trainer_of(converted(hardness=1.5), tmp_path / "cut", **options)
    cut.add_callback(StopAfterSaving(9))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = trainer_of(converted(seed=7), tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.compensation is None
    for (name, first), second in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_the_refit_disturbs_neither_data_nor_random_numbers(tmp_path: Path) -> None:
    """What the model is fed in training, with a data set and a collator that draw random numbers."""
    records = []
    for method in ("none", "least_squares"):
        fed: list[torch.Tensor] = []
        model = converted(hardness=1.5)
        model.register_forward_pre_hook(
            lambda m, args, kwargs, fed=fed: fed.append(kwargs["input_ids"]) if m.training else None, with_kwargs=True
        )
        args = arguments(tmp_path, hardness_compensate=method)
        hlg.LambdaGELUTrainer(model, args, train_dataset=NoisyRows(), data_collator=Masking()).train()
        records.append(torch.stack(fed))
    assert torch.equal(*records)


def test_no_parameter_is_added(tmp_path: Path) -> None:
    """The optimizer would not know it: Llama's maps are refit without the bias that relu_ize would give them."""
    model = tiny.build("llama")
    hlg.convert(model)
    names = [name for name, _ in model.named_parameters()]
    rows = [{"input_ids": t, "labels": t} for t in Rows().tokens]
    args = arguments(tmp_path, hardness_compensate="least_squares", max_steps=8)
    trainer = hlg.LambdaGELUTrainer(model, args, train_dataset=rows)
    trainer.train()
    assert [name for name, _ in model.named_parameters()] == names
    assert model.config.mlp_bias is False
    assert {site.method for site in trainer.compensation.sites} == {"least_squares"}


# `torchrun --nproc_per_node 2 script`, whose processes start as forks of the one that has imported transformers
_TORCHRUN = """
import runpy, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
place = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=0, start_method="fork", **place)
def script():
    runpy.run_path(sys.argv[1], run_name="__main__")
elastic_launch(config, script)()
"""
_TWO = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from scripts.finetuning import leave_process_group
from support.gloo_threads import check_none_is_left, gloo_workers
from support.training import Rows, arguments, converted
import copy
import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.hardening import refit_for_hard_gates
from hf_lambda_gelu.surgery.refit import dealt_batches, engine
from hf_lambda_gelu.training import callback
folder = Path({folder!r})
args = arguments(folder / "out", hardness_compensate="least_squares", max_steps=8, per_device_train_batch_size=4)
decide, refit, keep, apart, sizes = engine.decide, callback.refit_at_switch, dealt_batches.DealtBatches.keep, [], []
targets_apart = []
if args.process_index:  # what this process would decide is not asked for: the first one has the sums
    engine.decide = None
def kept(self, batches):
    keep(self, batches)
    sizes.append([self.team.size, self.sizes])
def compared(model, args, data):  # with one process on all batches, which no other is needed for
    alone = copy.deepcopy(model)
    report = refit(model, args, data)
    targets = callback.calibrated_targets(model, args, data)
    engine.decide = decide
    found = hlg.calibrate(model, data.batches(64)).targets(args.hardness_relative_tolerance)
    targets_apart.append(max(abs(targets[site] / found[site] - 1) for site in found))
    refit_for_hard_gates(alone, data.batches(300), "least_squares")
    for a, b in zip(alone.parameters(), model.parameters()):
        apart.append(float((a - b).double().norm() / a.double().norm()))
    return report
dealt_batches.DealtBatches.keep, callback.refit_at_switch = kept, compared
def main():  # a trainer at the module's level would outlive the process group
    trainer = hlg.LambdaGELUTrainer(converted(hardness=1.5), args, train_dataset=Rows())
    trainer.train()
    sums = {{name: float(t.double().sum()) for name, t in trainer.model.state_dict().items()}}
    record = [args.world_size, gloo_workers(), sizes[1:], targets_apart, apart, sums]
    (folder / f"rank{{args.process_index}}.json").write_text(json.dumps(record))
main()
leave_process_group()
check_none_is_left()
"""


def test_two_processes_go_on_with_the_same_weights(tmp_path: Path) -> None:
    """Each refits on half of the 32 examples: what one process finds on all of them, and the same bits on both."""
    script = tmp_path / "two.py"
    script.write_text(_TWO.format(folder=str(tmp_path)))
    done = in_fork(_TORCHRUN, str(script), env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first[:3] == [2, WORKERS, [[2, [4, 4, 4, 4]], [1, [4] * 8]]]
    assert first[3][0] < 1e-9
    assert max(first[4]) < 1e-6
    assert first == second
