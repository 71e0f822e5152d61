"""Trainers of other libraries joined with LambdaGELUTrainer: λ beside a twin, the switch, evaluation, resuming."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from support.training import At, StopAfterSaving, logged
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer

import hf_lambda_gelu as hlg
from scripts.matrix import trainers as matrix
from scripts.matrix.cells import Cell
from scripts.matrix.trainer_tasks import TASKS, TEXTS, classified, embedder

OTHERS = [name for name in TASKS if name != "Trainer"]


@pytest.fixture(autouse=True)
def one_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps the precision of the first run of a process; TRL sends no telemetry where it is tested."""
    monkeypatch.setenv("CI", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", matrix.TRAINERS)
def test_hardness_is_the_twins(name: str) -> None:
    """SGD without clipping hides no factor. The twin knows nothing of the package."""
    outcome = matrix.measure(Cell("SGD", "fp32", "one process", name))
    assert outcome.verdict == "equal", outcome
    assert outcome.figure is not None
    assert outcome.figure < 1e-6


def test_autocast_round_a_forward_that_names_no_part_of_it() -> None:
    """accelerate's wrapper, round one that runs its children by their order: the sites are what runs."""
    assert matrix.measure(Cell("SGD", "bf16", "one process", "SentenceTransformerTrainer")).verdict == "equal"


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_joined_arguments_keep_the_other_ones_defaults(name: str, ours_first: bool, tmp_path: Path) -> None:
    """All of them, whichever comes first: those of TrainingArguments stay where neither changes them."""
    other = TASKS[name].arguments

    @dataclass
    class Joined(*([hlg.LambdaGELUTrainingArguments, other] if ours_first else [other, hlg.LambdaGELUTrainingArguments])):
        logging_steps: float = 3

    got, expected = Joined(str(tmp_path), use_cpu=True), other(str(tmp_path), use_cpu=True, logging_steps=3)
    names = {field.name for field in fields(other)}
    assert {n: repr(getattr(got, n)) for n in names} == {n: repr(getattr(expected, n)) for n in names}
    with pytest.raises(ValueError, match="unknown hardness_target 'bogus'"):
        Joined(str(tmp_path), hardness_target="bogus")


class Prompts:
    """What the policy writes for a batch of prompts, as `calibration_inputs` of a trainer that generates."""

    def calibration_inputs(self: Any, batch: Any) -> Iterator[Any]:
        prompts = self.processing_class([row["prompt"] for row in batch], padding=True, return_tensors="pt")
        written = self.model.generate(**prompts.to(self.model.device), max_new_tokens=5)
        yield {"input_ids": written, "attention_mask": (written != self.processing_class.pad_token_id).long()}


def joined(name: str, model: nn.Module, folder: Path, given: dict[str, Any] | None = None, **changes: Any) -> Trainer:
    """The trainer of that name, joined with ours; it saves after each step."""
    task = TASKS[name]
    cls, arguments = matrix.joined(task)
    if name == "GRPOTrainer":
        cls = type(cls.__name__, (Prompts, cls), {})
    cell = Cell("SGD", "fp32", "one process", name)
    values = matrix.options(cell, task, str(folder)) | {"save_strategy": "steps", "save_steps": 1} | changes
    return cls(model=model, args=arguments(**values, hardness_learning_rate=0.5), **(task.given() | (given or {})))


@pytest.mark.parametrize("name", OTHERS)
def test_the_switch_and_resuming(name: str, tmp_path: Path) -> None:
    """Refit at step 3 of 6, on training batches; killed before it, the run ends as the uninterrupted one."""
    options = {"hardness_switch_point": 0.5}
    whole = joined(name, matrix.ours(TASKS[name].model()), tmp_path / "whole", **options, save_strategy="no")
    whole.train()
    assert whole.compensation is not None
    assert "least_squares" in {site.method for site in whole.compensation.sites}
    sites = list(hlg.hardness_sites(whole.model))
    expected = {key: logged(whole, key) for key in ("loss", *(f"hardness/{site}" for site in sites))}
    assert expected[f"hardness/{sites[0]}"][2] < 3.0
    assert expected[f"hardness/{sites[0]}"][3] > 100.0
    for step in (2, 4) if name == "SentenceTransformerTrainer" else (2,):  # that one loads its checkpoints itself
        folder = tmp_path / f"{step}"
        cut = joined(name, matrix.ours(TASKS[name].model()), folder, **options)
        cut.add_callback(StopAfterSaving(step))
        with pytest.raises(KeyboardInterrupt):
            cut.train()
        resumed = joined(name, matrix.ours(TASKS[name].model()), folder, **options)
        with torch.no_grad():
            for parameter in resumed.model.parameters():  # everything must come from the checkpoint
                parameter.add_(0.01)
        resumed.train(resume_from_checkpoint=True)
        assert {key: logged(resumed, key) for key in expected} == expected
        weights = whole.model.state_dict()
        assert not [k for k, value in resumed.model.state_dict().items() if not torch.equal(value, weights[k])]
    assert not hlg.relu_ize(whole.model).forced


def test_prompts_are_no_input_of_the_model(tmp_path: Path) -> None:
    """GRPO's training batches: said before the first step, with what to override."""
    cls, arguments = matrix.joined(TASKS["GRPOTrainer"])
    task, cell = TASKS["GRPOTrainer"], Cell("SGD", "fp32", "one process", "GRPOTrainer")
    model = matrix.ours(task.model())
    run = cls(model=model, args=arguments(**matrix.options(cell, task, str(tmp_path))), **task.given())
    with pytest.raises(hlg.CalibrationError, match=r"is a list: expected a mapping.*calibration_inputs"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("GRPOTrainer", {"use_vllm": True}, "use_vllm=True generates by vLLM, whose own models know no λ-GELU"),
        ("DPOTrainer", {"sync_ref_model": True}, r"ref_model, which has no λ: pass ref_model=copy\.deepcopy\(model\)"),
    ],
)
def test_what_cannot_work(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Refused when the trainer is made."""
    with pytest.raises(ValueError, match=message):
        joined(name, matrix.ours(TASKS[name].model()), tmp_path, **changes)


def test_a_reference_that_would_harden(tmp_path: Path) -> None:
    """With adapters TRL's reference is the model without them, λ included; what is computed beforehand has the first λ."""
    ramp = {"hardness_compensate": "none", "hardness_switch_point": 0.25}
    for how in ({}, {"precompute_ref_log_probs": True}):
        model = get_peft_model(TASKS["DPOTrainer"].model(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        hlg.convert(model)
        with nullcontext() if how else pytest.raises(ValueError, match=r"has its λ: .*precompute_ref_log_probs=True"):
            assert joined("DPOTrainer", model, tmp_path, {"ref_model": None}, **ramp, **how).ref_model is None


def test_a_reference_that_follows(tmp_path: Path) -> None:
    """With λ of its own it is mixed with the model, λ too."""
    model = matrix.ours(TASKS["DPOTrainer"].model())
    reference = copy.deepcopy(model)
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0, "save_strategy": "no"}
    run = joined("DPOTrainer", model, tmp_path, {"ref_model": reference}, hardness_switch_point=1.0, **options)
    seen: list[dict[str, float]] = []
    run.add_callback(At(lambda model: seen.append(hlg.hardness_profile(reference))))
    run.train()
    assert seen[3] == {site: logged(run, f"hardness/{site}")[4] for site in seen[3]}
    assert seen[3] != seen[0]


def evaluated(name: str, folder: Path, model: nn.Module, relu: bool, ours: bool = True) -> dict[str, float]:
    """The log line of an evaluation, without its timing."""
    task, given = TASKS[name], TASKS[name].given()
    given["eval_dataset"] = given["train_dataset"]
    if name == "SentenceTransformerTrainer":
        scores = [i * 7 % len(TEXTS) / len(TEXTS) for i in range(len(TEXTS))]
        given["evaluator"] = EmbeddingSimilarityEvaluator(TEXTS, TEXTS[::-1], scores, name="pairs")
    if ours:
        run = joined(name, model, folder, given, eval_relu=relu)
    else:
        cell = Cell("SGD", "fp32", "one process", name)
        args = task.arguments(**matrix.options(cell, task, str(folder)))
        run = task.trainer(model=model, args=args, **given)
    torch.manual_seed(5)
    run.evaluate()
    drawn = torch.rand(())  # the second evaluation takes no random numbers of the run's
    (entry,) = [entry for entry in run.state.log_history if "eval_loss" in entry]
    if name == "SentenceTransformerTrainer" and ours:  # what the evaluator has left for the model's card
        entry["card"] = list(run.model.model_card_data.eval_results_dict.values())
        assert entry["card"]
    timing = ("runtime", "_per_second", "step_time", "preparation_time")
    return {k: v for k, v in entry.items() if not k.endswith(timing)} | {"drawn": float(drawn)}


@pytest.mark.parametrize("name", OTHERS)
def test_metrics_of_two_evaluations(name: str, tmp_path: Path) -> None:
    """As λ-GELU what one evaluation alone gives; as ReLU what the library's own trainer gives of the ReLU network."""
    model = matrix.ours(TASKS[name].model())
    alone, both = (evaluated(name, tmp_path, copy.deepcopy(model), relu) for relu in (False, True))
    assert {key: value for key, value in both.items() if "eval_relu_" not in key} == alone
    relu = {key.replace("eval_relu_", "eval_"): value for key, value in both.items() if "eval_relu_" in key}
    assert "eval_loss" in relu
    if name in ("SFTTrainer", "DPOTrainer"):
        assert {"eval_mean_token_accuracy", "eval_rewards/accuracies"} & set(relu)
    if name == "GRPOTrainer":  # it samples: other random numbers, other completions
        assert "eval_reward" in relu
        return
    hlg.relu_ize(model, force=True)
    stock = evaluated(name, tmp_path, model, relu=False, ours=False)
    assert {key: stock[key] for key in relu} == pytest.approx(relu, rel=1e-5, abs=1e-6)
    assert abs(relu["eval_loss"] - both["eval_loss"]) > 1e-4 * abs(both["eval_loss"])  # the comparison can fail


class Once(IterableDataset):
    """A stream: what was read is gone."""

    def __init__(self) -> None:
        self.rows = iter(classified())

    def __iter__(self) -> Iterator[Any]:
        return self.rows


def test_a_stream_is_read_once(tmp_path: Path) -> None:
    """Its metrics as ReLU are those of a set of the same rows."""
    found = []
    for rows in (classified(), Once()):
        args = hlg.LambdaGELUTrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", include_for_metrics=["loss"], per_device_eval_batch_size=8
        )
        run = hlg.LambdaGELUTrainer(
            matrix.ours(TASKS["Trainer"].model()),
            args,
            eval_dataset=rows,
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        found.append({k: v for k, v in run.evaluate().items() if k.endswith(("loss", "accuracy"))})
    assert found[0] == found[1]
    assert len(found[0]) == 4


def test_a_sentence_transformer_outside_of_a_trainer(tmp_path: Path) -> None:
    """Measured and refit on what `preprocess` returns, as its inner model is on the same; saved, it is loaded as ReLU."""
    model = embedder()
    inner = copy.deepcopy(model[0].model)
    batches = [dict(model.preprocess(TEXTS[i : i + 8])) for i in range(0, len(TEXTS), 8)]
    smooth = model.encode(TEXTS, convert_to_tensor=True)
    hlg.convert(model)
    hlg.convert(inner)
    for site, expected in zip(hlg.calibrate(model, batches).sites, hlg.calibrate(inner, batches).sites, strict=True):
        assert site.name == f"0.model.{expected.name}"
        assert site.target_hardness(0.01) == pytest.approx(expected.target_hardness(0.01), rel=1e-6)
    for batch, message in (
        (TEXTS[:2], "is a list: expected a mapping"),
        ({"words": TEXTS[:2]}, "has words as a list: expected tensors"),
    ):
        with pytest.raises(hlg.CalibrationError, match=message):
            hlg.calibrate(model, [batch])
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert report.compensation is not None
    assert [site.target for site in report.compensation.sites] == ["stream"] * 2
    hlg.relu_ize(inner, calibration=batches, compensate="least_squares")
    for name, value in inner.state_dict().items():
        torch.testing.assert_close(model[0].model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    refit = model.encode(TEXTS, convert_to_tensor=True)
    assert float((refit - smooth).norm() / smooth.norm()) < 0.3
    model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert again[0].model.config.hidden_act == "relu"
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), refit)


def test_the_callback_in_a_trainer_of_another_library(tmp_path: Path) -> None:
    """SentenceTransformerTrainer as it is; the functions that split its batches are its own."""
    task = TASKS["SentenceTransformerTrainer"]
    model = matrix.ours(task.model())
    callback = hlg.HardnessCallback(
        hardness_switch_point=0.5, calibration_inputs=lambda batch: run.collect_features(batch)[0]
    )
    args = task.arguments(**matrix.options(Cell("SGD", "fp32", "one process", "ours"), task, str(tmp_path)))
    optimizers = (matrix.optimizer("SGD", model), None)
    run = task.trainer(model=model, args=args, callbacks=[callback], optimizers=optimizers, **task.given())
    run.train()
    twin = joined("SentenceTransformerTrainer", matrix.ours(task.model()), tmp_path / "twin", hardness_switch_point=0.5)
    twin.train()
    for key in ("loss", *(f"hardness/{site}" for site in hlg.hardness_sites(model))):
        assert logged(run, key) == logged(twin, key)
