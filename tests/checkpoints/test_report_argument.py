"""`report=`: what a card says of the substitution comes from the argument, and without it from what relu_ize left behind."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import CommitOperationAdd
from support.publishing import not_proven
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, TrainerState

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training import publish

HARDNESS = 200.0


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return BertForSequenceClassification(config).eval()


def hard(model: nn.Module, hardness: float = HARDNESS) -> nn.Module:
    hlg.convert(model)
    for site in hlg.hardness_sites(model).values():
        site.set_hardness(hardness)
    return model


@pytest.fixture
def substituted() -> tuple[PreTrainedModel, hlg.SubstitutionReport]:
    model = hard(tiny_bert())
    return model, hlg.relu_ize(model)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # drawing would take longer than all else


def again(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The same network as another object, on which relu_ize has left nothing."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def kept(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lambda_gelu.json").read_text(encoding="utf-8"))["substitution"]


def hardness_in_card(folder: Path) -> list[float]:
    """The λ column of the card's table of sites."""
    rows = [line.split("|") for line in (folder / "README.md").read_text(encoding="utf-8").splitlines() if "|" in line]
    return [float(cells[3]) for cells in rows if "intermediate" in cells[1]]


def test_the_report_is_written_for_a_model_that_carries_none(
    substituted: tuple[PreTrainedModel, hlg.SubstitutionReport], tmp_path: Path
) -> None:
    model, report = substituted
    other = again(model, tmp_path / "plain")
    without = hlg.save_relu_pretrained(other, tmp_path / "without")
    assert kept(without) is None
    assert hardness_in_card(without) == []
    given = hlg.save_relu_pretrained(other, tmp_path / "given", report=report)
    sites = {site["name"]: site["hardness"] for site in kept(given)["sites"]}
    names = [f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in range(2)]
    assert sites == pytest.approx(dict.fromkeys(names, HARDNESS), rel=1e-5)
    assert hardness_in_card(given) == [HARDNESS, HARDNESS]


def test_without_it_what_relu_ize_left_is_read(
    substituted: tuple[PreTrainedModel, hlg.SubstitutionReport], tmp_path: Path
) -> None:
    model, report = substituted
    left = hlg.save_relu_pretrained(model, tmp_path / "left")
    given = hlg.save_relu_pretrained(model, tmp_path / "given", report=report)
    assert kept(left) == kept(given)
    assert hardness_in_card(left) == [HARDNESS, HARDNESS]


def test_the_argument_goes_before_what_is_left(
    substituted: tuple[PreTrainedModel, hlg.SubstitutionReport], tmp_path: Path
) -> None:
    other = hlg.relu_ize(hard(tiny_bert(), 300.0))
    folder = hlg.save_relu_pretrained(substituted[0], tmp_path / "m", report=other)
    assert hardness_in_card(folder) == [300.0, 300.0]


@pytest.mark.parametrize(
    ("around", "inside"),
    [
        (lambda model: torch.compile(model, backend="eager"), "_orig_mod"),
        (nn.DataParallel, "module"),
        (AveragedModel, "module"),
    ],
)
def test_of_a_wrapped_model(around: Callable[[nn.Module], nn.Module], inside: str, tmp_path: Path) -> None:
    """The report is on the model in the wrapper, which is what can be saved, as the refusal of the wrapper says."""
    wrapper = around(tiny_bert())
    hlg.relu_ize(hard(wrapper))
    with pytest.raises(ValueError, match=rf"got \w+: pass model\.get_submodule\('{inside}'\)$"):
        hlg.save_relu_pretrained(wrapper, tmp_path / "m")
    model = getattr(wrapper, inside)
    assert hardness_in_card(hlg.save_relu_pretrained(model, tmp_path / "m")) == [HARDNESS, HARDNESS]


def test_of_a_model_with_more_around_it(tmp_path: Path) -> None:
    """What is in it is not all of it."""
    own = nn.ModuleDict({"bert": tiny_bert(), "head": nn.Linear(2, 2)})
    hlg.relu_ize(hard(own))
    with pytest.raises(ValueError, match=r"got ModuleDict: save its weights by safetensors\.torch\.save_model"):
        hlg.save_relu_pretrained(own, tmp_path / "m")


class Hub:
    """Takes what is uploaded, as files in memory."""

    token = "hf_none"

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def create_repo(self, *_: Any, **__: Any) -> None: ...

    def list_repo_files(self, *_: Any, **__: Any) -> list[str]:
        return [*self.files]

    def create_commit(self, operations: list[CommitOperationAdd], **_: Any) -> str:
        for operation in operations:
            with operation.as_file() as file:
                content = file.read()
            if operation.path_in_repo in ("lambda_gelu.json", "README.md"):
                self.files[operation.path_in_repo] = content.decode("utf-8")
        return "committed"


