"""`call`: what a forward is given besides the batch, and what comes back as a mapping."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement.forward import call, evaluating

_SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 99}
BATCH = {"input_ids": torch.tensor([[3, 4, 5]])}


class Own(BertPreTrainedModel):
    """A user's model; what its forward takes is the subclass's choice."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.given: list[dict[str, Any]] = []
        self.post_init()


class Bare(Own):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.bert(input_ids, attention_mask)[0]


class PassesOn(Own):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        self.given.append(kwargs)
        return self._head(self.bert(input_ids)[0], **kwargs)

    def _head(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        return hidden * scale


class PassesOnToBert(Own):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self.bert(input_ids, **kwargs)


class Named(Own):
    def forward(self, input_ids: Tensor, return_dict: bool | None = None) -> Any:
        self.given.append({"return_dict": return_dict})
        return self.bert(input_ids, return_dict=return_dict)


class Decorated(Own):
    @can_return_tuple
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        self.given.append(kwargs)
        return self.bert(input_ids, return_dict=True)


def _wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


def _rebound(model: Any) -> None:
    model.forward = _wrapped(model.forward)


def _hooked(model: Any) -> None:
    dispatch_model(model, {n: "cpu" for n, _ in model.named_children()}, main_device="cpu", force_hooks=True)


def _prepared(model: Any) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the first run of a process
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("change", [None, _rebound, _hooked, _prepared], ids=["as it is", "wraps", "hooks", "accelerate"])
@pytest.mark.parametrize("cls", [Bare, PassesOn, PassesOnToBert, Named, Decorated], ids=lambda c: c.__name__)
@pytest.mark.parametrize("returns", [True, False], ids=["dict", "tuple"])
def test_own_models(cls: type[Own], change: Callable[[Any], None] | None, returns: bool) -> None:
    """None is given what it does not take; those that take it return a mapping with names, whatever the config says."""
    model = cls(BertConfig(**_SMALL, return_dict=returns)).eval()
    if change is not None:
        change(model)
    output = call(model, BATCH)
    if cls in (Named, Decorated) or (cls is PassesOnToBert and returns):
        assert "last_hidden_state" in output
    else:
        assert next(iter(output)) == "0"
    if cls is Named:
        assert model.given == [{"return_dict": True}]
    if cls in (PassesOn, Decorated):
        assert model.given == [{}]


@pytest.mark.parametrize("cls", [Bare, PassesOn], ids=lambda c: c.__name__)
def test_verbs(cls: type[Own]) -> None:
    """Every verb that runs a model runs one whose forward lacks the argument."""
    model = cls(BertConfig(**_SMALL)).eval()
    hlg.convert(model)
    data = [{"input_ids": torch.randint(3, 99, (4, 7), generator=torch.Generator().manual_seed(i))} for i in range(4)]
    assert hlg.calibrate(model, data).sites[0].count == 4 * 4 * 7 * 12
    assert len(hlg.sensitivity(model, data).sites) == 1
    report = hlg.relu_ize(model, calibration=data, compensate="least_squares")
    assert report.compensation is not None
    assert report.compensation.uncompensated == {}


def test_stock_models() -> None:
    """A stock model whose config asks for tuples returns names all the same, as before."""
    model = BertForSequenceClassification(BertConfig(**_SMALL, return_dict=False)).eval()
    assert list(call(model, {**BATCH, "labels": torch.tensor([1])})) == ["loss", "logits"]


def test_plain_module() -> None:
    assert list(call(nn.Linear(4, 4), {"input": torch.ones(1, 4)})) == ["0"]


def test_texts_that_a_model_keeps_are_forgotten() -> None:
    """OmDet-Turbo keeps what it made of a text, whatever becomes of its activations: not across what is measured."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model[0].kept = SimpleNamespace(cache=OrderedDict({"text": 1}))
    with evaluating(model):
        assert not model[0].kept.cache
        model[0].kept.cache["text"] = 2
    assert not model[0].kept.cache
