"""Calibration sets, good and bad, what a model shows of being measured, and one whose sites see what comes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

import hf_lambda_gelu as hlg
from support import tiny

Batches = list[dict[str, Tensor]]


def padded(batch: dict[str, Tensor], name: str, mask: str, more: int, seed: int = 5) -> dict[str, Tensor]:
    """The batch with so many more tokens, drawn at random, at its end, and a mask that says so."""
    tokens = batch[name]
    size = (len(tokens), more)
    junk = torch.randint(3, 99, size, generator=torch.Generator().manual_seed(seed))
    known = batch.get(mask, torch.ones_like(tokens))
    return {**batch, name: torch.cat([tokens, junk], 1), mask: torch.cat([known, known.new_zeros(size)], 1)}


def labelled(seed: int = 0, size: int = 2) -> dict[str, Tensor]:
    """A batch for the tiny classifier, with labels and a mask."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, 99, (size, 11), generator=generator),
        "labels": torch.randint(0, 2, (size,), generator=generator),
        "attention_mask": torch.ones(size, 11, dtype=torch.long),
    }


def with_int32(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with token ids of another dtype."""
    return {**batch, "input_ids": batch["input_ids"].int()}


# name → (batches, what the message says)
BAD_LOADERS: dict[str, tuple[Callable[[], Iterable[Any]], str]] = {
    "empty": (lambda: [], "yielded no batch"),
    "consumed": (lambda: iter(()), "yielded no batch"),
    "a batch": (labelled, "is one dict: expected several, pass a list of such batches"),
    "a name": (lambda: "reviews.txt", "is a str: expected batches"),
    "no tensors": (lambda: [{"input_ids": [[5, 6]]}], r"batch 0 has input_ids as a list: .*return_tensors='pt'"),
    "an empty batch": (lambda: [labelled(), labelled(size=0)], "batch 1 is empty: input_ids 0 × 11"),
    "a row": (lambda: [{"input_ids": torch.arange(3, 14)}], r"batch 0: .*It was given input_ids 11$"),
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


def calibration_set(model: PreTrainedModel, count: int = 8, first: int = 0, padded: bool = False) -> Batches:
    """Batches of two examples, every third of one; text with a padding of its own."""
    batches = []
    for seed in range(first, first + count):
        batch = tiny.inputs(model, seed)
        if padded:
            mask = torch.ones_like(batch["input_ids"])
            mask[seed % 2, 11 - seed % 7 :] = 0
            batch["attention_mask"] = mask
        batches.append({k: v[: 1 if seed % 3 == 1 else 2] for k, v in batch.items()})
    return batches


@torch.no_grad()
def captured(model: PreTrainedModel, sites: Iterable[str], batches: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """{site: every element that went into it}, in float64."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in sites}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].double().numpy().ravel())
        )
        for name in seen
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(arrays) for name, arrays in seen.items()}


class Probe(PreTrainedModel):
    """What comes in goes to its sites; a third one is never called."""

    config_class = PreTrainedConfig
    main_input_name = "inputs_embeds"

    def __init__(self, base: str = "gelu") -> None:
        super().__init__(PreTrainedConfig())
        self.first, self.second, self.idle = (hlg.LambdaGELU(base=base) for _ in range(3))
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        self.modes.append((self.training or self.first.training, torch.is_grad_enabled()))
        return {"logits": self.first(inputs_embeds) + self.second(-inputs_embeds)}


def assert_same(first: hlg.CalibrationReport, second: hlg.CalibrationReport, names: str = "") -> None:
    """The same statistics, site by site."""
    for one, other in zip(first.sites, second.sites, strict=True):
        assert one.count == other.count, one.name
        assert (one.mean, one.std, one.negative) == pytest.approx(
            (other.mean, other.std, other.negative), rel=1e-4, abs=1e-5
        )
        assert one.relative_error(3.0) == pytest.approx(other.relative_error(3.0), rel=1e-3)
