"""A checkpoint that was not written to its end, or holds no numbers: named, and the last good one is taken."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from support.training import SITES, StopAfterSaving, converted, trained, trainer_of
from transformers import TrainerCallback

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training import resuming
from hf_lambda_gelu.training.resuming import last_good
from hf_lambda_gelu.training.whole_checkpoints import fault

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of 8 steps, uninterrupted, with its checkpoints of steps 2, 4 and 6; and the weights that it ended with."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = trained(converted(hardness=1.3), folder, **SAVING)
    shutil.rmtree(folder / "checkpoint-8")
    return folder, trainer.model.state_dict()


@pytest.fixture
def run(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "run")


def cut(name: str, keep: float) -> Callable[[Path], None]:
    """What a killed write leaves: the first part of a file."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return damage


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def spoilt(key: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[key].view(-1)[0] = math.nan
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def spoilt_state(folder: Path) -> None:
    state = json.loads((folder / "trainer_state.json").read_text())
    state["stateful_callbacks"]["HardeningCallback"]["attributes"]["at_switch"] = {SITES[1]: math.nan}
    (folder / "trainer_state.json").write_text(json.dumps(state))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (without("model.safetensors"), "model.safetensors is missing"),
    "weights cut": (cut("model.safetensors", 0.9), "model.safetensors has .* bytes, its header says"),
    "header cut": (cut("model.safetensors", 0.01), "model.safetensors is cut off"),
    "empty weights": (cut("model.safetensors", 0.0), "model.safetensors is cut off: it has 0 bytes"),
    "no optimizer": (without("optimizer.pt"), "optimizer.pt is missing"),
    "optimizer cut": (cut("optimizer.pt", 0.8), "optimizer.pt is cut off"),
    "empty optimizer": (cut("optimizer.pt", 0.0), "optimizer.pt is cut off"),
    "no scheduler": (without("scheduler.pt"), "scheduler.pt is missing"),
    "scheduler cut": (cut("scheduler.pt", 0.5), "scheduler.pt is cut off"),
    "no random state": (without("rng_state.pth"), "rng_state.pth is missing"),
    "random state cut": (cut("rng_state.pth", 0.5), "rng_state.pth is cut off"),
    "no state": (without("trainer_state.json"), "trainer_state.json is missing, which is written last"),
    "state cut": (cut("trainer_state.json", 0.7), "trainer_state.json is not JSON to its end"),
    "NaN λ": (spoilt(f"{SITES[1]}.unclipped_hardness"), rf"holds {SITES[1]}.unclipped_hardness with values"),
    "NaN bias": (spoilt("classifier.bias"), "holds classifier.bias with values that are no numbers"),
    "NaN in the state": (spoilt_state, rf"trainer_state.json holds λ = nan of {SITES[1]}"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_named(run: Path, name: str) -> None:
    """Asked for by its path, a broken checkpoint is refused, with the last good one, and the model stays as it was."""
    damage, message = DAMAGES[name]
    broken, trainer = run / "checkpoint-6", trainer_of(converted(seed=5), run, **SAVING)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    assert fault(broken) is None
    damage(broken)
    with pytest.raises(ValueError, match=f"cannot resume from '.*checkpoint-6': .*{message}.*is '.*checkpoint-4'"):
        trainer.train(resume_from_checkpoint=str(broken))
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    assert last_good(run) == run / "checkpoint-4"


@pytest.mark.parametrize("asked", [True, "True"])
def test_the_last_good_one_is_taken(
    finished: tuple[Path, Any], run: Path, asked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Two broken ones are named, and the run ends as the uninterrupted one, bit for bit, its checkpoints whole again."""
    cut("optimizer.pt", 0.5)(run / "checkpoint-6")
    without("trainer_state.json")(run / "checkpoint-4")
    trainer = trainer_of(converted(seed=5), run, **SAVING)
    trainer.train(resume_from_checkpoint=asked)
    for told in (
        "checkpoint-6 is broken (optimizer.pt",
        "checkpoint-4 is broken (trainer_state",
        "going on from checkpoint-2",
    ):
        assert told in caplog.text
    assert all(torch.equal(value, finished[1][key]) for key, value in trainer.model.state_dict().items())
    assert [fault(run / f"checkpoint-{step}") for step in (2, 4, 6, 8)] == [None] * 4


def test_no_good_one_is_left(run: Path) -> None:
    for step in (2, 4, 6):
        without("scheduler.pt")(run / f"checkpoint-{step}")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: checkpoint-6 is broken .*checkpoint-2 is broken"):
        trainer_of(converted(), run, **SAVING).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"there is no such folder; .* has no good one"):
        trainer_of(converted(), run, **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-7"))
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer_of(converted(), run / "elsewhere", **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_written_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it was: not taken for whole, with weights of one save and the optimizer of another."""
    trainer = trainer_of(converted(hardness=1.3), run, **SAVING)

    def killed(folder: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "trainer_state.json is missing" in str(fault(run / "checkpoint-2"))


def test_a_limit_to_checkpoints_keeps_the_last_good_one(run: Path) -> None:
    """Saved at another step than the broken one, which a Trainer keeps as the newest."""
    cut("optimizer.pt", 0.5)(run / "checkpoint-6")
    later = time.time() + 3600  # transformers goes by time, or by the numbers where times differ by less than a second
    os.utime(run / "checkpoint-6", (later, later))

    class SaveAtFive(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step == 5

    trainer = trainer_of(converted(seed=5), run, **SAVING, save_total_limit=1)
    trainer.add_callback(SaveAtFive())
    trainer.add_callback(StopAfterSaving(5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-5"]
    assert fault(run / "checkpoint-5") is None


def test_whole_ones_of_other_kinds(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not refused: shards, no optimizer at all, what FSDP and DeepSpeed write; refused where a part is missing."""
    folder = run / "checkpoint-6"
    weights = load_file(folder / "model.safetensors")

    model = converted()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert fault(folder) is None
    shards[1].unlink()
    assert f"{shards[1].name} is missing" in str(fault(folder))
    for each in (*folder.glob("model-*.safetensors"), folder / "model.safetensors.index.json"):
        each.unlink(missing_ok=True)

    dcp.save({"model": weights}, checkpoint_id=folder / "pytorch_model_fsdp_0")
    shutil.move(folder / "optimizer.pt", run / "optimizer.pt")
    dcp.save({"optimizer": weights}, checkpoint_id=folder / "optimizer_0")
    assert fault(folder) is None
    (folder / "optimizer_0" / ".metadata").unlink()
    assert "optimizer_0/.metadata is missing" in str(fault(folder))
    shutil.rmtree(folder / "optimizer_0")
    shutil.rmtree(folder / "pytorch_model_fsdp_0")

    (folder / "global_step6").mkdir()
    states = folder / "global_step6" / "mp_rank_00_model_states.pt"
    torch.save(weights, states)
    (folder / "latest").write_text("global_step6")
    (folder / "scheduler.pt").unlink()
    assert fault(folder) is None
    cut(states.name, 0.9)(states.parent)
    assert "mp_rank_00_model_states.pt is cut off" in str(fault(folder))
    shutil.rmtree(states.parent)
    assert "'latest' names 'global_step6'" in str(fault(folder))

    folder = run / "checkpoint-4"
    without("optimizer.pt", "scheduler.pt", "rng_state.pth")(folder)
    assert fault(folder) is None
    trainer_of(converted(hardness=1.3), run, max_steps=5).train(resume_from_checkpoint=str(folder))
    assert "checkpoint-4 holds no optimizer, no learning rate schedule and no random state" in caplog.text


def test_adapters(tmp_path: Path) -> None:
    """They, and λ beside them, are the weights of a checkpoint."""
    peft = pytest.importorskip("peft")

    def build() -> hlg.LambdaGELUTrainer:
        model = peft.get_peft_model(converted(), peft.LoraConfig(target_modules=["query"]))
        return trainer_of(model, tmp_path, **{**SAVING, "max_steps": 4})

    first = build()
    first.add_callback(StopAfterSaving(4))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert fault(tmp_path / "checkpoint-4") is None
    cut("adapter_model.safetensors", 0.9)(tmp_path / "checkpoint-4")
    again = build()
    again.train(resume_from_checkpoint=True)
    assert again._initial_global_step == 2
    shutil.copy(tmp_path / "checkpoint-2" / "lambda_gelu_hardness.safetensors", tmp_path)
    (tmp_path / "checkpoint-4" / "adapter_model.safetensors").unlink()
    assert "no other weights" in str(fault(tmp_path / "checkpoint-4"))


def test_several_processes_need_their_random_states(run: Path) -> None:
    """As many as have written it; others go on without, as transformers lets them."""
    folder = run / "checkpoint-6"
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    state = json.loads((folder / "trainer_state.json").read_text())
    state["stateful_callbacks"]["HardeningCallback"]["attributes"]["processes"] = 2
    (folder / "trainer_state.json").write_text(json.dumps(state))
    wants: Any = [
        SimpleNamespace(world_size=world, process_index=index) for world, index in ((2, 0), (2, 1), (4, 1), (1, 0))
    ]
    assert [fault(folder, each) for each in wants] == [
        None,
        "rng_state_1.pth is missing: the save of process 1 was not finished",
        None,
        None,
    ]


@pytest.mark.parametrize(("others", "chosen"), [([6, 4, 2], 6), ([4, 2], 4), ([2], 2), ([], None)])
def test_several_processes_take_the_same(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, others: list[int], chosen: int | None
) -> None:
    """The newest that is whole for each: of two processes, where another has its own disk, or lost its random state."""
    monkeypatch.setattr(resuming, "gather_object", lambda own: [*own, others])
    args: Any = SimpleNamespace(world_size=2, process_index=0, output_dir=str(run))
    if chosen is None:
        with pytest.raises(ValueError, match="is whole: other processes lack what is there"):
            resuming.checkpoint_to_resume(True, args)
        return
    assert resuming.checkpoint_to_resume(True, args) == str(run / f"checkpoint-{chosen}")
    assert ("checkpoint-6 is not whole for another process" in caplog.text) == (chosen < 6)
