"""DDP on four processes, FSDP2 and DeepSpeed's ZeRO, each against one process with the whole batch, by SGD without clipping.

One process imports everything and forks the ranks of one run after the other. The whole matrix, with AdamW and bf16, is
`python -m scripts.matrix.run --parts engines`.
"""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import in_fork

import hf_lambda_gelu as hlg

pytest.importorskip("deepspeed", reason="the extra `matrix` has it, on Linux")

PROBE = """
import json, os, pickle, sys
from functools import partial
from pathlib import Path

import torch

import hf_lambda_gelu as hlg
from scripts.matrix import engine_runs
from scripts.matrix.engine_runs import own_loop, with_trainer
from scripts.matrix.engine_setup import ENGINES, ONE, Rows, config_of, network, prepare
from scripts.matrix.ranks import RankError, on_ranks

folder, found = Path(sys.argv[1]), {}
ramp = {"hardness_compensate": "none"}


def run(name, engine, function, **options):
    # its last line where it raises
    try:
        found[name] = on_ranks(engine.processes, partial(function, engine, "SGD", "fp32", **options))
    except RankError as error:
        found[name] = str(error).strip().splitlines()[-1]


def refused(engine, optimizer, precision, rank):
    # no step is taken: the forward of a sharded model would wait for the other process
    model = network()
    forward, _, _ = engine_runs._engine(engine, optimizer, precision, model)
    before = hlg.hardness_profile(model)
    messages = []
    for verb in (hlg.harden, partial(hlg.relu_ize, compensate="bias")):
        try:
            verb(model, calibration=[Rows().batch(slice(8))])
        except ValueError as error:
            messages.append(str(error))
    return messages, hlg.hardness_profile(model) == before, repr(model)


def by_accelerate(engine, *arguments):
    # a config of accelerate's own: args.deepspeed is None
    config = folder / f"{arguments[-1]}.json"
    config.write_text(json.dumps(config_of(engine, "fp32")))
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    return with_trainer(ENGINES["DDP × 2"], *arguments)


def own_optimizer(engine, *arguments):
    config = config_of(engine, "fp32") | {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    return with_trainer(engine, *arguments, deepspeed=config)


prepare()
two, three = ENGINES["ZeRO-2 × 2"], ENGINES["ZeRO-3 × 2"]
run("loop", ONE, own_loop)
run("DDP", ENGINES["DDP × 4"], own_loop)
run("FSDP2", ENGINES["FSDP2 × 2"], own_loop)
run("ZeRO-1", ENGINES["ZeRO-1 × 2"], own_loop)
run("ZeRO-3 refused", three, refused)
run("trainer", ONE, with_trainer)
run("trainer, ramp", ONE, with_trainer, **ramp)
run("ZeRO-0", ENGINES["ZeRO-0 × 2"], with_trainer, folder=folder / "zero")
run("ZeRO-2", two, with_trainer, folder=folder / "two")
run("ZeRO-2 again", two, with_trainer, folder=folder / "two", resume=8)
run("ZeRO-3", three, with_trainer, folder=folder / "three")
run("ZeRO-3 again", three, with_trainer, folder=folder / "three", resume=4)
run("ZeRO-3 with a refit", three, by_accelerate)
run("own optimizer", two, own_optimizer)
run("FSDP on a CPU", ENGINES["FSDP2 × 2"], with_trainer)
(folder / "found.pickle").write_bytes(pickle.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """{name of a run: what each rank saw after every step}; the text of the error where it was refused."""
    folder = tmp_path_factory.mktemp("engines")
    # with that variable, accelerate drops DeepSpeed
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    done = in_fork(PROBE, str(folder), env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    records: dict[str, Any] = pickle.loads((folder / "found.pickle").read_bytes())
    return {**records, "folder": folder}


def check_equal(ranks: Any, twin: Any, skipped: int = 0) -> None:
    """λ of every site and the loss of a batch after every step, on every rank."""
    assert isinstance(ranks, list), ranks
    for rank in ranks:
        for one, other in zip(rank["hardness"], twin[0]["hardness"][skipped:], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        assert rank["loss"] == pytest.approx(twin[0]["loss"][skipped:], rel=1e-4)


def test_the_twins_learn_are_clipped_and_harden(found: dict[str, Any]) -> None:
    """Or the comparisons with them would show little."""
    for name in ("loop", "trainer", "trainer, ramp"):
        profiles = found[name][0]["hardness"]
        learned = [value for profile in profiles[:4] for value in profile.values()]
        assert 1.0 in learned
        assert max(learned) > 1.2
        assert all(value == pytest.approx(159.577, abs=1e-3) for value in profiles[-1].values())
    with_refit, without = found["trainer"][0]["loss"][-1], found["trainer, ramp"][0]["loss"][-1]
    assert abs(with_refit / without - 1.0) > 0.01


@pytest.mark.parametrize(("name", "twin"), [("DDP", "loop"), ("ZeRO-1", "loop"), ("FSDP2", "loop")])
def test_own_loops(found: dict[str, Any], name: str, twin: str) -> None:
    """With `harden` at the switch, of FSDP2's weights block by block; a refit that was undone would show in the losses."""
    check_equal(found[name], found[twin])


