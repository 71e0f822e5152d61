"""Training batches that the model's forward does not take as they are: found before the first step, or made into others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.models import converted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training import switch
from hf_lambda_gelu.training.publish import evaluation_sample


class Pairs(Dataset[dict[str, Tensor]]):
    """A query and a document, under names that no model's forward has."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {name: torch.randint(3, 99, (size,), generator=generator) for name, size in (("query", 6), ("document", 9))}


class Contrastive(hlg.LambdaGELUTrainer):
    """Its loss is of pairs."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        first, second = (model(input_ids=inputs[name]).logits for name in ("query", "document"))
        return F.mse_loss(first, second)


class Made(Contrastive):
    def calibration_inputs(self, batch: Any) -> Iterator[dict[str, Tensor]]:
        yield {"input_ids": batch["query"]}
        yield {"input_ids": batch["document"]}


def trainer(cls: type[hlg.LambdaGELUTrainer], folder: Path, **changes: Any) -> hlg.LambdaGELUTrainer:
    values = {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    arguments = hlg.LambdaGELUTrainingArguments(str(folder), remove_unused_columns=False, **(values | changes))
    return cls(converted("bert-classifier"), arguments, train_dataset=Pairs())


@pytest.mark.parametrize("changes", [{}, {"hardness_compensate": "none", "hardness_target": "calibrated"}])
def test_told_before_the_first_step(changes: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(Contrastive, tmp_path, **changes)
    before = tiny.snapshot(run.model)["tensors"]
    with pytest.raises(hlg.CalibrationError, match=r"switch at 0\.75 .*'query', 'document'.*calibration_inputs"):
        run.train()
    assert run.state.global_step == 0
    assert tiny.snapshot(run.model)["tensors"] == before


def test_not_needed_without_a_measured_switch(tmp_path: Path) -> None:
    run = trainer(Contrastive, tmp_path, hardness_compensate="none", hardness_target="l1")
    run.train()
    assert run.state.global_step == 4


def test_made_into_what_forward_takes(tmp_path: Path) -> None:
    """All 32 queries of 6 and documents of 9 tokens are what the refit sees."""
    run = trainer(Made, tmp_path)
    run.train()
    assert run.compensation is not None
    assert [site.rows for site in run.compensation.sites] == [32 * (6 + 9)] * 2


def test_made_for_what_a_substitution_changes(tmp_path: Path) -> None:
    """That is measured on examples of the evaluation set, which forward does not take as they are either."""
    run = trainer(Made, tmp_path)
    run.eval_dataset = Pairs()
    sample = evaluation_sample(run, 2)
    assert [batch["input_ids"].shape[1] for batch in sample or ()] == [6, 9, 6, 9]


def test_made_where_the_switch_comes_before_the_first_step(tmp_path: Path) -> None:
    run = trainer(Made, tmp_path, hardness_switch_point=0.0)
    run.train()
    assert run.compensation is not None
    assert [site.rows for site in run.compensation.sites] == [32 * (6 + 9)] * 2


def test_made_after_callbacks_were_restored(tmp_path: Path) -> None:
    """A second run of the same trainer, from before its switch, for which Trainer makes callbacks anew."""
    saving = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}
    run = trainer(Made, tmp_path, **saving)
    run.train()
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.compensation is not None
    assert [site.rows for site in run.compensation.sites] == [32 * (6 + 9)] * 2


class Gathers(hlg.LambdaGELUTrainer):
    """Gathers metrics in nested containers and counters, as trainers of other libraries do, and logs them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: dict[str, defaultdict[str, list[float]]] = {"eval": defaultdict(list)}
        self.batches = 0
        self.sums = {"eval": torch.zeros(())}
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss, output = super().compute_loss(model, inputs, return_outputs=True)
        self.seen["eval"]["size"].append(float(output.logits.detach().abs().mean()))
        self.batches += 1
        self.sums["eval"] += output.logits.detach().abs().sum()  # in place, as sentence-transformers' trainers do
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if values := self.seen["eval"].pop("size", None):
            logs |= {
                "eval_size": sum(values) / len(values),
                "eval_batches": float(self.batches),
                "eval_sum": float(self.sums["eval"]),
            }
        super().log(logs, start_time)


class Labelled(Pairs):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": super().__getitem__(index)["query"], "labels": index % 2}


def test_a_second_evaluation_leaves_no_trace(tmp_path: Path) -> None:
    """What is gathered in the evaluation as GELU is logged alone, beside the metrics as ReLU."""
    logged = []
    for relu in (False, True):
        arguments = hlg.LambdaGELUTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", eval_relu=relu)
        run = Gathers(converted("bert-classifier"), arguments, train_dataset=Labelled(), eval_dataset=Labelled())
        metrics = run.evaluate()
        assert ("eval_relu_loss" in metrics) == relu
        logged.append(next(entry for entry in run.state.log_history if "eval_size" in entry))
    assert logged[0]["eval_size"] == logged[1]["eval_size"]
    assert logged[0]["eval_sum"] == logged[1]["eval_sum"] > 0.0
    assert logged[0]["eval_batches"] == logged[1]["eval_batches"] == 4.0


def test_a_refit_that_would_not_find_its_way_is_rehearsed(tmp_path: Path) -> None:
    """A network that puts out something else each time cannot be compared with itself: told before the first step."""
    run = trainer(Made, tmp_path)
    calls = [0]

    def drift(module: Any, inputs: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        return output + calls[0]

    run.model.classifier.register_forward_hook(drift)
    before = tiny.snapshot(run.model)["tensors"]
    with pytest.raises(hlg.CalibrationError, match=r"switch at 0\.75 .*puts out something else each time"):
        run.train()
    assert run.state.global_step == 0
    assert tiny.snapshot(run.model)["tensors"] == before


class EndsInAGate(nn.Module):
    """No linear map follows the last gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.second, self.gate = nn.Linear(4, 6), hlg.LambdaGELU(), nn.Linear(6, 2), hlg.LambdaGELU()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.gate(self.second(self.other(self.first(x))))
        return {"loss": out.square().mean(), "logits": out}


def test_gates_that_will_not_be_refit_are_named_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(switch.logger, "warning", lambda text: said.append(text))
    rows = [{"x": torch.randn(4)} for _ in range(32)]
    values = {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    run = hlg.LambdaGELUTrainer(EndsInAGate(), hlg.LambdaGELUTrainingArguments(str(tmp_path), **values), train_dataset=rows)
    run.train()
    assert run.compensation is not None
    assert list(run.compensation.uncompensated) == ["gate"]
    assert [site.name for site in run.compensation.sites] == ["other"]
    (text,) = said
    assert "the switch will refit nothing for 1 of 2 gates, gate the first (" in text
