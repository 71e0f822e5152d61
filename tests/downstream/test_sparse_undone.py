"""`sparsify_ffn` undone, stopped half-way or refused: the network is what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny
from support.models import converted, relu_model
from support.sparse_calls import Calls, sequential
from torch import nn

import hf_lambda_gelu as hlg
from hf_lambda_gelu.downstream import sparse_ffn, sparse_products


def test_undo(calls: Calls) -> None:
    """Classes, attributes and the order in memory are as before; a second time does nothing."""
    for name in ("llama", "gpt2"):
        model = relu_model(name)
        before = tiny.snapshot(model)
        layouts = {n: p.stride() for n, p in model.named_parameters()}
        attributes = [(type(m), set(vars(m))) for m in model.modules()]
        report = hlg.sparsify_ffn(model)
        assert [(type(m), set(vars(m))) for m in model.modules()] != attributes
        report.undo()
        report.undo()
        assert [(type(m), set(vars(m))) for m in model.modules()] == attributes
        assert tiny.snapshot(model) == before
        assert {n: p.stride() for n, p in model.named_parameters()} == layouts


def test_with_block(calls: Calls) -> None:
    model = sequential()
    with hlg.sparsify_ffn(model, torch.randn(2, 6)):
        assert type(model[2]) is not nn.Linear
    assert type(model[2]) is nn.Linear

    def fails() -> None:
        with hlg.sparsify_ffn(model, torch.randn(2, 6)):
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert model[2].weight.is_contiguous()


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["crossover", "SparseMap"])
def test_a_stop_changes_nothing(when: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it measures, with weights laid anew; and when the first modules have another class."""
    model = relu_model("llama")
    before = tiny.snapshot(model)
    modules = [(type(m), set(vars(m))) for m in model.modules()]
    monkeypatch.setattr(sparse_ffn, when, interrupted)
    with pytest.raises(KeyboardInterrupt):
        hlg.sparsify_ffn(model)
    assert tiny.snapshot(model) == before
    assert [(type(m), set(vars(m))) for m in model.modules()] == modules
    assert all(p.is_contiguous() for p in model.parameters())


def sparse_already() -> nn.Module:
    model = relu_model("llama")
    hlg.sparsify_ffn(model)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: converted("llama"), "call hf_lambda_gelu.relu_ize"),
        (lambda: tiny.build("llama"), "is smooth"),
        (lambda: relu_model("llama").to("meta"), "meta device"),
        (sequential, "no inputs can be guessed for Sequential: pass inputs="),
        (sparse_already, r"sparse already: call undo\(\)"),
    ],
)
def test_refused(model: Callable[[], nn.Module], message: str, calls: Calls) -> None:
    built = model()
    with pytest.raises(ValueError, match=message):
        hlg.sparsify_ffn(built)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = relu_model("llama")
    before = tiny.snapshot(model)
    monkeypatch.setattr(sparse_products._LIBRARY, "_loaded", "the C++ kernel could not be built: no C++ compiler found")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler found"):
        hlg.sparsify_ffn(model)
    assert tiny.snapshot(model) == before
