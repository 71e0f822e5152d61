"""What a training in bf16 leaves on a model, accelerate's autocast around its forward, is in no measurement after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support import tiny
from support.calibration import calibration_set
from support.models import converted
from support.training import converted as classifier
from support.training import trainer_of
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement.forward import evaluating


@pytest.fixture(autouse=True)
def precision_of_its_own() -> Iterator[None]:
    """accelerate keeps the precision of the first run of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def relu(model: PreTrainedModel, compensate: Any) -> tuple[Any, ...]:
    report = hlg.relu_ize(model, calibration=calibration_set(model), compensate=compensate)
    return report.relative_change, report.zeros, {name: tensor.tolist() for name, tensor in model.state_dict().items()}


# verb → what it finds, or makes; in bf16 hard gates look 100 times softer, and the ranks of sites are noise
VERBS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "calibrate": lambda model: [site.std for site in hlg.calibrate(model, calibration_set(model)).sites],
    "sensitivity": lambda model: hlg.sensitivity(model, calibration_set(model)).to_dict(),
    "relu_ize": lambda model: relu(model, None),
    "relu_ize, refit": lambda model: relu(model, "least_squares"),
    "fold": lambda model: hlg.fold(model, tiny.inputs(model)).difference,
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
def test_verbs_find_what_they_found_before(verb: Callable[[PreTrainedModel], Any]) -> None:
    """A twin on which nothing was left; the model goes on with what was left on it."""
    plain, left = (converted("bert-classifier", 200.0) for _ in range(2))
    Accelerator(mixed_precision="bf16", cpu=True).prepare(left)
    wrapped = left.forward
    assert verb(left) == verb(plain)
    assert left.forward == wrapped


def test_as_llama() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99}
    model = Qwen2ForCausalLM(Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **sizes))
    Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    assert type(hlg.as_llama(model)).__name__ == "LlamaForCausalLM"


def test_attention_that_takes_half_precision_alone() -> None:
    """A model with flash attention and weights in fp32 runs in autocast or not at all: it keeps what it has."""
    model = classifier()
    Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    wrapped = model.forward
    with evaluating(model):
        assert model.forward != wrapped
    model.config._attn_implementation = "flash_attention_2"
    with evaluating(model):
        assert model.forward == wrapped


def test_the_switch_computes_as_its_run(tmp_path: Path) -> None:
    """In the course of a training it is part of it: attention that knows half precision alone goes on running."""
    model, seen = classifier(), set()

    def watch(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.add((module.training, torch.is_autocast_enabled("cpu")))

    model.bert.register_forward_pre_hook(watch)
    trainer_of(model, tmp_path, bf16=True, max_steps=4, hardness_compensate="least_squares").train()
    assert seen == {(True, True), (False, True)}
