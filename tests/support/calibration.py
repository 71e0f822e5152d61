"""Calibration sets, good and bad, and what a model shows of being measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg
from support import tiny


def converted(name: str, hardness: float = 1.0, step: float = 0.0) -> PreTrainedModel:
    model = tiny.build(name)
    hlg.convert(model)
    tiny.set_hardness(model, hardness, step)
    return model


# --- padding


def padded(batch: dict[str, Tensor], name: str, mask: str, more: int, seed: int = 5) -> dict[str, Tensor]:
    """The batch with so many more tokens, drawn at random, at its end, and a mask that says so."""
    tokens = batch[name]
    size = (len(tokens), more)
    junk = torch.randint(3, 99, size, generator=torch.Generator().manual_seed(seed))
    known = batch.get(mask, torch.ones_like(tokens))
    return {**batch, name: torch.cat([tokens, junk], 1), mask: torch.cat([known, known.new_zeros(size)], 1)}


# --- bad input, and what is left behind


def labelled(seed: int = 0, size: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, 99, (size, 11), generator=generator),
        "labels": torch.randint(0, 2, (size,), generator=generator),
        "attention_mask": torch.ones(size, 11, dtype=torch.long),
    }


def with_int32(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "input_ids": batch["input_ids"].int()}


# name → (batches, what the message says)
BAD_LOADERS: dict[str, tuple[Callable[[], Iterable[Any]], str]] = {
    "empty": (lambda: [], "yielded no batch"),
    "consumed": (lambda: iter(()), "yielded no batch"),
    "a list": (lambda: [labelled(), [1, 2]], "batch 1 is a list: expected a mapping"),
    "no usable tensor": (lambda: [labelled(), {"text": "good"}], "batch 1 holds 'text': no tensor in it"),
    "other dtype": (lambda: [labelled(), with_int32(labelled())], "batch 1: input_ids is torch.int32"),
    "only padding": (
        lambda: [{**labelled(), "attention_mask": torch.zeros(2, 11, dtype=torch.long)}],
        "only padding",
    ),
    "token out of range": (
        lambda: [labelled(), {**labelled(), "input_ids": torch.full((2, 11), 99)}],
        "batch 1: .*forward raised IndexError",
    ),
}


def watched(measure: Callable[[PreTrainedModel, Iterable[Any]], Any], model: PreTrainedModel, loader: Iterable[Any]) -> Any:
    """`measure`, with a model in mixed modes that must come out as it went in, whatever happens."""
    model.train()
    model.get_submodule("bert.encoder.layer.1").eval()
    before, outputs = tiny.snapshot(model), tiny.outputs(model.eval(), tiny.inputs(model))
    model.train()
    model.get_submodule("bert.encoder.layer.1").eval()
    try:
        return measure(model, loader)
    finally:
        assert tiny.snapshot(model) == before
        hooks = [h for m in model.modules() for h in (m._forward_pre_hooks, m._forward_hooks) if h]
        assert not hooks
        assert not any(p.grad is not None for p in model.parameters())
        assert tiny.relative_difference(outputs, tiny.outputs(model.eval(), tiny.inputs(model))) == 0.0
