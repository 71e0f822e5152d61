"""The first step shows whether λ is in what runs, before anything has been learned."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.training import Rows, arguments, converted
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg


def fused(self: Any, hidden_states: Tensor) -> Tensor:
    return F.gelu(self.dense(hidden_states))


def opaque(self: Any, hidden_states: Tensor) -> Tensor:
    hidden_states = self.dense(hidden_states)
    return self.intermediate_act_fn(hidden_states) if hidden_states.dim() > 9 else F.gelu(hidden_states)


def replaced(forward: Any) -> PreTrainedModel:
    model = converted()
    block = model.bert.encoder.layer[1].intermediate
    block.forward = types.MethodType(forward, block)
    return model


@pytest.mark.parametrize("forward", [fused, opaque])
def test_refused_before_anything_is_learned(forward: Any, tmp_path: Path) -> None:
    """By the code where it can be told, else by the run."""
    model = replaced(forward)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = hlg.LambdaGELUTrainer(model, arguments(tmp_path), train_dataset=Rows())
    with pytest.raises(ValueError, match=r"layer\.1\.intermediate\.intermediate_act_fn is not what runs.*λ would not"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class TwoHeads(nn.Module):
    """A second branch that only runs on long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = tiny.build("bert-classifier")
        self.branch = nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 2))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.bert(input_ids=input_ids).logits
        if input_ids.shape[1] > 100:
            logits = logits + self.branch(logits)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_what_a_batch_does_not_reach_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = TwoHeads()
    hlg.convert(model)
    changes = {"max_steps": 2, "hardness_compensate": "none", "save_strategy": "no", "eval_strategy": "no"}
    trainer = hlg.LambdaGELUTrainer(model, arguments(tmp_path, **changes), train_dataset=Rows())
    trainer.train()
    assert trainer.state.global_step == 2
    told = [record.message for record in caplog.records if "did not run on the first batch" in record.message]
    assert told == [
        "1 of 3 λ-GELU did not run on the first batch, branch.1: their λ is learned from batches that reach them, if there "
        "are any"
    ]


def test_a_sound_run_is_run_once_a_step(tmp_path: Path) -> None:
    """No forward more than the steps have, and nothing said."""
    model, calls = converted(), []
    model.bert.register_forward_hook(lambda *_: calls.append(1))
    changes = {"max_steps": 3, "hardness_compensate": "none", "eval_strategy": "no"}
    hlg.LambdaGELUTrainer(model, arguments(tmp_path, **changes), train_dataset=Rows()).train()
    assert len(calls) == 3
