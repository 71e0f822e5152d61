"""Evaluation with the gates as ReLU, against stock models; the best checkpoint by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.training import STEPS, At, Rows, arguments, converted, logged, stock_twin, trainer_of
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training.publish import own_evaluation, substitute_trained


@torch.no_grad()
def loss_and_accuracy(model: PreTrainedModel, rows: Rows) -> tuple[float, float]:
    logits = model(input_ids=rows.tokens).logits
    return float(F.cross_entropy(logits, rows.labels)), float((logits.argmax(-1) == rows.labels).float().mean())


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_eval_relu_metrics_are_those_of_a_relu_network(tmp_path: Path) -> None:
    """Against stock BERTs with the same weights, one with gelu and one with relu in its config, evaluated in one batch."""
    model = converted()
    sets = {"first": Rows(16, 1), "second": Rows(24, 2)}
    before = tiny.outputs(model, tiny.inputs(model))
    trainer = hlg.LambdaGELUTrainer(model, arguments(tmp_path), eval_dataset=sets, compute_metrics=accuracy)
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        for activation, prefix in (("gelu", ""), ("relu", "relu_")):
            loss, share = loss_and_accuracy(stock_twin(model, activation), rows)
            assert metrics[f"eval_{name}_{prefix}loss"] == pytest.approx(loss, rel=1e-5)
            assert metrics[f"eval_{name}_{prefix}accuracy"] == pytest.approx(share)
        assert abs(metrics[f"eval_{name}_loss"] - metrics[f"eval_{name}_relu_loss"]) > 1e-2  # the comparison can fail
    prediction = trainer.predict(sets["first"])
    assert prediction.metrics["test_relu_loss"] == pytest.approx(metrics["eval_first_relu_loss"])
    smooth = stock_twin(model, "gelu")(sets["first"].tokens).logits.detach()  # predictions are those of the smooth model
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), smooth, rtol=1e-5, atol=1e-6)
    assert tiny.relative_difference(before, tiny.outputs(model, tiny.inputs(model))) == 0.0

    trainer.args.eval_relu = False
    assert not [key for key in trainer.evaluate() if "relu" in key]


def test_gates_are_smooth_again_after_a_failing_evaluation(tmp_path: Path) -> None:
    """The outputs are compared, not the flags."""
    model = converted()
    before = tiny.outputs(model, tiny.inputs(model))
    calls = []

    def failing(prediction: EvalPrediction) -> dict[str, float]:
        calls.append(prediction)
        if len(calls) == 2:  # the second pass is the one with ReLU
            raise RuntimeError("metric failed")
        return {}

    trainer = hlg.LambdaGELUTrainer(model, arguments(tmp_path), eval_dataset=Rows(16, 1), compute_metrics=failing)
    with pytest.raises(RuntimeError, match="metric failed"):
        trainer.evaluate()
    assert tiny.relative_difference(before, tiny.outputs(model, tiny.inputs(model))) == 0.0


def test_best_checkpoint_by_the_relu_loss(tmp_path: Path) -> None:
    """The best checkpoint is found again from the files, by stock ReLU models with their weights."""
    rows = Rows(64, 1)
    args = arguments(
        tmp_path,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        hardness_switch_point=1.0,  # soft gates to the end, so that the smooth and the ReLU loss differ
        hardness_hold=0.0,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_relu_loss",
    )
    trainer = hlg.LambdaGELUTrainer(converted(seed=4), args, train_dataset=Rows(128), eval_dataset=rows)
    trainer.train()
    saved = {step: load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in range(2, STEPS + 1, 2)}
    relu = {step: loss_and_accuracy(stock_twin(trainer.model, "relu", weights), rows)[0] for step, weights in saved.items()}
    assert logged(trainer, "eval_relu_loss") == pytest.approx(relu, rel=1e-5)
    best = min(relu, key=relu.__getitem__)
    smooth = logged(trainer, "eval_loss")
    assert min(smooth, key=smooth.__getitem__) != best  # another choice than by the smooth loss
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert all(torch.equal(value, saved[best][name]) for name, value in trainer.model.state_dict().items())
    both = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert all("eval_relu_loss" in entry for entry in both)  # one log line, hence one event for the callbacks


@pytest.mark.parametrize("best", [False, True])
def test_what_a_card_says_was_measured_on_what_is_held(tmp_path: Path, best: bool) -> None:
    """The weights of the end, or the best checkpoint's, are evaluated once more; by then that evaluation counts."""
    args = arguments(
        tmp_path,
        learning_rate=2e-2,
        hardness_compensate="least_squares",
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=best,
        metric_for_best_model="eval_relu_loss",
    )
    trainer = hlg.LambdaGELUTrainer(converted(), args, train_dataset=Rows(), eval_dataset=Rows(16, 1))
    trainer.evaluate()
    trainer.train()
    assert trainer.state.best_global_step != trainer.state.global_step  # or both would be right
    told = own_evaluation(trainer)
    assert told == {"loss": pytest.approx(loss_and_accuracy(stock_twin(trainer.model, "relu"), Rows(16, 1))[0], rel=1e-4)}
    again = trainer.evaluate(Rows(24, 2))["eval_relu_loss"]
    assert own_evaluation(trainer) == {"loss": again}
    assert again != told["loss"]


def test_a_best_checkpoint_from_before_the_switch_was_not_refit(tmp_path: Path) -> None:
    """As finetuning does with one that is best as ReLU: the refit that came later is not in its weights."""
    trainer = trainer_of(converted(), tmp_path, max_steps=4, hardness_compensate="bias")
    trainer.train()
    assert trainer.compensation is not None
    soft = converted(hardness=1.2)
    assert substitute_trained(trainer, soft, force=True).compensation is None
    assert substitute_trained(trainer, trainer.model).compensation is trainer.compensation


def test_what_was_not_evaluated_is_not_told(tmp_path: Path) -> None:
    """An evaluation of an earlier step is of another network; of several sets each is told, as ReLU."""
    sets = {"a": Rows(16, 1), "b": Rows(16, 2)}
    trainer = hlg.LambdaGELUTrainer(converted(), arguments(tmp_path, max_steps=2), train_dataset=Rows(), eval_dataset=sets)
    trainer.add_callback(At(lambda model: trainer.evaluate(), 1))
    trainer.train()
    assert set(logged(trainer, "eval_a_relu_loss")) == {1}
    assert own_evaluation(trainer) == {}
    found = trainer.evaluate()
    assert own_evaluation(trainer) == {"a_loss": found["eval_a_relu_loss"], "b_loss": found["eval_b_relu_loss"]}


@pytest.mark.parametrize(
    ("metric", "warned"), [(None, True), ("eval_accuracy", True), ("eval_relu_accuracy", False), ("relu_loss", False)]
)
@pytest.mark.parametrize("chosen", [{"save_strategy": "steps", "load_best_model_at_end": True}, {"save_strategy": "best"}])
def test_warning_about_a_smooth_metric_for_the_best_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, metric: str | None, warned: bool, chosen: dict[str, Any]
) -> None:
    """A smooth metric is warned of before training, and the warning names the metric to take."""
    metric = "loss" if metric is None and "load_best_model_at_end" not in chosen else metric  # or Trainer refuses it
    trainer_of(converted(), tmp_path, eval_strategy="steps", metric_for_best_model=metric, **chosen)
    warnings = [record.getMessage() for record in caplog.records if "may choose a checkpoint" in record.getMessage()]
    assert len(warnings) == warned
    if warned:
        assert f"'eval_relu_{(metric or 'loss').removeprefix('eval_')}'" in warnings[0]
