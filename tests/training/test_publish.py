"""`LambdaGELUTrainer.push_to_hub` in a process whose Hub is the stand-in server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.hub_server import HubServer
from support.processes import in_fork
from support.publishing import TOKEN, run_stock

# Trains for four steps and pushes; with what the command line says.
PROGRAM = """
import json, sys
import torch
from support import tiny
import hf_lambda_gelu as hlg
from safetensors.torch import save_file
torch.set_num_threads(1)
options = json.loads(sys.argv[1])
model = tiny.build("bert-classifier")
hlg.convert(model)
rows = [{"input_ids": torch.arange(5 + i % 3, 13 + i % 3), "labels": i % 2} for i in range(16)]
args = hlg.LambdaGELUTrainingArguments(
    sys.argv[2] + "/my-run", max_steps=4, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
    push_to_hub=True,    hub_model_id="tester/my-model", eval_strategy="steps", eval_steps=2, seed=3, **options["arguments"],
)
metrics = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
trainer = hlg.LambdaGELUTrainer(model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
if options["train"]:
    trainer.train()
if options["save"]:
    trainer.save_model()
    sys.exit()
try:
    details = hlg.CardDetails(license="mit") if options["push"].get("relu", True) else None
    trainer.push_to_hub(**options["push"], **({"details": details} if details else {}))
except hlg.SoftGateError as error:
    print("SOFT", error)
assert len(hlg.hardness_sites(trainer.model)) == 2  # the model in memory is as it was
if not options["train"]:
    sys.exit()
last = [entry for entry in trainer.state.log_history if "eval_relu_accuracy" in entry][-1]
with torch.no_grad(), hlg.gates_as_relu(trainer.model):
    logits = trainer.model.eval()(input_ids=torch.stack([rows[0]["input_ids"]])).logits
save_file({"logits": logits}, sys.argv[2] + "/logits.safetensors")
print(json.dumps(last))
"""


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as server:
        yield server


def push(hub: HubServer, tmp_path: Path, arguments: dict, train: bool = True, save: bool = False, **push: object) -> str:
    options = json.dumps({"arguments": arguments, "train": train, "save": save, "push": push})
    process = in_fork(PROGRAM, options, str(tmp_path), env=hub.env(tmp_path / "home"))
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_the_relu_network(hub_server: HubServer, tmp_path: Path) -> None:
    """One commit with the ReLU network and its card; what stock transformers loads computes what was trained."""
    out = push(hub_server, tmp_path, {"hub_private_repo": True}, commit_message="Done", revision=None)
    measured = json.loads(out.splitlines()[-1])
    repo = hub_server.repos["tester/my-model"]
    assert repo.private
    assert [commit.summary for commit in repo.commits] == ["Done"]
    card = ModelCard(repo.files["README.md"].decode())
    assert (card.data.license, card.data.model_name) == ("mit", "tester/my-model")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"accuracy": measured["eval_relu_accuracy"], "loss": measured["eval_relu_loss"]}
    assert "- seed: 3" in card.text
    assert "- hardness_compensate: least_squares" in card.text
    record = json.loads(repo.files["lambda_gelu.json"])
    assert len(record["learned_hardness"]) == 2
    assert all(0.0 < value < 1.0 for value in record["substitution"]["zeros"].values())
    assert "% in the mean" in card.text
    before, after = record["substitution"]["metrics"]["loss"]
    assert before == pytest.approx(after, abs=1e-3)
    assert after == pytest.approx(measured["eval_relu_loss"], abs=1e-4)  # all 16 examples
    assert record["checks"]["largest_difference_of_outputs"] == 0.0
    assert record["checks"]["inputs"] == {"input_ids": [4, 8]}  # the first examples of the evaluation set, without labels
    assert TOKEN.encode() not in b"".join(repo.files.values())
    run_stock(
        hub_server,
        tmp_path / "other",
        """
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForSequenceClassification
        torch.set_num_threads(1)
        model = AutoModelForSequenceClassification.from_pretrained("tester/my-model")
        assert model.config.hidden_act == "relu"
        with torch.no_grad():
            save_file({"logits": model(input_ids=torch.arange(5, 13)[None]).logits}, sys.argv[1])
        """,
        str(tmp_path / "stock.safetensors"),
    )
    stock, trained = (load_file(tmp_path / f"{name}.safetensors")["logits"] for name in ("stock", "logits"))
    assert float((stock - trained).abs().max()) < 1e-6


def test_with_its_hardness(hub_server: HubServer, tmp_path: Path) -> None:
    """`relu=False`: λ-GELU and Trainer's own card, tagged."""
    push(hub_server, tmp_path, {}, relu=False, tags="mine")
    files = hub_server.repos["tester/my-model"].files
    assert json.loads(files["config.json"])["hidden_act"] == "lambda_gelu"
    assert b"unclipped_hardness" in files["model.safetensors"]
    tags = ModelCard(files["README.md"].decode()).data.tags
    assert {"mine", "lambda-gelu", "arxiv:2603.21991"} <= set(tags)
    assert "relu" not in tags


def test_soft_gates(hub_server: HubServer, tmp_path: Path) -> None:
    """A run that has not hardened its gates publishes nothing."""
    out = push(hub_server, tmp_path, {}, train=False)
    assert "SOFT 2 of 2 gates are soft" in out
    assert not hub_server.repos["tester/my-model"].commits


def test_what_is_saved_is_what_goes_up(hub_server: HubServer, tmp_path: Path) -> None:
    """`save_model` of a run with `push_to_hub=True` pushes what it saves, as Trainer's does: λ-GELU, soft here."""
    push(hub_server, tmp_path, {}, train=False, save=True)
    repo = hub_server.repos["tester/my-model"]
    assert [commit.summary for commit in repo.commits] == ["Model save"]
    assert json.loads(repo.files["config.json"])["hidden_act"] == "lambda_gelu"
    assert repo.files["model.safetensors"] == (tmp_path / "my-run" / "model.safetensors").read_bytes()
