"""What trainers push while they train, or without a proof: the Hub then says nothing of another network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from support.hub_server import HubServer
from support.processes import in_fork
from support.publishing import TOKEN

NAME = "tester/my-model"
FORMER = {"README.md": b"# A ReLU network", "lambda_gelu.json": b"{}", "hardness_profile.png": b"png"}

# Trains for four steps, saving each second one, and pushes; with what the command line says.
PROGRAM = """
import json, sys
import torch
from support import tiny
import hf_lambda_gelu as hlg
from hf_lambda_gelu._compat import finish_current_push
from transformers import TrainerCallback, TrainingArguments
torch.set_num_threads(1)
options = json.loads(sys.argv[1])
model = tiny.build("bert-classifier")
rows = [{"input_ids": torch.arange(5 + i % 3, 13 + i % 3), "labels": i % 2} for i in range(16)]
arguments = {
    "output_dir": sys.argv[2] + "/my-run", "max_steps": 4, "save_steps": 2, "report_to": "none", "disable_tqdm": True,
    "use_cpu": True, "push_to_hub": True, "hub_model_id": "tester/my-model",
} | options["arguments"]
hlg.convert(model)
if options["student"]:
    hlg.relu_ize(model, force=True)
    args = TrainingArguments(**arguments)
    trainer = hlg.DistillationTrainer(model, args, teacher=tiny.build("bert-classifier"), train_dataset=rows)
else:
    args = hlg.LambdaGELUTrainingArguments(hardness_compensate="none", **arguments)
    if options["adapters"]:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(tiny.build("bert-classifier"), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        hlg.convert(model)
    trainer = hlg.LambdaGELUTrainer(model, args, train_dataset=rows)
class Waits(TrainerCallback):  # for each push, so that none is left out, and none sees the next one's files
    def on_save(self, args, state, control, **kwargs):
        finish_current_push(trainer)
trainer.add_callback(Waits())
trainer.train()
if options["push"] is not None:
    trainer.push_to_hub(**options["push"])
"""


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as server:
        yield server


def run(
    hub: HubServer,
    tmp_path: Path,
    student: bool = False,
    adapters: bool = False,
    push: dict | None = None,
    **arguments: object,
) -> str:
    """What the program says on stderr."""
    options = json.dumps({"arguments": arguments, "student": student, "adapters": adapters, "push": push})
    process = in_fork(PROGRAM, options, str(tmp_path), env=hub.env(tmp_path / "home"))
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stderr


@pytest.mark.parametrize("student", [False, True])
def test_the_card_of_a_former_network(hub_server: HubServer, tmp_path: Path, student: bool) -> None:
    """It goes before other weights come: smooth ones, and those of a student that has learned on."""
    repo = hub_server.add_repo(NAME, {**FORMER, "model.safetensors": b"former", "notes.md": b"mine"})
    said = run(hub_server, tmp_path, student)
    assert not set(FORMER) & set(repo.files)
    assert repo.files["notes.md"] == b"mine"
    assert repo.files["model.safetensors"] == (tmp_path / "my-run/checkpoint-4/model.safetensors").read_bytes()
    summaries = [commit.summary for commit in repo.commits]
    first = "Remove the card of the former ReLU network"
    assert summaries == [first, "Training in progress, step 2", "Training in progress, step 4"]
    assert f"{NAME} held a ReLU network" in said
    assert "was not pushed" not in said


@pytest.mark.parametrize("student", [False, True])
def test_the_card_goes_with_a_push_at_the_end_too(hub_server: HubServer, tmp_path: Path, student: bool) -> None:
    """What Trainer writes as a card of its own is there in its place, on the branch that is asked for."""
    repo = hub_server.add_repo(NAME, FORMER)
    repo.branches["smooth"] = repo.branches["main"]
    push = {"revision": "smooth", **({} if student else {"relu": False})}
    run(hub_server, tmp_path, student, push=push, hub_strategy="end")
    pushed = repo.snapshots[repo.resolve("smooth")]
    assert "lambda_gelu.json" not in pushed
    assert b"# A ReLU network" not in pushed["README.md"]
    assert set(FORMER) <= set(repo.files), "main stays as it is"


def test_a_card_of_ones_own(hub_server: HubServer, tmp_path: Path) -> None:
    """Without the record of a ReLU network the card is not this package's, and stays."""
    repo = hub_server.add_repo(NAME, {"README.md": b"# Mine"})
    run(hub_server, tmp_path)
    assert repo.files["README.md"] == b"# Mine"
    assert "model.safetensors" in repo.files


def test_adapters_come_with_their_hardness(hub_server: HubServer, tmp_path: Path) -> None:
    """Each push has the λ of its checkpoint, which lies in a file that Trainer does not know."""
    run(hub_server, tmp_path, adapters=True, hardness_switch_point=0.25, hardness_hold=0.0)
    repo = hub_server.repos[NAME]
    beside = "lambda_gelu_hardness.safetensors"
    for step, snapshot in zip((2, 4), list(repo.snapshots.values())[1:], strict=True):
        saved = (tmp_path / f"my-run/checkpoint-{step}" / beside).read_bytes()
        assert snapshot[beside] == saved
    values = [torch.stack(list(load(each[beside]).values())) for each in list(repo.snapshots.values())[1:]]
    assert bool((values[0] < values[1]).all()), "λ moved, so the second is not the first"


def test_a_push_that_fails_is_told(hub_server: HubServer, tmp_path: Path) -> None:
    """Of the upload and of the look at the repository before it; training goes on, and the next push is made."""
    hub_server.add_repo(NAME)
    hub_server.fail_next("POST", "/commit/main", 403)
    said = run(hub_server, tmp_path)
    assert f"checkpoint-2 was not pushed to {NAME}, and training goes on: " in said
    assert "403" in said
    assert "checkpoint-4 was not pushed" not in said
    repo = hub_server.repos[NAME]
    assert [commit.summary for commit in repo.commits] == ["Training in progress, step 4"]
    held = repo.add("main", {**repo.files, **FORMER})
    hub_server.fail_next("POST", "/commit/main", 403, times=2)  # the card cannot be removed
    said = run(hub_server, tmp_path)
    assert repo.branches["main"] == held, "no other weights beside the card"
    assert "checkpoint-2 was not pushed" in said
    assert "checkpoint-4 was not pushed" in said


def test_a_branch_that_is_not_there(hub_server: HubServer, tmp_path: Path) -> None:
    """It is made, as it is for the ReLU network."""
    said = run(hub_server, tmp_path, hub_revision="dev")
    repo = hub_server.repos[NAME]
    assert [commit.revision for commit in repo.commits] == ["dev", "dev"]
    assert "was not pushed" not in said