def test_it_is_published(
    substituted: tuple[PreTrainedModel, hlg.SubstitutionReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model, report = substituted
    hub = Hub()
    done = hlg.push_relu_to_hub(again(model, tmp_path / "plain"), "me/m", processor=(), report=report, api=hub)
    assert done == "committed"
    assert json.loads(hub.files["lambda_gelu.json"])["substitution"]["sites"] == report.to_dict()["sites"]
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]  # no temporary folder is left


def test_a_folder_has_its_report_already(
    substituted: tuple[PreTrainedModel, hlg.SubstitutionReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model, report = substituted
    folder, hub = hlg.save_relu_pretrained(model, tmp_path / "m"), Hub()
    with pytest.raises(ValueError, match="a saved folder is uploaded as it is"):
        hlg.push_relu_to_hub(folder, "me/m", processor=(), report=report, api=hub)
    assert not hub.files


def test_ctrl_c_while_uploading_leaves_nothing(
    substituted: tuple[PreTrainedModel, hlg.SubstitutionReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that no message names would be garbage; one that a PushError names stays."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    seen: dict[type[BaseException], Path] = {}
    for error in (KeyboardInterrupt, ConnectionError):
        hub = Hub()

        def refuse(error: type[BaseException] = error, **_: Any) -> str:
            (seen[error],) = tmp_path.glob("hf_lambda_gelu-scratch-*/m")
            raise error

        hub.create_commit = refuse  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else hlg.PushError):
            hlg.push_relu_to_hub(substituted[0], "me/m", processor=(), api=hub)
    assert not seen[KeyboardInterrupt].parent.exists()
    assert (seen[ConnectionError] / "model.safetensors").is_file()


def test_a_model_with_adapters_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's wrapper is no model of transformers, nor is it a folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    wrapped = peft.get_peft_model(tiny_bert(), peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(ValueError, match="merge_and_unload"):
        hlg.push_relu_to_hub(wrapped, "me/m", processor=(), api=Hub())
    with pytest.raises(ValueError, match="pass processor="):
        hlg.push_relu_to_hub(wrapped, "me/m", api=Hub())


def trainer_of(model: nn.Module) -> Any:
    """As much of a LambdaGELUTrainer as publishing reads."""
    arguments = hlg.LambdaGELUTrainingArguments("unused", report_to="none", use_cpu=True)
    evaluation = {"eval_relu_accuracy": 0.75, "eval_accuracy": 0.5, "eval_runtime": 1.0}
    return SimpleNamespace(
        args=arguments,
        model=model,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        state=TrainerState(global_step=3, log_history=[evaluation | {"step": 3}]),
        hub_model_id="me/m",
        processing_class=None,
        eval_dataset=None,
        train_dataset=None,
        learned_hardness=dict.fromkeys(hlg.hardness_sites(model), 1.5),
        compensation=None,
        hinges=None,
    )


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches push_relu_to_hub."""
    got: dict[str, Any] = {}

    def push(model: nn.Module, repo_id: str, **options: Any) -> None:
        got.update(options, model=model, repo_id=repo_id)

    monkeypatch.setattr(publish, "push_relu_to_hub", push)
    return got


def test_push_trained_hands_its_report_on(pushed: dict[str, Any]) -> None:
    """The merged model of PEFT is another object, which relu_ize has not seen; the trainer's own is as it was."""
    wrapped = peft.get_peft_model(tiny_bert(), peft.LoraConfig(target_modules=["query"], r=2))
    hard(wrapped)
    before = copy.deepcopy(wrapped.state_dict())
    publish.push_trained(trainer_of(wrapped), "message", hlg.CardDetails())
    assert isinstance(pushed["model"], BertForSequenceClassification)
    assert not hlg.hardness_sites(pushed["model"])
    assert list(pushed["report"].profile.values()) == pytest.approx([HARDNESS, HARDNESS], rel=1e-5)
    assert pushed["learned"] == dict.fromkeys(hlg.hardness_sites(wrapped), 1.5)
    assert len(hlg.hardness_sites(wrapped)) == 2
    assert all(torch.equal(tensor, wrapped.state_dict()[name]) for name, tensor in before.items())


def test_push_trained_takes_a_report_for_a_model_that_is_relu_already(
    substituted: tuple[PreTrainedModel, hlg.SubstitutionReport], tmp_path: Path, pushed: dict[str, Any]
) -> None:
    model, report = substituted
    publish.push_trained(trainer_of(again(model, tmp_path / "plain")), "message", hlg.CardDetails(), report=report)
    assert pushed["report"] is report
    assert pushed["details"].results == {"ReLU": {"accuracy": 0.75}}
    assert pushed["details"].arguments["hardness_tolerance"] == 0.005


def test_the_scripts_and_the_push_substitute_alike() -> None:
    """Soft gates are refused against the run's tolerance, or, calibrated, against its targets; `force` takes them."""
    model = hard(tiny_bert(), 100.0)
    trainer = trainer_of(model)
    with pytest.raises(hlg.SoftGateError, match=r"soft for tolerance 0\.005"):
        publish.substitute_trained(trainer, model)
    assert len(hlg.hardness_sites(model)) == 2
    trainer.args.hardness_target = "calibrated"
    trainer.hardness_targets = dict.fromkeys(hlg.hardness_sites(model), 90.0)
    soft = hard(tiny_bert(), 80.0)
    with pytest.raises(hlg.SoftGateError, match="soft for their targets"):
        publish.substitute_trained(trainer, soft)
    assert publish.substitute_trained(trainer, soft, force=True).forced
    assert not publish.substitute_trained(trainer, model).forced
    assert model.config.hidden_act == "relu"


def test_a_traceback_shows_no_token(
    substituted: tuple[PreTrainedModel, hlg.SubstitutionReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tools that print the variables of each frame, as pytest does, print none."""
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub = Hub()

    def refuse(**_: Any) -> str:
        raise ConnectionError

    hub.create_commit = refuse  # type: ignore[method-assign]
    with pytest.raises(hlg.PushError) as caught:
        hlg.push_relu_to_hub(substituted[0], "me/m", processor=(), folder=tmp_path / "m", token="hf_secret", api=hub)
    sender = next(entry for entry in caught.traceback if entry.name == "send")
    assert "me/m" in repr(sender.frame.f_locals["self"])
    assert "hf_secret" not in repr(sender.frame.f_locals["self"])