def test_a_sharded_model_is_saved_whole(found: dict[str, Any]) -> None:
    first = found["FSDP2"][0]
    saved = {name: value.item() for name, value in first["saved"].items() if name.endswith("unclipped_hardness")}
    assert saved == {f"{site}.unclipped_hardness": value for site, value in first["hardness"][-1].items()}


@pytest.mark.parametrize(("name", "twin"), [("ZeRO-0", "trainer"), ("ZeRO-2", "trainer"), ("ZeRO-3", "trainer, ramp")])
def test_the_trainer_on_deepspeed(found: dict[str, Any], name: str, twin: str) -> None:
    check_equal(found[name], found[twin])
    for rank in found[name]:
        assert rank["engine"] == "DeepSpeedEngine"
        logged = [{key.removeprefix("hardness/"): value for key, value in entry.items()} for entry in rank["logged"][:10]]
        assert logged == rank["hardness"]


@pytest.mark.parametrize(("name", "twin", "step"), [("ZeRO-2 again", "trainer", 8), ("ZeRO-3 again", "trainer, ramp", 4)])
def test_a_run_is_continued(found: dict[str, Any], name: str, twin: str, step: int) -> None:
    """From before the switch, and from after it with the weights that were refit."""
    check_equal(found[name], found[twin], step)


@pytest.mark.parametrize(("name", "step"), [("two", 8), ("three", 4)])
def test_a_checkpoint_holds_the_learned_hardness(found: dict[str, Any], name: str, step: int) -> None:
    """Of ZeRO-3 too, with `stage3_gather_16bit_weights_on_model_save`."""
    seen = found["ZeRO-2" if name == "two" else "ZeRO-3"][0]["hardness"][step - 1]
    saved = load_file(found["folder"] / name / f"checkpoint-{step}" / "model.safetensors")
    assert {site: max(saved[f"{site}.unclipped_hardness"].item(), 1.0) for site in seen} == seen


def test_refits_of_sharded_weights_are_refused(found: dict[str, Any]) -> None:
    """Before the first step, of a config of accelerate's own too; by the verbs, which leave the model as it was."""
    for messages, as_before, text in found["ZeRO-3 refused"]:
        assert len(messages) == 2
        for message in messages:
            assert "needs whole weights, which FSDP or DeepSpeed has cut up here" in message
            assert "set_hardness along a HardeningSchedule" in message
        assert as_before
        assert "hardness=sharded" in text
    assert "set hardness_compensate='none' and hardness_target='l1', for a ramp" in found["ZeRO-3 with a refit"]


def test_an_optimizer_of_deepspeeds_config_is_refused(found: dict[str, Any]) -> None:
    assert "λ is in a group with weights" in found["own optimizer"]
    assert "take 'optimizer' out of it" in found["own optimizer"]


def test_fsdp_that_accelerate_drops_is_refused(found: dict[str, Any]) -> None:
    assert "FSDP was asked for, and accelerate has not sharded the model" in found["FSDP on a CPU"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_hardness_in_half_precision_is_rounded_up(dtype: torch.dtype) -> None:
    """As DeepSpeed holds it in the module under bf16 and fp16: a gate that was set to its target would count as soft."""
    gate = hlg.LambdaGELU()
    gate.unclipped_hardness.data = gate.unclipped_hardness.data.to(dtype)
    for wanted in (1.0, 1.2345, 37.123, 159.577, 277.26):
        gate.set_hardness(wanted)
        assert gate.unclipped_hardness.dtype == dtype
        (found,) = hlg.hardness_profile(gate).values()
        assert wanted <= found <= wanted * (1.0 + torch.finfo(dtype).eps)
